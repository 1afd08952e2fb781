"""What the tests of GR00T N1.5's and N1.7's networks share: loss and sampler, the originals' fixtures, damaged files."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.robot.gr00t import Network

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
TOLERANCE = {  # as stated beside the fixtures; gpu: TF32 off
    "cpu": dict(features=1e-5, loss=1e-5, velocity=1e-4, actions=5e-5, grad=3e-4, adamw=1e-4),
    "cuda": dict(features=1e-4, loss=1e-4, velocity=5e-4, actions=5e-4, grad=2e-3, adamw=1e-3),
}


# ---- the equations that turn a velocity into a loss and into actions -------------------------------------------------


def flow_loss(model, batch):
    """eq: x_t = (1 - t) noise + t action;  loss = sum(mask (v_pred - (action - noise))^2) / sum(mask)"""
    features, mask = model.vl_features(batch)
    noise, action, t = batch["noise"], batch["action"], batch["t"]
    x_t = (1 - t[:, None, None]) * noise + t[:, None, None] * action
    v_pred = model.velocity(features, mask, batch["state"], x_t, t, batch["embodiment_id"])
    m = batch["action_mask"].float()
    return ((v_pred - (action - noise)) ** 2 * m).sum() / m.sum(), v_pred


@torch.no_grad()
def sample(model, batch, steps):
    features, mask = model.vl_features(batch)
    x = batch["initial_noise"]
    for k in range(steps):
        t = torch.full((len(x),), k / steps, device=x.device)
        x = x + model.velocity(features, mask, batch["state"], x, t, batch["embodiment_id"]) / steps
    return x


# ---- parity with the original ----------------------------------------------------------------------------------------


class HeadOnly(torch.nn.Module):
    """An action head with given backbone features."""

    vl_features = Network.vl_features

    def __init__(self, head):
        super().__init__()
        self.action_head, self.velocity, self.process_backbone = head, head.velocity, head.process_backbone


def load_fixture(folder, name, prefix="", device="cpu"):
    """All tensors of a fixture, those that a model takes, and what its JSON says."""
    tensors = load_file(folder / f"{name}.safetensors")
    inputs = {k.removeprefix(f"{prefix}input."): v for k, v in tensors.items() if k.startswith(f"{prefix}input.")}
    return tensors, {k: v.to(device) for k, v in inputs.items()}, json.loads((folder / f"{name}.json").read_text())


def distance(a, b):
    """max |a - b| / max |b|"""
    return ((a.cpu() - b.cpu()).abs().max() / b.abs().max()).item()


def assert_gradients(model, expected, tolerance, **inputs):
    tensors = dict(model.named_parameters()) | {f"input.{name}": tensor for name, tensor in inputs.items()}
    found = {name: p.grad.norm().item() for name, p in tensors.items() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        # key biases: a shift of all scores, zero up to rounding
        assert abs(found[name] - norm) < max(tolerance * norm, 1e-6), name


def assert_adamw(model, batch, adamw):
    """As many updates on one batch as the original made: its losses before each of them."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[name not in adamw["not_decayed"]].append(p)
    groups = [dict(params=groups[True], weight_decay=adamw["weight_decay"]), dict(params=groups[False], weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr=adamw["lr"], betas=adamw["betas"], eps=adamw["eps"])
    for target in adamw["losses"]:
        loss, _ = flow_loss(model, batch)
        assert abs(loss.item() / target - 1) < TOLERANCE["cpu"]["adamw"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adamw["clip_grad_norm"])
        optimizer.step()


# ---- golden values ---------------------------------------------------------------------------------------------------


def fill(model):
    """Weights that do not depend on torch's generators: every bias, norm and embodiment row differs from the others."""
    for index, (_, p) in enumerate(sorted(model.named_parameters())):
        x = np.random.RandomState(index).standard_normal(p.shape)
        if p.dim() > 1:
            x = 0.8 * x / math.sqrt(p.shape[1] if p.dim() < 4 else p[0].numel())
        else:
            x = 0.1 * x
        p.data.copy_(torch.from_numpy(x))
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight") and p.dim() == 1 or name.endswith("vlln.weight"):
            p.data += 1
    return model


def grad_norm(part):
    return math.sqrt(sum(p.grad.square().sum().item() for p in part.parameters()))


def assert_golden(found, expected, device):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        near = TOLERANCE[device]["loss"] if name == "loss" else {"cpu": 1e-4, "cuda": 2e-3}[device]
        assert found[name] == pytest.approx(values, rel=near, abs=near), name


# ---- files -----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, change, file="config.json"):
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def assert_refused(network, folder, words, capsys):
    """Loading it ends in one line that holds these words, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        network.from_pretrained(folder)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words), line
