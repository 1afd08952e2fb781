"""Plumbing every script starts with: the command line, the device, the run folder, a clean way to stop.

Nothing here moves a learning curve.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import tyro

PACKAGES = ["torch", "transformers", "datasets", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "wandb"]


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2: what is wrong and the nearest thing that works."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse(config_class, description: str):
    """Command line -> dataclass instance. A wrong flag or value ends in one line and exit code 2."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(config_class, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box around the message, its title in the top line
        lines = [line for line in captured.getvalue().splitlines() if not line.startswith("╭")]
        fail(re.sub(r"[╰╯│─╶╴]+", " ", " ".join(lines)))


# ---- processes and devices -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that torchrun started (one process: rank 0 of 1)."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_sum(self, tensors: list[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.reshape(-1) for t in tensors])  # one message instead of hundreds
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def gather(self, rows: list) -> list:
        """Concatenates every process's list, in the order of the ranks, on every process."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]


def setup_world(device: str) -> World:
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
    if size > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(int(os.environ.get("RANK", 0)), size, torch.device(device))


def close_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- the run folder --------------------------------------------------------------------------------------------------


def git_revision() -> str:
    root = Path(__file__).parent.parent
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return out.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def create_run(script: str, exp_name: str, seed: int, root: str) -> Path:
    """Makes runs/<script>/<exp-name>-<seed>-<time>/ with a copy of the script."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path(root) / Path(script).stem
    run_dir, n = base / f"{exp_name}-{seed}-{stamp}", 1
    while run_dir.exists():  # two runs in one second
        run_dir, n = base / f"{exp_name}-{seed}-{stamp}-{n}", n + 1
    run_dir.mkdir(parents=True)
    shutil.copy(script, run_dir)
    return run_dir


def write_config(run_dir: Path, args, world: World) -> None:
    """Writes config.json: every flag as used, git revision, versions, device."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    facts = {
        "args": dataclasses.asdict(args),
        "command": " ".join(sys.argv),
        "git": git_revision(),
        "versions": versions(),
        "device": device,
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }
    (run_dir / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def read_config(run_dir: Path, config_class):
    """The flags of an earlier run, from its config.json, as a `config_class`."""
    try:
        saved = json.loads((run_dir / "config.json").read_text())["args"]
    except (OSError, ValueError, KeyError):
        fail(f"'{run_dir}' is not a run folder: it has no readable config.json")
    fields = {f.name for f in dataclasses.fields(config_class)}
    if unknown := set(saved) - fields:
        fail(f"'{run_dir}' was made by another script or version: unknown settings {sorted(unknown)}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


# ---- stopping --------------------------------------------------------------------------------------------------------


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or 0)  # the shell's convention: 130 for Ctrl-C, 143 for SIGTERM
