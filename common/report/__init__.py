"""Runs as one page, report.html, that needs neither a network nor a server: settings, curves, tables, videos, health.

Numbers and texts of the runs travel packed (gzip, base64) and reach the page as text only, whatever is in them. The
curves are drawn by uPlot, whose two files stand in uplot/ with their licence.
"""

import base64
import gzip
import html
import importlib
import json
import math
from collections import Counter
from pathlib import Path
from string import Template

import numpy as np

from common.checkpoint import replace_file
from common.cli import fail
from common.log import lines_until
from common.plot import ROOMS, expand
from common.report.health import judge

POINTS = 1_000  # of a curve; of a longer one the extremes of equal stretches
PACKED, IMAGES, VIDEOS = 1_500_000, 1_500_000, 20_000_000  # bytes: tables of completions, figures, videos
TEXTS, SCORES = (
    ("completion", "sample"),
    ("is_correct", "accuracy"),
)  # of tables with problems: what was said, how right
AXES = ("step", "time/elapsed_s", "time/train_s")


def read_lines(path: Path) -> list[dict]:
    """A log of a run, which may still be going on."""
    return [json.loads(line) for line in lines_until(path, math.inf)] if path.exists() else []


class Shown:
    """A run folder as it is read."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.resolve().name
        config = folder / "config.json"
        if not config.exists() and not (folder / "metrics.jsonl").exists():
            fail(f"'{folder}' is no run folder: it has no config.json; runs are in runs/<script>/")
        self.config = json.loads(config.read_text()) if config.exists() else {}
        command = Path(self.config.get("command", "").split(" ")[0]).stem  # else its copy in the folder, or runs/SCRIPT
        names = [command, *(path.stem for path in folder.glob("*.py")), *reversed(folder.resolve().parts)]
        self.script = next((name for name in names if name in ROOMS), "")
        self.series: dict[str, tuple[list[int], list[float]]] = {}  # metric -> lines where it was logged, values there
        for number, row in enumerate(read_lines(folder / "metrics.jsonl")):
            for name, value in row.items():
                if value is not None:
                    at, values = self.series.setdefault(name, ([], []))
                    at.append(number)
                    values.append(value)
        self.tables = {p.stem: read_lines(p) for p in sorted(folder.glob("*.jsonl")) if p.stem != "metrics"}

    def curves(self) -> dict:
        """metric -> (lines, values), thinned; what they are drawn over is kept whole."""
        return {name: one if name in AXES else thin(*one) for name, one in self.series.items()}

    def health(self) -> list[dict]:
        args = self.config.get("args", {})
        low = "bfloat16" in args.values() or args.get("amp") in ("bf16", "fp16")
        low |= "auto" in (args.get("dtype"), args.get("amp")) and self.config.get("device") != "cpu"
        return judge(self.script, {name: values for name, (_, values) in self.series.items()}, low)


def thin(at: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """The least and the largest value of each of POINTS / 2 stretches, where there are more than POINTS."""
    if len(values) > POINTS:
        array, parts = np.array(values), np.array_split(np.arange(len(values)), POINTS // 2)
        extremes = [part[extreme(array[part])] for part in parts for extreme in (np.argmin, np.argmax)]
        index = np.unique([0, len(values) - 1, *extremes])
        at, values = [at[i] for i in index], [values[i] for i in index]
    return at, [rounded(v) for v in values]


# ---- tables ----------------------------------------------------------------------------------------------------------


def before_and_after(rows: list[dict]) -> list[dict]:
    """Of problems that came up more than once: what was said and how right it was, the first time and the last."""
    if not rows or not (text := next((name for name in TEXTS if name in rows[0]), None)) or "prompt" not in rows[0]:
        return []
    score = next(name for name in SCORES if name in rows[0])
    times: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        times.setdefault((row.get("run"), row["prompt"]), {}).setdefault(row["step"], []).append(row)
    found = []
    for (run, prompt), by_step in times.items():
        if len(by_step) > 1:
            line = ({"run": run} if run else {}) | {"prompt": prompt}
            line["expected"] = by_step[min(by_step)][0].get("expected")
            for when, step in (("before", min(by_step)), ("after", max(by_step))):
                said = Counter(row[text] for row in by_step[step]).most_common(3)
                line[f"{when}: step"], line[when] = (
                    step,
                    "\n".join(f"{t}  ({n} times)" if n > 1 else t for t, n in said),
                )
                line[f"{when}: right"] = float(np.mean([row[score] for row in by_step[step]]))
            found.append(line | {"gain": line["after: right"] - line["before: right"]})
    return found


def fewer(rows: list[dict]) -> list[dict]:
    """Every second step, the first and the last among them; where there are but two, every second row."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    kept = {*steps[::2], steps[-1]}
    return [row for row in rows if row["step"] in kept] if len(steps) > 2 else rows[::2]


def packed(value) -> str:
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 6, mtime=0)).decode()


def rounded(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def columns_of(name: str, rows: list[dict], total: int) -> dict:
    """Column by column, which packs well."""
    names = list(dict.fromkeys(column for row in rows for column in row))
    note = (
        f"{len(rows):,} of {total:,} have room here; all are in {name.split(',')[0]}.jsonl" if len(rows) < total else ""
    )
    return {
        "name": name,
        "columns": names,
        "data": [[rounded(row.get(n)) for row in rows] for n in names],
        "note": note,
    }


def tables(runs: list[Shown]) -> list[str]:
    """Packed tables, before and after first; rows are left out where PACKED would not hold them all."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.tables if name != "video_table"):
        own = [({"run": run.name} if len(runs) > 1 else {}) | row for run in runs for row in run.tables.get(name, [])]
        if pairs := before_and_after(own):
            found[f"{name}, before and after"] = pairs
        found[name] = own
    out = []
    for name, rows in found.items():
        total = len(rows)
        while len(text := packed(columns_of(name, rows, total))) > PACKED // len(found) and len(rows) > 1:
            rows = fewer(rows) if "step" in rows[0] else rows[::2]
        out += [text] if rows else []
    return out


# ---- the page --------------------------------------------------------------------------------------------------------


def text_of(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings(runs: list[Shown]) -> list[dict]:
    """A line for each flag, version and fact of config.json: its value in each run."""
    facts = []
    for run in runs:
        flags = {f"--{name.replace('_', '-')}": value for name, value in run.config.get("args", {}).items()}
        others = {name: value for name, value in run.config.items() if not isinstance(value, dict)}
        facts.append(flags | others | run.config.get("versions", {}))
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [{"setting": n} | {run.name: text_of(f.get(n, "")) for run, f in zip(runs, facts)} for n in names]


def differing(lines: list[dict]) -> list[dict]:
    return [line for line in lines if len(set(list(line.values())[1:])) > 1]


def spread(paths: list[Path], room: int) -> list[Path]:
    """As many of the files, evenly, the first and the last among them, as have room."""
    for count in range(len(paths), 0, -1):
        some = [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, count)})]
        if sum(path.stat().st_size for path in some) * 4 / 3 <= room:  # base64
            return some
    return []


def media(runs: list[Shown], pattern: str, room: int) -> dict:
    """Videos or images of the runs, as data of their own, each with what its table says of it."""
    shown, left_out = [], []
    for run in runs:
        every = sorted(run.folder.glob(pattern))
        for path in (some := spread(every, room // len(runs))):
            about = [row for row in run.tables.get("video_table", []) if Path(row["video"]).name == path.name]
            hidden = ("step", "global_step", "video")
            said = [", ".join(f"{k} {rounded(v)}" for k, v in row.items() if k not in hidden) for row in about]
            kind = "video/mp4" if path.suffix == ".mp4" else "image/png"
            source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            shown.append({"source": source, "text": "\n".join([f"{run.name}, {path.stem}", *said])})
        if len(some) < len(every):
            left_out.append(f"{len(some)} of {len(every)} have room here; all are in {run.folder / pattern}")
    return {"shown": shown, "note": "; ".join(left_out)}


def panels(runs: list[Shown]) -> list[dict]:
    """Those of the scripts' figures that have something to show."""
    found, logged = [], {name for run in runs for name in run.series}
    for script in dict.fromkeys(run.script for run in runs if run.script):
        for figure in importlib.import_module(ROOMS[script]).FIGURES[script].values():
            own = [{"title": t, "x": x, "metrics": expand(metrics, logged)} for t, x, metrics in figure]
            found += [panel for panel in own if panel["metrics"] and panel not in found]
    return found


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Writes the page of these runs, report.html in the folder of the only one or beside several; returns its path."""
    out = out or (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    runs, here = [Shown(folder) for folder in folders], Path(__file__).parent
    curves = {"panels": panels(runs), "runs": [{"name": run.name, "series": run.curves()} for run in runs]}
    lines = settings(runs)
    judged = [({"run": run.name} if len(runs) > 1 else {}) | line for run in runs for line in run.health()]
    about = {"What differs": differing(lines), "Settings": lines}
    data = {
        "curves": packed(curves),
        "settings": [packed(columns_of(name, rows, len(rows))) for name, rows in about.items() if rows],
        "tables": [*([packed(columns_of("Health", judged, len(judged)))] if judged else []), *tables(runs)],
        "Videos": media(runs, "videos/*.mp4", VIDEOS),
        "Open loop": media(runs, "open_loop/*.png", IMAGES),
    }
    parts = {
        "title": html.escape(", ".join(run.name for run in runs)),
        "data": json.dumps(data).replace("<", "\\u003c"),
        "style": (here / "uplot" / "uPlot.min.css").read_text() + (here / "page.css").read_text(),
        "uplot": (here / "uplot" / "uPlot.iife.min.js").read_text(),
        "page": (here / "page.js").read_text(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, Template((here / "page.html").read_text()).substitute(parts))
    return out
