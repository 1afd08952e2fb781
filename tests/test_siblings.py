"""Scripts that are diffs of each other stay so: what they share is the same text."""

import ast
import difflib

import pytest
from conftest import ROOT

# (script, its sibling) -> definitions that the sibling changes on purpose; everything else they share must be identical
CHANGED = {
    ("grpo_arithmetic.py", "grpo_mixed.py"): {
        "Args",  # tasks, proportions, sampling
        "Problem",  # knows its task
        "Level",  # knows the tasks' shares; does not count its problems
        "levels_of",
        "draw_more",  # with shares
        "distance",  # the task's parser in place of extract_answer
        "is_correct",
        "evaluate",  # each task's accuracy beside the standard evaluation
        "resolve",
        "check_problems",
        "check_training",
        "main",
        "run",
    }
}
ONLY_IN_FIRST = {  # counting distinct problems, which a mixture does not
    ("grpo_arithmetic.py", "grpo_mixed.py"): {"draw_unique", "draw_bands", "available"}
}
MAX_CHANGED_LINES = 250
# contracts that callers of either script rely on
CONTRACT = {"group_advantages", "completion_mask", "grpo_loss", "token_logprobs", "generate", "extract_answer"}


def definitions(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text()
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name: ast.get_source_segment(text, n) for n in ast.parse(text).body if isinstance(n, kinds)}


@pytest.mark.parametrize("pair", CHANGED, ids=" and ".join)
def test_shared_definitions_are_the_same_text(pair):
    first, second = map(definitions, pair)
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differing == CHANGED[pair]
    assert first.keys() - second.keys() == ONLY_IN_FIRST[pair]
    assert CONTRACT <= first.keys() & second.keys() and not CONTRACT & differing
    shared = [name for name in first if name in second]
    assert shared == [name for name in second if name in first]  # in the same order


@pytest.mark.parametrize("pair", CHANGED, ids=" and ".join)
def test_the_diff_stays_small(pair):
    """A changed line is one that either side of the diff has more of: max(lines removed, lines added)."""
    first, second = ((ROOT / name).read_text().splitlines() for name in pair)
    diff = [
        line[:1] for line in difflib.unified_diff(first, second, n=0, lineterm="") if line[:3] not in ("---", "+++")
    ]
    assert max(diff.count("+"), diff.count("-")) < MAX_CHANGED_LINES


@pytest.mark.parametrize("pair", CHANGED, ids=" and ".join)
def test_sections_come_in_the_same_order(pair):
    rulers = [[line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ---- ")] for name in pair]
    assert rulers[0] == rulers[1] and len(rulers[0]) == 7
