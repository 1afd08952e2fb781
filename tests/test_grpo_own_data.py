"""The page "train on your own data in ten lines", walked as it stands; and what is said where nothing is ever right."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import grpo_mixed
from common.language import watch

PAGE = (ROOT / "docs" / "own_data.md").read_text()
QUICK = [
    "--n-samples",
    "16",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--num-generations",
    "4",
    "--task-eval-problems",
    "8",
]
QUICK += ["--eval-samples", "1", "--eval-every", "0"]


def test_the_page_as_it_stands_trains_on_a_file_of_ones_own(tmp_path, monkeypatch):
    data, task = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (command,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    words = shlex.split(command)
    assert words[:4] == ["uv", "run", "python", "my_task.py"]
    assert sum(bool(line.strip()) for line in task.splitlines()) <= 13  # ten, and where a function ends
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo_mixed, "TASKS", dict(grpo_mixed.TASKS))
    monkeypatch.setattr(grpo_mixed, "REWARDS", dict(grpo_mixed.REWARDS))
    monkeypatch.setattr(sys, "argv", [*words[3:], *QUICK])
    exec(compile(data, "data", "exec"), {})
    with pytest.raises(SystemExit) as stop:
        exec(compile(task, "my_task.py", "exec"), {"__name__": "__main__"})
    assert stop.value.code == 0
    (folder,) = (tmp_path / "runs" / "grpo_mixed").iterdir()
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    asked = {json.loads(line)["question"] for line in open("sums.jsonl")}
    assert {row["task"] for row in rows} == {"sums"} and {row["prompt"] for row in rows} <= asked
    for row in rows:
        assert row["brief"] == pytest.approx(-0.1 * max(len(row["completion"]) - 4, 0))
        assert row["reward"] == pytest.approx(row["binary"] + 0.5 * row["brief"], abs=1e-5)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["eval_sums_accuracy_n"] == 8


def test_a_step_without_a_right_completion_says_what_to_do():
    (text,) = watch.alarms({"train/accuracy": 0.0, "train/entropy": 1.0}).values()
    assert "GRPO needs a first success" in text and "docs/own_data.md" in text
    assert watch.alarms({"train/accuracy": 1 / 256, "train/entropy": 1.0}) == {}
