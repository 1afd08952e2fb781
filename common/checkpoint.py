"""Checkpoints that survive being killed: safetensors and JSON, written to a temporary folder, then renamed.

run/checkpoints/step-000000120/    model folder (the script writes it) + trainer.json
                 trainer/          what is not the model: who loads a model reads every *.safetensors beside config.json
run/last, run/best                 symbolic links to one of them
"""

import json
import os
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from common.cli import Natural, NonNegative, fail
from common.files import read_json
from common.parallel import gathered, like


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Writes a file that readers see whole, as it was or as it is now."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


@contextmanager
def atomic_folder(target: Path):
    """Yields a temporary folder that becomes `target` at the end: readers see the whole folder or none."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "trainer").mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:  # on the disk before the rename is
            sync(path)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a checkpoint: whole, then gone."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def trainer_file(folder: Path, name: str) -> Path:
    """Where a checkpoint has a file that is not the model's (older ones: beside the model)."""
    return folder / name if (folder / name).exists() else folder / "trainer" / name


def link(run_dir: Path, name: str, folder: Path) -> None:
    """Points run_dir/name at `folder`, in one move; where there is no such folder, at nothing."""
    temporary = run_dir / f".tmp-{name}"
    temporary.unlink(missing_ok=True)
    if folder.exists():
        temporary.symlink_to(folder.relative_to(run_dir))
        temporary.replace(run_dir / name)
    else:
        (run_dir / name).unlink(missing_ok=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """Its checkpoints, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def settle(run_dir: Path, last: Path, best: Path, keep: int) -> None:
    """Points the links at these, deletes all others but the newest `keep`, and what a kill has left half done.

    What is later than `last` is of another timeline: the newest goes first, so that a kill leaves one with its logs.
    """
    for later in reversed(checkpoints(run_dir)):
        if later.name > last.name:
            remove(later)
    link(run_dir, "last", last)
    link(run_dir, "best", best)
    for folder in checkpoints(run_dir)[:-keep]:
        if folder not in (last, best):
            remove(folder)
    for left in [*run_dir.glob(".tmp-*"), *(run_dir / "checkpoints").glob(".tmp-*")]:
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


# ---- state as tensors and JSON ---------------------------------------------------------------------------------------


class Best(TypedDict):
    score: list[float]
    step: Natural


class Trainer(TypedDict):
    """trainer.json, besides what the script keeps there."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)
    script: str
    step: Natural
    best: Best | None
    elapsed: NonNegative
    ended: NotRequired[bool]  # older checkpoints lack this and the next
    tensors: NotRequired[list[str]]  # names of those in trainer.safetensors
    rng: dict[str, list]


def save_state(folder: Path | None, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes trainer.safetensors (optimizer moments, torch RNG) and trainer.json (`state` and the other RNGs).

    Moments may be spread over processes: then all of them call it, those that do not write with None for a folder.
    """
    tensors = {"rng.torch": torch.get_rng_state()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in gathered(slots, keep=folder is not None).items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    if folder is not None:
        save_file(tensors, trainer_file(folder, "trainer.safetensors"))
        name, words, *rest = np.random.get_state()
        rng = {"python": random.getstate(), "numpy": [name, words.tolist(), *rest]}
        state = state | {"tensors": sorted(tensors), "rng": rng}
        (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n")


OTHER = "--resume also takes an older step-… folder"


def read_state(folder: Path, script: str) -> Trainer:
    """trainer.json of a checkpoint of this script, whose tensors are there. Else: exit code 2."""
    state = read_json(folder / "trainer.json", Trainer, f"this checkpoint cannot be continued; {OTHER}")
    if state["script"] != script:
        fail(f"checkpoint '{folder}' belongs to {state['script']}, not to {script}")
    try:
        with safe_open(trainer_file(folder, "trainer.safetensors"), "pt") as file:
            found = sorted(file.keys())
    except (OSError, SafetensorError) as error:
        fail(f"checkpoint '{folder}' cannot be read ({error}); {OTHER}")
    if differ := sorted({*found} ^ {*state.get("tensors", found)}):
        fail(f"checkpoint '{folder}': trainer.json and trainer.safetensors disagree about {differ[0]}; {OTHER}")
    set_generators(folder, state)  # tried here, before a model is read
    return state


def set_generators(folder: Path, state: Trainer) -> None:
    try:
        version, words, gauss = state["rng"]["python"]
        random.setstate((version, tuple(words), gauss))
        name, words, *rest = state["rng"]["numpy"]
        np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        fail(f"checkpoint '{folder}': its random generators cannot be restored ({error}); {OTHER}")


def load_state(folder: Path, state: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Restores optimizer and RNGs of the checkpoint that `state` was read from. Where they do not fit: exit code 2."""
    tensors, slots = load_file(trainer_file(folder, "trainer.safetensors")), {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            shape = parameters[int(index)].shape if int(index) < len(parameters) else None
            if value.shape not in ((), shape) or not value.is_floating_point():  # a step would write beyond it
                found = f"{key} is {value.dtype} {tuple(value.shape)}"
                fail(f"checkpoint '{folder}': {found}, the weight {tuple(shape or ())}; {OTHER}")
            # a sharded parameter: each process takes its slice of what it has read
            slots.setdefault(int(index), {})[name] = like(value, parameters[int(index)])
    if state["step"] and not slots:
        fail(f"checkpoint '{folder}' has no optimizer.* tensors after {state['step']} steps; {OTHER}")
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.torch"])
    set_generators(folder, state)


def find_checkpoint(path: str, best: bool = False) -> Path:
    """The checkpoint that a run folder (its newest or its best) or a step-… folder means. None there: exit code 2."""
    folder = Path(path)
    if not os.path.isdir(path):  # also where the name is longer than one may be
        what = "is no folder" if os.path.exists(path) else "does not exist"
        fail(f"'{path[:200]}' {what}; give a run folder such as runs/<script>/<name> or one of its step-… folders")
    if (folder / "trainer.json").exists():
        return folder.resolve()
    if best and (folder / "best").is_symlink():
        return find_checkpoint(str(folder / "best"))
    if not (steps := checkpoints(folder)):
        fail(f"'{path}' holds no checkpoint: it is not a run folder, or the run ended before its first save")
    return steps[-1].resolve()
