"""GR00T N1.5 at its published size, random weights: training speed and memory, sampling latency, attention kernels.

    uv run python benchmarks/gpu_gr00t.py                           # 2.4 billion parameters made on the GPU, no download
    uv run python benchmarks/gpu_gr00t.py --device cpu --reduced    # the tiny model: does all of it run

One JSON line per row. A training step is gr00t_finetune.py's with its default flags (frozen backbone in bf16, head in
fp32 under autocast, gradient clipping, fused AdamW) on one synthetic batch that is already on the device: the loader
is timed by gr00t_data.py. Sampling is one observation, four Euler steps. "peak_gb" is 1e9 bytes of allocated tensors
on a GPU, the process's largest resident set so far on a CPU.
"""

import json
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gr00t_finetune as g
from common.cli import parse
from common.parallel import join_world
from common.robot.gr00t_n15 import GR00T, GR00TConfig


@dataclass
class Args:
    device: str = "cuda"  # cuda or cpu
    reduced: bool = False  # the tiny model, batches of 1 and 2, and of what is compiled the sampling alone
    batch_sizes: tuple[int, ...] = (1, 8, 32)  # samples of a training step
    compiled_batch_sizes: tuple[int, ...] = (32,)
    """those that are timed compiled as well: at full size each takes a minute or two to compile"""
    compiled: bool = True  # sample with a compiled and with a graphed head too, and train the compiled one
    cameras: int = 2  # camera views; a prompt has 256 tokens for each and 45 more
    steps: int = 10  # timed steps of each row, after three that are not


def make_model(config: GR00TConfig, device: torch.device, args: g.Args) -> GR00T:
    """The modules of `config` in the dtypes that `load_model` gives a checkpoint, with random weights, on `device`."""
    with torch.device("meta"):
        model = GR00T(config, args.attn_implementation)
    model.backbone.to(torch.bfloat16 if args.amp == "bf16" else torch.float32)
    model.to_empty(device=device)
    model.backbone.restore_buffers()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.set_trainable()
    return model


def make_batch(config: GR00TConfig, B: int, cameras: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as `Demonstrations` makes it, of random numbers; of the 32 action dims six are real."""
    generator = torch.Generator().manual_seed(0)
    image_tokens = config.tokens_per_image * cameras
    ids = torch.randint(0, 256, (B, image_tokens + 45), generator=generator)
    ids[:, 20 : 20 + image_tokens] = config.image_token_index
    size = config.image_size
    batch = {
        "images": torch.randint(0, 256, (B * cameras, 3, size, size), generator=generator, dtype=torch.uint8),
        "eagle_input_ids": ids,
        "eagle_attention_mask": torch.ones_like(ids),
        "state": torch.randn(B, 1, config.state_dim, generator=generator),
        "embodiment_id": torch.tensor([31]),
        "action": torch.randn(B, config.action_horizon, config.action_dim, generator=generator),
        "action_mask": (torch.arange(config.action_dim) < 6).expand(B, config.action_horizon, config.action_dim),
        "noise": torch.randn(B, config.action_horizon, config.action_dim, generator=generator),
        "t": torch.rand(B, generator=generator),
    }
    return g.to_device(batch, device)


def seconds(function, steps: int, device: torch.device) -> float:
    """Seconds of one call: the mean of `steps` calls in a row, after three that warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        function()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        function()
    wait()
    return (time.perf_counter() - start) / steps


def peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def row(part: str, **values) -> None:
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"part": part} | shown), flush=True)


def train_step(model, batch, optimizer, parameters, args: g.Args, device: torch.device) -> None:
    with g.autocast(args, device):
        loss = g.flow_matching_loss(model, batch, batch["noise"], batch["t"])
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training(model, sizes, compiled: bool, flags: Args, args: g.Args, device: torch.device) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        g.parameter_groups(model, args.weight_decay), lr=1e-6, betas=args.adam_betas, eps=1e-8, fused=True
    )
    g.set_training(model, {})
    for B in sizes:
        batch = make_batch(model.config, B, flags.cameras, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = partial(train_step, model, batch, optimizer, parameters, args, device)
        try:
            s = seconds(step, flags.steps, device)
            row("train", batch=B, compiled=compiled, step_ms=1e3 * s, samples_per_s=B / s, peak_gb=peak_gb(device))
        except torch.OutOfMemoryError:  # a result too: this card is too small for this batch
            row("train", batch=B, compiled=compiled, step_ms="out of memory", samples_per_s=0.0, peak_gb=None)
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


@torch.no_grad()
def sampling(model, how: str, flags: Args, args: g.Args, device: torch.device) -> None:
    model.eval()
    batch = make_batch(model.config, 1, flags.cameras, device)

    def sample() -> None:
        with g.autocast(args, device):
            g.sample_actions(model, batch, batch["noise"], 4).cpu()  # a robot waits for the numbers

    def backbone() -> None:
        with g.autocast(args, device):
            model.backbone(batch)

    whole, part = (1e3 * seconds(f, flags.steps, device) for f in (sample, backbone))
    row("sample", batch=1, euler_steps=4, head=how, latency_ms=whole, of_which_backbone_ms=part)


def attention_kernels(config: GR00TConfig, B: int, flags: Args, device: torch.device) -> None:
    """Each kernel that torch has, forward and backward, on the head's three attention shapes without a mask."""
    tokens = 1 + config.num_future_tokens + config.action_horizon
    S = config.tokens_per_image * flags.cameras + 45
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, heads, dim, queries, keys in (
        ("DiT cross", config.dit_heads, config.dit_head_dim, tokens, S),
        ("DiT self", config.dit_heads, config.dit_head_dim, tokens, tokens),
        ("VL self", config.vl_heads, config.vl_head_dim, S, S),
    ):
        q, k, v = (
            torch.randn(B, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for n in (queries, keys, keys)
        )
        times: dict[str, float | str] = {}
        for kernel in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

            def step(q=q, k=k, v=v, kernel=kernel) -> None:
                with nullcontext() if kernel == "default" else sdpa_kernel(getattr(SDPBackend, kernel)):
                    F.scaled_dot_product_attention(q, k, v).sum().backward()

            column = kernel.lower().removesuffix("_attention")
            try:
                times[column] = 1e3 * seconds(step, flags.steps, device)
            except torch.OutOfMemoryError:
                times[column] = "out of memory"
            except RuntimeError:  # no such kernel for this device, dtype or head size
                times[column] = "not available"
        row("attention, ms", shape=f"{name}: {queries} x {keys}, {heads} heads of {dim}, batch {B}", **times)


def main(flags: Args) -> None:
    device = join_world(flags.device).device
    args = g.resolve(g.Args(model_path="nvidia/GR00T-N1.5-3B", device=flags.device))
    torch.set_float32_matmul_precision("highest")  # as the script does where autocast is on
    config = GR00TConfig()
    if flags.reduced:
        config = GR00TConfig.tiny(image_size=32, dit_layers=2, dropout=0.2, vl_dropout=0.2)
        flags = replace(flags, batch_sizes=(1, 2), compiled_batch_sizes=(), steps=2)
    model = make_model(config, device, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row(
        "model",
        parameters=sum(p.numel() for p in model.parameters()),
        trained=trained,
        amp=args.amp,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
    )
    attention_kernels(config, max(flags.batch_sizes), flags, device)
    sampling(model, "eager", flags, args, device)
    training(model, flags.batch_sizes, False, flags, args, device)
    head = model.action_head
    if not flags.compiled:
        return
    for mode in ("default", "reduce-overhead") if device.type == "cuda" else ("default",):  # the latter: CUDA graphs
        model.compile_head(None if mode == "default" else mode)
        sampling(model, f"compiled, {mode}", flags, args, device)
        if mode == "default":
            training(model, flags.compiled_batch_sizes, True, flags, args, device)
        del head.velocity, head.process_backbone  # the methods again
        torch.compiler.reset()


if __name__ == "__main__":
    main(parse(Args, __doc__))
