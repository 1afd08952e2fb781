"""REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, GSPO side by side: each rung changes one function of grpo_arithmetic.py.

    uv run python -m exercises.ladder   # on the table of logits of exercises/run.py, ten seeds: half a minute

REINFORCE is a diff (`git apply exercises/ladder/reinforce.diff`, back with `git apply -R`), the others are flags.
Two optimizer steps a batch, so that ratio and clip have something to do.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import grpo_arithmetic
from common.cli import parse
from exercises import solutions
from exercises.run import answers

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "ladder"
SHORT = "--fresh --n-samples 16 --epochs 40 --eval-every 0 --eval-samples 4 --save-every 0 --num-iterations 2"
RUNGS = {  # name -> flags, diff
    "REINFORCE": ("--scale-rewards none", "reinforce.diff"),
    "RLOO": ("--baseline others --scale-rewards none", None),
    "GRPO": ("", None),
    "Dr. GRPO": ("--scale-rewards none --loss-type dr_grpo", None),
    "DAPO": ("--loss-type dapo --epsilon-high 0.28", None),
    "GSPO": ("--importance sequence", None),
}
SHIFT = 5.0  # added to every reward on the table: it changes no preference, and who has a baseline does not notice
T9 = 2.262  # Student's t: 95 %, ten seeds


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


def module_of(diff: str | None):
    """grpo_arithmetic as it is, or changed by the diff."""
    if not diff:
        return grpo_arithmetic
    with tempfile.TemporaryDirectory() as folder:
        spec = importlib.util.spec_from_file_location("changed", workspace(Path(folder), diff))
        sys.modules["changed"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def settings_of(flags: str):
    kept, sys.argv = sys.argv, ["grpo_arithmetic.py", *SHORT.split(), *flags.split()]
    args, sys.argv = parse(grpo_arithmetic.Args, ""), kept
    return args


def on_the_table(name: str, seeds: range) -> list[list[float]]:
    """Mean reward (0 to 2) of each of 80 steps, for every seed."""
    flags, diff = RUNGS[name]
    script, args = module_of(diff), settings_of(flags)
    names = ("loss_type", "importance", "epsilon", "epsilon_high")
    loss = partial(script.grpo_loss, **{n: getattr(args, n) for n in names}, max_completion_length=3)
    f = SimpleNamespace(**vars(solutions))
    f.group_advantages = lambda rewards, G: script.group_advantages(rewards, G, args.scale_rewards, args.baseline)
    f.grpo_loss = lambda *given, beta: loss(*given, beta=beta)[0]
    curves = [[] for _ in seeds]
    for seed, curve in zip(seeds, curves):
        list(answers(f, seed=seed, iterations=args.num_iterations, shift=SHIFT, curve=curve))
    return curves


def table(curves: dict[str, list[list[float]]]) -> str:
    """Mean reward of all steps, the difference to GRPO's seed by seed with its 95 % interval, and of the last steps."""
    lines = ["| rung | reward, mean of all steps | difference to GRPO | mean of the last ten |", "|---|---|---|---|"]
    whole = {name: np.mean(seeds, axis=1) for name, seeds in curves.items()}
    for name, seeds in curves.items():
        difference = whole[name] - whole["GRPO"]
        half = T9 * difference.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) == 10 else float("nan")
        against = f"{difference.mean():+.3f} ± {half:.3f}" if name != "GRPO" and half == half else ""
        lines.append(f"| {name} | {whole[name].mean():.2f} | {against} | {np.mean(np.array(seeds)[:, -10:]):.2f} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[list[float]]], out: Path) -> None:
    """A panel a rung: each seed thin, their mean thick, and in grey GRPO's mean to compare with."""
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 5.6), sharex=True, sharey=True)
    for ax, (name, seeds) in zip(axes.flat, curves.items()):
        steps = np.arange(1, len(seeds[0]) + 1)
        for seed in seeds:
            ax.plot(steps, seed, color="tab:blue", linewidth=0.6, alpha=0.4)
        ax.plot(steps, np.mean(seeds, axis=0), color="tab:blue", linewidth=2)
        ax.plot(steps, np.mean(curves["GRPO"], axis=0), color="0.2", linestyle="--", linewidth=1)
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    fig.suptitle(f"thin: {len(seeds)} seed(s), thick: their mean, dashed: GRPO's mean", fontsize=9)
    fig.supxlabel("step", fontsize=9)
    fig.supylabel("mean reward of a step (0 to 2)", fontsize=9)
    fig.tight_layout()
    fig.savefig(out, dpi=90)
    plt.close(fig)


def main() -> None:
    torch.set_num_threads(1)
    curves = {name: on_the_table(name, range(10)) for name in RUNGS}
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"rung": name, "reward": seeds}) for name, seeds in curves.items()]
    (RESULTS / "ladder.jsonl").write_text("\n".join(lines) + "\n")
    draw(curves, RESULTS / "ladder.png")
    print(f"{table(curves)}\n{RESULTS}/ladder.png")


if __name__ == "__main__":
    main()
