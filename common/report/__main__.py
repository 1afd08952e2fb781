"""One page of one or several runs, to look at, to compare, to send: curves, completions, videos, health.

uv run python -m common.report runs/grpo_arithmetic/A runs/grpo_arithmetic/B --out both.html
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.report import write


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders
    out: Path | None = None  # file to write; default: report.html in the folder of the run, or beside several


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    print(write(list(args.runs), args.out))
