"""Chat prompts: templates with all their traps, the same text in training, evaluation and checks; marked answers."""

import json
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import test_grpo_run
from test_grpo_probe import framing
from transformers import AutoTokenizer

from common.language import chat, lm
from common.language.chat import Conversation
from common.language.numbers import MARKS, format_reward
from grpo_arithmetic import REWARDS, Args, Problem, extract_answer, is_correct, load_problems

run = test_grpo_run.run  # a fixture

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }} or {{ date_string }}.\n" + TURNS
BEGINNING = "<|endoftext|>" + TURNS  # a template that brings its own beginning
THINKING = TURNS.replace(
    "assistant\n{% endif %}", "assistant\n{% if not enable_thinking %}<no think>{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
DEAF = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


def tokenizer_of(template: str | None, before=()):
    tokenizer = framing(list(before), [])
    tokenizer.chat_template = template
    return tokenizer


def text_of(template: str, prompt="7 * 8 = ", before=(), **flags) -> str:
    tokenizer = tokenizer_of(template, before)
    return tokenizer.decode(lm.encode(tokenizer, [prompt], Args(chat=True, **flags))[0])


def test_a_prompt_is_a_turn_of_the_user_and_the_model_is_to_go_on():
    user = "<|im_start|>user\n7 * 8 =<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(TURNS) == user
    assert text_of(TURNS, system_prompt="Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + user
    assert "user" not in tokenizer_of(TURNS).decode(lm.encode(tokenizer_of(TURNS), ["7"], Args())[0])


def test_a_beginning_of_text_stands_there_once():
    """The tokenizer adds one to every text, the template has written one: not both."""
    tokenizer = tokenizer_of(BEGINNING, before=["<|endoftext|>"])
    assert tokenizer("x").input_ids[0] == 256, "or this tests nothing"
    (ids,) = lm.encode(tokenizer, ["7 * 8 = "], Args(chat=True))
    assert Counter(ids)[256] == 1 and ids[0] == 256
    (ids,) = lm.encode(tokenizer_of(TURNS, before=["<|endoftext|>"]), ["7 * 8 = "], Args(chat=True))
    assert Counter(ids)[256] == 0  # a template that writes none wants none


def test_what_is_read_does_not_depend_on_the_day():
    assert text_of(DATED).startswith("Today is 01 Jan 2025 or 01 Jan 2025.\n<|im_start|>user")


def test_models_that_can_think_do_so_only_when_asked():
    assert text_of(THINKING).endswith("assistant\n<no think>")
    assert text_of(THINKING, thinking=True).endswith("assistant\n")


def test_the_end_of_a_turn_ends_a_completion():
    ends = chat.ends(tokenizer_of(TURNS), Args(chat=True))
    assert ends == [258] and chat.ends(tokenizer_of(TURNS), Args()) == []
    plain = TURNS.replace("<|im_end|>", "")
    assert chat.ends(tokenizer_of(plain), Args(chat=True)) == []  # "\n" is text, not an end


@pytest.mark.parametrize(
    "template, flags, says",
    [
        (None, {"chat": True}, "has no chat template: take a model trained on chats"),
        (TURNS, {"system_prompt": "x"}, "--system-prompt is for chat prompts: add --chat"),
        (TURNS, {"thinking": True}, "--thinking is for chat prompts: add --chat"),
        (TURNS, {"chat": True, "thinking": True}, "has no switch for thinking: leave out --thinking"),
        (NO_SYSTEM, {"chat": True, "system_prompt": "x"}, "takes no system prompt (no system role)"),
        (DEAF, {"chat": True, "system_prompt": "x"}, "leaves a system prompt out"),
        ("{{ messages[0].content.nothing() }}", {"chat": True}, "cannot be filled in"),
    ],
)
def test_what_a_template_cannot_do_is_refused_in_one_line(template, flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.check(tokenizer_of(template), Args(**flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error


@pytest.mark.parametrize("template", [TURNS, DATED, BEGINNING, THINKING, NO_SYSTEM])
def test_templates_that_do_are_taken(template):
    chat.check(tokenizer_of(template), Args(chat=True))
    chat.check(tokenizer_of(None), Args())


def test_a_prompt_of_several_messages_comes_from_a_file_and_reads_as_text(tmp_path, capsys):
    messages = [
        {"role": "user", "content": "1 + 1 = "},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2 = "},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": 4}) + "\n")
    (problem,) = load_problems(str(path))
    assert problem.prompt == "user: 1 + 1 = \nassistant: 2\nuser: 2 + 2 = " and problem.answer == "4"
    assert problem.prompt.messages == messages == pickle.loads(pickle.dumps(problem.prompt)).messages
    read = text_of(TURNS, problem.prompt, system_prompt="Hm.")
    assert read.count("<|im_start|>") == 5 and "<|im_start|>assistant\n2<|im_end|>" in read
    for wrong in (
        [],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": " "}],
        ["x"],
    ):
        path.write_text(json.dumps({"prompt": wrong, "answer": 4}) + "\n")
        with pytest.raises(SystemExit):
            load_problems(str(path))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "row 1" in error, wrong


def test_training_evaluation_and_the_length_check_read_the_same_text(
    run, micro_model_folder, tmp_path, monkeypatch, capsys
):
    """One `encode` with one set of flags; the run says what it reads; a checkpoint keeps the template."""
    import shutil

    folder = str(tmp_path / "chatty")
    shutil.copytree(micro_model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    seen, encode = [], lm.encode
    monkeypatch.setattr(lm, "encode", lambda *args: seen.append(encode(*args)) or seen[-1])
    flags = {"model_name": folder, "epochs": 1, "n_samples": 4, "eval_samples": 1, "eval_every": 0}
    code, path = run(chat=True, system_prompt="Answer.", rewards=("binary", "tag"), reward_weights=(1.0, 0.2), **flags)
    assert code == 0
    begin = encode(tokenizer, ["?"], SimpleNamespace(chat=True, system_prompt="Answer.", thinking=False))[0][:40]
    rows = [row for call in seen for row in call]
    assert len(rows) > 400 and all(row[:40] == begin for row in rows)
    out = capsys.readouterr().out
    assert "prompts as the model reads them: 'Today is 01 Jan 2025" in out and "Answer." in out
    assert AutoTokenizer.from_pretrained(path / "last").chat_template == DATED
    table = [json.loads(line) for line in (path / "completions.jsonl").read_text().splitlines()]
    assert {"tag", "binary", "prompt", "extracted_answer"} <= table[0].keys()


# ---- answers that are marked -----------------------------------------------------------------------------------------

MARKED = {
    "<answer>56</answer>": "56", "7 * 8 is <answer> 56 </answer>.": "56", "<answer>\n$56.00\n</answer>": "56",
    "<answer>5</answer> no, <answer>56</answer>": "56", "<answer>1,234</answer>": "1234", "<answer>-3.</answer>": "-3",
    "so \\boxed{56}": "56", "\\boxed{56.0}": "56", "$\\boxed{ 56 }$": "56", "5 + 3\n#### 8": "8", "#### 8 apples": "8",
    "<answer>the cat</answer>": "the cat", "\\boxed{8 million}": "8 million", "<answer>8e3</answer>": "8e3",
    # no mark: as ever
    "56": "56", "56. <answer>": "56", "56 </answer>": "56", "12 \\boxed{": "12", "3 ####": "3", "3 <answer></answer>": "3",
}  # fmt: skip


@pytest.mark.parametrize("text", MARKED)
def test_a_marked_answer_is_the_answer_as_a_number(text):
    assert extract_answer(text) == MARKED[text]
    assert is_correct(text, Problem("", MARKED[text]))


def test_the_format_is_rewarded_beside_what_is_right():
    right, wrong = "I think <answer>56</answer>", "I think <answer>57</answer>"
    problem = Problem("Calculate: 7 * 8 = ", "56")
    assert [REWARDS["tag"](text, problem) for text in (right, wrong, "56", "<answer></answer>", right + right)] == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert [REWARDS["binary"](text, problem) for text in (right, wrong, "56")] == [1, -1, 1]
    assert REWARDS["boxed"]("\\boxed{1}", problem) == REWARDS["hashes"]("so\n#### 1", problem) == 1
    for mark in MARKS:
        assert format_reward("<answer>" * 50_000 + "####" * 50_000 + "\\boxed{" * 50_000, problem, mark) == 0
        extract_answer("<answer>" * 50_000 + "####" * 50_000 + "\\boxed{" * 50_000)


def test_messages_need_no_template_to_be_a_string():
    talk = Conversation([{"role": "user", "content": "a"}])
    assert {talk: 1}["user: a"] == 1 and json.dumps(talk) == '"user: a"'
