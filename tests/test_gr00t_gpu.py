"""GR00T on a device: what its numbers rely on there. benchmarks/gpu.sh runs this file on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_gr00t_run import make_batch

import gr00t_finetune as g
from common.robot.gr00t_n15 import GR00T, GR00TConfig

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_rows_that_see_no_key_get_zeros_and_finite_gradients(device, dtype):
    """The pad tokens of a left-padded prompt: the head reads their features, so NaN there would be NaN everywhere."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 12, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    real = torch.arange(12, device=device) >= torch.tensor([[0], [5]], device=device)  # (B, S): 5 pads in the second
    mask = (real[:, None, None] & torch.ones(12, 12, dtype=torch.bool, device=device).tril()).expand(2, 4, 12, 12)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y.float().square().sum().backward()
    assert y[1, :, :5].abs().max() == 0 and y[1, :, 5:].abs().min() > 0
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def on_gpu():
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.tiny(image_size=32))
    model.set_trainable(True, True, True, True)
    batch = make_batch(config=model.config, lengths=[22, 22, 18])
    return model.eval().cuda(), {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["compiled", "graphed"])
def test_a_compiled_or_graphed_head_equals_the_eager_one(mode):
    model, batch = on_gpu()
    fast = copy.deepcopy(model)
    fast.compile_head(mode)
    for _ in range(3):  # a graph is recorded at the second call and replayed from the third on
        actions = [g.sample_actions(m, batch, batch["noise"]) for m in (model, fast)]
        assert (actions[0] - actions[1]).abs().max() < 1e-4 * actions[0].abs().max()
    if mode is None:
        for m in (model, fast):
            g.flow_matching_loss(m, batch, batch["noise"], batch["t"]).backward()
        for (name, a), b in zip(model.named_parameters(), fast.parameters()):
            assert (a.grad - b.grad).norm() < 1e-3 * a.grad.norm() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_moves_loss_and_actions_by_little():
    model, batch = on_gpu()
    found = []
    for amp in ("off", "bf16"):
        with g.autocast(g.Args(amp=amp), torch.device("cuda")), torch.no_grad():
            loss = g.flow_matching_loss(model, batch, batch["noise"], batch["t"])
            found.append((loss.item(), g.sample_actions(model, batch, batch["noise"])))
    (a, x), (b, y) = found
    assert abs(a - b) < 0.02 * a and (x - y).norm() < 0.05 * x.norm()
