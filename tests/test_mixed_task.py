"""The tasks of grpo_mixed.py: parsers, problems, the split, shares, and what a step draws."""

import re
import subprocess
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_mixed
from grpo_mixed import (
    CURRICULA,
    REWARDS,
    TASKS,
    WORDS,
    Args,
    Level,
    Problem,
    binary_numeral,
    distance,
    draw_from,
    draw_held_out,
    draw_mixture,
    draw_more,
    extract_answer,
    final_number,
    is_correct,
    levels_of,
    load_problems,
    load_word_problems,
    next_level,
    parse_answer,
    split_of,
    with_shares,
    yes_or_no,
)

EVAL = {p.prompt for p in load_problems(str(ROOT / "assets" / "arithmetic_eval.jsonl"))}
LEVEL = Level(0, 20)

# ---- parsers: text -> what is read; "" (or another wrong text) where a human might be generous ------------------------

# arithmetic, words, letters: the integer that the completion starts with
NUMBERS = {
    "8": "8", " 8": "8", "8 ": "8", "\n8": "8", "\t8\n": "8", "8.": "8", "8!": "8", "8,": "8", "8 words": "8",
    "8 letters.": "8", "8\n8": "8", "8 or 9": "8", "8 9": "8", "8-9": "8", "8/2": "8", "8=8": "8", "8<|im_end|>": "8",
    "8th": "8", "8words": "8", "8.0": "8", "8,000": "8", "8 + 0": "8", "8) because": "8", "8\u00a0": "8", "-8": "-8",
    "88": "88", "80": "80", "18": "18", "0": "0", "8" * 30: "8" * 30, "8٣": "8", "8½": "8", "8²": "8", "8\x00": "8",
    # not the same text as the right number
    "08": "08", "008": "008", "+8": "+8", "- 8": "-", "--8": "--8", "−8": "−8", "８": "８", "Ⅷ": "Ⅷ", "⑧": "⑧",
    "eight": "eight", "Eight": "Eight", ".8": ".8", "#8": "#8", "$8": "$8", "(8)": "(8)", "[8]": "[8]", '"8"': '"8"',
    "*8*": "*8*", "**8**": "**8**", "~8": "~8", "=8": "=8", "≈ 8": "≈", "x8": "x8", "_8": "_8", "•8": "•8",
    # it stands inside a sentence
    "There are 8 words": "There", "the answer is 8": "the", "Answer: 8": "Answer:", "I count 8": "I", "it is 8": "it",
    "let me think. 8": "let", "words: 8": "words:", "apple apple": "apple", "yes": "yes", "?": "?", "": "", "  ": "",
}  # fmt: skip

# comparison: yes or no as the first word, alone, and not both
YES_OR_NO = {
    "yes": "yes", "no": "no", "Yes": "yes", "NO": "no", "yEs": "yes", " yes": "yes", "\nno": "no", "\t no\n": "no",
    "yes.": "yes", "no!": "no", "yes,": "yes", "no;": "no", "yes?": "yes", "no)": "no", 'yes"': "yes", "no\u00a0": "no",
    "yes, 8 is greater": "yes", "no, it is less": "no", "yes 8 > 7": "yes", "no: equal": "no", "yes yes": "yes",
    "no no no": "no", "yes\nbecause": "yes", "yes, I know": "yes", "yes, nothing else": "yes", "no, not yesterday": "no",
    "no. Eyes open": "no", "yes*": "yes", "no 1": "no", "yes (really)": "yes", "no/": "no", "yes, piano": "yes",
    # both
    "yes and no": "", "yes or no": "", "no or yes": "", "yes/no": "", "no/yes": "", "no, yes": "", "yes. no.": "",
    "yes\nno": "", "no... YES": "", "Yes, No": "", "no, I mean yes": "", "yes; that is, no": "", "yes - no": "",
    # a longer word
    "know": "", "now": "", "not": "", "none": "", "nothing": "", "note": "", "nope": "", "yesterday": "", "yess": "",
    "eyes": "", "no-one": "", "no's": "", "no’s": "", "yes-man": "", "yes_": "", "no1": "", "yes2": "", "nö": "", "noé": "",
    "yesé": "", "n o": "", "y": "", "n": "", "ye s": "", "yeſ": "", "ｙｅｓ": "", "nо": "", "да": "", "true": "", "1": "",
    # it does not come first
    "I know": "", "maybe yes": "", "the answer is yes": "", "not yes": "", "Answer: no": "", "it is no": "", "8 > 7": "",
    '"yes"': "", "(no)": "", "*yes*": "", "**no**": "", "- yes": "", ".yes": "", "it depends": "", "": "",
    "   ": "", "?": "",
}  # fmt: skip

# binary: the numeral of 0 and 1 that the completion starts with, alone
BINARY = {
    "101": "101", " 101": "101", "101 ": "101", "\n101\n": "101", "101.": "101", "101,": "101", "101!": "101",
    "101 in binary": "101", "101 = 5": "101", "101=5": "101", "101)": "101", "101\n110": "101",
    "101 or 110": "101", "101, 110": "101", "101;": "101", "101?": "101", "101-": "101", "101/2": "101", "101+0": "101",
    "0": "0", "1": "1", "10": "10", "0101": "0101", "00": "00", "1" * 40: "1" * 40, "101 0": "101", "1 0 1": "1",
    "101<": "101", "101\x00": "101", "101. It": "101", "101\u00a0": "101", "101(2)": "101", "101:": "101", '101"': "101",
    # other digits, letters or a fraction follow
    "1012": "", "102": "", "1013.": "", "12": "", "1a": "", "101b": "", "101th": "", "101_2": "", "101₂": "", "101²": "",
    "0b101": "", "0B101": "", "0x5": "", "1e1": "", "101.0": "", "101.5": "", "101,000": "", "1,0": "",
    "10l": "", "1O1": "", "101٣": "", "1０1": "", "101é": "",
    # something comes first
    "5": "", "-101": "", "+101": "", "b101": "", "#101": "", "(101)": "", "'101'": "", "*101*": "", "=101": "", ".101": "",
    "the answer is 101": "", "it is 101": "", "Answer: 101": "", "binary 101": "", "five": "", "one": "",
    "l01": "", "١٠١": "", "１０１": "", "": "", "  ": "", "?": "", "yes": "",
}  # fmt: skip

# word problems: the number on the line after the last ####, in lowest terms
FINAL = {
    "#### 8": "8", "####8": "8", "so 8\n#### 8": "8", "#### 8.": "8", "#### 8\n": "8", "####\n8": "8",
    "#### -8": "-8", "#### 1,234": "1234", "#### 1,234,567": "1234567", "#### 8, done": "8", "#### 8!": "8", "####\t8": "8",
    "#### 7\n#### 8": "8", "#### no\n#### 8": "8", "##### 8": "8", "######## 8": "8", "text #### 8 #### 9": "9",
    "3 + 5 = 8 #### 8": "8", "#### 8)": "8", "#### 8;": "8", "#### 8:": "8", '#### 8"': "8", "#### 8\u00a0": "8",
    "#### 8\n9": "8", "#### 8\n\nQuestion: 9?": "8", "####  8 apples": "8", "#### 8 apples.": "8", "#### 8…": "8",
    # signs, zeros, decimals, fractions: as numbers
    "#### +8": "8", "#### −8": "-8", "#### 08": "8", "#### 0": "0", "#### -0": "0", "#### -0.0": "0", "#### 8.0": "8",
    "#### 8.50.": "17/2", "#### .8": "4/5", "#### -.5": "-1/2", "#### 8/2": "4", "#### 3/4": "3/4", "#### 0.75": "3/4",
    "#### -6/8 cups": "-3/4", "#### 0/3": "0", "#### 1,234.50": "2469/2", "#### 12,345,678.90": "123456789/10",
    # currency, percent (a unit), bold
    "#### $8": "8", "#### \\$8": "8", "#### $ 8": "8", "#### -$8": "-8", "#### $-8": "-8", "#### 8$": "8", "#### 8 €": "8",
    "#### £8.00": "8", "#### $8 per day": "8", "#### 8%": "8", "#### 8 %": "8", "#### 8 percent": "8",
    "#### **8**": "8", "#### **8.**": "8", "#### **8** apples": "8", "#### **$1,000.00**": "1000", "#### **8 apples**": "8",
    "#### 8 (eight)": "8", "#### 8 miles per hour": "8", "#### 8 km/h": "8", "#### 8 mile-long walks": "8",
    # more than a number and its unit on the line: never read in part
    "#### 8 9": "", "#### 8-9": "", "#### 8 + 1": "", "#### 8 = eight": "", "#### 8 ### 9": "", "#### 1, 2": "",
    "#### 8 or 9": "", "#### 8:30": "", "#### 8 apples, 3 pears": "", "#### 8 * x": "", "#### 8*3": "", "#### 8**2": "",
    "#### **8**2": "", "#### 8^2": "", "#### 8²": "", "#### 8½": "", "#### 8 ½": "", "#### 8 1/2": "",
    "#### 8 and a half": "",
    "#### 8 million": "", "#### 8 dozen eggs": "", "#### 8 k": "", "#### 2 thirds": "", "#### 8 八": "", "#### 8/0": "",
    "#### 3/4/5": "", "#### 1.5/2": "", "#### 1.234.567": "", "#### 8.5.3": "", "#### 2024-01-02": "", "#### 8</b>": "",
    # separators out of place
    "#### 1,23": "", "#### 12,34": "", "#### 1,2345": "", "#### 1234,567": "", "#### 0,123": "", "#### 0,5": "",
    "#### 1,234,56": "", "#### 1.234,5": "", "#### 1 234": "", "#### 1'234": "", "#### 1_234": "", "#### ,8": "",
    # a unit stands behind a blank
    "#### 1,234apples": "", "#### 8kg": "", "#### 8th": "", "#### 8a": "", "#### 8_": "", "#### 8e3": "", "#### 8x": "",
    # no number of its own
    "8": "", "### 8": "", "# # # # 8": "", "The answer is 8": "", "####": "", "#### ": "", "####\n": "", "#### eight": "",
    "#### eight 8": "", "#### - 8": "", "#### --8": "", "#### (8)": "", "#### *8*": "", "#### =8": "", "#### $": "",
    "#### ８": "", "#### 8٣": "", "#### the 8": "", "#### 8 ####": "", "#### 8 ####\n": "", "8 ####": "", "#### .": "",
    "#### x": "", "#### x = 8": "", "": "", "  ": "", "#### ½": "", "#### nan": "", "#### inf": "", "#### 1e400": "",
    "#### 7\n####": "", "＃＃＃＃ 8": "", "#### ~8": "", "Answer: 8 ###": "", "#### \\frac{3}{4}": "",
    "#### \\boxed{8}": "",
    "#### " + "8" * 101: "",
}  # fmt: skip

TABLES = {
    "arithmetic": NUMBERS,
    "words": NUMBERS,
    "letters": NUMBERS,
    "comparison": YES_OR_NO,
    "binary": BINARY,
    "word_problems": FINAL,
}


def test_every_task_has_at_least_sixty_adversarial_texts():
    assert set(TABLES) == set(TASKS) and min(map(len, TABLES.values())) >= 60


@pytest.mark.parametrize("task", TABLES)
def test_parsers_read_what_they_should_and_nothing_else(task):
    problem = Problem("", "", task=task)
    read = {text: parse_answer(text, problem) for text in TABLES[task]}
    assert read == TABLES[task]


@pytest.mark.parametrize(
    "task, answer", [("words", "8"), ("comparison", "no"), ("binary", "101"), ("word_problems", "8")]
)
def test_only_the_right_text_earns_the_reward(task, answer):
    problem = Problem("", answer, task=task)
    for text, read in TABLES[task].items():
        assert is_correct(text, problem) == (read == answer)
        assert REWARDS["binary"](text, problem) == (1.0 if read == answer else -1.0)


@given(st.text(), st.sampled_from(sorted(TASKS)))
def test_no_text_breaks_a_parser_or_a_reward(text, task):
    problem = Problem("", "no" if task == "comparison" else "10", task=task)
    answer = parse_answer(text, problem)
    assert isinstance(answer, str)
    assert all(-1.0 <= reward(text, problem) <= 1.0 for reward in REWARDS.values())


@given(st.text(alphabet="yesnoYESNO ,./'-8_", max_size=12))
def test_a_yes_is_a_first_word_without_a_no_and_the_other_way_round(text):
    words = text.strip().lower().replace(",", " ").replace(".", " ").replace("/", " ").split()
    read = yes_or_no(text)
    assert read in ("yes", "no", "")
    if read:
        assert words[0] == read and {"yes": "no", "no": "yes"}[read] not in words


@given(st.text(alphabet="012 .,ab-#\n", max_size=12))
def test_numerals_are_read_from_the_start_or_not_at_all(text):
    numeral = binary_numeral(text)
    assert set(numeral) <= set("01") and text.strip().startswith(numeral)


@given(st.text(alphabet="0123456789  ,./-+$%*ax\u00bd", max_size=10))
def test_no_number_is_read_in_part(text):
    """Whatever is read is made of all the digits that are there, in one piece."""
    if number := final_number(f"#### {text}"):
        whole = re.fullmatch(r"[^0-9.]*([0-9.,/]*[0-9])[^0-9½]*", text)
        assert abs(Fraction(number)) == Fraction(whole[1].replace(",", ""))


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_equal_numbers_are_equal_texts(n, places):
    value = Fraction(n, 10**places)
    decimal = f"{Decimal(n).scaleb(-places):f}"
    grouped = f"{Decimal(n).scaleb(-places):,f}"
    for text in (
        decimal,
        grouped,
        f"${grouped}",
        f"**{decimal}**",
        f"{grouped} euros.",
        f"{n}/{10**places}",
        f"{decimal}%",
    ):
        assert final_number(f"reasoning 1, 2\n#### {text}") == str(value), text


def test_the_empty_text_is_never_correct_whatever_the_gold():
    for task in TASKS:
        for gold in ("", " ", "x"):
            assert not is_correct("", Problem("", gold, task=task)) and not is_correct(
                " ", Problem("", gold, task=task)
            )
            assert REWARDS["binary"]("", Problem("", gold, task=task)) == -1.0


@given(st.integers(), st.text(alphabet="abc #\n", max_size=8))
def test_a_final_number_is_found_behind_any_reasoning(n, reasoning):
    assert final_number(f"{reasoning}\n#### {n}") == str(n) == final_number(f"{reasoning}\n#### {n:,}.")


def test_endless_texts_take_no_time():
    for text in ("1" * 100_000, "yes " * 30_000, "#" * 100_000, "#### 1," * 20_000, "no" * 50_000):
        for task in TASKS:
            parse_answer(text, Problem("", "1", task=task))


def test_distance_is_between_decimal_numbers_only():
    assert distance("9", Problem("", "7", task="words")) == 2
    assert distance("#### 9", Problem("", "7", task="word_problems")) == 2
    assert distance("110", Problem("", "101", task="binary")) is None
    assert distance("yes", Problem("", "no", task="comparison")) is None


# ---- problems ----------------------------------------------------------------------------------------------------------


def draws(task, n, level=LEVEL, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [draw_from(rng, task, level, split, EVAL) for _ in range(n)]


CHECKS = {  # prompt -> answer, by another route than the generator's
    "words": lambda p: str(len(p.removeprefix("Count the words: ").removesuffix(". Answer: ").split())),
    "letters": lambda p: str(len(p.removeprefix("Count the letters: ").removesuffix(". Answer: "))),
    "binary": lambda p: bin(int(p.removeprefix("Convert ").removesuffix(" to binary: ")))[2:],
    "arithmetic": lambda p: str(eval(p.removeprefix("Calculate: ").removesuffix(" = "))),
    "comparison": lambda p: (
        "yes"
        if eval(
            p.removeprefix("Is ").removesuffix("? Answer yes or no: ").replace("greater than", ">")
            .replace("less than", "<").replace("equal to", "==")
        )
        else "no"
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", CHECKS)
def test_answers_are_right_and_parse_to_themselves(task):
    for problem in draws(task, 300):
        assert problem.task == task and problem.answer == CHECKS[task](problem.prompt)
        assert is_correct(problem.answer, problem) and is_correct(f" {problem.answer}.\n", problem)
        assert not is_correct(problem.prompt + problem.answer, problem)  # the completion only, never the prompt


@pytest.mark.parametrize("level, split", [(LEVEL, "train"), (LEVEL, "eval"), (Level(-5, 5), "train")])
def test_comparisons_are_balanced_within_every_relation(level, split):
    kinds = Counter(p.operation for p in draws("comparison", 1500, level, split))
    assert sum(kinds.values()) == 1500 and len(kinds) == 6
    for relation, share in {"greater than": 0.4, "less than": 0.4, "equal to": 0.2}.items():
        yes, no = kinds[f"{relation}: yes"], kinds[f"{relation}: no"]
        assert (yes + no) / 1500 == pytest.approx(share, abs=0.04) and yes / (yes + no) == pytest.approx(0.5, abs=0.09)


def test_comparisons_ask_about_equal_numbers_too():
    pairs = [
        p.prompt.split() for p in draws("comparison", 1000) if p.operation in ("greater than: no", "less than: no")
    ]
    equal = sum(words[1] == words[4].rstrip("?") for words in pairs)
    assert 0.1 < equal / len(pairs) < 0.3


def test_excluding_problems_does_not_shift_the_operations():
    operations = Counter(p.operation for p in draws("arithmetic", 1500))
    assert all(operations[op] / 1500 == pytest.approx(1 / 3, abs=0.05) for op in "+-*")


def test_word_lists_have_no_duplicates_and_count_one_to_ten():
    assert len(set(WORDS)) == len(WORDS) and all(w.isalpha() for w in WORDS)
    assert {p.answer for p in draws("words", 500)} == {str(n) for n in range(1, 11)}


# ---- the split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"word_problems"}))
def test_train_validation_and_evaluation_share_no_prompt(task):
    args = Args(tasks=(task,), proportions=(1.0,), min_num=0, max_num=20, n_samples=150)
    held_out, validation = (draw_held_out(args, split, 100, EVAL) for split in ("eval", "validation"))
    level = levels_of(args)[0]
    train = [p for seed in range(5) for p in draw_mixture(np.random.default_rng(seed), level, 200, EVAL)]
    parts = [{p.prompt for p in part} for part in (train, validation, held_out)]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert not (parts[0] | parts[1] | parts[2]) & EVAL
    assert len(held_out) == len(parts[2]) <= 100  # all different: one observation each
    assert held_out == draw_held_out(args, "eval", 100, EVAL)  # the same in every run
    assert {p.task for p in train + held_out} == {task}


def test_the_split_depends_on_the_prompt_alone_and_has_its_proportions():
    parts = Counter(split_of(f"Calculate: {a} + {b} = ") for a in range(100) for b in range(100))
    assert [parts[s] / 1e4 for s in ("train", "eval", "validation")] == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.015)


def test_a_level_without_held_out_problems_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        for seed in range(20):
            draw_from(np.random.default_rng(seed), "comparison", Level(0, 1), "validation", set())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "comparison" in message and message.count("\n") == 1


# ---- shares ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(1, 200), st.integers(0, 9))
def test_a_mixture_holds_each_task_to_within_one_problem_of_its_share(weights, n, seed):
    tasks = ("words", "letters", "comparison", "binary", "arithmetic")[: len(weights)]
    shares = dict(zip(tasks, np.array(weights) / sum(weights)))
    found = Counter(p.task for p in draw_mixture(np.random.default_rng(seed), replace(LEVEL, shares=shares), n, set()))
    assert sum(found.values()) == n and all(abs(found[t] - n * s) < 1 + 1e-6 for t, s in shares.items())


def test_shares_are_exact_on_average_and_in_no_order():
    level = replace(LEVEL, shares={"words": 0.7, "binary": 0.3})
    batches = [draw_mixture(np.random.default_rng(i), level, 1, set()) for i in range(500)]
    assert np.mean([b[0].task == "words" for b in batches]) == pytest.approx(0.7, abs=0.06)
    first = [draw_mixture(np.random.default_rng(i), level, 10, set())[0].task for i in range(200)]
    assert 0.6 < np.mean([t == "words" for t in first]) < 0.8


def test_default_shares_are_those_of_the_research_code():
    args = Args(proportions=(2.0, 1.0, 1.0), min_num=0, max_num=20)
    (level,) = levels_of(args)
    assert level.shares == {"arithmetic": 0.5, "words": 0.25, "comparison": 0.25}
    found = Counter(p.task for p in draw_mixture(np.random.default_rng(1), level, 150, EVAL))
    assert found["arithmetic"] == 75 and {found["words"], found["comparison"]} <= {37, 38}


def test_balanced_and_adaptive_shares():
    args = Args(proportions=(2.0, 1.0, 1.0), sampling="balanced")
    assert with_shares(args, LEVEL, {}).shares == pytest.approx(dict.fromkeys(args.tasks, 1 / 3))
    args.sampling = "adaptive"
    assert with_shares(args, LEVEL, {}).shares["arithmetic"] == 0.5  # nothing known yet: the proportions
    shares = with_shares(args, LEVEL, {"arithmetic": 1.0, "words": 0.5, "comparison": 0.9}).shares
    weights = np.array([2 * 0.05, 0.25, 0.09])  # p (1 - p) times the proportion, solved tasks at the floor
    assert list(shares.values()) == pytest.approx(list(weights / weights.sum()))


def test_more_problems_come_from_different_places_of_the_pool_with_the_shares_of_the_level():
    pool = draw_mixture(np.random.default_rng(0), replace(LEVEL, shares={"words": 0.9, "binary": 0.1}), 200, EVAL)
    level = replace(LEVEL, shares={"words": 0.5, "binary": 0.5})
    found = Counter()
    for seed in range(100):
        chosen = draw_more(np.random.default_rng(seed), Args(), pool, level, 4, EVAL)
        assert len({id(p) for p in chosen}) == 4
        found.update(p.task for p in chosen)
    assert found["words"] / 400 == pytest.approx(0.5, abs=0.08)
    fresh = draw_more(np.random.default_rng(0), Args(fresh=True), pool, level, 8, EVAL)
    assert Counter(p.task for p in fresh) == {"words": 4, "binary": 4}


def test_curricula_switch_where_they_should():
    stages = [next_level("three_stage", 0, i / 100, []) for i in range(100)]
    assert [stages.index(n) for n in (0, 1, 2)] == [0, 20, 50]
    stages = [next_level("progressive", 0, i / 100, []) for i in range(100)]
    assert [stages.index(n) for n in range(4)] == [0, 25, 50, 75]
    assert [level.high for _, level in CURRICULA["progressive"]] == [5, 10, 15, 20]
    assert next_level("none", 0, 0.9, [1.0] * 10) == 0


def test_the_dynamic_curriculum_moves_by_the_mean_of_ten_rewards():
    assert next_level("dynamic", 1, 0.0, [1.0] * 9) == 1  # too few to judge
    assert next_level("dynamic", 1, 0.0, [0.8] * 10) == 2
    assert next_level("dynamic", 1, 0.0, [0.2] * 10) == 0
    assert next_level("dynamic", 1, 0.0, [0.5] * 10) == 1
    assert next_level("dynamic", 0, 0.0, [-1.0] * 10) == 0 and next_level("dynamic", 4, 0.0, [1.0] * 10) == 4
    assert next_level("dynamic", 1, 0.0, [-1.0] * 30 + [1.0] * 10) == 2  # old rewards do not count


def test_the_curriculum_over_tasks_adds_them_one_by_one():
    args = Args(curriculum="tasks", proportions=(2.0, 1.0, 1.0))
    levels = levels_of(args)
    assert [list(level.shares) for level in levels] == [list(args.tasks[:n]) for n in (1, 2, 3)]
    assert levels[1].shares == pytest.approx({"arithmetic": 2 / 3, "words": 1 / 3})
    stages = [next_level("tasks", 0, i / 100, []) for i in range(100)]
    assert [stages.index(n) for n in range(3)] == [0, 20, 40] == [100 * start for start, _ in CURRICULA["tasks"]]
    assert [level.high for level in levels_of(replace(args, curriculum="progressive"))] == [5, 10, 15, 20]


# ---- word problems from a file, and a task of one's own ----------------------------------------------------------------


def test_word_problems_are_read_from_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "".join(
            f'{{"question": "Ann has {n} apples and buys 1000. How many?", "answer": "{n}+1000\\n#### {n + 1000:,}"}}\n'
            for n in range(40)
        )
    )
    problems = load_word_problems(str(path))
    assert problems[5].answer == "1005" and problems[5].prompt.startswith("Question: Ann has 5 apples")
    args = Args(tasks=("word_problems",), proportions=(1.0,), min_num=0, max_num=20, word_problems=str(path))
    (level,) = levels_of(args)
    train = {p.prompt for p in draw_mixture(np.random.default_rng(0), level, 50, set())}
    assert train and not train & {p.prompt for p in draw_held_out(args, "eval", 100, set())}


GOOD = '{"question": "q", "answer": "1 + 1 = 2\\n#### 2"}\n'


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"question": "q"}\n', "row 1: answer: is missing"),
        ("no json\n", "row 1 cannot be read as JSONL"),
        ("", "holds no"),
        (GOOD + '\n{"question": "q", "answer": "it is 5"}\n', "row 3: no number after the last #### in 'it is 5'"),
        (
            GOOD + '{"question": "q", "answer": "#### 1.234,5"}\n',
            "row 2: no number after the last #### in '#### 1.234,5'",
        ),
        (GOOD + '{"question": "q", "answer": "#### \\\\frac{3}{4}"}\n', "row 2: no number"),
        (GOOD + '{"question": "q", "answer": ""}\n', "row 2: answer ''"),
        (GOOD + '{"question": "q", "answer": 5}\n', "row 2: answer 5"),
        (GOOD + '{"question": null, "answer": "#### 5"}\n', "row 2: question None"),
        (GOOD + '{"question": " ", "answer": "#### 5"}\n', "row 2: question ' '"),
        (
            GOOD + '{"question": "q", "question": "r", "answer": "#### 5"}\n',
            "row 2 cannot be read as JSONL: one of the keys",
        ),
    ],
)
def test_files_that_are_no_word_problems_are_refused_with_their_row(tmp_path, capsys, text, words):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        load_word_problems(str(path))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


class Hub:
    """openai/gsm8k as the hub has it: two configs, and none is the default."""

    rows = [
        {"question": f"{i} and 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"}
        for i in range(1500)
    ]

    @classmethod
    def load_dataset(cls, name, config=None):
        if name != "openai/gsm8k":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed.")
        if config is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        return {"test": cls.rows[:10], "train": cls.rows}


def test_the_documented_word_problems_load_from_a_hub_by_their_config(monkeypatch, capsys):
    monkeypatch.setattr("datasets.load_dataset", Hub.load_dataset)
    load_word_problems.cache_clear()
    page = (ROOT / "docs" / "grpo_mixed.md").read_text()
    assert f"--word-problems {Args().word_problems} " in page
    problems = load_word_problems(Args().word_problems)
    assert [p.answer for p in problems] == [str(i + 1) for i in range(1500)]  # those of the training split
    for source, reason in [("openai/gsm8k", "['main', 'socratic']"), ("no/such", "doesn't exist on the Hub")]:
        with pytest.raises(SystemExit) as stop:
            load_word_problems(source)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and reason in err and "OWNER/NAME[/CONFIG]" in err and err.count("\n") == 1


def test_a_task_of_ones_own_is_two_functions_and_a_line(monkeypatch):
    """The example of docs/grpo_mixed.md, executed as it stands there."""
    page = (ROOT / "docs" / "grpo_mixed.md").read_text()
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "def draw_" in block.split("```")[0]]
    assert code.count("\n") <= 10
    monkeypatch.setattr(grpo_mixed, "TASKS", dict(TASKS))
    names = vars(grpo_mixed) | {}
    exec(code, names)
    (new,) = set(names["TASKS"]) - set(TASKS)
    args = Args(tasks=("arithmetic", new), proportions=(1.0, 1.0), min_num=0, max_num=20)
    problems = draw_mixture(np.random.default_rng(0), levels_of(args)[0], 20, EVAL)
    mine = [p for p in problems if p.task == new]
    assert len(mine) == 10 and all(is_correct(p.answer, p) for p in mine)
    assert draw_held_out(args, "eval", 5, EVAL)


def test_numbers_are_read_by_the_one_function_of_all_tasks():
    assert {TASKS[t][1] for t in ("arithmetic", "words", "letters")} == {extract_answer}


@pytest.mark.parametrize("number", range(10))
def test_the_ten_ablations_of_the_page_apply_as_they_are_printed(number, tmp_path):
    """`git apply` takes each block; one place of one file changes, and it still compiles."""
    blocks = (ROOT / "docs" / "grpo_mixed.md").read_text().split("```diff\n")[1:]
    assert len(blocks) == 10
    before = (ROOT / "grpo_mixed.py").read_text()
    (tmp_path / "grpo_mixed.py").write_text(before)
    done = subprocess.run(
        ["git", "apply"], input=blocks[number].split("```")[0], text=True, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "grpo_mixed.py").read_text()
    compile(after, "grpo_mixed.py", "exec")
    changed = [i for i, (x, y) in enumerate(zip(before.splitlines(), after.splitlines())) if x != y]
    assert len(changed) == 1 and before.count("\n") == after.count("\n")
