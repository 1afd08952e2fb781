"""Helpers that must be the same in two scripts are the same, to the letter."""

import inspect

import pytest

import gr00t_finetune
import ppo_fetch
import ppo_gr00t

TWINS = {
    ppo_fetch: [
        "RunningStatistics", "orthogonal", "mlp", "gae", "ppo_loss", "normalize_advantages", "minibatch_order",
        "returns_of", "wilson", "summary", "task_of", "video_off",
    ],
    gr00t_finetune: ["LoRALinear", "add_lora", "merged", "resolve_model_path", "prompt", "load_tokenizer", "wilson"],
}  # fmt: skip


@pytest.mark.parametrize("sibling, name", [(module, name) for module, names in TWINS.items() for name in names],
                         ids=lambda v: v if isinstance(v, str) else v.__name__)  # fmt: skip
def test_twins_are_identical(sibling, name):
    assert inspect.getsource(getattr(ppo_gr00t, name)) == inspect.getsource(getattr(sibling, name))
