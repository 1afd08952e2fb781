"""metrics.jsonl of one or several runs -> figures: a thin line per run, a thick one for their median where all runs
are, and the 95 % interval of an evaluation: a band around a single run, a whisker at the end of each of several.

uv run python -m common.plot --runs runs/grpo_arithmetic/A runs/grpo_arithmetic/B --out docs/results/grpo_arithmetic
"""

import importlib
import json
import re
import textwrap
from pathlib import Path

import numpy as np

SECONDS = "time/elapsed_s"
# script -> module whose FIGURES has its figures -> panels (title, x, metrics) and whose UNITS name the y axes. A panel
# without a metric in any of the runs is left out
ROOMS = dict.fromkeys(("grpo_arithmetic", "grpo_mixed"), "common.plot.language")
ROOMS |= dict.fromkeys(("ppo_fetch", "ppo_gr00t", "gr00t_finetune"), "common.plot.robot")
X = {SECONDS: "seconds since the start", "time/train_s": "seconds of training"}


def read_metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl" if run_dir.is_dir() else run_dir
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(rows: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def median(curves: list[tuple[np.ndarray, np.ndarray]], log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Median of curves (x, y) at every x that one of them has, from where all have begun to where the first one ends.

    Straight lines between a curve's points are straight on the axis that is drawn. Of two outcomes it shows the more
    frequent one, where a mean would be an outcome that no run had.
    """
    xs = np.unique(np.concatenate([c[0] for c in curves]))
    xs = xs[(xs >= max(c[0][0] for c in curves)) & (xs <= min(c[0][-1] for c in curves))]
    to, back = (np.log, np.exp) if log and min(c[1].min() for c in curves) > 0 else (np.asarray, np.asarray)
    ys = np.median([back(np.interp(xs, c[0], to(c[1]))) for c in curves], axis=0)
    if len(xs) <= 100:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), 100)  # of every step: the median of a hundredth of the run
    return np.array([xs[part].mean() for part in parts]), np.array([np.median(ys[part]) for part in parts])


def expand(metrics: list[str], logged: set[str]) -> list[str]:
    """Those that are logged; a * stands for every task, a user's own among them: what has an eval_<task>_greedy."""
    tasks = sorted(found[1] for name in logged if (found := re.fullmatch(r"eval_(\w+)_greedy", name)))
    names = [metric.replace("*", task) for metric in metrics for task in (tasks if "*" in metric else ("",))]
    return [name for name in dict.fromkeys(names) if name in logged]


def of_task(metric: str) -> str:
    """The task of a metric by task, else the metric: what has one colour."""
    return re.sub(r"eval_(\w+)_accuracy|train/(\w+)/solve_rate", r"\1\2", metric)


def unit_of(metric: str, units: dict[str, str]) -> str:
    return next((label for pattern, label in units.items() if re.match(pattern, metric)), "")


def figure(runs: list[Path], panels: list, out: Path, caption: str, units: dict[str, str], step: str) -> Path:
    """Draws the panels for all runs and writes a PNG. units: pattern of a metric -> y label; step: x label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    data = [read_metrics(run) for run in runs]
    logged = {name for rows in data for row in rows for name in row}
    panels = [(title, x, names) for title, x, metrics in panels if (names := expand(metrics, logged))]
    shown = [of_task(name) for _, _, metrics in panels for name in metrics]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(shown))}  # a series keeps its own in all panels
    thousands = EngFormatter(sep="")
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines + 0.5), squeeze=False)
    for ax, (title, x, metrics) in zip(axes.flat, panels):
        for metric in metrics:
            color = colors[of_task(metric)]
            for rows in data:
                xs, ys = series(rows, x, metric)
                sparse = {"marker": "o", "markersize": 3} if len(xs) < 30 else {}
                ax.plot(
                    xs, ys, color=color, alpha=0.35 if len(runs) > 1 or len(xs) > 300 else 1.0, linewidth=1, **sparse
                )
                low, high = (series(rows, x, f"{metric}_{end}") for end in ("low", "high"))
                if len(low[0]) == len(xs) > 0 and len(runs) == 1 and len(metrics) <= 3:
                    ax.fill_between(xs, low[1], high[1], color=color, alpha=0.15, linewidth=0)
                elif len(low[0]) == len(xs) > 0 and len(metrics) <= 3:
                    bar = np.maximum([ys[-1:] - low[1][-1:], high[1][-1:] - ys[-1:]], 0)  # 1.0 may have rounded
                    ax.errorbar(xs[-1:], ys[-1:], bar, color=color, alpha=0.5, linewidth=1, capsize=2)
            curves = [c for rows in data if len((c := series(rows, x, metric))[0])]
            if len(curves) > 1 or (curves and len(curves[0][0]) > 300):
                ax.plot(*median(curves, title.endswith("log scale")), color=color, linewidth=2)
            ax.plot([], [], color=color, linewidth=2, label=metric.removeprefix("train/").removeprefix("losses/"))
        ax.set_title(title, fontsize=10)
        if title.endswith("log scale") and any(np.greater(line.get_ydata(), 0).any() for line in ax.lines):
            ax.set_yscale("log")
        ax.set_xlabel(X.get(x, step), fontsize=9)
        ax.set_ylabel(unit_of(metrics[0], units), fontsize=9)
        ax.xaxis.set_major_formatter(lambda v, _: thousands.format_eng(v) if abs(v) >= 1000 else f"{v:g}")  # 0.5 s
        ax.locator_params(axis="x", nbins=6)  # more labels than that run into each other
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    key = "thin: one run each, thick: their median where all runs are, whisker" if len(runs) > 1 else "band"
    caption = textwrap.fill(f"{caption} | {key}: 95 % interval of an evaluation", int(4.6 * columns * 18))
    fig.text(0.5, 0.005, caption, ha="center", fontsize=7, color="0.35")
    fig.tight_layout(rect=(0, 0.02 + 0.1 / lines / 3, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
    return out


def caption_of(runs: list[Path]) -> str:
    """Command, commit, hardware and seeds, from the runs' config.json."""
    configs = [json.loads((run / "config.json").read_text()) for run in runs if (run / "config.json").exists()]
    if not configs:
        return ""
    c = configs[0]
    seeds = ", ".join(str(config["args"]["seed"]) for config in configs)
    command = re.sub(r" --(seed|exp-name|output-dir) \S+", "", c["command"])
    hardware = f"{c['cpu']} " if c["device"] == "cpu" and c.get("cpu") else ""
    threads = f"{c['threads']} thread" + "s" * (c["threads"] != 1)
    commits = ", ".join(dict.fromkeys(config["git"] for config in configs))
    return f"{command} | commit {commits} | {hardware}{c['device']}, {threads} | seed{'s' * (len(configs) > 1)} {seeds}"


def draw(runs: list[Path], script: str, out: Path) -> list[Path]:
    """All figures of a script, as <out>/<figure>.png."""
    if script not in ROOMS:
        return []
    room = importlib.import_module(ROOMS[script])
    about = caption_of(runs), room.UNITS, room.STEP.get(script, "training step")
    return [figure(runs, panels, out / f"{name}.png", *about) for name, panels in room.FIGURES[script].items()]
