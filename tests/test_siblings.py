"""Scripts that are diffs of each other stay so: what they share is the same text."""

import ast
import difflib

import pytest
from conftest import ROOT

# (script, its sibling) -> definitions that the sibling changes on purpose; everything else they share must be identical
CHANGED = {
    ("grpo_arithmetic.py", "grpo_mixed.py"): {
        "Args",  # tasks, proportions, sampling, curricula, refill
        "Problem",  # knows its task
        "Level",  # knows the tasks' shares
        "distance",  # the task's parser in place of extract_answer
        "is_correct",
        "Rollout",
        "evaluate",  # each task's accuracy beside the standard evaluation
        "resolve",
        "check",
        "main",
        "train",
    }
}
ONLY_IN_FIRST = {  # different problems, which a mixture draws by shares
    ("grpo_arithmetic.py", "grpo_mixed.py"): {"draw_unique", "draw_bands", "level_of"}
}
MAX_CHANGED_LINES = 400  # removed plus added
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
    """All changed lines of the diff count, removed and added."""
    first, second = ((ROOT / name).read_text().splitlines() for name in pair)
    diff = difflib.unified_diff(first, second, n=0, lineterm="")
    changed = [line for line in diff if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    assert len(changed) <= MAX_CHANGED_LINES


@pytest.mark.parametrize("pair", CHANGED, ids=" and ".join)
def test_sections_come_in_the_same_order(pair):
    rulers = [[line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ---- ")] for name in pair]
    assert rulers[0] == rulers[1] and len(rulers[0]) == 6
