"""Our loss against TRL's own, where TRL is installed (uv run --group bench pytest tests/test_grpo_trl.py)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_arithmetic import grpo_loss

trl = pytest.importorskip("trl", reason="TRL is in the bench group only: uv run --group bench pytest")
from trl import GRPOTrainer  # noqa: E402


def trl_loss(logprobs, old, ref, advantages, mask, *, loss_type, beta, epsilon, epsilon_high, max_length):
    """Runs GRPOTrainer._compute_loss on given log-probs, on a stand-in that holds only the settings it reads."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, use_vllm=False,
        importance_sampling_level="token", epsilon_low=epsilon, epsilon_high=epsilon_high, loss_type=loss_type,
        current_gradient_accumulation_steps=1, max_completion_length=max_length, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1].long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.1, 0.3)])
def test_loss_gradient_and_metrics_equal_trls_on_random_inputs(loss_type, beta, clip):
    epsilon, epsilon_high = clip
    for seed in range(5):
        torch.manual_seed(seed)
        B, T = 12, 7
        mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
        old, ref = (-torch.rand(B, T, dtype=torch.float64) for _ in range(2))
        advantages = torch.randn(B, dtype=torch.float64)
        results = []
        for theirs in (True, False):
            lp = old + 0.4 * torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            lp = lp.requires_grad_(True)
            if theirs:
                loss, metrics = trl_loss(
                    lp, old, ref, advantages, mask, loss_type=loss_type, beta=beta, epsilon=epsilon,
                    epsilon_high=epsilon_high, max_length=9,
                )  # fmt: skip
            else:
                loss, metrics = grpo_loss(
                    lp, old, ref if beta else None, advantages, mask, loss_type=loss_type, beta=beta, epsilon=epsilon,
                    epsilon_high=epsilon_high, max_completion_length=9,
                )  # fmt: skip
            (grad,) = torch.autograd.grad(loss, lp)
            results.append((loss.item(), grad, metrics))
        (a, grad_a, trl_metrics), (b, grad_b, our_metrics) = results
        assert a == pytest.approx(b, abs=1e-12)
        assert torch.allclose(grad_a, grad_b, atol=1e-12)
        for name, value in our_metrics.items():
            assert value.item() == pytest.approx(trl_metrics[name], abs=1e-6), name
