"""Problems, answers, rewards and the evaluation set."""

import itertools
import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from assets.build_arithmetic_eval import text as eval_file_text
from common.language.stats import pass_at_k
from common.stats import wilson
from grpo_arithmetic import (
    EVAL_BANDS,
    OPERATION_NAMES,
    REWARDS,
    Args,
    Level,
    Problem,
    draw_bands,
    draw_batch,
    draw_unique,
    eval_metrics,
    extract_answer,
    is_correct,
    learning_rate_at,
    load_problems,
    make_problem,
)

EVAL = ROOT / "assets" / "arithmetic_eval.jsonl"

EXTRACTED = {
    # the integer at the start, whatever follows it
    "8": "8", " 8": "8", "8\n": "8", "8.": "8", "8 apples": "8", "8<": "8", "8abc": "8", "8 = 3 + 5": "8", "-8": "-8",
    "\t\n -8 ": "-8", "56 or 57": "56", "5.0": "5", "1,234": "1", "3 + 5 = 8": "3", "8-9": "8", "8 8": "8", "0": "0",
    # not the same text as the answer, though a human might accept it
    "007": "007", "-0": "-0", "+5": "+5", "- 5": "-", "--5": "--5", "five": "five", "٣": "٣", "８": "８", "½": "½",
    # the answer does not come first, so it is not the answer
    "the answer is 8": "the", "= 8": "=", "Calculate: 3 + 5 = 8": "Calculate:", "x8": "x8", "$8": "$8", "(8)": "(8)",
    "": "", "   ": "", "\n": "", "-": "-", ".5": ".5", "?": "?",
}  # fmt: skip


@pytest.mark.parametrize("completion", EXTRACTED)
def test_answer_extraction_follows_its_rule_on_adversarial_texts(completion):
    assert extract_answer(completion) == EXTRACTED[completion]


@given(st.text())
def test_no_text_breaks_extraction_or_a_reward(completion):
    answer = extract_answer(completion)
    assert answer == "" or answer in completion
    for reward in REWARDS.values():
        assert -1.0 <= reward(completion, make_problem(3, "+", 5)) <= 1.0


def test_endless_digits_break_nothing():
    assert all(-1 <= reward("9" * 10_000, make_problem(3, "+", 5)) <= 1 for reward in REWARDS.values())


def test_the_reward_reads_the_completion_and_never_the_prompt():
    """The research code cut len(prompt) characters off the completion and so rewarded repeating the prompt."""
    problem = make_problem(3, "+", 5)
    assert REWARDS["binary"]("8", problem) == 1.0
    assert REWARDS["binary"]("Calculate: 3 + 5 = 8", problem) == -1.0
    assert REWARDS["binary"](problem.prompt + "8", problem) == -1.0


def test_a_number_cut_short_counts_as_the_number_that_is_there():
    assert REWARDS["binary"]("1", make_problem(3, "*", 4)) == -1.0  # "12" truncated
    assert REWARDS["rich"]("1", make_problem(3, "*", 4)) == -0.5
    assert REWARDS["binary"]("1", make_problem(1, "*", 1)) == 1.0


@pytest.mark.parametrize(
    "name, expected",
    [
        # right answer 12 = 3 * 4; completions 12, 13, 10, 9, 17, 7 (= 3 + 4), -1 (= 3 - 4), 30, and no integer
        ("binary", [1, -1, -1, -1, -1, -1, -1, -1, -1]),
        ("partial_credit", [1, 0.5, 0.25, 0.25, 0.25, 0.25, -0.5, -1, -1]),
        ("rich", [1, 0.7, 0.4, 0.1, 0.1, 0.1, -0.5, -0.5, -1]),
        ("rich_exponential", [1, 0.8, 0.5, 0.7**3, 0.7**5, 0.7**5, 0.7**13, 0.7**18, -1]),
        ("length", [0] * 9),
    ],
)
def test_rewards_have_their_specified_values(name, expected):
    completions = ["12", "13", "10", "9", "17", "7", "-1", "30", "twelve"]
    assert [REWARDS[name](c, make_problem(3, "*", 4)) for c in completions] == pytest.approx(expected)


def test_length_reward_falls_as_a_square_between_20_and_100_characters():
    rewards = [REWARDS["length"]("x" * n, make_problem(1, "+", 1)) for n in (20, 60, 100, 500)]
    assert rewards == pytest.approx([0.0, -0.5 * 0.25, -0.5, -0.5])


def test_problems_are_right_and_unique_and_a_function_of_the_seed():
    level = Level(0, 20, "+-*/")
    problems = draw_unique(np.random.default_rng(3), level, 500)
    assert len({p.prompt for p in problems}) == 500
    for p in problems:
        expression = p.prompt.removeprefix("Calculate: ").removesuffix(" = ")
        assert eval(expression) == int(p.answer)  # also proves that divisions are exact
    assert problems == draw_unique(np.random.default_rng(3), level, 500)
    assert problems != draw_unique(np.random.default_rng(4), level, 500)


@pytest.mark.parametrize(
    "level", [Level(0, 10), Level(0, 20), Level(0, 5, "+"), Level(-3, 4, "+-*/"), Level(0, 9, "/")]
)
def test_every_different_problem_is_found_and_no_other(level):
    numbers = range(level.low, level.high + 1)
    prompts = {
        make_problem(a, op, b).prompt
        for a, op, b in itertools.product(numbers, level.operations, numbers)
        if not (op == "/" and b == 0)
    }
    found = [p.prompt for p in draw_unique(np.random.default_rng(0), level, len(prompts) + 100)]
    assert set(found) == prompts and len(found) == len(prompts)
    assert {p.prompt for p in draw_unique(np.random.default_rng(0), level, len(prompts))} == prompts


def test_known_problem_counts():
    counts = {level: len(draw_unique(np.random.default_rng(1), level, 2000)) for level in (Level(0, 10), Level(0, 20))}
    assert list(counts.values()) == [363, 1323]


def test_the_committed_evaluation_set_is_the_one_its_builder_draws():
    assert EVAL.read_text() == eval_file_text()
    problems = load_problems(str(EVAL))
    drawn = draw_bands(np.random.default_rng(2025))
    assert [(p.prompt, p.answer) for p in problems] == [(p.prompt, p.answer) for p in drawn]
    for band, (n, level) in EVAL_BANDS.items():
        members = [p for p in drawn if p.difficulty == band]
        assert len(members) == n
        # a division's first operand is rounded down to a multiple of the second, possibly to 0
        assert all(level.low <= x <= level.high for p in members for x in p.operands if p.operation != "/")
        assert {p.operation for p in members} <= set(level.operations)


def test_the_origins_evaluation_file_loads_and_is_consistent():
    path = ROOT.parent / "shared" / "data" / "arithmetic_eval.jsonl"
    if not path.exists():
        pytest.skip("the origin's evaluation file is not part of the repository")
    problems = load_problems(str(path))
    assert len(problems) == 200
    for p in problems:
        expression = p.prompt.removeprefix("Calculate: ").removesuffix(" = ")
        assert int(eval(expression)) == int(p.answer) and p.operation in expression


def test_every_epoch_visits_each_problem_at_most_once_in_a_new_order():
    pool = draw_unique(np.random.default_rng(0), Level(0, 20), 100)
    epochs = [[p for step in range(6 * e, 6 * e + 6) for p in draw_batch(pool, step, 16, 42)] for e in range(3)]
    assert all(len({p.prompt for p in epoch}) == 96 for epoch in epochs)
    assert epochs[0] != epochs[1] and {p.prompt for e in epochs for p in e} > {p.prompt for p in epochs[0]}
    assert draw_batch(pool, 7, 16, 42) == draw_batch(pool, 7, 16, 42) != draw_batch(pool, 7, 16, 43)


def test_the_learning_rate_rises_then_falls_to_zero_in_a_line():
    args = Args(learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate_at(step, 100, args) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90, rel=1e-3)
    args.warmup_ratio = 0.0
    assert learning_rate_at(0, 100, args) == 1.0


def test_wilson_interval_has_its_textbook_values():
    assert wilson(84, 200) == pytest.approx((0.35375, 0.48920), abs=1e-4)
    assert wilson(0, 40) == pytest.approx((0.0, 0.08762), abs=1e-4)
    assert wilson(40, 40) == pytest.approx((0.91238, 1.0), abs=1e-4)


def test_pass_at_k_equals_the_average_over_all_subsets():
    samples = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_evaluation_metrics_split_by_band_operation_and_overlap():
    problems = load_problems(str(EVAL))
    right = np.array([[p.difficulty == "easy", True] for p in problems], dtype=float)
    trained = {p.prompt for p in problems if p.difficulty != "easy"}
    metrics = eval_metrics(problems, right, right[:, :1], trained, EVAL_BANDS, OPERATION_NAMES)
    assert metrics["arithmetic_eval"] == pytest.approx((200 + 40) / 400)
    assert metrics["arithmetic_eval_correct"] == 240 and metrics["arithmetic_eval_total"] == 400
    assert metrics["arithmetic_eval_greedy"] == pytest.approx(0.2)
    assert metrics["eval_easy_accuracy"] == 1.0 and metrics["eval_hard_accuracy"] == 0.5
    assert metrics["arithmetic_eval_unseen"] == 1.0
    assert metrics["arithmetic_eval_unseen_n"] == 40 - sum(
        p.prompt in trained for p in problems if p.difficulty == "easy"
    )
    for name, value in metrics.items():
        if name + "_low" in metrics:
            assert metrics[name + "_low"] <= value <= metrics[name + "_high"]


@pytest.mark.parametrize("completion", ["5", "5.7", "5.", "5,000", "5 * 3 = 15", "5/2", "5th", "5 or 6", "5\n7"])
def test_what_follows_the_integer_is_not_looked_at(completion):
    """Decided, and said in docs/grpo_arithmetic.md, section 4: an answer is what a completion starts with."""
    page = (ROOT / "docs" / "grpo_arithmetic.md").read_text()
    assert extract_answer(completion) == "5" and "`5.7`" in page and "`5 * 3 = 15`" in page
    assert is_correct(completion, make_problem(10, "/", 2)) and not is_correct(completion, make_problem(5, "*", 3))


def test_the_empty_text_is_never_correct_whatever_the_gold():
    for gold in ("", " ", "0"):
        problem = Problem("Calculate: ", gold)
        assert not is_correct("", problem) and not is_correct(" \n", problem)
        assert all(
            REWARDS[name]("", problem) == -1.0 for name in ("binary", "partial_credit", "rich", "rich_exponential")
        )


ROW = {"prompt": "Calculate: 7 * 8 = ", "answer": "56"}
WRONG_ROWS = [  # the row as it stands in the file, what the line must say
    *(
        (json.dumps(ROW | {"answer": gold}), f"answer {gold!r}")
        for gold in ("1,000", 3.5, 56.0, None, [56], {"n": 56}, True)
    ),
    *(
        (json.dumps(ROW | {"answer": gold}), f"answer {gold!r}")
        for gold in ("", " ", " 56", "56 ", "56.0", "056", "-0", "+5")
    ),
    *(
        (json.dumps(ROW | {"answer": gold}), f"answer {gold!r}")
        for gold in ("five", "five six", "$5", "5%", "1_000", "٣", "5\n")
    ),
    ('{"prompt": "p", "answer": NaN}', "NaN is no JSON"),
    ('{"prompt": "p", "answer": Infinity}', "Infinity is no JSON"),
    ('{"prompt": "p", "answer": "1", "answer": "2"}', "prompt, answer comes twice"),
    ('{"prompt": "p", "prompt": "q", "answer": "2"}', "prompt, answer comes twice"),
    *(
        (json.dumps(ROW | {"prompt": prompt}), f"prompt {prompt!r}")
        for prompt in (None, 5, ["p"], "", " \n", "a\0b", "\ud800")
    ),
    ('{"answer": "2"}', "prompt: is missing"),
    ('{"prompt": "p"}', "answer: is missing"),
    (json.dumps(ROW | {"metadata": "add"}), "metadata 'add'"),
    (json.dumps(ROW | {"metadata": {"operation": 1}}), "metadata.operation 1"),
    (json.dumps(ROW | {"difficulty": 3}), "difficulty 3"),
    ("[1, 2]", "one JSON object a line"),
    ("null", "one JSON object a line"),
    ('"text"', "one JSON object a line"),
    ('{"prompt": "p", "answer', "cannot be read as JSONL"),
    ("[" * 100_000, "cannot be read as JSONL"),
    ('{"prompt": "p", "answer": 1' + "0" * 5000 + "}", "cannot be read as JSONL"),
]


@pytest.mark.parametrize("row, words", WRONG_ROWS, ids=[row[:60] for row, _ in WRONG_ROWS])
def test_a_wrong_row_of_an_evaluation_file_is_refused_in_one_line_that_names_it(tmp_path, capsys, row, words):
    path = tmp_path / "eval.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{row}\n{json.dumps(ROW)}\n")
    with pytest.raises(SystemExit) as stop:
        load_problems(str(path))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and f"--eval-dataset '{path}', row 3" in err and words in err and err.count("\n") == 1


def test_right_rows_of_an_evaluation_file_are_read(tmp_path):
    path = tmp_path / "eval.jsonl"
    rows = [ROW, ROW | {"answer": 56}, ROW | {"answer": -7, "metadata": None, "difficulty": None, "more": [1.5]}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode())  # as some editors save it
    assert [p.answer for p in load_problems(str(path))] == ["56", "56", "-7"]


def test_is_correct_is_exact_text_equality_after_extraction():
    problem = make_problem(3, "-", 10)
    assert is_correct("-7", problem) and is_correct(" -7.", problem)
    assert not is_correct("7", problem) and not is_correct("-70", problem) and not is_correct("-07", problem)


def test_eval_file_rows_have_the_documented_fields():
    row = json.loads(EVAL.read_text().splitlines()[0])
    assert list(row) == ["index", "prompt", "answer", "difficulty", "metadata"]


def test_evaluation_problems_are_kept_out_of_training():
    excluded = {p.prompt for p in load_problems(str(EVAL))}
    everything = {p.prompt for p in draw_unique(np.random.default_rng(0), Level(0, 10), 363)}
    drawn = {p.prompt for p in draw_unique(np.random.default_rng(0), Level(0, 10), 363, excluded)}
    assert 250 < len(drawn) < 363 and not drawn & excluded and drawn == everything - excluded
