"""One training step of grpo_arithmetic.py against TRL's GRPOTrainer: same model, prompts, batch, lengths and loss.

Each side runs in its own process, ours and TRL's in turn, so that a machine whose speed drifts drifts under both.
Ours is the script itself, with its own timers; TRL's step is timed from on_step_begin to on_step_end. The learning rate
is tiny on purpose: both sides keep the completions of the untrained model, so both do the same work.

    uv run --group bench python benchmarks/grpo_vs_trl.py                               # bundled model, CPU
    uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2  # Qwen2-0.5B's shape, GPU
    uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --decode graph
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    model_name: str = str(ROOT / "assets" / "tiny-qwen2")  # model folder or hub id
    random_qwen2: bool = False  # instead of --model-name: the architecture of Qwen2-0.5B with random weights
    device: Literal["cpu", "cuda"] = "cpu"  # where both sides run; on cuda both compute in bfloat16
    batch_size: int = 256  # completions a step
    num_generations: int = 16  # completions per prompt
    max_completion_length: int = 16  # new tokens at most
    loss_type: str = "grpo"  # loss of both sides
    beta: float = 0.1  # KL weight of both sides
    kl_gradient: Literal["k3", "reverse"] = "k3"  # gradient of the KL, both sides
    micro_batch_size: int | None = None
    """completions per forward and backward pass of both sides; default: all (256 of 256 tokens need more than 80 GB)"""
    decode: Literal["eager", "graph", "compile"] = "eager"  # decode steps of our side
    compile: bool = False  # our side compiles the layers of the update
    steps: int = 10  # timed steps of each process
    warmup: int = 2  # steps before them
    pairs: int = 3  # processes of each side, in turn
    side: Literal["both", "ours", "trl"] = "both"
    """ours or trl: run that side in this process and print its JSON (what `both` starts)"""


def random_qwen2_folder(folder: str, device: str) -> str:
    """Qwen2-0.5B's architecture, and a tokenizer of as many ids: both sides sample the whole vocabulary, where an end is
    one id of 151,936, so that practically all completions of both have the full length."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    end = copy_tokenizer(folder, config.vocab_size)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    return folder


def copy_tokenizer(folder: str, size: int) -> int:
    """The bundled tokenizer with words "w256", "w257", ... that no text is made of, `size` ids in all; its end id."""
    tiny = ROOT / "assets" / "tiny-qwen2"
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    bytes_, special = len(tokenizer["model"]["vocab"]), tokenizer["added_tokens"]
    tokenizer["model"]["vocab"] |= {f"w{i}": i for i in range(bytes_, size - len(special))}
    for i, token in enumerate(special):  # the end comes first; the library wants them last
        token["id"] = size - len(special) + i
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(tiny / "tokenizer_config.json", folder)
    return special[0]["id"]


def summarise(args: Args, step, generation, update, tokens, peak) -> dict:
    keep = slice(args.warmup, None)
    result = {"step_s": median(step[keep]), "generation_s": median(generation[keep]), "update_s": median(update[keep])}
    return result | {"tokens": median(tokens[keep]), "peak_MB": peak}


def peak_memory(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run_ours(args: Args) -> dict:
    import numpy as np

    import grpo_arithmetic as grpo

    # not part of a step: evaluations before and after, which cost minutes with a model that never ends
    grpo.sample_answers = lambda policy, problems, samples, *rest, **options: (
        np.zeros((len(problems), samples)),
        [[""] * samples for _ in problems],
    )
    with tempfile.TemporaryDirectory() as folder:
        total = args.steps + args.warmup
        flags = grpo.Args(
            model_name=args.model_name, device=args.device, batch_size=args.batch_size, loss_type=args.loss_type,
            num_generations=args.num_generations, max_completion_length=args.max_completion_length, beta=args.beta,
            epochs=total, n_samples=args.batch_size // args.num_generations, learning_rate=1e-7, output_dir=folder,
            eval_every=0, eval_samples=1, eval_batch_size=args.batch_size, save_every=0, decode=args.decode,
            compile=args.compile, micro_batch_size=args.micro_batch_size, kl_gradient=args.kl_gradient,
        )  # fmt: skip
        try:
            grpo.main(flags)
        except SystemExit as stop:
            assert stop.code == 0
        (metrics,) = Path(folder).glob("*/*/metrics.jsonl")
        rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "time/step_s" in row]
    columns = [[row[f"time/{name}"] for row in rows] for name in ("step_s", "generation_s", "update_s")]
    tokens = [row["train/completions/mean_length"] * args.batch_size for row in rows]
    return summarise(args, *columns, tokens, peak_memory(args.device))


def run_trl(args: Args) -> dict:
    import datasets
    import torch
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo_arithmetic as grpo
    from common.streams import stream

    torch.backends.cuda.enable_cudnn_sdp(False)  # as on our side: it plans anew for every shape
    n = args.batch_size // args.num_generations
    problems = grpo.draw_unique(stream(42, "problems"), grpo.Level(0, 20), n)
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
    step_s, generation_s, tokens = [], [], []

    def reward(completions, answer, completion_ids, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        return [1.0 if grpo.extract_answer(c) == a else -1.0 for c, a in zip(completions, answer)]

    class Timed(GRPOTrainer):
        def _generate(self, *positional, **named):
            start = time.perf_counter()
            result = super()._generate(*positional, **named)
            if args.device == "cuda":
                torch.cuda.synchronize()
            generation_s.append(time.perf_counter() - start)
            return result

    class Clock(TrainerCallback):
        def on_step_begin(self, *positional, **named):
            self.start = time.perf_counter()

        def on_step_end(self, *positional, **named):
            step_s.append(time.perf_counter() - self.start)

    known = len(AutoTokenizer.from_pretrained(args.model_name))
    beyond = list(
        range(known, AutoConfig.from_pretrained(args.model_name).vocab_size)
    )  # ids that our side never samples
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.micro_batch_size or args.batch_size,
            gradient_accumulation_steps=args.batch_size // (args.micro_batch_size or args.batch_size),
            num_generations=args.num_generations, use_bias_correction_kl=args.kl_gradient == "reverse",
            max_completion_length=args.max_completion_length, temperature=0.7, beta=args.beta, loss_type=args.loss_type,
            learning_rate=1e-7, weight_decay=0.01, max_steps=args.steps + args.warmup, logging_steps=1, report_to="none",
            save_strategy="no", seed=42, gradient_checkpointing=False, bf16=args.device == "cuda",
            generation_kwargs={"suppress_tokens": beyond} if beyond else None,
            use_cpu=args.device == "cpu", model_init_kwargs={"dtype": "float32"}, disable_tqdm=True,
        )  # fmt: skip
        trainer = Timed(
            model=args.model_name, reward_funcs=reward, args=config, train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    update_s = [a - b for a, b in zip(step_s, generation_s)]  # reference and old log-probs, loss, backward, optimizer
    return summarise(args, step_s, generation_s, update_s, tokens, peak_memory(args.device))


def both(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = random_qwen2_folder(folder, args.device) if args.random_qwen2 else args.model_name
        flags = [f"--model-name={model}", f"--device={args.device}", f"--loss-type={args.loss_type}"]
        flags += [f"--decode={args.decode}", "--compile" if args.compile else "--no-compile"]
        flags += [f"--micro-batch-size={args.micro_batch_size}"] if args.micro_batch_size else []
        for name in (
            "batch_size",
            "num_generations",
            "max_completion_length",
            "beta",
            "kl_gradient",
            "steps",
            "warmup",
        ):
            flags.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
        results = {"ours": [], "trl": []}
        for _ in range(args.pairs):
            for side in results:
                command = [sys.executable, __file__, f"--side={side}", *flags]
                out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
                if out.returncode:
                    sys.exit(f"{side} failed:\n{out.stdout[-2000:]}{out.stderr[-4000:]}")
                results[side].append(json.loads(out.stdout.splitlines()[-1]))
                print(side, json.dumps(results[side][-1]), flush=True)
    medians = {side: {k: median(r[k] for r in rs) for k in rs[0]} for side, rs in results.items()}
    shape = f"{args.batch_size} completions, {args.num_generations} per prompt"
    print(f"\n{shape}, loss {args.loss_type}, beta {args.beta} ({args.kl_gradient}), {args.device}")
    print(f"{'median of ' + str(args.pairs) + ' processes':24s} {'ours':>10s} {'TRL':>10s} {'TRL / ours':>11s}")
    for name in ("step_s", "generation_s", "update_s", "peak_MB"):
        a, b = medians["ours"][name], medians["trl"][name]
        print(f"{name:24s} {a:10.3f} {b:10.3f} {b / a:10.2f}x")
    speed = {side: m["tokens"] / m["generation_s"] for side, m in medians.items()}
    ratio = speed["ours"] / speed["trl"]
    print(f"{'sampled tokens / s':24s} {speed['ours']:10.0f} {speed['trl']:10.0f} {ratio:10.2f}x (ours / TRL)")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.side == "both":
        both(args)
    else:
        print(json.dumps((run_ours if args.side == "ours" else run_trl)(args)))
