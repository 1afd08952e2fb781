"""Our loss against TRL's own, where TRL is installed (uv run --group bench pytest tests/test_grpo_trl.py)."""

from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch

from grpo_arithmetic import grpo_loss

trl = pytest.importorskip("trl", reason="TRL is in the bench group only: uv run --group bench pytest")
from trl import GRPOTrainer  # noqa: E402


def trl_loss(
    logprobs, old, ref, advantages, mask, *, max_length, loss_type, importance, kl_gradient, top=1.0, **options
):
    """Runs GRPOTrainer._compute_loss on given log-probs, on a stand-in that holds only the settings it reads."""
    entropies = -logprobs.detach()  # stand-ins, positive
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=top, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level=importance, epsilon_low=options["epsilon"], epsilon_high=options["epsilon_high"],
        beta=options["beta"], loss_type=loss_type, current_gradient_accumulation_steps=1,
        max_completion_length=max_length, _entropy_bonus_enabled=False, model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=kl_gradient == "reverse", steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        ),
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
    )  # fmt: skip
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1].long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def both(seed: int, top: float = 1.0, **options):
    """(loss, gradient, metrics) of ours and of TRL's on one random batch."""
    torch.manual_seed(seed)
    B, T = 12, 7
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    old, ref = (-torch.rand(B, T, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(B, dtype=torch.float64)
    moved, results = old + 0.4 * torch.randn(B, T, dtype=torch.float64), []
    for ours in (True, False):
        lp = moved.clone().requires_grad_(True)
        if ours:
            H = -moved
            chosen = None if top == 1 else H >= H[mask].float().quantile(1 - top)
            given = lp, old, ref if options["beta"] else None, advantages, mask
            loss, metrics = grpo_loss(*given, max_completion_length=9, trained=chosen, **options)
        else:
            loss, metrics = trl_loss(lp, old, ref, advantages, mask, max_length=9, top=top, **options)
        results.append((loss.item(), torch.autograd.grad(loss, lp)[0], metrics))
    return results


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("beta, kl_gradient", [(0.0, "k3"), (0.1, "k3"), (0.1, "reverse")])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.1, 1.1)])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_loss_gradient_and_metrics_equal_trls_on_random_inputs(loss_type, beta, kl_gradient, clip, importance):
    settings = {"loss_type": loss_type, "beta": beta, "kl_gradient": kl_gradient, "importance": importance}
    for seed in range(5):
        (a, grad_a, ours), (b, grad_b, trls) = both(seed, epsilon=clip[0], epsilon_high=clip[1], **settings)
        tolerance = 1e-7 if loss_type == "sapo" else 1e-12  # whose 1.05 is a float32 in TRL
        assert a == pytest.approx(b, abs=tolerance)
        assert torch.allclose(grad_a, grad_b, atol=tolerance)
        if importance == "token":  # TRL counts rows, not tokens, where a ratio is a row's
            same = {name for name in ours.keys() & trls.keys() if name != "kl" or kl_gradient == "k3"}
            assert {name: ours[name].item() for name in same} == pytest.approx({n: trls[n] for n in same}, abs=1e-6)
            assert len(same) >= (5 if loss_type not in ("cispo", "sapo") else 0) + (beta != 0 and kl_gradient == "k3")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_training_the_tokens_of_highest_entropy_alone_is_trls(beta):
    settings = {"loss_type": "dapo", "beta": beta, "kl_gradient": "k3", "importance": "token"}
    for seed in range(5):
        (a, grad_a, _), (b, grad_b, _) = both(seed, top=0.2, epsilon=0.2, epsilon_high=0.2, **settings)
        assert a == pytest.approx(b, abs=1e-12) and torch.allclose(grad_a, grad_b, atol=1e-12)
