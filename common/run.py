"""A run from its flags to its last line: processes, folder, logs, checkpoints, and a clean way to stop.

Nothing here moves a learning curve. docs/house.md shows in a dozen lines how a script uses it.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from typing_extensions import TypedDict

from common import plot, report, stop
from common.checkpoint import atomic_folder, find_checkpoint, load_state, read_state, replace_file, save_state, settle
from common.cli import Count, Name, Natural, Seed, Text, fail, flag, schema_of
from common.files import read_json
from common.log import Logger, lines_until
from common.parallel import cores, join_world
from common.track import chosen

PACKAGES = ["torch", "transformers", "datasets", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "wandb"]


@dataclass
class RunArgs:
    """Flags that all scripts have."""

    # run
    exp_name: Name | None = None  # name of the run; default: by script and task
    seed: Seed = 42  # seed of every random stream of the run
    tags: tuple[str, ...] = ()  # of the run, for a tracker
    output_dir: Text = "runs"  # parent of the run folder
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # where numbers, tables and videos also go
    track: bool = False  # the same as --tracker wandb
    track_checkpoints: bool = False  # every checkpoint becomes an artifact of Weights & Biases
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account
    resume: Text | None = None
    """run folder (or one of its checkpoints) to continue, bit-exactly on a CPU, with its own settings"""
    eval_only: bool = False  # measure a trained model and stop
    save_every: Natural = 50  # steps (PPO: iterations) between checkpoints, 0: only at the end
    keep: Count = 2  # newest checkpoints to keep, besides the best


FREE = {
    "resume",
    "device",
    "tracker",
    "track",
    "track_checkpoints",
    "wandb_mode",
}  # flags that may differ from those of the run that is resumed


class Run:
    """One run of a script. `args` are its flags; until `open`, nothing is written."""

    def __init__(self, script: str, args, free: set[str] = FREE):
        """script: its __file__. free: flags that --resume may change."""
        stop.listen()
        chosen(args)  # a tracker that is installed
        self.script, self.args, self.checkpoint = Path(script), args, None
        self.name = self.script.stem
        if args.resume:
            initial = asdict(type(args)())
            if given := [name for name, value in asdict(args).items() if name not in free and value != initial[name]]:
                fail(f"--resume continues with the run's own settings; drop {flag(given[0])} or start a new run")
            self.checkpoint = find_checkpoint(args.resume)
            self.folder = self.checkpoint.parent.parent
            self.args = read_config(self.folder, type(args))
            self.args = replace(self.args, **{name: getattr(args, name) for name in free})
            self.saved = read_state(self.checkpoint, self.name)
            for path in self.folder.glob("*.jsonl"):
                lines_until(path, math.inf)  # each is a line of a log
        else:
            check_parent(Path(args.output_dir))
        self.world = join_world(args.device)
        self.exit_code = 1  # unless the end is reached
        self.unit = 1  # what is logged as the step, in steps of the loop; PPO counts environment steps
        self.first, self.best = 0, None  # steps done before; {"score", "step"} of the best so far
        self.total, self.ending, self.stopped = 0, False, False
        self.seconds: Counter = Counter()  # of this step, by what they were spent on: see `clock`
        self.warned: dict[str, int] = {}

    @contextlib.contextmanager
    def open(self, args) -> Iterator["Run"]:
        """Makes the run folder, or opens the one to continue. Logs, tracker and processes end with the block."""
        self.args, world = args, self.world
        random.seed(args.seed)
        np.random.seed(args.seed % 2**32)
        torch.manual_seed(args.seed)
        if not self.checkpoint:
            made = [str(create_folder(self.script, args))] if world.main else []
            self.folder = Path(world.gather(made)[0])
            self.configure(args)
        self.lock = locked(self.folder) if world.main else None
        self.log = Logger(self.folder, asdict(args), chosen(args), enabled=world.main)
        self.say = self.log.say
        stop.opened = True
        try:
            yield self
            self.exit_code = 128 + stop.received if self.stopped else 0
        except (OSError, SafetensorError) as error:
            if not (full := no_room(error)):
                raise
            fail(f"'{self.folder}': {full}; the last checkpoint stands: make room for another, then --resume it")
        except SystemExit:
            if world.main and not self.checkpoint and not (self.folder / "metrics.jsonl").exists():
                shutil.rmtree(self.folder)  # nothing has happened in it: a refused start leaves no folder behind
            raise
        finally:
            stop.opened = stop.patient = False
            self.log.finish(self.exit_code)
            world.leave()

    def configure(self, args) -> None:
        """Takes these flags for the run's and writes config.json."""
        self.args = args
        if self.world.main:
            write_config(self.folder, args, self.world)

    def finish(self, text: str) -> None:
        """The last lines: what came out of it, and where figures and model are."""
        if self.world.main and not self.stopped:
            self.log.finish()  # closes the bar
            figures, page = plot.draw([self.folder], self.name, self.folder), report.write([self.folder])
            print(f"{text}\nreport {page}; figures {', '.join(map(str, figures))}; model {self.model_folder}")

    @property
    def model_folder(self) -> Path:
        """The best checkpoint, or the last where none of this run's was the best."""
        return self.folder / ("best" if (self.folder / "best").exists() else "last")

    def steps(self, total: int) -> Iterator[int]:
        """0, 1, … total - 1, from where the checkpoint left off, with a progress bar; ends where the run does."""
        self.total = total
        self.log.progress(total, self.first)
        with stop.patience():
            for step in range(self.first, total):
                if self.ending or self.stopped:
                    break
                self.seconds.clear()
                self.started = time.time()
                yield step

    def due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps (0: only at the end) is due after `step` steps."""
        return self.ending or step == self.total or bool(every and step % every == 0)

    def end(self, reason: str = "") -> None:
        """Lets the run end with this step. Every process calls it."""
        self.ending = True
        if reason:
            self.say(reason)

    @contextlib.contextmanager
    def clock(self, name: str):
        """Adds the seconds of the block to `seconds[name]`."""
        start = time.time()
        try:
            yield
        finally:
            self.seconds[name] += time.time() - start

    def warn(self, step: int, warnings: dict[str, str]) -> None:
        """Says each kind of warning at most every 50 steps."""
        for kind, text in warnings.items():
            if step - self.warned.get(kind, -50) >= 50:
                self.warned[kind] = step
                self.say(f"warning, step {step * self.unit}: {text}")

    def table(self, name: str, step: int, rows: list[dict], upload: bool = True) -> None:
        self.log.table(name, step * self.unit, rows, upload)

    def write(self, step: int, metrics: dict) -> None:
        """A line of metrics.jsonl."""
        self.log.log(step * self.unit, metrics)

    def is_best(self, step: int, *score: float) -> bool:
        """Whether this score (the larger the better, later numbers break ties) is the best so far; remembers it.

        A score that is not a number is never the best.
        """
        better = all(map(math.isfinite, score)) and (self.best is None or list(score) > self.best["score"])
        if better:
            self.best = {"score": list(score), "step": step}
        return better

    def end_step(
        self, step: int, metrics: dict, state: dict, optimizer, write: Callable, **shown: float | None
    ) -> None:
        """Ends step number `step` (from 1): metrics (unless empty), the progress bar with the numbers `shown`,
        a checkpoint where one is due, the step is the best so far or the last, or a signal has come.

        write(folder): see `save`.
        """
        if metrics:
            self.write(step, metrics)
        self.log.advance(**shown)
        stopped, best = self.world.any(stop.received is not None, self.best is not None and self.best["step"] == step)
        if stopped or best or self.due(step, self.args.save_every):
            self.save(step, state, optimizer, write)
        if stopped and (state.get("owed") or step < self.total and not self.ending):
            self.stopped = True
            command = f"uv run python {self.script.name} --resume {self.folder}"
            self.say(f"stopped at step {step * self.unit}; continue with: {command}")

    def save(self, step: int, state: dict, optimizer, write: Callable) -> None:
        """Writes checkpoints/step-…, links `last` and `best` to it, and prunes old ones.

        write(folder) saves the model into the folder and may return more entries for `state`. Every process calls it,
        as weights may have to be gathered; only the first has a folder, the others get None.
        """
        self.log.sync()
        with atomic_folder(self.at(step)) if self.world.main else contextlib.nullcontext() as folder:
            extra = write(folder) or {}
            own = {"script": self.name, "step": step, "best": self.best, "elapsed": self.log.elapsed}
            save_state(folder, optimizer, state | extra | own | {"ended": self.ending or step == self.total})
        self.settle(step)
        if self.args.track_checkpoints and self.log.tracker:
            self.log.tracker.checkpoint(self.at(step))

    def at(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step * self.unit:09d}"

    def settle(self, step: int) -> None:
        """`last` and `best` as they are after this step, and no checkpoint that is not to be kept."""
        if self.world.main:
            settle(self.folder, self.at(step), self.at(self.best["step"] if self.best else 0), self.args.keep)

    def resume(self, state: dict, optimizer) -> dict:
        """`state` as it is, or with --resume as it was saved; optimizer, generators and logs then go on from there."""
        if not self.checkpoint:
            return state
        saved = self.saved
        for key, value in state.items():
            if key not in saved or (value is not None and type(saved[key]) is not type(value)):
                why = "of another type" if key in saved else "missing, as in older versions"
                fail(f"checkpoint '{self.checkpoint}': {key!r} is {why}; start a new run")
        load_state(self.checkpoint, saved, optimizer)
        self.first, self.best, self.ending = saved["step"], saved["best"], saved.get("ended", False)
        self.settle(self.first)
        self.log.truncate(self.first * self.unit, saved["elapsed"])
        self.say(f"resuming {self.folder} after {self.first * self.unit:,} steps")
        return saved


# ---- the run folder --------------------------------------------------------------------------------------------------


def git_revision() -> str:
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError):
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
        return out.stdout.strip() or "unknown"
    return "unknown"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The CPU's model name, where the system tells."""
    with contextlib.suppress(OSError, AttributeError):
        return re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    return "unknown"


def create_folder(script: Path, args) -> Path:
    """Makes runs/<script>/<exp-name>-<seed>-<time>/ with a copy of the script."""
    base, name = Path(args.output_dir) / script.stem, f"{args.exp_name}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    base.mkdir(parents=True, exist_ok=True)
    for n in itertools.count():  # two runs in one second
        folder = base / (f"{name}-{n}" if n else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            shutil.copy(script, folder)
            return folder


def write_config(folder: Path, args, world) -> None:
    """Writes config.json: every flag as used, git revision, versions, hardware."""
    facts = {
        "args": asdict(args),
        "command": " ".join(sys.argv),
        "git": git_revision(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "cpu": processor(),
        "cores": cores(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }
    replace_file(folder / "config.json", json.dumps(facts, indent=2) + "\n")


def read_config(folder: Path, config_class):
    """The flags of an earlier run, from its config.json, as a `config_class`."""

    class Config(TypedDict):
        args: schema_of(config_class)

    hint = "this is no run folder, or one of another script or version: start a new run"
    return config_class(**read_json(folder / "config.json", Config, hint)["args"])


def check_parent(folder: Path) -> None:
    """A folder that exists or can be made."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        fail(f"--output-dir '{str(folder)[:80]}' cannot be written to ({error.strerror}); the default is runs")


def locked(folder: Path):
    """The run's lock, an open file, which also a killed process gives back: two in one folder would mix their steps."""
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"'{folder}' is in use by another process: let it end, or start a new run")
    return file


def no_room(error: Exception) -> str:
    """What the system said, if it is that nothing more can be written; else nothing."""
    said, numbers = str(error), (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return next((os.strerror(n) for n in numbers if f"[Errno {n}]" in said or f"(os error {n})" in said), "")
