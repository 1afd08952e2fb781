"""Processes that torchrun started, and weights, gradients and moments that they share.

A sharded model (FSDP2) takes the same calls as a whole one: a gradient is summed, clipped, gathered or saved by the
same line of a script, whatever `--fsdp` says.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.cli import fail


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started (one process: rank 0 of 1)."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's rows of `count`, which divides by the number of processes."""
        part, rest = divmod(count, self.size)
        assert rest == 0, f"{count} rows cannot be shared by {self.size} processes"
        return slice(self.rank * part, (self.rank + 1) * part)

    def total(self, *tensors: torch.Tensor):
        """Sums over all processes, in place and in one message; the tensors (one: itself) are returned."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))
        return tensors[0] if len(tensors) == 1 else tensors

    def gather(self, rows: list) -> list:
        """Concatenates every process's list, in the order of the ranks, on every process."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def any(self, *facts: bool) -> list[bool]:
        """Which of these facts holds in some process."""
        return [any(column) for column in zip(*self.gather([facts]))]

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def cores() -> int:
    """Those that this process may run on; macOS does not tell, so there all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join_world(device: str) -> World:
    """Picks the device ("auto", "cpu", "cuda") and joins the process group when torchrun started this process."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch sees no CUDA device; --device cpu works everywhere")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        # cuDNN's attention makes a plan for every new shape, which is most steps here, and its gradients can be NaN
        # where a mask meets certain lengths (pytorch#196678); torch then takes flash or memory-efficient attention
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(int(os.environ.get("RANK", 0)), size, torch.device(device))


# ---- sharded weights -------------------------------------------------------------------------------------------------


def shard(model: nn.Module, units: Iterable[nn.Module], world: World, methods: Iterable[str] = (), **policy) -> None:
    """FSDP2: each process keeps a part of every weight, gradient and moment; a unit is gathered while it computes.

    units: modules gathered one after the other, in the order they compute; what is left of `model` is one more.
    methods: besides forward, those of the model's methods that read weights of its own. policy: MixedPrecisionPolicy's.
    From then on a forward or backward pass is one of all processes, and backward leaves gradients summed over them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*units, model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy), reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a process has a part of the batch's loss: gradients add up
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo knows too
    for method in methods:
        register_fsdp_forward_method(model, method)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over the processes, or not, as a whole one; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Tensors that may be spread over the processes made whole, one by one, on the CPU of the process that keeps them.

    Every process calls it, with the same names; those that do not keep get nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor spread as `parameter` is, or left whole as it is."""
    if not isinstance(parameter, DTensor) or not value.dim():
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def sum_gradients(parameters: Iterable[nn.Parameter], world: World, bucket: int = 25_000_000) -> None:
    """Adds up all processes' gradients, some 100 MB at a time; those of sharded weights, backward has added already.

    A process may not have needed a parameter that another has: its part is 0.
    """
    grads, size = [], 0
    for p in parameters if world.size > 1 else ():
        if isinstance(p, DTensor):
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
        size += p.numel()
        if size > bucket:
            world.total(*grads)
            grads, size = [], 0
    world.total(*grads) if grads else None


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> torch.Tensor:
    """Scales gradients down to this norm in all, 0: leaves them as they are; returns the norm () before."""
    return whole(nn.utils.clip_grad_norm_(parameters, largest or torch.inf))


@torch.no_grad()
def refresh(copy: nn.Module, model: nn.Module) -> None:
    """Gives a (low precision) copy the model's weights, in place: captured graphs and caches keep their addresses."""
    for low, full in zip(copy.parameters(), model.parameters()):
        low.copy_(whole(full.to(low.dtype)))
