"""Flags: grouped help, defaults that a script redefines, one line for what is wrong."""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT

from common.cli import Count, NonNegative, Positive, Refused, Share, Text, described_fields, fail, parse


@dataclass
class Shared:
    # run
    seed: int = 42
    """seed of 100 % of it"""
    device: str = "auto"  # auto, cpu or cuda


@dataclass
class Args(Shared):
    device: str = "cpu"
    tags: tuple[str, ...] = ("a",)
    """without a group of its own"""
    note: str = "a # b"  # kept, with its hash #
    # update: what an optimizer step does
    beta: float = 0.1
    """weight of the penalty,
    0 to 1"""
    loss: Literal["grpo", "bnpo"] | None = None
    """kind of loss"""


def given(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    return parse(Args, "what it does")


def test_a_redefined_field_keeps_its_group_and_its_help():
    assert described_fields(Args) == {
        "seed": ("run", "seed of 100 % of it"),
        "device": ("run", "auto, cpu or cuda"),
        "tags": ("options", "without a group of its own"),
        "note": ("options", "kept, with its hash #"),
        "beta": ("update: what an optimizer step does", "weight of the penalty, 0 to 1"),
        "loss": ("update: what an optimizer step does", "kind of loss"),
    }


@pytest.mark.parametrize("given, kept", [(None, "1000"), ("300000", "300000")])
def test_threads_of_every_script_spin_but_shortly_unless_told(given, kept):
    """OpenMP reads it when torch is loaded: what sets it has to come first."""
    rest = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    code = "import sys, common.stop, os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    env = rest | ({"GOMP_SPINCOUNT": given} if given else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [kept, "False"], done.stderr
    for script in ("grpo_arithmetic", "grpo_mixed", "gr00t_finetune", "ppo_fetch", "ppo_gr00t"):
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert first.names[0].name == "common.stop", script


def test_help_into_a_reader_that_leaves_says_nothing_more():
    done = subprocess.run(
        f"{sys.executable} grpo_mixed.py --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage:") and done.stderr == ""


def test_help_lists_every_flag_once_under_its_group(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        given(monkeypatch, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [text.count(f"--{name} ") for name in ("seed", "device", "tags", "beta", "loss")] == [1] * 5
    assert text.index("run options") < text.index("--seed") < text.index("update options") < text.index("--beta")
    assert "100 %" in text and "(default: cpu)" in text


def test_flags_become_the_dataclass_in_both_spellings(monkeypatch):
    assert given(monkeypatch) == Args()
    assert given(monkeypatch, "--beta", "0.5", "--tags", "x", "y", "--loss", "bnpo") == Args(
        beta=0.5, tags=("x", "y"), loss="bnpo"
    )
    assert given(monkeypatch, "--device=cuda", "--seed", "1") == Args(device="cuda", seed=1)


@pytest.mark.parametrize("words", [["--beta", "much"], ["--unknown", "1"], ["--loss", "ppo"], ["stray"]])
def test_what_is_wrong_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as stop:
        given(monkeypatch, *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words[0].strip("-") in error


@dataclass
class Bounded:
    # update
    steps: Count | None = None  # how many
    rate: Positive = 0.1  # how fast
    beta: NonNegative = 0.0  # how close
    weights: tuple[NonNegative, ...] = ()  # of each
    warmup: Share = 0.1  # how much of it
    resume: Text | None = None  # which


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--rate", "0"], "--rate 0.0: must be positive"),
        (["--rate", "nan"], "--rate nan: must be a finite number"),
        (["--beta", "inf"], "--beta inf: must be a finite number"),
        (["--beta=-0.1"], "--beta -0.1: must not be negative"),
        (["--weights", "1", "nan"], "--weights[1] nan: must be a finite number"),
        (["--warmup", "1.01"], "--warmup 1.01: must be at most 1"),
        (["--resume", ""], "--resume '': must not be empty"),
    ],
)
def test_bounds_stand_beside_the_field_and_nothing_infinite_keeps_them(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit) as stop:
        parse(Bounded, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {line}") and error.count("\n") == 1
    good = ["script.py", "--steps", "1", "--rate", "1e-9", "--weights", "0", "2", "--warmup", "1", "--resume", "x"]
    monkeypatch.setattr(sys, "argv", good)
    assert parse(Bounded, "") == Bounded(1, 1e-9, 0.0, (0.0, 2.0), 1.0, "x")


def test_only_the_waiting_thread_says_what_its_threads_notice(capsys):
    with ThreadPoolExecutor(4) as pool:
        noticed = [pool.submit(fail, "the file is broken") for _ in range(4)]
    assert all(isinstance(one.exception(), Refused) for one in noticed) and capsys.readouterr().err == ""


def test_what_all_processes_notice_the_first_one_says(monkeypatch, capsys):
    """The others wait for torchrun to end them; one that is alone with it says it in the end."""
    slept = []
    monkeypatch.setattr("common.cli.time.sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        fail("no such device")
    assert slept[0][0] >= 3 and slept[0][1] == "" and capsys.readouterr().err == "error: no such device\n"
