"""Kills a short run of each script at every file operation, resumes it, and compares with a run that was left alone.

    uv run python benchmarks/kill_points.py                               # every point of all five scripts, one core
    uv run python benchmarks/kill_points.py --script ppo_fetch --every 10

Operation: opening a file to write, a write, making, renaming, removing or linking something, inside the output folder.
A point is the moment before one, or the middle of a write. What a kill would leave there is a copy of the folder, made
in that moment (what the process still had in its buffers is not in it); every tenth point is killed for real (SIGKILL).
So is `--resume` of runs that were killed at moments that leave much to do: with lines behind the last checkpoint, while
old checkpoints are pruned, before the links, before the end. Then `--resume` must end well, and the folder be that of
the run left alone:

    every line of metrics.jsonl and of all tables but for what time/ says     the weights that last and best point at
    the checkpoints that are kept, and nothing temporary                      at every tenth point: --resume changes nothing

Killed before there was a checkpoint, a run is refused in one line. Prints a table and exits with 1 if a point lost.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import short_runs
from benchmarks.file_operations import Point, killed, photographed, restore
from benchmarks.short_runs import SCRIPTS, forked, run_main
from common.cli import parse

# ---- what a run has left ---------------------------------------------------------------------------------------------


def run_folder(root: Path, script: str) -> Path | None:
    return next((root / script).glob("*/"), None) if (root / script).exists() else None


def resume(root: Path, script: str) -> None:
    run_main(script, ["--resume", str(run_folder(root, script))])


def calls_of(script: str, flags: list[str], root: Path) -> tuple[Callable, Callable]:
    """Starting the script in `root`, and resuming what is there."""
    return partial(run_main, script, [*flags, "--output-dir", str(root)]), partial(resume, root, script)


def contents(run: Path) -> dict[str, object]:
    """What two equal runs have in common; file -> what it holds."""
    found: dict[str, object] = {}
    for path in sorted(run.glob("*.jsonl")):
        # what a row names, and how long it took
        text = re.sub(r'"time/[^"]*": [^,}]*(, )?', "", path.read_text()).replace(str(run), "")
        found |= {f"{path.name}:{number}": row for number, row in enumerate(text.split("\n"), 1)}
    found["checkpoints"] = sorted(path.name for path in (run / "checkpoints").glob("*"))
    found |= {name: os.readlink(run / name) for name in ("last", "best") if (run / name).is_symlink()}
    for name in ("last", "best"):
        found |= {f"{name}/{p.name}": p.read_bytes() for p in (run / name).glob("model*.safetensors")}
    found["figures"] = sorted(str(p.relative_to(run)) for p in run.rglob("*.png"))
    found["temporary"] = [str(p.relative_to(run)) for p in run.rglob("*") if "tmp" in p.name]
    return found


def difference(found: dict, wanted: dict) -> str:
    """The first difference in words, or nothing."""
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            have, want = (str(x.get(name, "nothing"))[:100] for x in (found, wanted))
            return f"{name} differs" + ("" if "safetensors" in name else f": {have} instead of {want}")
    return ""


def verdict(run: Path | None, again: Callable, wanted: dict, twice: bool) -> str:
    """Calls again(), which resumes `run`, perhaps `twice`; what is wrong then, or nothing."""
    if run is None:
        return ""  # killed before it had a folder
    hopeless = not list((run / "checkpoints").glob("step-*"))
    for name in ("--resume", "a second --resume") if twice and not hopeless else ("--resume",):
        outcome = forked(again)
        if hopeless and outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1:
            return ""
        if outcome.code != 0 or hopeless:
            return f"{name} ends with {outcome.code}: {(outcome.err.strip().splitlines() or ['?'])[-1][-200:]}"
        if lost := difference(contents(run), wanted):
            return f"after {name} {lost}"
    return ""


# ---- all points ------------------------------------------------------------------------------------------------------


def moments(points: list[Point]) -> dict[str, Point]:
    """Points of a run after which --resume has much to do."""
    whole = [point for point in points if not point.half]
    saves = [p.number for p in whole if p.kind == "os.rename" and re.search(r"checkpoints/step-\d+$", p.path)]
    logs = [p.number for p in whole if p.kind == "write" and p.path.endswith("metrics.jsonl")]
    prunes = [p.number for p in whole if p.kind == "os.remove" and "checkpoints/" in p.path]
    chosen = {
        "lines behind the last checkpoint": next(n for n in logs if n > saves[1]) + 1,
        "a checkpoint half pruned": prunes[len(prunes) // 2],
        "a checkpoint without links": saves[-1] + 1,
        "all but the end": whole[-1].number,
    }
    return {name: next(p for p in whole if p.number == number) for name, number in chosen.items()}


def all_points(
    script: str, start: Callable, again: Callable, every: int, folder: Path, tell=print, resumes=True
) -> tuple[int, list[str]]:
    """Tries every `every`-th point of a run and of its resumptions. Returns their number and what was lost.

    start() makes a run of the script in folder/run, again() resumes it. resumes: kill resumptions too.
    """
    root, losses, tried = folder / "run", [], 0
    points, outcome = photographed(start, root, folder / "first")
    assert outcome.code == 0, outcome.err
    wanted = contents(run_folder(root, script))

    def attempt(point: Point, call: Callable, album: Path, before: Path, name: str = "") -> None:
        nonlocal tried
        tenth = tried % 10 == 0
        if tenth:
            restore(before, root)
            killed(call, root, point)
        else:
            restore(point.photo(album), root)
        tried += 1
        if wrong := verdict(run_folder(root, script), again, wanted, twice=tenth):
            losses.append(f"{script}, killed {name}{point}: {wrong}")
            tell(losses[-1])

    for point in points[::every]:
        attempt(point, start, folder / "first", folder / "nothing")
    for name, first in moments(points).items() if resumes else ():
        restore(before := first.photo(folder / "first"), root)
        resumed, outcome = photographed(again, root, folder / "second")
        if outcome.code != 0:
            losses.append(f"{script}, with {name}: --resume ends with {outcome.code}: {outcome.err[-200:]}")
        for point in resumed[::every]:
            attempt(point, again, folder / "second", before, f"with {name}, resumed and killed ")
    return tried, losses


@dataclass
class Args:
    script: Literal["all", "grpo_arithmetic", "grpo_mixed", "ppo_fetch", "gr00t_finetune", "ppo_gr00t"] = "all"
    """which script to kill"""
    every: int = 1  # try every so many points


def main(args: Args) -> None:
    short_runs.warm_up()
    rows, lost = [], 0
    with tempfile.TemporaryDirectory() as name:
        flags = short_runs.starting_points(Path(name))
        for script in SCRIPTS if args.script == "all" else [args.script]:
            start = time.time()
            calls = calls_of(script, flags[script], Path(name) / script / "run")
            tried, losses = all_points(script, *calls, args.every, Path(name) / script)
            rows.append(f"| {script} | {tried} | {len(losses)} | {time.time() - start:.0f} s |")
            lost += len(losses)
    print("\n".join(["| script | points | losses | time |", "|---|---|---|---|", *rows]))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main(parse(Args, __doc__))
