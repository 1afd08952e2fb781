"""The five scripts as runs of a second, each in a fork of a process that has imported everything.

A case of `kill_points.py`, `wrong_inputs.py` and `soak.py` is a fork: nothing is imported again, and whatever a script
does to its process ends with it.
"""

import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is refused at once
os.environ.setdefault("WANDB_MODE", "offline")

import torch

from common import cli, plot

SCRIPTS = ["grpo_arithmetic", "grpo_mixed", "ppo_fetch", "gr00t_finetune", "ppo_gr00t"]
SMALL_GR00T = dict(dit_layers=1, dit_heads=2, dit_head_dim=8, vl_heads=2, vl_head_dim=8, hidden_size=16)
GRPO = (
    "--batch-size 8 --num-generations 4 --n-samples 4 --max-completion-length 3 --eval-samples 2 --temperature 1 "
    "--learning-rate 1e-2 --log-completions 2 --epochs 2 --eval-every 2 --save-every 1 --keep 1"
)  # 2 prompts a step, 2 steps an epoch
PPO = "--hidden 8 --num-minibatches 2 --update-epochs 1 --eval-episodes 2 --eval-every 2 --save-every 1 --keep 1"
PPO += " --no-capture-video --num-threads 1 --env-groups 1"
FLAGS = {  # 4 steps, a checkpoint after each, an evaluation and tables
    "grpo_arithmetic": GRPO,
    "grpo_mixed": f"{GRPO} --tasks arithmetic words --task-eval-problems 2",
    "ppo_fetch": f"{PPO} --num-envs 4 --num-steps 5 --total-timesteps 80",
    "gr00t_finetune": "--model-path lite --max-steps 4 --batch-size 4 --max-samples 32 --val-episodes 1 --log-every 2 "
    "--eval-every 2 --eval-batches 1 --eval-trajs 1 --eval-steps 16 --denoising-sweep 2 --no-closed-loop "
    "--save-every 1 --keep 1",
    "ppo_gr00t": f"{PPO} --num-envs 2 --num-steps 2 --total-timesteps 80 --critic-epochs 1",
}


@dataclass
class Outcome:
    """What became of a fork: its exit code (None: it took too long; negative: a signal), and what it printed."""

    code: int | None
    out: str
    err: str
    seconds: float


def forked(call: Callable[[], object], seconds: float = 60) -> Outcome:
    """Calls `call()` in a fork of this process, as a program of its own would: exit code, traceback, own output."""
    start = time.time()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody is there to answer
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
            os._exit(exit_code(call))
        code = None
        while code is None and time.time() < start + seconds:
            ended, status = os.waitpid(process, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            time.sleep(0.002)
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(code, *texts, time.time() - start)


def exit_code(call: Callable[[], object]) -> int:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    gc.freeze()  # collecting what the parent holds would copy its memory
    code: object = 0
    try:
        call()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def run_main(script: str, words: list[str]) -> None:
    """A script's main(), with these words behind its name and less to do. For a fork: it changes modules."""
    module = importlib.import_module(script)
    shrink(module)
    sys.argv = [f"{script}.py", *words]
    module.main(cli.parse(module.Args, module.__doc__))


def warm_up() -> None:
    """Imports everything that a script imports, in its middle too; computes nothing."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from common.robot import fetch

    fetch.import_robotics()
    for script in SCRIPTS:
        cli.described_fields(importlib.import_module(script).Args)


def shrink(module) -> None:
    """What a run takes long for: the problems of evaluations, the lite model, figures."""
    plot.draw = lambda folders, script, out: [write_figure(out / "figure.png")]
    if isinstance(getattr(module, "EVAL_BANDS", None), dict):
        module.EVAL_BANDS |= {name: (2, level) for name, (_, level) in module.EVAL_BANDS.items()}
    if hasattr(module, "FRESH"):
        module.FRESH["lite"] = partial(module.FRESH["lite"], **SMALL_GR00T)
        module.draw_open_loop = lambda result, names, horizon, path: write_figure(path)


def write_figure(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"figure")
    return path


def flags_of(script: str, folder: Path) -> list[str]:
    """The flags of a short run, with what `starting_points` makes in `folder`."""
    own = {"ppo_fetch": [], "gr00t_finetune": ["--dataset-path", folder / "demos"]}
    own["ppo_gr00t"] = ["--model-path", folder / "gr00t"]
    language = ["--model-name", folder / "lm", "--eval-dataset", folder / "eval.jsonl"]
    return [*FLAGS[script].split(), *map(str, own.get(script, language))]


def starting_points(folder: Path, steps: int = 100) -> dict[str, list[str]]:
    """Makes a language model `lm` (trained for so many steps), problems `eval.jsonl`, demonstrations `demos`, and a lite
    GR00T that knows them, `gr00t`, all tiny. Returns the flags of each script."""
    make_demonstrations(folder / "demos")
    problems = (ROOT / "assets" / "arithmetic_eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(problems[::40]))
    gr00t = [*flags_of("gr00t_finetune", folder), "--output-dir", str(folder / "start")]
    for make in (partial(make_language_model, folder / "lm", steps), partial(run_main, "gr00t_finetune", gr00t)):
        made = forked(make)
        if made.code != 0:
            sys.exit(f"the starting points could not be made: {made.err}")
    (run,) = (folder / "start" / "gr00t_finetune").iterdir()
    shutil.copytree(run / "last", folder / "gr00t")
    return {script: flags_of(script, folder) for script in SCRIPTS}


def make_demonstrations(folder: Path, count: int = 6) -> None:
    """The first of the bundled episodes."""
    source = ROOT / "assets" / "fetch_demos"
    for path in sorted(source.rglob("episode_*")):
        if int(path.stem.split("_")[1]) < count:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copytree(source / "meta", folder / "meta")
    for path in (folder / "meta").glob("episodes*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    episodes = [json.loads(line) for line in (folder / "meta" / "episodes.jsonl").read_text().splitlines()]
    info = json.loads((folder / "meta" / "info.json").read_text())
    info |= {"total_episodes": count, "total_videos": count, "total_frames": sum(e["length"] for e in episodes)}
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"splits": {"train": f"0:{count}"}}))


def make_language_model(folder: Path, steps: int) -> None:
    """A Qwen2 with 27,000 parameters that answers with numbers, now and then with the right one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

    from assets.build_tiny_qwen2 import batches

    torch.manual_seed(0)
    sizes = dict(vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(**sizes, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for ids, labels in batches(random.Random(0), tokenizer, steps=steps, batch_size=48, corruption=0.0):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
