"""What the two PPO scripts share is the same, to the letter; what differs is listed, and how much the diff teaches."""

import difflib
import inspect

import pytest
from conftest import ROOT
from test_siblings import definitions

import ppo_fetch
import ppo_gr00t

TWINS = [
    "potential_of", "reward_of", "orthogonal", "mlp", "gae", "ppo_loss", "normalize_advantages",
    "minibatch_order", "update", "group_advantages", "episode_advantages", "evaluate", "measure", "resolve",
]  # fmt: skip
# in both under one name, and not the same: the policy, its chunks, its checkpoint, its evaluation
CHANGED = {
    "Args", "Group", "make_groups", "Agent", "advantages_of", "minibatch_loss", "rollout", "play", "record_video",
    "check", "train", "main",
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_identical(name):
    assert inspect.getsource(getattr(ppo_gr00t, name)) == inspect.getsource(getattr(ppo_fetch, name))


def test_what_a_flow_policy_changes_in_ppo_is_listed():
    first, second = definitions("ppo_fetch.py"), definitions("ppo_gr00t.py")
    shared = first.keys() & second.keys()
    assert {name for name in shared if first[name] != second[name]} == CHANGED
    assert shared - CHANGED == set(TWINS)


def test_a_group_is_compared_as_in_grpo():
    assert definitions("ppo_fetch.py")["group_advantages"] == definitions("grpo_arithmetic.py")["group_advantages"]


def test_sections_come_in_the_same_order():
    names = ("ppo_fetch.py", "ppo_gr00t.py")
    rulers = [[line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ---- ")] for name in names]
    assert rulers[0] == rulers[1] and len(rulers[0]) == 7


def test_the_diff_is_short():
    texts = [(ROOT / name).read_text().splitlines() for name in ("ppo_fetch.py", "ppo_gr00t.py")]
    changed = [line for line in difflib.unified_diff(*texts, n=0) if line[0] in "+-"]
    assert len(changed) - 2 <= 900  # two lines name the files
