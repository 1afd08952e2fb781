"""Tasks of reasoning-gym in the mixture: with a stand-in for the library, and with the library where it is installed."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import grpo_mixed
from common.language import gym
from grpo_mixed import Args, Level, Problem, draw_held_out, draw_mixture, is_correct, levels_of, parse_answer, split_of

TASKS = ("arithmetic", "rg:doubling")


class Doubling:
    """2 n of a number n; half a point for the right last digit."""

    def __getitem__(self, i):
        return {"question": f"Twice {i % 500}?", "answer": str(2 * (i % 500)), "metadata": {"n": i % 500}}

    def score_answer(self, answer, entry):
        right = 2 * entry["metadata"]["n"]
        return 1.0 if int(answer) == right else 0.5 if int(answer) % 10 == right % 10 else 0.0


@pytest.fixture
def library(monkeypatch):
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda name, size, seed: Doubling()
    package.factory, factory.DATASETS = factory, {"doubling": Doubling, "counting": None}
    for name, module in (("reasoning_gym", package), ("reasoning_gym.factory", factory)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(grpo_mixed, "TASKS", dict(grpo_mixed.TASKS))


def resolved(tasks=TASKS, **flags):
    return grpo_mixed.resolve(Args(tasks=tasks, **flags), None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(grpo_mixed.lm, "count_parameters", lambda *_: 1e6)


def test_a_task_of_the_library_is_drawn_split_and_judged_by_its_verifier(library):
    args = resolved()
    pool = draw_mixture(np.random.default_rng(0), levels_of(args)[0], 60, set())
    mine = [p for p in pool if p.task == "rg:doubling"]
    assert len(mine) == 20 and {split_of(p.prompt) for p in mine} == {"train"}
    held_out = [p for p in draw_held_out(args, "eval", 20, set()) if p.task == "rg:doubling"]
    assert len(held_out) == 20 and not {p.prompt for p in held_out} & {p.prompt for p in mine}
    p, answer = mine[0], int(mine[0].answer)
    assert p.prompt.startswith("Twice ") and p.prompt.endswith("?\nAnswer: ")
    assert is_correct(f" {answer}.\nTwice 3?", p) and is_correct(f"so <answer>{answer}</answer>", p)
    assert not is_correct("", p) and not is_correct("none", p), "a verifier that trips has found nothing"
    score = grpo_mixed.REWARDS["score"]
    assert [score(text, p) for text in (f"{answer}", f"{answer + 10}", f"{answer + 1}", "none", "")] == [
        1,
        0.5,
        0,
        0,
        0,
    ]
    plain = Problem("Calculate: 1 + 1 = ", "2")
    assert score("2", plain) == 0 and is_correct("2", plain) and parse_answer("2 or 3", plain) == "2"


def test_a_mixture_with_it_trains_and_is_measured(library, tmp_path, micro_model_folder):
    args = Args(
        model_name=micro_model_folder, output_dir=str(tmp_path), tasks=TASKS, rewards=("binary", "score"), batch_size=24,
        num_generations=4, n_samples=12, epochs=1, max_completion_length=5, eval_samples=4, task_eval_problems=6,
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        grpo_mixed.main(args)
    assert stop.value.code == 0
    (folder,) = (tmp_path / "grpo_mixed").iterdir()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_rg:doubling_accuracy_n"] == 6 and "train/rg:doubling/reward" in last
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == set(TASKS) and all(0 <= row["score"] <= 1 for row in rows)


@pytest.mark.parametrize(
    "task, says", [("rg:doublin", "has no 'doublin'; it has doubling"), ("rg:", "has no ''; it has chain_sum")]
)
def test_a_name_that_the_library_does_not_know(library, task, says, capsys):
    with pytest.raises(SystemExit) as stop:
        resolved((task,))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit) as stop:
        resolved()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "rg:doubling: reasoning-gym is not installed; `uv sync --extra rg` brings it" in error
    assert gym.add_tasks({}, ("arithmetic", "words"), None) == ()  # nobody else needs it


def test_numbers_change_none_of_its_tasks(library, capsys):
    with pytest.raises(SystemExit):
        resolved(("rg:doubling",), max_num=30)
    assert "change none of --tasks rg:doubling" in capsys.readouterr().err


@pytest.mark.skipif(
    not importlib.util.find_spec("reasoning_gym"), reason="reasoning-gym is an extra: uv sync --extra rg"
)
@pytest.mark.parametrize("name", ["chain_sum", "letter_counting", "number_sorting", "basic_arithmetic"])
def test_the_library_itself(name):
    tasks = {}
    gym.add_tasks(
        tasks, (f"rg:{name}",), lambda *given: SimpleNamespace(**dict(zip(("prompt", "answer", "score"), given)))
    )
    draw, parser = tasks[f"rg:{name}"]
    problems = [draw(np.random.default_rng(i), Level(0, 20)) for i in range(30)]
    again = [draw(np.random.default_rng(i), Level(0, 20)) for i in range(30)]
    assert [p.prompt for p in problems] == [p.prompt for p in again] and len({p.prompt for p in problems}) > 25
    for p in problems:
        assert p.score(parser(f" {p.answer}\nNext")) == 1 == p.score(parser(f"<answer>{p.answer}</answer>"))
        assert p.score(parser("I cannot say")) < 1
