"""Flags: grouped help, defaults that a script redefines, one line for what is wrong."""

import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from common.cli import at_least, described_fields, parse, positive


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


@pytest.mark.parametrize("check", [lambda a: at_least(1, a, "beta"), lambda a: positive(a, "beta")])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_bounds_name_the_flag_and_catch_what_is_not_a_number(check, value, capsys):
    with pytest.raises(SystemExit):
        check(Args(beta=value))
    assert capsys.readouterr().err.startswith(f"error: --beta {value}: must be ")
    check(Args(beta=1.5))
    at_least(1, Args(), "loss")  # None: not given
