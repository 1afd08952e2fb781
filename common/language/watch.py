"""What is watched while a language model learns: metrics of completions, alarms, accuracies with their intervals."""

import numpy as np
import torch

from common.language.stats import pass_at_k
from common.run import Run
from common.stats import wilson

ALARMS = {  # metric -> what is alarming, what to say
    "frac_reward_zero_std": (
        lambda share: share == 1,
        "all completions of every prompt earned the same reward, nothing to learn from this step: raise the "
        "temperature, or look at completions.jsonl",
    ),
    "accuracy": (
        lambda share: share == 0,
        "no completion of this step is right, and GRPO needs a first success: easier problems, a reward with steps, "
        "more tokens, --chat for a chat model, or supervised texts first; see docs/own_data.md",
    ),
    "kl": (lambda nats: nats > 5, "the policy is leaving its language: lower --learning-rate or raise --beta"),
    "completions/clipped_ratio": (
        lambda share: share == 1,
        "every completion was cut at --max-completion-length before it ended: allow more tokens, or check that the "
        "model's end token is right",
    ),
    "skipped": (
        lambda count: count > 0,
        "the loss or gradient was not finite or no token was left to train: weights left as they were",
    ),
    "sampling_logp_difference/mean": (
        lambda nats: not nats <= 0.05,
        "sampler and trainer are different models: of such a step nothing is to be trusted",
    ),
    "entropy": (lambda nats: nats < 0.01, "the policy has become deterministic and stopped exploring"),
}


def alarms(metrics: dict[str, float], low_precision: bool = False) -> dict[str, str]:
    """What looks broken in a step's metrics, in plain words. In bfloat16 a trainer is that far from its sampler."""
    if low_precision:
        metrics = {name: x for name, x in metrics.items() if "sampling_logp_difference" not in name}
    logged = {name: metrics[f"train/{name}"] for name in ALARMS if f"train/{name}" in metrics}
    found = {name: f"{name} is {x:.3g}: {ALARMS[name][1]}" for name, x in logged.items() if ALARMS[name][0](x)}
    for name, count in metrics.items():
        if name.startswith("train/rewards/") and name.endswith("/missing") and count:
            text = (
                f"reward {name.split('/')[2]!r} gave no finite number for {count:.0f} completions: their advantage is 0"
            )
            found[name] = text + ", their groups go on without them; see completions.jsonl"
    return found


def reward_parts(rows: list[dict], names: tuple[str, ...]) -> torch.Tensor:
    """(B, functions) float32: what each reward function gave; NaN for None, NaN and infinity."""
    parts = torch.from_numpy(np.array([[row[name] for name in names] for row in rows], dtype=np.float32))
    return parts.masked_fill(~parts.isfinite(), torch.nan)


def mean_and_std(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the finite ones among these."""
    values = values[values.isfinite()]
    return values.mean(), values.std() if len(values) > 1 else torch.zeros(())


def reward_metrics(rewards: torch.Tensor, parts: torch.Tensor, names: tuple[str, ...], num_generations: int) -> dict:
    """rewards (B,) and their parts (B, functions) before weighting, of whole groups in consecutive rows."""
    groups = [group[group.isfinite()] for group in rewards.view(-1, num_generations)]
    mean, std = mean_and_std(rewards)
    metrics = {"reward": mean, "reward_std": std}
    metrics["frac_reward_zero_std"] = torch.tensor([len(group.unique()) < 2 for group in groups]).float().mean()
    for name, column in zip(names, parts.T):
        mean, std = mean_and_std(column)
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
        metrics[f"rewards/{name}/missing"] = (~column.isfinite()).sum()
    return metrics


def completion_metrics(rows: list[dict]) -> dict:
    """Of a step's completions, each a row with "is_correct", "ended" and "tokens"."""
    lengths = {"length": [row["tokens"] for row in rows]}
    lengths["terminated_length"] = [row["tokens"] for row in rows if row["ended"]] or [0]
    metrics = {"accuracy": np.mean([row["is_correct"] for row in rows])}
    for name, values in lengths.items():
        for kind, statistic in (("mean", np.mean), ("min", min), ("max", max)):
            metrics[f"completions/{kind}_{name}"] = statistic(values)
    return metrics | {"completions/clipped_ratio": 1 - np.mean([row["ended"] for row in rows])}


@torch.no_grad()
def clip_metrics(low: torch.Tensor, high: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> dict:
    """low, high (B, T) bool: tokens stopped at the lower or upper end of the ratio; mask (B, T) 0 or 1; tokens: of the
    whole step, whose share they are."""
    low, high, row_tokens = low * mask, high * mask, mask.sum(1).clamp(min=1.0)
    return {
        "clip_ratio/low_mean": low.sum() / tokens,
        "clip_ratio/high_mean": high.sum() / tokens,
        "clip_ratio/region_mean": (low + high).sum() / tokens,
        "clip_ratio/low_min": (low.sum(1) / row_tokens).min(),
        "clip_ratio/high_max": (high.sum(1) / row_tokens).max(),
    }


def scored(rows: list[dict], rewards: torch.Tensor, advantages: torch.Tensor, n: int) -> list[dict]:
    """The first n rows with what they earned and how they compare with their group."""
    return [row | {"reward": r, "advantage": a} for row, r, a in zip(rows[:n], rewards, advantages)]


def solved_by_task(rows: list[dict]) -> dict[str, float]:
    """Share of right completions of each "task" among these."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return {task: float(np.mean([row["is_correct"] for row in rows if row["task"] == task])) for task in tasks}


def task_metrics(rows: list[dict], rewards: torch.Tensor, shares: dict[str, float], num_generations: int) -> dict:
    """reward_metrics of the groups of each task, its share of the step, and how many groups that came to."""
    metrics, tasks = {}, [row["task"] for row in rows]  # (B,)
    for task, share in shares.items():
        own = rewards[torch.tensor([name == task for name in tasks])]
        metrics |= {f"{task}/share": share, f"{task}/groups": len(own) // num_generations}
        if len(own):
            found = reward_metrics(own, own[:, None], (), num_generations)
            metrics |= {f"{task}/{name}": found[name] for name in ("reward", "frac_reward_zero_std")}
    return metrics


def accuracy(name: str, solved: np.ndarray) -> dict[str, float]:
    """solved (n,): share of right samples of each problem -> their mean, its interval and n; nothing for no problem.

    Intervals take each problem as one observation, however many samples it got: problems are what was drawn.
    """
    if not len(solved):
        return {}
    low, high = wilson(solved.sum(), len(solved))
    return {name: solved.mean(), f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(solved)}


def eval_metrics(problems, sampled, greedy, trained_prompts, bands, operations) -> dict[str, float]:
    """Accuracies of the standard evaluation. sampled (N, k) and greedy (N, 1): 1.0 where the answer is right.

    bands: difficulties; operations: sign -> name, of what is counted apart.
    """
    N, k = sampled.shape
    metrics = {"arithmetic_eval_correct": int(sampled.sum()), "arithmetic_eval_total": N * k}
    metrics["arithmetic_eval_greedy"] = greedy.mean()
    for j in [j for j in (4, 16, 64) if 1 < j <= k]:
        metrics[f"arithmetic_eval_pass@{j}"] = np.mean([pass_at_k(k, int(c), j) for c in sampled.sum(1)])
    unseen = [p.prompt not in trained_prompts for p in problems]
    groups = {"arithmetic_eval": [True] * N, "arithmetic_eval_unseen": unseen}
    groups |= {f"eval_{band}_accuracy": [p.difficulty == band for p in problems] for band in bands}
    groups |= {f"eval_{name}_accuracy": [p.operation == op for p in problems] for op, name in operations.items()}
    for name, members in groups.items():
        metrics |= accuracy(name, sampled[np.array(members)].mean(1))
    del metrics["arithmetic_eval_n"]  # arithmetic_eval_total says it
    return {name: float(value) for name, value in metrics.items()}


def with_interval(metrics: dict[str, float], name: str) -> str:
    """0.412 [0.346, 0.481]"""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{metrics[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def report(run: Run, metrics: dict[str, float], table: list[dict]) -> None:
    """Logs and prints an evaluation that stands alone: --eval-only."""
    run.write(0, metrics)
    run.table("evaluation", 0, table)
    for name in metrics:
        if not name.endswith(("_low", "_high", "_n")):
            run.say(f"{name:32s} {with_interval(metrics, name)}")
    run.say(f"evaluated {run.args.model_name}; answers in {run.folder}/evaluation.jsonl")


def outcome(run: Run, state: dict, steps: int) -> str:
    """The last line of a run, from its first and last evaluation."""
    base, last = (with_interval(state[when], "arithmetic_eval") for when in ("base", "last"))
    train = state["last"].get("final_train_accuracy")
    return (
        f"arithmetic_eval {base} -> {last} "
        f"(held out, {run.args.eval_samples} samples at T {run.args.eval_temperature:g}), "
        + ("" if train is None else f"train accuracy {train:.3f}, ")
        + f"best step {run.best['step']}, {steps} steps in {run.log.elapsed:.0f} s"
    )
