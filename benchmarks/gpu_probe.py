"""Small questions to a GPU, one JSON object a line: its rates, what a captured decode step is made of, cuDNN attention
where lengths change at every step, and the decode step's modules: plain, fused as the trainer's, with a change more.

    uv run python benchmarks/gpu_probe.py --parts rates kernels attention proposals
    uv run python benchmarks/gpu_probe.py --device cpu --size toy      # does it run?
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_arithmetic as grpo
from benchmarks import gpu_decode
from common.cli import parse
from common.language.decode import inverse_cdf
from common.language.fused import fuse
from common.language.lm import chunk_logprobs, head_logprobs, in_blocks
from common.parallel import join_world

Part = Literal["rates", "kernels", "attention", "head", "proposals"]


@dataclass
class Args:
    device: str = "cuda"  # cuda or cpu
    size: Literal["0.5B", "1.5B", "7B", "toy"] = "0.5B"  # architecture, of the Qwen2 family
    parts: tuple[Part, ...] = ("rates", "kernels", "attention", "head", "proposals")  # what to measure
    batch_sizes: tuple[int, ...] = (256,)  # rows of the decode steps
    compiled: bool = False  # kernels and proposals: of the compiled step


def row(part: str, **values) -> None:
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"part": part} | shown), flush=True)


def rates(flags: Args) -> None:
    """The two ceilings of this very card, on random data."""
    cuda = flags.device == "cuda"
    n, m = (2**32, 8192) if cuda else (2**22, 256)
    x = torch.randint(256, (n,), dtype=torch.uint8, device=flags.device)
    y = torch.empty_like(x)
    y.copy_(x)
    copied = gpu_decode.seconds(partial(y.copy_, x), 20, flags.device)
    a, b = (torch.randn(m, m, device=flags.device, dtype=torch.bfloat16) for _ in range(2))
    found = {}
    for name, (p, q) in {"bf16": (a, b), "fp32 or TF32": (a.float(), b.float())}.items():
        for _ in range(3):
            p @ q
        found[f"{name} TFLOP/s"] = 2 * m**3 / gpu_decode.seconds(partial(torch.matmul, p, q), 20, flags.device) / 1e12
    name = torch.cuda.get_device_name() if cuda else "CPU"
    row("rates", device=name, copy_TB_s=2 * n / copied / 1e12, **found, torch=torch.__version__,
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())  # fmt: skip


def captured(model, B: int, flags: Args):
    """A decoder whose graph for B rows has been captured, and what sets it back to its second token."""
    shape = gpu_decode.Args(device=flags.device, size=flags.size)
    decoder = gpu_decode.decoder_of(model, "compile" if flags.compiled else "graph")
    gpu_decode.rollout(model, decoder, shape, B, shape.new_tokens)
    ((replay, fallback, _),) = decoder.graphs.values()

    def reset() -> None:
        decoder.buffers.t.fill_(1)
        decoder.buffers.position.fill_(shape.prompt_tokens)

    return decoder, replay, fallback, reset


@torch.no_grad()
def step_ms(replay, reset, device: str, steps: int = 20) -> float:
    """Milliseconds of one of `steps` decode steps in a row."""
    times = []
    for _ in range(6 if device == "cuda" else 2):
        reset()
        times.append(gpu_decode.seconds(lambda: [replay() for _ in range(steps)], 1, device) / steps)
    return 1e3 * median(times[1:])


@torch.no_grad()
def kernels(flags: Args) -> None:
    """How many kernels one replay starts, and which of them take the time."""
    from torch.profiler import ProfilerActivity, profile

    cuda = flags.device == "cuda"
    model = fuse(gpu_decode.make_model(flags.size, flags.device, torch.bfloat16 if cuda else torch.float32))
    for B in flags.batch_sizes:
        _, replay, fallback, reset = captured(model, B, flags)
        reset()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
            replay()
            torch.cuda.synchronize() if cuda else None
        events = [e for e in profiled.events() if not cuda or e.device_type == torch.autograd.DeviceType.CUDA]
        spent, calls = Counter(), Counter()
        for e in events:
            calls[e.name] += 1
            spent[e.name] += e.device_time_total if cuda else e.self_cpu_time_total
        how = {"compiled": flags.compiled, "fallback": fallback}
        row("kernels", B=B, **how, step_ms=step_ms(replay, reset, flags.device), kernels=len(events),
            kernel_ms=sum(spent.values()) / 1e3)  # fmt: skip
        for name, us in spent.most_common(14):
            row("kernel", B=B, calls=calls[name], us=us, name=name[:90])


def attention(flags: Args) -> None:
    """Forward and backward of the log-probs, ten steps of which none has another's length, without and with cuDNN."""
    cuda = flags.device == "cuda"
    model = gpu_decode.make_model(flags.size, flags.device, torch.float32).requires_grad_(True)
    V, G, P = model.config.vocab_size, 16, 16 if cuda else 2
    for share_prompt in (True, False):
        for cudnn in (False, True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            draw, times, finite = torch.Generator().manual_seed(0), [], True
            for step in range(12):  # the first two warm up
                prompts = torch.randint(V, (P, 14 + step), generator=draw).to(flags.device)
                lengths = torch.full((P,), prompts.shape[1], device=flags.device)
                ids = torch.randint(V, (P * G, 4 + step), generator=draw).to(flags.device)
                mask = torch.arange(ids.shape[1]) < torch.randint(1, 5 + step, (P * G, 1), generator=draw)
                mask = mask.to(flags.device)

                def once(prompts=prompts, lengths=lengths, ids=ids, mask=mask, share_prompt=share_prompt):
                    with torch.autocast(flags.device, torch.bfloat16):
                        logp, _ = grpo.token_logprobs(
                            model, prompts, lengths, ids, mask, temperature=0.7, share_prompt=share_prompt
                        )
                    (logp.sum() / 1000).backward()

                times.append(1e3 * gpu_decode.seconds(once, 1, flags.device))
                finite &= all(bool(p.grad.isfinite().all()) for p in model.parameters())
                model.zero_grad()
            layout = "shared prompt" if share_prompt else "plain"
            row("attention", rows=layout, cudnn=cudnn, median_ms=median(times[2:]), max_ms=max(times[2:]),
                sum_ms=sum(times[2:]), gradients_finite=finite)  # fmt: skip
    torch.backends.cuda.enable_cudnn_sdp(False)


def head(flags: Args) -> None:
    """Log-probs of 16,384 tokens from hidden states: as the trainer computes them, and other ways, in chunks of 4,096."""
    cuda = flags.device == "cuda"
    N, chunk = (16384, 4096) if cuda else (64, 32)
    model = gpu_decode.make_model(flags.size, flags.device, torch.float32).requires_grad_(True)
    weight, V = model.get_output_embeddings().weight, model.config.vocab_size
    hidden = torch.randn(N, weight.shape[1], device=flags.device).to(torch.bfloat16).requires_grad_(True)
    targets = torch.randint(V, (N,), device=flags.device)
    temper = partial(grpo.tempered, temperature=0.7, vocab_size=V)

    def logprobs(entropy: bool, compiled: bool):
        model.chunk_logprobs = chunk_logprobs
        if compiled:  # as `prepare` does
            model.chunk_logprobs = partial(in_blocks, torch.compile(chunk_logprobs, dynamic=False))
        return lambda: head_logprobs(model, hidden, targets, temper, entropy, chunk)[0]

    ways = {"the policy's": (True, False), "the reference's, without entropies": (False, False),
            "the policy's, compiled": (True, True), "the reference's, compiled": (False, True)}  # fmt: skip
    first = None
    for name, how in ways.items():
        way = logprobs(*how)
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def forward(way=way):
            with torch.no_grad(), torch.autocast(flags.device, torch.bfloat16):
                return way()

        def step(way=way):
            with torch.autocast(flags.device, torch.bfloat16):
                way().sum().backward()
            weight.grad = hidden.grad = None

        try:
            forward(), step()
            first = forward() if first is None else first
            gap = (forward() - first).abs().max().item()
            ms = [1e3 * gpu_decode.seconds(f, 5, flags.device) for f in (forward, step)]
        except Exception as error:
            row("head", way=name, failed=str(error).splitlines()[0][:200])
            continue
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        row("head", way=name, tokens=N, forward_ms=ms[0], step_ms=ms[1], peak_gb=peak, largest_gap=gap)


# ---- proposals: what the trainer's copy fuses, and a change that it does not have -------------------------------------


def sample_in_one_pass_less(logits, uniform, temperature, vocab_size=None):
    """The trainer's draw; the log-prob is that of the chosen probability."""
    p = grpo.tempered(logits, temperature, vocab_size).softmax(-1)  # (B, V)
    tokens = inverse_cdf(p, uniform)
    return tokens, p.gather(-1, tokens[:, None])[:, 0].log()


@torch.no_grad()
def proposals(flags: Args) -> None:
    """A decode step on plain modules, on the trainer's, with a change: time, draws, log-probs against float32."""
    plain = grpo.sample_tokens
    dtype = torch.bfloat16 if flags.device == "cuda" else torch.float32
    changes = {
        "plain modules": (plain, False), "the trainer's": (plain, True),
        "one pass less": (sample_in_one_pass_less, True), "plain modules, again": (plain, False),
    }  # fmt: skip
    exact = gpu_decode.make_model(flags.size, flags.device, torch.float32)
    text = torch.randint(exact.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0)).to(flags.device)
    exact_logp = exact(input_ids=text).logits.log_softmax(-1)
    del exact
    for B in flags.batch_sizes:
        logits = torch.randn(B, exact_logp.shape[-1], device=flags.device, dtype=dtype)
        uniform = torch.rand(B, device=flags.device)
        for name, (sample, fused) in changes.items():
            model = gpu_decode.make_model(flags.size, flags.device, dtype)
            if fused:
                fuse(model)
            gap = (model(input_ids=text).logits.float().log_softmax(-1) - exact_logp).abs().mean().item()
            same = (sample(logits, uniform, 0.7)[0] == plain(logits, uniform, 0.7)[0]).float().mean().item()
            grpo.sample_tokens = sample
            try:
                decoder, replay, fallback, reset = captured(model, B, flags)
                ms = step_ms(replay, reset, flags.device)
            finally:
                grpo.sample_tokens = plain
            row("proposal", B=B, change=name, compiled=flags.compiled, step_ms=ms, tokens_per_s=1e3 * B / ms,
                fallback=fallback, draws_equal=same, logp_gap_to_fp32=gap)  # fmt: skip
            del decoder, replay, reset, model


def main(flags: Args) -> None:
    join_world(flags.device)
    if flags.size == "toy":
        flags = replace(flags, batch_sizes=(8,))
    for part in flags.parts:
        {"rates": rates, "kernels": kernels, "attention": attention, "head": head, "proposals": proposals}[part](flags)
        torch.cuda.empty_cache() if flags.device == "cuda" else None


if __name__ == "__main__":
    main(parse(Args, __doc__))
