"""Shared fixtures: small random models of several architectures, and the bundled tokenizer."""

import ast
import gc
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never touch the network
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as common/__init__.py, which comes after torch here
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: each and what it starts gets its share of the cores
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(share)

import pytest
import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

ROOT = Path(__file__).resolve().parent.parent
pytest.register_assert_rewrite("networks")  # its asserts say what they compared, as those of tests do
sys.path.insert(0, str(ROOT))
torch.backends.cuda.enable_cudnn_sdp(False)  # as join_world leaves a GPU

from assets.build_tiny_qwen2 import batches  # noqa: E402
from common import plot  # noqa: E402
from common.cli import parse  # noqa: E402

VOCAB = 264  # five ids more than the bundled tokenizer has
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=128),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=128),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    # caps its logits, so the trainer must refuse it
    "gemma2": lambda: Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0),
}


def make_model(name="qwen2", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from the near-uniform distribution of a fresh model
            p.mul_(3.0) if p.dim() > 1 else None
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
    return model


# a GPU's image with torch and transformers only: what needs no simulator is collected all the same
if not all(map(importlib.util.find_spec, ("gymnasium", "mujoco"))):
    collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py") if not p.name.startswith("test_grpo_")]


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what all modules hold stays: looking it through again and again is a fifth of the suite's time


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture
def figures():
    """Figures are drawn as they are for users."""


@pytest.fixture(autouse=True)
def sketches(request, monkeypatch):
    """Unless a test asks for `figures`: they are made of what a run logged, but neither laid out nor written, which
    takes longer than most runs."""
    figure = plot.figure

    def sketch(*about):
        from matplotlib.figure import Figure

        with monkeypatch.context() as patch:
            patch.setattr(Figure, "tight_layout", lambda *_, **__: None)
            patch.setattr(Figure, "savefig", lambda self, out, **_: out.touch())
            return figure(*about)

    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plot, "figure", sketch)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-qwen2")


@pytest.fixture(scope="session")
def micro_model_folder(tmp_path_factory, tokenizer):
    """A 27,000 parameter Qwen2 that answers with numbers, now and then with the right one: a step takes milliseconds."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["qwen2"](), attn_implementation="eager")
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for ids, labels in batches(random.Random(0), tokenizer, steps=200, batch_size=48, corruption=0.0):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("micro-qwen2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def fetch_metadata() -> dict:
    """What metadata.json says of a policy for Fetch: the bundled demonstrations' statistics, and their camera."""
    from common.robot.data_configs import DATA_CONFIGS
    from common.robot.demonstrations import make_metadata, read_mixture

    config = DATA_CONFIGS["fetch"]
    sets = read_mixture([ROOT / "assets" / "fetch_demos"], config, "fetch")
    return make_metadata(sets, config, [1.0], "new_embodiment")


def run_script(module, argv: list[str], monkeypatch) -> int:
    """Runs a script's main() in this process, which keeps its signals, threads and kernels; returns the exit code."""
    monkeypatch.setattr(sys, "argv", argv)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stop:
            module.main(parse(module.Args, module.__doc__))
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    return stop.value.code


def flags_of(**flags) -> list[str]:
    """num_envs=3, stagger=False -> --num-envs 3 --no-stagger; None is left out."""
    argv = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            argv += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def rows(run_dir: Path, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run_dir)]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def two_forks(start) -> list[int]:
    """Calls `start()` in two forks of this process joined by gloo, which import nothing anew; their exit codes."""
    port = free_port()

    def child(rank: int) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        start()

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    return [process.exitcode for process in processes]


def imported(module: str) -> set[str]:
    """What the code of a module, and of everything of this project that it imports, imports when it is loaded."""
    found, left = set(), [module]
    while left:
        name = left.pop().replace(".", "/")
        places = [ROOT / f"{name}.py", ROOT / name / "__init__.py", ROOT / "tests" / f"{name}.py"]
        path = next((place for place in places if place.exists()), None)
        for node in ast.parse(path.read_text()).body if path else []:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            left += [name for name in names if name not in found]
            found |= set(names)
    return found
