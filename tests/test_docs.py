"""Pages that do not lie: commands parse, links lead somewhere, the metrics table is what a run logs."""

import dataclasses
import json
import re
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT

import gr00t_finetune
import grpo_arithmetic
import grpo_mixed
import ppo_fetch
import ppo_gr00t
from common.cli import described_fields, parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "grpo_arithmetic.py": grpo_arithmetic,
    "grpo_mixed.py": grpo_mixed,
    "ppo_fetch.py": ppo_fetch,
    "gr00t_finetune.py": gr00t_finetune,
    "ppo_gr00t.py": ppo_gr00t,
}


def commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield page.name, words


@pytest.mark.parametrize("page, words", list(commands()), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_documented_commands_name_files_and_flags_that_exist(page, words, monkeypatch):
    paths = [w for w in words if w.endswith((".py", ".sh")) and not w.startswith("https://")]
    assert all((ROOT / path).exists() for path in paths)
    for name, module in SCRIPTS.items():
        if name in words:
            monkeypatch.setattr(sys, "argv", words[words.index(name) :])
            parse(module.Args, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_dev_container_is_a_stage_of_the_dockerfile():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    stages = re.findall(r"^FROM \S+ AS (\w+)", (ROOT / "Dockerfile").read_text(), re.M)
    assert container["build"]["target"] in stages and stages == ["base", "cpu", "cuda"]
    extras = re.findall(r"--(?:group|extra) (\w+)", (ROOT / "Dockerfile").read_text())
    assert all(re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for name in extras)


def test_stated_line_counts_hold():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \|.*?\| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.M):
        real = (ROOT / name).read_text().count("\n")
        assert abs(real - int(lines.replace(",", ""))) <= 0.02 * real, f"{name} has {real} lines"


def test_every_flag_has_its_line_of_help():
    for name, module in SCRIPTS.items():
        found = described_fields(module.Args)
        assert found.keys() == {f.name for f in dataclasses.fields(module.Args)}, name
        assert [flag for flag, (_, text) in found.items() if not text] == [], name


def documented_metrics(page):
    section = (ROOT / "docs" / page).read_text().split("## 5. Metrics")[1].split("## 6.")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_table_of_recipes_is_the_one_in_the_script():
    section = (ROOT / "docs/gr00t_finetune.md").read_text().split("| model | `--max-steps` |")[1].split("\n\n")[0]
    head = ["max_steps", *(flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", section.splitlines()[0]))]
    for line, recipe in zip(section.splitlines()[2:], gr00t_finetune.RECIPES.values(), strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:]]
        stated = {name: [float(x) for x in cell.split()] for name, cell in zip(head, cells)}
        assert stated == {name: np.atleast_1d(value).tolist() for name, value in recipe.items()}
