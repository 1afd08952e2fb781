"""Where numbers and samples go: metrics.jsonl and <table>.jsonl in the run folder and, if asked, a tracker.

Metrics travel as one dict, `logger.log(step, {...})`, so adding a metric is one line in the script.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.checkpoint import replace_file, sync
from common.cli import fail
from common.track import TRACKERS


def plain(value):
    """A number JSON can hold: Python float or int; NaN and infinity become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines_until(path: Path, step: float) -> list[str]:
    """The lines of a JSONL file up to `step`, without the half one that a full disk may have left at the end."""
    *lines, half = path.read_bytes().split(b"\n")
    kept, begins = [], half[:9] == b'{"step": '[: len(half)]
    for number, line in enumerate(lines if begins else [*lines, half], 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, TypeError, KeyError):
            fail(f"'{path}', line {number} is not a line of this log: {line[:40]!r}; take it out to go on")
    return kept


def watched(items: Sequence, what: str):
    """The items, with a progress bar (of the first process, on a terminal: None) if they take long."""
    return tqdm(items, what, leave=False, delay=3, disable=os.environ.get("RANK", "0") != "0" or None)


class Logger:
    """Writes metrics and tables of one run.

    Keys under `time/` hold wall-clock seconds and what else depends on the machine; all others, flags and seed decide.
    With `enabled=False` (all processes but the first) every method does nothing.
    """

    def __init__(self, run_dir: Path, config: dict, tracker: str = "none", enabled: bool = True):
        """config: the run's flags. tracker: a name of common/track."""
        self.run_dir, self.enabled = run_dir, enabled
        self.start = time.time()
        self.bar = None
        self.tracker = TRACKERS[tracker](run_dir, config) if enabled and tracker != "none" else None

    def truncate(self, step: int, elapsed: float) -> None:
        """Continues a run from `step`: later lines are dropped, the clock goes on from `elapsed` seconds."""
        self.start = time.time() - elapsed
        if self.enabled:
            for path in self.run_dir.glob("*.jsonl"):
                replace_file(path, "".join(lines_until(path, step)))

    def sync(self) -> None:
        """Before a checkpoint: what led to it is on the disk."""
        for path in self.run_dir.glob("*.jsonl") if self.enabled else ():
            sync(path)

    @property
    def elapsed(self) -> float:
        return time.time() - self.start

    def progress(self, total: int, initial: int) -> None:
        if self.enabled:
            self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)

    def advance(self, **numbers) -> None:
        """Moves the progress bar by one step and shows the numbers that matter."""
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in numbers.items() if v is not None}, refresh=False)
            self.bar.update()

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        if self.enabled:
            tqdm.write(text)

    def log(self, step: int, metrics: dict) -> None:
        """Appends one line {"step": …, **metrics} to metrics.jsonl (values: numbers or 0-d tensors)."""
        if not self.enabled:
            return
        row = {k: plain(v) for k, v in metrics.items()} | {"time/elapsed_s": round(self.elapsed, 3)}
        with open(self.run_dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step} | row) + "\n")
        if self.tracker is not None:
            self.tracker.log(step, {k: v for k, v in row.items() if v is not None})

    def table(self, name: str, step: int, rows: list[dict], upload: bool = True) -> None:
        """Appends rows to <name>.jsonl; with `upload` the tracker gets them too."""
        if not self.enabled or not rows:
            return
        rows = [{"step": step} | {k: plain(v) for k, v in row.items()} for row in rows]
        with open(self.run_dir / f"{name}.jsonl", "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)  # ASCII: no line separator of Unicode gets in
        if self.tracker is not None and upload:
            self.tracker.table(name, step, rows)

    def finish(self, exit_code: int = 0) -> None:
        """Closes the progress bar and the tracker; safe to call twice."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.tracker is not None:
            self.tracker.finish(exit_code)
            self.tracker = None
