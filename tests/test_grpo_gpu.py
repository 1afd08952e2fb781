"""What only a GPU can show; benchmarks/gpu.sh runs these there."""

import copy

import pytest
import torch
from conftest import make_model
from test_grpo_decode import assert_equal
from test_grpo_model import PROMPTS, SAMPLING
from test_grpo_run import rows, run  # noqa: F401  # a fixture

from common.language.decode import GraphDecoder, pad_right
from common.language.lm import sampling_copy
from grpo_arithmetic import generate, sampling_noise, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def rollout(model, T=12, G=4, decoder=None, seed=0):
    noise = sampling_noise(seed, range(3 * G), T)
    return generate(
        model, PROMPTS, num_generations=G, max_new_tokens=T, temperature=0.7, noise=noise, decoder=decoder, **SAMPLING
    )


def test_the_gpu_samples_the_tokens_the_cpu_samples_in_float32():
    torch.set_float32_matmul_precision("highest")
    model = make_model()
    assert_equal(rollout(model), rollout(copy.deepcopy(model).cuda()), gap=1e-3)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_bfloat16_sampling_and_training_stay_close(share_prompt):
    model = make_model().cuda()
    model.set_attn_implementation("sdpa")
    sampler = sampling_copy(model, model.device, torch.bfloat16)
    prompt_ids, lengths = pad_right(PROMPTS, 256, model.device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ids, mask, sampled = rollout(sampler)
        logprobs, _ = token_logprobs(
            model, prompt_ids, lengths, ids, mask, temperature=0.7, vocab_size=259, share_prompt=share_prompt
        )
    assert ((logprobs - sampled).abs() * mask).sum() / mask.sum() < 0.05


@pytest.mark.parametrize("compiled", [False, True], ids=["graphed", "compiled"])
def test_captured_steps_sample_the_tokens_of_the_eager_loop_also_after_a_refresh(compiled):
    """Batches that shrink, weights that change in place: every step a replay, none a fallback."""
    torch.set_float32_matmul_precision("highest")
    model = make_model().cuda()
    model.set_attn_implementation("sdpa")
    sampler = copy.deepcopy(model).requires_grad_(False)
    decoder = GraphDecoder(sampler, compiled, say=pytest.fail)
    for seed in range(3):
        with torch.no_grad():
            for low, full in zip(sampler.parameters(), model.parameters()):
                full.mul_(1.0 + 0.05 * seed)
                low.copy_(full)
        slow, fast = rollout(model, 24, 20, seed=seed), rollout(sampler, 24, 20, decoder, seed)
        assert_equal(slow, fast, gap=1e-3)
        graphs = len(decoder.graphs)
    rollout(sampler, 24, 20, decoder, seed=0)
    assert decoder.fallbacks == 0 and len(decoder.graphs) == graphs > 1, "graphs are captured once"


@pytest.mark.parametrize(
    "options", [{}, {"compile": True, "gradient_checkpointing": True, "num_iterations": 2}], ids=["eager", "compiled"]
)
def test_a_run_on_the_gpu_captures_every_decode_step(run, options):  # noqa: F811
    code, folder = run(epochs=2, device="cuda", rewards=("rich",), **options)
    logged = [row for row in rows(folder) if "train/reward" in row]
    assert code == 0 and len(logged) == 4 and all(row["time/decode_fallbacks"] == 0 for row in logged)
    assert all(row["train/sampling_logp_difference/mean"] < 0.05 and row["train/skipped"] == 0 for row in logged)
