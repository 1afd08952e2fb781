"""Checkpoints that survive being killed: safetensors and JSON, written to a temporary folder, then renamed.

run/checkpoints/step-000000120/   model folder (the script writes it) + trainer.safetensors + trainer.json
run/last, run/best             symbolic links to one of them
"""

import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.cli import fail
from common.parallel import gathered, like


@contextmanager
def atomic_folder(target: Path):
    """Yields a temporary folder that becomes `target` at the end: readers see the whole folder or none."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in [*temporary.rglob("*"), temporary]:  # on the disk before the rename is
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if target.exists():
        # only a resumed run writes a step twice, and a folder can not be replaced in one move
        shutil.rmtree(target)
    temporary.rename(target)


def link(run_dir: Path, name: str, folder: Path) -> None:
    """Points run_dir/name at `folder`, in one move."""
    temporary = run_dir / f".tmp-{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(run_dir))
    temporary.replace(run_dir / name)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep` and those that last and best point at."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    linked = {(run_dir / name).resolve() for name in ("last", "best")}
    for folder in folders[: max(len(folders) - keep, 0)]:
        if folder.resolve() not in linked:
            shutil.rmtree(folder)


# ---- state as tensors and JSON ---------------------------------------------------------------------------------------


def save_state(folder: Path | None, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes trainer.safetensors (optimizer moments, torch RNG) and trainer.json (`state` and the other RNGs).

    Moments may be spread over processes: then all of them call it, those that do not write with None for a folder.
    """
    tensors = {"rng.torch": torch.get_rng_state()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in gathered(slots, keep=folder is not None).items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    if folder is not None:
        save_file(tensors, folder / "trainer.safetensors")
        state = state | {"rng": {"python": random.getstate(), "numpy": numpy_rng()}}
        (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n")


def load_state(folder: Path, optimizer: torch.optim.Optimizer, script: str) -> dict:
    """Restores optimizer and RNGs, returns the dict given to `save_state`. Unreadable or foreign: exit code 2."""
    try:
        state = json.loads((folder / "trainer.json").read_text())
        tensors = load_file(folder / "trainer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"checkpoint '{folder}' cannot be read ({error}); --resume also takes an older step-… folder")
    if state.get("script") != script:
        fail(f"checkpoint '{folder}' belongs to {state.get('script')}, not to {script}")
    slots: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, named in slots.items():  # a sharded parameter: each process takes its slice of what it has read
        slots[index] = {name: like(value, parameters[index]) for name, value in named.items()}
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": slots, "param_groups": full["param_groups"]})
    torch.set_rng_state(tensors["rng.torch"])
    version, words, gauss = state["rng"]["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, *rest = state["rng"]["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    return state


def numpy_rng() -> list:
    name, words, *rest = np.random.get_state()
    return [name, words.tolist(), *rest]


def find_checkpoint(path: str, best: bool = False) -> Path:
    """The checkpoint meant by a run folder (its newest or its best) or a step-… folder. Nothing there: exit code 2."""
    folder = Path(path)
    if not folder.exists():
        fail(f"'{path}' does not exist; give a run folder such as runs/<script>/<name> or a step-… folder in it")
    if (folder / "trainer.json").exists():
        return folder.resolve()
    if best and (folder / "best").exists():
        return (folder / "best").resolve()
    steps = sorted((folder / "checkpoints").glob("step-*"), key=lambda step: int(step.name.split("-")[1]))
    if not steps:
        fail(f"'{path}' holds no checkpoint: it is not a run folder, or the run ended before its first save")
    return steps[-1].resolve()
