"""Decode speed of grpo_arithmetic.py's generation loop beside what the memory of the card allows, and its numerics.

Prints a JSON object a line. Random weights: the speed of a decode step does not depend on them. A row is a rollout of B
completions, 16 per prompt, none of which ends early. A step is timed as (a rollout of N tokens - a rollout of one token)
/ (N - 1), so the prefill is not in it; rollout_tokens_per_s has it in. The roofline is the time to read what a step must
read once, weights and the keys and values of the tokens so far, or to do its arithmetic, whichever is longer:

    bytes = weights + B * context * bytes of keys and values per token;  operations = 2 * weights * B

    uv run python benchmarks/gpu_decode.py                             # Qwen2-0.5B's architecture, bfloat16, on a GPU
    uv run python benchmarks/gpu_decode.py --device cpu --reduced      # does it run? a toy on a CPU, in float32
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo_arithmetic as grpo
from common.cli import fail
from common.language.decode import Decoder, GraphDecoder, additive, pad_right
from common.language.fused import fuse
from common.language.lm import sampling_copy

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied: the Qwen2 family's published configurations
SIZES = {
    "toy": (64, 128, 2, 4, 2, 1024, True),
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
# memory bandwidth in TB/s and dense bfloat16 TFLOP/s from NVIDIA's data sheets (SXM)
CARDS = {"H200": (4.8, 989), "H100": (3.35, 989), "A100": (2.0, 312)}


@dataclass
class Args:
    device: Literal["cuda", "cpu"] = "cuda"  # cuda: bfloat16; cpu: float32
    size: Literal["0.5B", "1.5B", "7B", "toy"] = "0.5B"  # architecture, of the Qwen2 family
    batch_sizes: tuple[int, ...] = (16, 64, 256, 512)  # completions B
    modes: tuple[Literal["eager", "graph", "compile"], ...] = ("eager", "graph", "compile")  # values of --decode
    checks: bool = True  # numerics and sampling after the speed
    compile_batch_sizes: tuple[int, ...] = (256,)
    """those of B that `compile` is measured at: each costs a compilation of all layers"""
    prompt_tokens: int = 32  # length of every prompt
    new_tokens: int = 32  # length N of every completion; 64 tokens in all are one bucket of columns
    repeats: int = 5  # timed rollouts of each length; the median counts
    reduced: bool = False  # the toy architecture, two small batches, few tokens


def make_model(size: str, device: str, dtype: torch.dtype):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return sampling_copy(Qwen2ForCausalLM(config).eval(), torch.device(device), dtype)


def kv_bytes(size: str, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a token leaves in the cache."""
    hidden, _, layers, heads, kv_heads, *_ = SIZES[size]
    return 2 * layers * kv_heads * (hidden // heads) * dtype.itemsize


def decoder_of(model, mode: str):
    """What --decode MODE makes of a sampling model."""
    model.set_attn_implementation("sdpa")
    return Decoder(model) if mode == "eager" else GraphDecoder(model, mode == "compile")


def rollout(model, decoder, args: Args, B: int, N: int, temperature: float = 0.7, seed: int = 0):
    """B completions of N tokens each: no id ends one."""
    vocabulary = model.config.vocab_size
    draw = torch.Generator().manual_seed(seed)
    G = min(16, B)
    prompts = torch.randint(vocabulary, (B // G, args.prompt_tokens), generator=draw).tolist()
    noise = torch.rand(B, N, generator=draw)
    return prompts, *grpo.generate(
        model, prompts, num_generations=G, max_new_tokens=N, temperature=temperature, noise=noise,
        stop_ids=[vocabulary], pad_id=0, decoder=decoder,
    )  # fmt: skip


def seconds(function, repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize() if device == "cuda" else None
        start = time.perf_counter()
        function()
        torch.cuda.synchronize() if device == "cuda" else None
        times.append(time.perf_counter() - start)
    return median(times)


def bandwidth(device: str) -> tuple[float, float | None, str]:
    """Bytes/s, FLOP/s (None: unknown) and where they are from."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for card, (terabytes, teraflops) in CARDS.items():
        if card in name:
            return terabytes * 1e12, teraflops * 1e12, f"{name}: data sheet"
    x = torch.empty(2**28 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x), 9, device), None, f"{name}: measured by a copy"


def speed(args: Args) -> list[dict]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = fuse(make_model(args.size, args.device, dtype))
    weights = sum(p.numel() for p in model.parameters())
    rate, flops, source = bandwidth(args.device)
    print(
        f"Qwen2 {args.size}, {weights:,} weights, {dtype}; {source}, {rate / 1e12:.3f} TB/s; torch {torch.__version__}"
    )
    rows = []
    for mode in args.modes:
        for B in args.batch_sizes if mode != "compile" else args.compile_batch_sizes:
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            decoder = decoder_of(model, mode)
            whole, first = (partial(rollout, model, decoder, args, B, n) for n in (args.new_tokens, 1))
            whole()  # compiles, captures
            total, start = seconds(whole, args.repeats, args.device), seconds(first, args.repeats, args.device)
            step = (total - start) / (args.new_tokens - 1)
            context = args.prompt_tokens + args.new_tokens / 2
            read = weights * dtype.itemsize + B * context * kv_bytes(args.size, dtype)
            bound = max(read / rate, 2 * weights * B / flops if flops else 0.0)
            peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
            row = {
                "decode": mode, "B": B, "context": context, "ms_per_step": 1e3 * step, "decode_tokens_per_s": B / step,
                "roofline_tokens_per_s": B / bound, "percent_of_roofline": 100 * bound / step,
                "rollout_tokens_per_s": B * args.new_tokens / total, "peak_MB": peak,
            }  # fmt: skip
            row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            rows.append(row | {"fallbacks": decoder.fallbacks})
            print(json.dumps(rows[-1]), flush=True)
            del decoder, whole, first  # and their buffers
    return rows


def sampling(args: Args) -> list[dict]:
    """Milliseconds to sample a token from each row of finished logits, op by op and compiled."""
    B, vocabulary = max(args.compile_batch_sizes), SIZES[args.size][5]
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(B, vocabulary, generator=draw).to(args.device, torch.bfloat16)
    uniform, rows, tokens = torch.rand(B, generator=draw).to(args.device), [], []
    cdf = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    exact = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    del cdf
    compiled = torch.compile(grpo.sample_tokens, dynamic=False, fullgraph=True)
    for name, sample in (("eager", grpo.sample_tokens), ("compiled", compiled)):
        once = partial(sample, logits, uniform, 0.7, vocabulary)
        try:
            tokens.append(once()[0])
        except Exception as error:  # whatever the compiler raises is a result
            print(json.dumps({"sampling": name, "failed": str(error).splitlines()[0][:200]}))
            continue
        took = 1e3 * seconds(once, 4 * args.repeats, args.device)
        rows.append({"sampling": name, "B": B, "ms": float(f"{took:.4g}")})
        rows[-1]["equal_to_eager"] = float(f"{(tokens[0] == tokens[-1]).float().mean():.4g}")
        rows[-1]["equal_to_float64"] = float(f"{(exact == tokens[-1]).float().mean():.4g}")
        print(json.dumps(rows[-1]), flush=True)
    return rows


def numerics(args: Args) -> dict[str, float | bool]:
    """What must hold whatever the card: fast equals eager, sampling is near training, masked rows stay finite."""
    found: dict[str, float | bool] = {}
    B, N = (8, 12) if args.reduced else (64, 32)
    torch.set_float32_matmul_precision("highest")
    model = make_model(args.size, args.device, torch.float32)
    with torch.no_grad():  # away from the fresh model that repeats its last token
        for p in model.model.layers.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
    # so sharp that rounding rarely moves a draw from one of 150,000 tokens to its neighbour
    sharp = 0.02 * model.config.hidden_size**0.5 / 8
    _, slow, _, slow_logp = rollout(model, decoder_of(model, "eager"), args, B, N, sharp)
    found["mean log-prob of the completions that are compared"] = slow_logp.mean().item()
    _, fast, _, fast_logp = rollout(model, decoder_of(model, "graph"), args, B, N, sharp)
    same = (slow == fast).all(1)
    found["graph: share of completions equal to eager's, float32"] = same.float().mean().item()
    found["graph: largest log-prob gap of those"] = (slow_logp - fast_logp)[same].abs().max().item()

    sampler = fuse(sampling_copy(model, model.device, torch.bfloat16))
    drawn = {m: rollout(sampler, decoder_of(sampler, m), args, B, N, temperature=1.0) for m in ("eager", "graph")}
    prompts, ids, mask, sampled = drawn["graph"]
    model.set_attn_implementation("sdpa")
    model.requires_grad_(True)
    prompt_ids, lengths = pad_right(prompts, 0, model.device)
    for mode, (_, tokens, its_mask, its_logp) in drawn.items():
        with torch.no_grad():
            exact, _ = grpo.token_logprobs(model, prompt_ids, lengths, tokens, its_mask, temperature=1.0)
        found[f"gap of bfloat16 sampling, {mode}, and float32: mean"] = (exact - its_logp).abs().mean().item()
    for share_prompt in (True, False):
        with torch.autocast(args.device, torch.bfloat16):
            logp, _ = grpo.token_logprobs(
                model, prompt_ids, lengths, ids, mask, temperature=1.0, share_prompt=share_prompt
            )
        layout = "shared-prompt" if share_prompt else "plain"
        found[f"bfloat16 gap of sampling and training, {layout} rows: mean"] = (logp - sampled).abs().mean().item()
        found[f"bfloat16 gap of sampling and training, {layout} rows: largest"] = (logp - sampled).abs().max().item()
        half = mask.clone()
        half[: B // 2] = False  # completions that --mask-truncated-completions leaves out
        with torch.autocast(args.device, torch.bfloat16):
            logp, _ = grpo.token_logprobs(
                model, prompt_ids, lengths, ids, half, temperature=1.0, share_prompt=share_prompt
            )
        logp.sum().backward()
        finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
        found[f"gradients finite with masked completions, {layout} rows"] = finite
        model.zero_grad()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, 8, 64, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3))
        hidden = torch.zeros(2, 1, 8, 8, dtype=torch.bool, device=args.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive(hidden, dtype))
        out.sum().backward()
        finite = all(bool(torch.isfinite(x).all()) for x in (out, q.grad, k.grad, v.grad))
        found[f"SDPA finite on fully masked rows, {str(dtype).removeprefix('torch.')}"] = finite
    return found


def main(args: Args) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("no CUDA device; --device cpu --reduced runs everywhere")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as join_world leaves a GPU
    if args.reduced:
        args.size, args.batch_sizes, args.compile_batch_sizes = "toy", (8, 4), (8,)
        args.prompt_tokens, args.new_tokens, args.repeats = 8, 12, 3
    rows = speed(args)
    found = numerics(args) if args.checks else {}
    for name, value in found.items():
        print(json.dumps({"check": name, "value": value if isinstance(value, bool) else float(f"{value:.3g}")}))
    drawn = sampling(args) if args.checks else []
    wrong = [name for name, value in found.items() if value is False]
    wrong += [name for name, value in found.items() if "share of completions" in name and value < 0.95]
    # two roundings of one model, each about as far from float32 as the other: nearer to each other than twice that
    exact = found.get("gap of bfloat16 sampling, graph, and float32: mean", 0.0)
    wrong += [name for name, value in found.items() if "rows: mean" in name and value > 2 * exact]
    wrong += [f"sampling {row['sampling']}" for row in drawn if row["equal_to_eager"] < 0.95]
    if args.device == "cuda":
        wrong += [f"{row['decode']} at B = {row['B']} fell back" for row in rows if row["fallbacks"]]
    if wrong:
        sys.exit("failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
