"""Fewer kernels for the copy that samples: a captured decode step of a small model is bound by their number.

Linear layers of one input (q, k and v; gate and up) become one product, an RMSNorm one kernel. Parameters keep their
names, their order and their shapes, so the copy is refreshed in place like any other.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one module, which gives them one input


class Joined:
    """Linear layers as one product: from now on their weights (and biases) are views of one buffer.

    The first to be called computes all, the others fetch their part. One that is given anything else than what the
    first was given computes by itself, whatever the model does in between.
    """

    def __init__(self, layers: list[nn.Linear]):
        self.sizes, self.input, self.outputs = [layer.out_features for layer in layers], None, ()
        self.weight, self.bias = (self.buffer(layers, name) for name in ("weight", "bias"))
        for i, layer in enumerate(layers):
            layer.forward = partial(self.part, layer, i)

    def buffer(self, layers, name: str) -> torch.Tensor | None:
        """(outputs of all, ...), of which each layer's tensor becomes a part."""
        if getattr(layers[0], name) is None:
            return None
        whole = torch.cat([getattr(layer, name).data for layer in layers])
        for layer, part in zip(layers, whole.split(self.sizes)):
            getattr(layer, name).data = part
        return whole

    def part(self, layer: nn.Linear, i: int, x: torch.Tensor) -> torch.Tensor:
        if i == 0:
            self.input, self.outputs = x, F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        elif x is not self.input:
            return F.linear(x, layer.weight, layer.bias)
        out = self.outputs[i]
        if i == len(self.sizes) - 1:  # nothing is kept from one step to the next
            self.input, self.outputs = None, ()
        return out


def rms_norm(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)  # eq: w x / sqrt(mean(x^2) + eps)


def is_rms_norm(layer: nn.Module) -> bool:
    """Whether it computes what `rms_norm` does, tried with random weights: some models mean 1 + w by w."""
    if not hasattr(layer, "variance_epsilon"):
        return False
    trial, draw = copy.deepcopy(layer).to("cpu", torch.float32), torch.Generator().manual_seed(0)
    trial.weight.data = torch.randn(trial.weight.shape, generator=draw)
    x = torch.randn(4, *trial.weight.shape, generator=draw)
    return torch.allclose(trial(x), rms_norm(trial, x), atol=1e-5)


def fuse(model: nn.Module, say=print) -> nn.Module:
    """Changes a model without gradients in place. What has another form stays as it is; `say` tells, once."""
    joined, norms = 0, {}
    for module in model.modules():
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers) and len({layer.bias is None for layer in layers}) == 1:
                Joined(layers)
                joined += 1
        if (kind := type(module).__name__).endswith("RMSNorm"):
            if kind not in norms:
                norms[kind] = is_rms_norm(module)
            if norms[kind]:
                module.forward = partial(rms_norm, module)
    other = ["projections"] * (not joined) + [kind for kind, known in norms.items() if not known]
    if other:
        say(f"sampling: {' and '.join(other)} of {type(model).__name__} have a form of their own and stay as they are")
    return model
