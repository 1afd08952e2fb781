"""Threads, open files and memory of the GRPO and PPO scripts over a thousand short steps: they stay what they were.

    uv run python benchmarks/soak.py                       # about four minutes of one core
    uv run python benchmarks/soak.py --script ppo_fetch --steps 5000

Prints a row of /proc/self for every tenth of a run, and exits with 1 if threads or files of the last row are more than
those of the second, or its memory is larger by more than 20 MB.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import short_runs
from benchmarks.short_runs import forked, run_main
from common.cli import parse

ROOM = 20  # MB that a run may grow by


def usage() -> dict[str, int]:
    """This process now: threads, open files, MB in memory."""
    status = Path("/proc/self/status").read_text()
    threads, memory = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("Threads", "VmRSS"))
    return {"threads": threads, "files": len(os.listdir("/proc/self/fd")), "memory": memory // 1024}


def soak(script: str, words: list[str], steps: int, log: Path) -> None:
    """Runs the script; after every tenth of its steps a line of `log` says what it uses."""
    from common.run import Run

    end_step = Run.end_step

    def watched(run, step: int, *args, **kwargs) -> None:
        end_step(run, step, *args, **kwargs)
        if step % (steps // 10) == 0:
            with open(log, "a") as file:
                file.write(json.dumps({"script": script, "step": step} | usage()) + "\n")

    Run.end_step = watched
    run_main(script, words)


@dataclass
class Args:
    script: Literal["all", "grpo_arithmetic", "grpo_mixed", "ppo_fetch", "ppo_gr00t"] = "all"  # which script to run
    steps: int = 1000  # optimizer steps, or iterations of PPO; a multiple of 10


def main(args: Args) -> None:
    short_runs.warm_up()
    scripts = ["grpo_arithmetic", "grpo_mixed", "ppo_fetch", "ppo_gr00t"] if args.script == "all" else [args.script]
    grown = []
    print("| script | step | threads | open files | memory, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        flags = short_runs.starting_points(Path(name))
        for script in scripts:
            length = ["--epochs", args.steps // 2] if "grpo" in script else ["--total-timesteps", args.steps * 20]
            rare = ["--eval-every", 0, "--save-every", 0, "--output-dir", Path(name) / "soak"]
            log = Path(name) / f"{script}.jsonl"
            words = [*flags[script], *map(str, length + rare)]
            outcome = forked(partial(soak, script, words, args.steps, log), 3600)
            assert outcome.code == 0, outcome.err[-1000:]
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            print("\n".join(f"| {' | '.join(map(str, row.values()))} |" for row in rows), flush=True)
            second, last = rows[1], rows[-1]
            more = [kind for kind in ("threads", "files") if last[kind] > second[kind]]
            grown += [f"{script}: {kind}" for kind in more + ["memory"] * (last["memory"] > second["memory"] + ROOM)]
    print("what grows: " + (", ".join(grown) or "nothing"))
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main(parse(Args, __doc__))
