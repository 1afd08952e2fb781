"""Helpers that must be the same in two scripts are the same, to the letter; what else they share differs on purpose."""

import inspect

import pytest
from conftest import ROOT
from test_siblings import definitions

import ppo_fetch
import ppo_gr00t

TWINS = {
    ppo_fetch: [
        "RunningStatistics", "orthogonal", "mlp", "gae", "ppo_loss", "normalize_advantages", "minibatch_order",
        "returns_of", "summary",
    ],
}  # fmt: skip


@pytest.mark.parametrize("sibling, name", [(module, name) for module, names in TWINS.items() for name in names],
                         ids=lambda v: v if isinstance(v, str) else v.__name__)  # fmt: skip
def test_twins_are_identical(sibling, name):
    assert inspect.getsource(getattr(ppo_gr00t, name)) == inspect.getsource(getattr(sibling, name))


# in both PPO scripts under one name, and not the same: the policy, its chunks, its checkpoint, its evaluation
CHANGED = {
    "Args", "Group", "Agent", "update", "rollout", "evaluate", "record_video", "resolve", "check", "main",
}  # fmt: skip


def test_what_a_flow_policy_changes_in_ppo_is_listed():
    first, second = definitions("ppo_fetch.py"), definitions("ppo_gr00t.py")
    shared = first.keys() & second.keys()
    assert {name for name in shared if first[name] != second[name]} == CHANGED
    assert shared - CHANGED == set(TWINS[ppo_fetch]) and {"gae", "ppo_loss"} <= shared - CHANGED


def test_sections_come_in_the_same_order():
    names = ("ppo_fetch.py", "ppo_gr00t.py")
    rulers = [[line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ---- ")] for name in names]
    assert rulers[0] == rulers[1] and len(rulers[0]) == 7
