"""LoRA (arXiv 2106.09685): low-rank matrices beside the attention projections of GR00T, in place of training them."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import trainer_file
from common.robot.files import read_tensors
from common.robot.gr00t import Network


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained matrix of low rank."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, nn.Dropout(dropout)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))  # starts as the layer it adapts
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        # eq: y = W x + b + (alpha / r) B A x   [LoRA, arXiv 2106.09685]
        low = F.linear(self.dropout(x).to(self.A.dtype), self.A)
        return self.linear(x) + self.scale * F.linear(low, self.B)

    def merged_weight(self) -> Tensor:
        # eq: W' = W + (alpha / r) B A
        return (self.linear.weight.float() + self.scale * (self.B @ self.A)).to(self.linear.weight.dtype)

    def parts(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "weight": self.linear.weight}


def add_lora(model: Network, args) -> dict[str, LoRALinear]:
    """Puts adapters on the attention projections; trained are they and, as ever, the embodiment layers.

    The reference freezes the embodiment layers too, which leaves a new robot with layers that were never trained.
    args: lora_rank, lora_alpha, lora_dropout, lora_full_model, lora_targets, tune_projector.
    """
    ends = ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
    ends += ("out_proj", "o_proj", "to_out.0") if args.lora_targets == "qkvo" else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.tune_projector and model.group_of(name) == "tune_projector")
    adapters = {}
    for name, linear in list(model.named_modules()):
        wanted = name.endswith(ends) and (args.lora_full_model or name.startswith("action_head."))
        if wanted and isinstance(linear, nn.Linear):
            adapter = LoRALinear(linear, args.lora_rank, args.lora_alpha, args.lora_dropout).train(linear.training)
            adapters[name] = adapter
            put(model, name, adapter)
    return adapters


def put(model: Network, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def merged(model: Network, adapters: dict[str, LoRALinear]):
    """Inside, the model is the plain one with the adapters added to its weights; outside, it is what it was."""
    kept = {name: adapter.linear.weight.data for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        adapter.linear.weight.data = adapter.merged_weight().detach()
        put(model, name, adapter.linear)
    try:
        yield
    finally:
        for name, adapter in adapters.items():
            adapter.linear.weight.data = kept[name]
            put(model, name, adapter)


def adapter_tensors(adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """What a continued run needs beside the merged weights, on the CPU: each layer's A, B and unmerged weight."""
    return {
        f"{name}.{part}": tensor.detach().cpu().contiguous()
        for name, adapter in adapters.items()
        for part, tensor in adapter.parts().items()
    }


@torch.no_grad()
def load_adapters(adapters: dict[str, LoRALinear], folder: Path) -> None:
    """From a checkpoint's lora.safetensors."""
    tensors = read_tensors(trainer_file(folder, "lora.safetensors"), adapter_tensors(adapters)) if adapters else {}
    for name, adapter in adapters.items():
        for part, to in adapter.parts().items():
            to.copy_(tensors[f"{name}.{part}"])
