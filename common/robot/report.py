"""What is told of a flow policy: its loss by time and by action dim; recorded episodes replayed, in tables, figures and
words.

A replay is a dict: episode, instruction, recorded and predicted (T, d) in raw units; its errors are a dict of numbers.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.parallel import World
from common.robot.demonstrations import Demonstrations, Split
from common.robot.gr00t import Network
from common.run import Run

TIME_BINS = 4


def student(df: int) -> float:
    """97.5 % quantile of Student's t, within 1 % (Cornish-Fisher from 3 degrees of freedom on)."""
    if df < 3:
        return {1: 12.706, 2: 4.303}.get(df, math.nan)
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))


class Tally:
    """Sums of squared errors since the last line of metrics: in all, by time of the flow, by action dim."""

    def __init__(self, device: torch.device, dims: int):
        self.bins = torch.zeros(2, TIME_BINS, device=device)  # sum, count
        self.dims = torch.zeros(2, dims, device=device)

    @torch.no_grad()
    def add(self, error: torch.Tensor, mask: torch.Tensor, t: torch.Tensor) -> None:
        error, mask = error.float() * mask, mask.float()
        bins = (t.float() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        self.bins[0].index_add_(0, bins, error.sum((1, 2)))
        self.bins[1].index_add_(0, bins, mask.sum((1, 2)))
        self.dims += torch.stack([error.sum((0, 1)), mask.sum((0, 1))])

    def sums(self, world: World) -> dict:
        """Those of all processes, for a checkpoint."""
        bins, dims = world.total(self.bins.clone(), self.dims.clone())
        return {"bins": bins.tolist(), "dims": dims.tolist()}

    def load(self, sums: dict) -> None:
        self.bins.copy_(torch.tensor(sums["bins"]))
        self.dims.copy_(torch.tensor(sums["dims"]))

    def metrics(self, prefix: str, names: list[str], world: World | None = None) -> dict[str, float]:
        """Means, over all processes; the sums start anew."""
        if world:
            world.total(self.bins, self.dims)
        bins, dims = self.bins.tolist(), self.dims.tolist()
        found = {f"{prefix}/loss": sum(bins[0]) / max(sum(bins[1]), 1)}
        for i in range(TIME_BINS):
            name = f"{prefix}/loss_t/{i / TIME_BINS:.2f}-{(i + 1) / TIME_BINS:.2f}"
            found[name] = bins[0][i] / bins[1][i] if bins[1][i] else math.nan
        for i, name in enumerate(names):
            found[f"{prefix}/loss_dim/{name}"] = dims[0][i] / max(dims[1][i], 1)
        self.bins.zero_()
        self.dims.zero_()
        return found


def describe(model: Network, data: Demonstrations, held: Split, args, run: Run) -> str:
    """The arithmetic of a run, before it begins."""
    micro_batches, whole = run.world.size * args.gradient_accumulation_steps, args.max_steps * args.batch_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    notes = ""
    if not held.val_episodes:
        notes += (
            "\nno episode is held out (a single one, or --val-episodes 0): no validation loss, no evaluation at the end"
        )
    if data.state_dims > (most := data.interface.state_dim):
        notes += f"\nthe state has {data.state_dims} numbers, the model takes {most}: the last ones are cut, as in the "
        notes += "reference; name fewer keys in a data config of your own"
    return (
        f"{', '.join(e.path.name for e in data.sets)} as {args.data_config}/{args.embodiment_tag}: {len(held.rows):,} "
        f"of {len(data.end):,} frames to train on, {len(held.val_episodes)} episodes held out, "
        f"{len(data.config.video)} camera(s), {data.dims} action dims\n{args.model_path}: {trained:,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters train; batch {args.batch_size} = {run.world.size} "
        f"process(es) x {args.gradient_accumulation_steps} micro-batch(es) x {args.batch_size // micro_batches}, "
        f"{args.max_steps} steps = {whole / len(held.rows):.1f} epochs, lr {args.learning_rate:g}, amp {args.amp}; log "
        f"{run.folder}{notes}"
    )


def open_loop_tables(run: Run, step: int, results: list[dict], errors: list[dict], names: list[str]) -> None:
    """A row an episode, a row a joint. names: of the recorded action dims."""
    about = [{"episode": r["episode"], "instruction": r["instruction"], "steps": len(r["recorded"])} for r in results]
    run.table("trajectory_results", step, [row | error for row, error in zip(about, errors)])
    squares = [((r["predicted"] - r["recorded"]) ** 2).mean(0) for r in results]  # (d,) each
    joints = [{"joint": name, "mse": float(mse)} for name, mse in zip(names, np.mean(squares, axis=0))]
    run.table("per_joint_mse", step, joints)


def draw_open_loop(result: dict, names: list[str], chunk: int, path: Path) -> Path:
    """One panel per joint: recording, prediction, and a dot wherever the policy looked, every `chunk` rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    height = 1.9 * lines + 0.6
    fig, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, height), squeeze=False, sharex=True)
    for i, (ax, name) in enumerate(zip(axes.flat, names)):
        ax.plot(result["recorded"][:, i], color="0.3", linewidth=1.2, label="recorded")
        ax.plot(result["predicted"][:, i], color="C1", linewidth=1.2, label="predicted")
        looks = np.arange(0, len(result["predicted"]), chunk)
        ax.plot(looks, result["predicted"][looks, i], "o", color="C3", markersize=3, label="looked")
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7, labelbottom=True)
        ax.set_xlabel("frame", fontsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    axes.flat[0].legend(fontsize=7)
    mse = np.mean((result["predicted"] - result["recorded"]) ** 2)
    fig.suptitle(f"episode {result['episode']}: {result['instruction']}; MSE {mse:.4g}", fontsize=9, y=1 - 0.1 / height)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.25 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def in_words(metrics: dict[str, float], base: dict[str, float]) -> Iterator[str]:
    """What an evaluation found. base: the same of the untrained model, or nothing."""
    if "eval/mse" in metrics:
        m = {key.removeprefix("eval/"): value for key, value in metrics.items()}
        before = f"{base['base/mse']:.4g} (untrained on this data) -> " if base else ""
        one = np.isnan(m["mse_low"])  # the spread of one episode is unknown
        interval = "(one episode, no interval)" if one else f"[{m['mse_low']:.4g}, {m['mse_high']:.4g}]"
        yield (
            f"open loop, {m['num_trajectories']:.0f} held-out episodes: MSE {before}{m['mse']:.4g} {interval}; hold "
            f"last action {m['mse_hold_last']:.4g} ({m['mse_hold_last'] / m['mse']:.1f}x), mean action "
            f"{m['mse_mean_action']:.4g} ({m['mse_mean_action'] / m['mse']:.1f}x); normalised {m['mse_normalized']:.4g}"
        )
        sweep = [f"{name.removeprefix('mse_k')}: {value:.4g}" for name, value in m.items() if name.startswith("mse_k")]
        yield f"MSE by number of Euler steps: {', '.join(sweep)}"
    for name, rate in metrics.items():
        if name.startswith("closed_loop/") and name.endswith("/success_rate"):
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            yield f"closed loop, {name.split('/')[1]}: {rate:.0%} [{low:.0%}, {high:.0%}]"
