"""Draws metrics.jsonl of one or several runs of a script.

uv run python -m common.plot --runs runs/grpo_arithmetic/A runs/grpo_arithmetic/B --out docs/results/grpo_arithmetic
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from common.plot import draw


@dataclass
class Args:
    runs: tuple[Path, ...]  # run folders of one script
    out: Path  # folder for the PNG files
    script: str = "grpo_arithmetic"  # script the runs are of


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    print("\n".join(map(str, draw(list(args.runs), args.script, args.out))))
