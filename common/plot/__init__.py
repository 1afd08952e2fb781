"""metrics.jsonl of one or several runs -> figures: a thin line per seed, a thick one for their mean.

uv run python -m common.plot --runs runs/grpo_arithmetic/A runs/grpo_arithmetic/B --out docs/results/grpo_arithmetic
"""

import importlib
import json
import textwrap
from pathlib import Path

import numpy as np

SECONDS = "time/elapsed_s"
# script -> module whose FIGURES has its figures -> panels (title, x, metrics). A metric is followed by its interval
# where <metric>_low is logged; a panel without a metric in any of the runs is left out
ROOMS = dict.fromkeys(("grpo_arithmetic", "grpo_mixed"), "common.plot.language")
ROOMS |= dict.fromkeys(("ppo_fetch", "ppo_gr00t", "gr00t_finetune"), "common.plot.robot")


def read_metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl" if run_dir.is_dir() else run_dir
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(rows: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def figure(runs: list[Path], panels: list, out: Path, caption: str) -> Path:
    """Draws the panels for all runs and writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = [read_metrics(run) for run in runs]
    logged = {name for rows in data for row in rows for name in row}
    panels = [panel for panel in panels if logged & set(panel[2])] or panels
    columns = {4: 2, 7: 4, 8: 4}.get(len(panels), min(len(panels), 3))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.3 * lines + 0.4), squeeze=False)
    for ax, (title, x, metrics) in zip(axes.flat, panels):
        for i, metric in enumerate(metrics):
            curves = [c for rows in data if len((c := series(rows, x, metric))[0])]
            if not curves:
                continue
            color = f"C{i}"
            for xs, ys in curves:
                sparse = {"marker": "o", "markersize": 3} if len(xs) < 30 else {}
                ax.plot(xs, ys, color=color, alpha=0.35 if len(curves) > 1 else 1.0, linewidth=1, **sparse)
            grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 100)
            if len(curves) > 1:
                mean = np.mean([np.interp(grid, *c) for c in curves], axis=0)
                ax.plot(grid, mean, color=color, linewidth=2)
            ax.plot([], [], color=color, label=metric.removeprefix("train/").removeprefix("losses/"))
            low, high = (series(data[0], x, f"{metric}_{end}") for end in ("low", "high"))
            if len(runs) == 1 and len(metrics) <= 3 and len(low[0]):
                ax.fill_between(low[0], low[1], high[1], color=color, alpha=0.15, linewidth=0)
        ax.set_title(title, fontsize=10)
        if title.endswith("log scale"):
            ax.set_yscale("log")
        ax.set_xlabel("seconds" if x.startswith("time/") else x, fontsize=9)
        ax.locator_params(axis="x", nbins=6)  # more labels than that run into each other
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    caption = textwrap.fill(caption, int(4.6 * columns * 18))
    fig.text(0.5, 0.005, caption, ha="center", fontsize=7, color="0.35")
    fig.tight_layout(rect=(0, 0.04, 1, 1))
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
    return f"{c['command']} | commit {c['git']} | {c['device']}, {c['threads']} threads | seeds {seeds}"


def draw(runs: list[Path], script: str, out: Path) -> list[Path]:
    """All figures of a script, as <out>/<figure>.png."""
    found = importlib.import_module(ROOMS[script]).FIGURES[script] if script in ROOMS else {}
    return [figure(runs, panels, out / f"{name}.png", caption_of(runs)) for name, panels in found.items()]
