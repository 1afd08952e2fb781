"""REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, GSPO side by side: each rung changes one function of grpo_arithmetic.py.

    uv run python -m exercises.ladder              # runs what is not there yet, a minute each; then draws
    uv run python -m exercises.ladder --seeds 1 2  # more seeds: one is no claim

REINFORCE is a diff (`git apply exercises/ladder/reinforce.diff`, back with `git apply -R`), the others are flags.
Two optimizer steps a batch, so that ratio and clip have something to do.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from common.stats import wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "ladder"
SHORT = "--fresh --n-samples 16 --epochs 60 --eval-every 0 --eval-samples 4 --save-every 0 --num-iterations 2"
RUNGS = {  # name -> flags, diff
    "REINFORCE": ("--scale-rewards none", "reinforce.diff"),
    "RLOO": ("--baseline others --scale-rewards none", None),
    "GRPO": ("", None),
    "Dr. GRPO": ("--scale-rewards none --loss-type dr_grpo", None),
    "DAPO": ("--loss-type dapo --epsilon-high 0.28", None),
    "GSPO": ("--importance sequence --epsilon 3e-4 --epsilon-high 4e-4", None),
}


def workspace(folder: Path, diff: str | None) -> Path:
    """A copy of the script, changed by the diff, beside links to what it imports; its path."""
    for name in ("assets", "common"):
        (folder / name).symlink_to(ROOT / name)
    script = folder / "grpo_arithmetic.py"
    script.write_text((ROOT / script.name).read_text())
    if diff:
        patch = ROOT / "exercises" / "ladder" / diff
        subprocess.run(["git", "apply", "--unsafe-paths", "--directory", str(folder), str(patch)], check=True, cwd="/")
    return script


def climb(name: str, seed: int) -> dict:
    """Trains one rung in a process of its own. Returns its reward of every step, its evaluation, and how it was made."""
    flags, diff = RUNGS[name]
    words = [*SHORT.split(), *flags.split(), "--seed", str(seed)]
    log = ["git", "log", "-1", "--format=%h", "--", "grpo_arithmetic.py", "common", "assets"]  # what a run is made of
    head = subprocess.run(log, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        script = workspace(Path(folder), diff)
        command = [sys.executable, str(script), *words, "--output-dir", f"{folder}/runs"]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        (log,) = Path(folder).glob("runs/grpo_arithmetic/*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    (last,) = [row for row in rows[-1:] if "arithmetic_eval" in row]
    row = {"rung": name, "seed": seed, "command": "python grpo_arithmetic.py " + " ".join(words), "diff": diff}
    row |= {"commit": head, "seconds": round(time.time() - start), "threads": 1}
    row |= {"arithmetic_eval": last["arithmetic_eval"], "base": rows[0]["arithmetic_eval"]}
    return row | {"reward": [round(r["train/reward"], 4) for r in rows if "train/reward" in r]}


def table(rows: list[dict]) -> str:
    """A line a run: reward of the first and last ten steps, accuracy with the 95 % interval over the 200 problems."""
    lines = ["| rung | seed | reward, first 10 steps → last 10 | `arithmetic_eval` |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (list(RUNGS).index(row["rung"]), row["seed"])):
        (low, high), r = wilson(200 * row["arithmetic_eval"], 200), row["reward"]
        cells = f"{row['rung']} | {row['seed']} | {np.mean(r[:10]):.2f} → {np.mean(r[-10:]):.2f}"
        lines.append(f"| {cells} | {row['arithmetic_eval']:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(lines)


def draw(rows: list[dict]) -> None:
    """One panel a rung: its seeds thick, all other rungs thin and grey behind; mean of 5 steps."""
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 5.6), sharex=True, sharey=True)
    for ax, name in zip(axes.flat, RUNGS):
        for row in sorted(rows, key=lambda row: row["rung"] == name):
            y, own = np.convolve(row["reward"], np.ones(5) / 5, "valid"), row["rung"] == name
            ax.plot(np.arange(5, len(y) + 5), y, color="tab:blue" if own else "0.8", linewidth=2 if own else 0.8)
        ax.set_title(f"{name} ({sum(row['rung'] == name for row in rows)} seed)", fontsize=10)
        ax.grid(alpha=0.3)
    fig.supxlabel("step of 256 completions", fontsize=9)
    fig.supylabel("reward of the step (-1 to 1), mean of 5 steps", fontsize=9)
    fig.tight_layout()
    fig.savefig(RESULTS / "ladder.png", dpi=100)


@dataclass
class Args:
    seeds: tuple[int, ...] = (1,)


def main(args: Args) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "ladder.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed, name in [(seed, name) for seed in args.seeds for name in RUNGS]:
        if not any((row["rung"], row["seed"]) == (name, seed) for row in rows):
            rows.append(climb(name, seed))
            with open(file, "a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    draw(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
