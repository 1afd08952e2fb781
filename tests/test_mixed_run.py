"""Whole runs of grpo_mixed.py: what they log by task, refill, resume, refuse, and that they learn."""

import json
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, two_forks
from safetensors.torch import load_file
from test_docs import documented_metrics

import grpo_mixed as mixed
from common.cli import parse
from common.language import checks, lm

EVAL = {p.prompt for p in mixed.load_problems(str(ROOT / "assets" / "arithmetic_eval.jsonl"))}
SMALL = dict(
    batch_size=24, num_generations=4, n_samples=12, epochs=4, max_completion_length=5, eval_samples=4, eval_every=4,
    task_eval_problems=6, save_every=4, temperature=1.0, learning_rate=1e-3,
)  # fmt: skip  # 6 prompts a step, 2 steps an epoch, 8 steps


@pytest.fixture
def run(tmp_path, micro_model_folder, monkeypatch):
    """Runs main() in this process with SMALL settings; returns (exit code, run folder)."""

    def start(**flags):
        settings = {"model_name": micro_model_folder, "output_dir": str(tmp_path / "runs")} | SMALL | flags
        settings = {"resume": flags["resume"]} if "resume" in flags else settings
        argv = ["grpo_mixed.py"]
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                argv += [flag, *map(str, value if isinstance(value, (tuple, list)) else [value])]
        monkeypatch.setattr(sys, "argv", argv)
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        try:
            with pytest.raises(SystemExit) as stop:
                mixed.main(parse(mixed.Args, mixed.__doc__))
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
        runs = sorted((tmp_path / "runs" / "grpo_mixed").glob("*"), key=lambda p: p.stat().st_mtime)
        return stop.value.code, runs[-1] if runs else None

    return start


def rows(run_dir: Path, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def timeless(run_dir: Path):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run_dir)]


def test_two_sharded_processes_with_the_decoders_buffers_equal_one_without(run, monkeypatch):
    """--fsdp and --decode graph in this script's loop; what they do inside is shared with grpo_arithmetic.py."""
    _, single = run(epochs=2, num_iterations=2, rewards=("rich",))
    assert all(row["train/grad_norm"] > 1e-2 for row in rows(single) if "train/reward" in row)
    main = mixed.main
    monkeypatch.setattr(mixed, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code, sharded = run(epochs=2, num_iterations=2, rewards=("rich",), fsdp=True, decode="graph")
    assert code == 0
    for a, b in zip(timeless(single), timeless(sharded), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-3), (a["step"], key)
    assert [row["time/decode_fallbacks"] > 0 for row in rows(sharded) if "train/reward" in row] == [True] * 4
    model, moments = (load_file(sharded / "last" / f"{name}.safetensors") for name in ("model", "trainer/trainer"))
    assert all(torch.isfinite(x).all() for x in model.values()) and len(moments) == 3 * len(model) + 1


def test_a_run_logs_by_task_what_its_tables_and_its_page_say(run, figures):
    code, folder = run(log_completions=24)
    assert code == 0
    tables, metrics = rows(folder, "completions"), [row for row in rows(folder) if "train/reward" in row]
    for row in metrics:
        mine = [r for r in tables if r["step"] == row["step"]]
        assert len(mine) == 24
        by_task = {task: [r for r in mine if r["task"] == task] for task in {r["task"] for r in mine}}
        for task, lines in by_task.items():
            assert row[f"train/{task}/groups"] == len(lines) / 4
            assert row[f"train/{task}/accuracy"] == pytest.approx(np.mean([r["is_correct"] for r in lines]))
            assert row[f"train/{task}/reward"] == pytest.approx(np.mean([r["reward"] for r in lines]))
        assert sum(row[f"train/{t}/groups"] for t in ("arithmetic", "words", "comparison")) == 6
    # training never meets a held-out problem, evaluation never a training problem
    assert all(mixed.split_of(r["prompt"]) == "train" and r["prompt"] not in EVAL for r in tables)
    answers = [r for r in rows(folder, "evaluation") if r["step"] == 8]
    held_out = [r for r in answers if r["difficulty"] == "held out"]
    assert len(answers) == 200 + len(held_out) and {mixed.split_of(r["prompt"]) for r in held_out} == {"eval"}
    last = metrics[-1]
    for task in ("arithmetic", "words", "comparison"):
        mine = [r["accuracy"] for r in held_out if r["task"] == task]
        assert last[f"eval_{task}_accuracy_n"] == len(mine) == 6
        assert last[f"eval_{task}_accuracy"] == pytest.approx(np.mean(mine))
        assert last[f"eval_{task}_accuracy_low"] <= np.mean(mine) <= last[f"eval_{task}_accuracy_high"]
    logged = {name for row in rows(folder) for name in row} - {"step"}
    general = set()
    for name in logged:
        for task in ("arithmetic", "words", "comparison"):
            name = name.replace(f"train/{task}/", "train/<task>/").replace(f"eval_{task}_", "eval_<task>_")
        general.add("<metric>" + name[name.rindex("_") :] if name.endswith(("_low", "_high", "_n")) else name)
    general = {name.replace("rewards/binary/", "rewards/<name>/") for name in general}
    assert general == documented_metrics("grpo_mixed.md") - {"arithmetic_eval_pass@16"}
    assert all((folder / name).stat().st_size > 5000 for name in ("learning.png", "health.png", "report.html"))


def test_a_resumed_run_equals_an_unbroken_one_with_adaptive_shares_refills_and_a_curriculum(run):
    flags = dict(sampling="adaptive", refill=2, curriculum="tasks", tasks=("words", "binary", "comparison"))
    _, whole = run(keep=10, **flags)
    assert {row.get("train/curriculum_level") for row in rows(whole)} >= {0.0, 1.0, 2.0}
    broken = whole.with_name("broken")
    shutil.copytree(whole, broken, symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-000000008")
    assert run(resume=str(broken))[0] == 0
    assert timeless(broken) == timeless(whole)
    assert (broken / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    a, b = (load_file(folder / "checkpoints" / "step-000000008" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_groups_without_spread_are_drawn_again_and_the_cost_is_logged(run):
    _, plain = run(learning_rate=1e-9, epochs=2, fresh=True)
    _, refilled = run(learning_rate=1e-9, epochs=2, fresh=True, refill=3, log_completions=24)
    before, after = ([r for r in rows(folder) if "train/reward" in r] for folder in (plain, refilled))
    for a, b in zip(before, after):  # the same first draw
        assert a["train/refilled_completions"] == 0
        assert b["train/refilled_completions"] == 4 * b["train/refilled_groups"]
        empty = round(6 * a["train/frac_reward_zero_std"])
        assert b["train/refilled_groups"] >= empty and (b["train/refilled_groups"] > 0) == (empty > 0)
        assert b["train/frac_reward_zero_std"] <= a["train/frac_reward_zero_std"]
        tasks = ("arithmetic", "words", "comparison")
        assert all(a.get(f"train/{t}/accuracy") == b.get(f"train/{t}/accuracy") for t in tasks)
    assert sum(r["train/refilled_groups"] for r in after) > 0
    # ids, texts and rewards of the rows that were replaced still belong together
    for r in rows(refilled, "completions"):
        problem = mixed.Problem(r["prompt"], r["expected"], task=r["task"])
        assert mixed.is_correct(r["completion"], problem) == r["is_correct"] == (r["reward"] == 1)
    assert all(r["train/sampling_logp_difference/max"] < 1e-3 for r in after)


def test_a_curriculum_really_switches_the_problems(run):
    _, folder = run(
        tasks=("arithmetic",), curriculum="three_stage", epochs=10, n_samples=30, eval_every=0, batch_size=16,
        log_completions=16, eval_samples=1,
    )  # fmt: skip
    table, levels = rows(folder, "completions"), {}
    for row in rows(folder):
        if "train/curriculum_level" in row:
            levels.setdefault(row["train/curriculum_level"], []).append(row["step"])
    total = max(row["step"] for row in table)
    assert levels[0][-1] == total * 0.2 and levels[1][-1] == total * 0.5 and levels[2][-1] == total
    operations = {i: {row["prompt"].split()[2] for row in table if row["step"] in steps} for i, steps in levels.items()}
    assert operations[0] == {"+"} and operations[1] == operations[2] == {"+", "-", "*"}
    largest = max(int(row["prompt"].split()[1]) for row in table if row["step"] in levels[2])
    assert largest > 10 >= max(int(row["prompt"].split()[1]) for row in table if row["step"] in levels[1])


@dataclass
class Roll:
    prompts: list
    texts: list
    ids: torch.Tensor
    ended: torch.Tensor


def test_groups_are_replaced_at_any_length():
    """Two completions each of three prompts; those of one prompt are replaced by longer or shorter ones."""
    old = Roll([[1], [2], [3]], list("abcdef"), torch.arange(12).view(6, 2), torch.zeros(6, dtype=torch.bool))
    new = Roll([[4]], list("xy"), torch.ones(2, 4, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    longer = lm.replace_groups(old, new, [1])
    assert longer.prompts == [[1], [4], [3]] and longer.texts == list("abxyef")
    assert longer.ids[:3].tolist() == [[0, 1, 0, 0], [2, 3, 0, 0], [1, 1, 1, 1]]
    assert longer.ended.tolist() == [False, False, True, True, False, False]
    shorter = lm.replace_groups(old, replace(new, ids=new.ids[:, :1]), [2])
    assert shorter.ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [1, 0], [1, 0]]
    assert old.texts == list("abcdef") and old.ids.tolist() == torch.arange(12).view(6, 2).tolist()


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(tasks=("arithmetic", "poetry")), "unknown task 'poetry'"),
        (dict(tasks=("words", "words")), "each once"),
        (dict(proportions=(0.5, 0.5)), "3 numbers"),
        (dict(proportions=(1.0, 0.0, 1.0)), "at least 0.001"),
        (dict(min_num=5, max_num=5), "must be below"),
        (dict(min_num=0, max_num=1), "widen the numbers"),
        (dict(eval_only=True, operations="x"), "--operations"),
        (dict(eval_only=True, min_num=9, max_num=9), "must be below"),
        (dict(n_samples=3), "6 prompts per step of only 3"),
        (dict(refill=-1), "--refill"),
        (dict(batch_size=25), "multiple of"),
        (dict(tasks=("word_problems",), word_problems="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(task_eval_problems=0), "at least 1"),
        (dict(task_eval_problems=10**7), "at most 10000"),
        (dict(proportions=(1.0, 1e-300, 1.0)), "1e-300"),
        (dict(proportions=(1.0, 1e300, 1.0)), "1e+300"),
        (dict(n_samples=10**8), "--fresh"),
        (dict(max_num=10**10), "at most 9 digits"),
        (dict(rewards=("binary", "binary")), "each once"),
        (dict(curriculum="three_stage", operations="+-"), "sets the numbers itself"),
        (dict(curriculum="dynamic", max_num=50), "sets the numbers itself"),
        (dict(curriculum="tasks", dataset_type="small_numbers"), "sets the numbers itself"),
        (dict(curriculum="tasks", tasks=("words",)), "several --tasks"),
        (dict(curriculum="progressive", tasks=("words", "binary")), "changes none of --tasks words binary"),
        (dict(tasks=("words", "letters"), max_num=50), "change none of --tasks words letters"),
        (dict(sampling="adaptive", tasks=("words",)), "several --tasks"),
        (dict(sampling="balanced", proportions=(1.0, 2.0, 3.0)), "leave out --proportions"),
        (dict(word_problems="mine.jsonl"), "add it to --tasks"),
    ],
)
def test_bad_input_ends_in_one_line_before_a_model_is_loaded(run, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("a model was loaded"))
    code, folder = run(**flags)
    message = capsys.readouterr().err
    assert code == 2 and words in message and message.count("\n") == 1 and folder is None


def word_problems(path: Path, long: str, n: int = 400) -> str:
    """A file of short questions; those of one split ("train", "validation", "eval"; "" for none) may be long."""
    form = "Question: {}\nThink step by step, then write #### and the number.\nAnswer: "
    with path.open("w") as file:
        for i in range(n):
            question = f"{i} + 1?"
            while mixed.split_of(form.format(question)) == long and len(question) < 60:
                question += " Say it." * 8  # may lead into another split: then it is as long in that one
            file.write(json.dumps({"question": question, "answer": f"#### {i + 1}"}) + "\n")
    return str(path)


@pytest.mark.parametrize("long, fresh", [("", False), ("validation", False), ("eval", False), ("train", True)])
def test_word_problems_longer_than_the_context_are_found_before_the_model_is_loaded(
    run, monkeypatch, tmp_path, capsys, long, fresh
):
    monkeypatch.setattr(lm, "load_model", lambda *_: sys.exit(9))
    source = word_problems(tmp_path / "problems.jsonl", long)
    flags = dict(tasks=("word_problems",), word_problems=source, fresh=fresh, max_completion_length=40)
    code, folder = run(**flags)
    assert (code, folder) == (2 if long else 9, None)
    err = capsys.readouterr().err
    assert not long or "context of 128" in err and "Say it." in err and err.count("\n") == 1


def test_fresh_word_problems_count_each_and_of_other_tasks_the_longest_are_drawn(run, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        checks, "context", lambda args, config, tokenizer, prompts: asked.extend(prompts) or sys.exit(9)
    )
    source = word_problems(tmp_path / "problems.jsonl", "")
    tasks = ("arithmetic", "words", "letters", "comparison", "binary", "word_problems")
    assert run(tasks=tasks, fresh=True, word_problems=source)[0] == 9
    assert {p.prompt for p in mixed.load_word_problems(source)} <= set(asked)
    words = "Count the words: " + "window " * 9 + "window. Answer: "  # no word is longer
    for longest in ("Calculate: 20 + 20 = ", "Is 20 greater than 10? Answer yes or no: ", words):
        assert max(len(prompt) for prompt in asked if prompt[:8] == longest[:8]) == len(longest)


def test_a_gold_that_cannot_be_read_is_refused_before_a_model_is_loaded(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "q", "answer": "#### 2"}\n{"question": "r", "answer": "#### twelve"}\n')
    code, folder = run(tasks=("word_problems",), word_problems=path)
    err = capsys.readouterr().err
    assert code == 2 and folder is None and "row 2: no number after the last #### in '#### twelve'" in err


def test_refilling_and_the_dynamic_curriculum_go_on_without_rewards(run, monkeypatch):
    """Groups in which one completion or none has a reward have no spread: they are drawn again."""
    monkeypatch.setitem(mixed.REWARDS, "binary", lambda text, problem: None)
    code, folder = run(refill=1, curriculum="dynamic", epochs=1)
    logged = [row for row in rows(folder) if "train/refilled_groups" in row]
    assert code == 0 and all(
        row["train/refilled_groups"] == 6 == row["train/rewards/binary/missing"] / 4 for row in logged
    )
    assert all(row["train/reward"] is None and row["train/frac_reward_zero_std"] == 1 for row in logged)


def test_a_mixture_of_two_toy_tasks_is_learnt_at_once(run, monkeypatch):
    """The same completion is right for one task and wrong for the other: the prompt must be read."""

    def draw(form, answer):
        return lambda rng, level: mixed.Problem(form.format(rng.integers(10**6)), answer)

    toys = {
        "zeros": (draw("{} 00000: ", "0"), mixed.extract_answer),
        "ones": (draw("{} 1+1+1: ", "1"), mixed.extract_answer),
    }
    monkeypatch.setattr(mixed, "TASKS", mixed.TASKS | toys)
    _, folder = run(
        tasks=("zeros", "ones"), batch_size=256, num_generations=32, n_samples=80, epochs=8, learning_rate=5e-3, beta=0.0,
        eval_every=0, save_every=0, eval_samples=2, task_eval_problems=20,
    )  # fmt: skip
    first, last = [r for r in rows(folder) if "eval_ones_accuracy" in r]
    for task in ("zeros", "ones"):
        assert first[f"eval_{task}_accuracy"] < 0.5 and last[f"eval_{task}_accuracy"] > 0.9
