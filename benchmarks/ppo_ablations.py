"""What each classic PPO mistake costs: the script as it is, with one function replaced by the mistaken one.

    uv run python benchmarks/ppo_ablations.py --out docs/results/ppo_fetch/ablations.jsonl
    uv run python benchmarks/ppo_ablations.py --env-id FetchPush-v4 --total-timesteps 400000 --only none off_by_one_dones

Every variant runs with the same seeds; the numbers are success and return of 100 evaluation episodes.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo_fetch

real_gae, real_update, real_mean_actions = ppo_fetch.gae, ppo_fetch.update, ppo_fetch.mean_actions


def truncation_as_death():
    """A time limit counts as a terminal state: the value after it is 0."""

    def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        return real_gae(rewards, values, next_values, dones, dones, gamma, gae_lambda)

    ppo_fetch.gae = gae


def reset_as_successor():
    """The value after a time limit is that of the next episode's first observation."""

    def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        following = torch.cat([values[1:], next_values[-1:]])
        return real_gae(rewards, values, following, terminations, dones, gamma, gae_lambda)

    ppo_fetch.gae = gae


def off_by_one_dones():
    """The end after step t is stored at t but read at t + 1: the sums run on into the next episode."""

    def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        late = torch.cat([dones[1:], torch.zeros_like(dones[:1])])
        following = torch.cat([values[1:], next_values[-1:]])
        return real_gae(rewards, values, following, late, late, gamma, gae_lambda)

    ppo_fetch.gae = gae


def no_shuffle():
    """Minibatches are the same consecutive rows in every epoch."""
    ppo_fetch.minibatch_order = lambda num, generator: torch.arange(num)


def unsaved_statistics():
    """Evaluation starts from empty observation statistics and learns them as it goes."""

    def mean_actions(agent, device):
        act = real_mean_actions(agent, device)

        def forgetful(x):
            kept = agent.statistics
            forgetful.seen = np.concatenate([forgetful.seen, x]) if len(x) == len(forgetful.last) else x
            forgetful.last = x
            agent.statistics = ppo_fetch.RunningStatistics(x.shape[1])
            agent.statistics.update(torch.from_numpy(forgetful.seen[-50 * len(x) :]))
            actions = act(x)
            agent.statistics = kept
            return actions

        forgetful.seen = forgetful.last = np.zeros((0, 1), np.float32)
        return forgetful

    ppo_fetch.mean_actions = mean_actions


def stale_normaliser():
    """The statistics move between acting and learning: stored log-probs are those of a stale normaliser."""

    def update(agent, loss_of, optimizer, scaler, batch, *rest):
        agent.statistics.update(batch["obs"].flatten(0, 1))
        return real_update(agent, loss_of, optimizer, scaler, batch, *rest)

    ppo_fetch.update = update


PATCHES = [truncation_as_death, reset_as_successor, off_by_one_dones, no_shuffle, unsaved_statistics, stale_normaliser]
FLAGS = {  # not mistakes, but choices of this script that matter
    "in_phase_starts": ["--no-stagger"],
    "no_goal_delta": ["--observation-mode", "observation_goal"],
    "gamma_0.99": ["--gamma", "0.99"],
    "no_target_kl": ["--target-kl", "0"],
    "no_obs_statistics": ["--no-normalize-obs"],
    "no_reward_scaling": ["--no-scale-rewards"],
    "no_advantage_norm": ["--no-norm-adv"],
    "no_annealing": ["--no-anneal-lr"],
    "entropy_bonus": ["--ent-coef", "0.01"],
    "wide_start": ["--log-std-init", "0"],
    "lambda_1": ["--gae-lambda", "1"],
    "lambda_0.8": ["--gae-lambda", "0.8"],
    "no_critic": ["--advantage", "group", "--eval-every", "4"],  # whole episodes: twice the steps an iteration
}
VARIANTS = {"none": None} | {patch.__name__: patch for patch in PATCHES} | dict.fromkeys(FLAGS)


@dataclass
class Args:
    env_id: str = "FetchReach-v4"  # task
    total_timesteps: int = 12_000  # env steps of a run
    eval_every: int = 8  # iterations between evaluations
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of every variant
    only: tuple[str, ...] = tuple(VARIANTS)  # variants to run
    out: str | None = None  # JSONL file for the curves
    child: str | None = None  # (used by the benchmark itself) train one variant into this folder


def command(args: Args, name: str, seed: int) -> list[str]:
    """The script's own command line."""
    return ["--env-id", args.env_id, "--total-timesteps", str(args.total_timesteps), "--seed", str(seed),
            "--eval-every", str(args.eval_every), "--no-capture-video", *FLAGS.get(name, [])]  # fmt: skip


def train(args: Args, name: str, seed: int) -> list[dict]:
    """Runs one variant in a process of its own; its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--child", folder, "--only", name, "--seeds", str(seed)]
        words += ["--env-id", args.env_id, "--total-timesteps", str(args.total_timesteps)]
        words += ["--eval-every", str(args.eval_every)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        (run,) = Path(folder, "ppo_fetch").iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("eval/success_rate", "eval/episodic_return", "eval/final_distance")
    return [{"step": r["step"]} | {k: r[k] for k in keys} for r in rows if keys[0] in r]


def main(args: Args) -> None:
    if args.child:
        (name,), (seed,) = args.only, args.seeds
        if VARIANTS[name]:
            VARIANTS[name]()
        sys.argv = ["ppo_fetch.py", *command(args, name, seed), "--output-dir", args.child]
        ppo_fetch.main(ppo_fetch.parse(ppo_fetch.Args, ""))
    print(f"{args.env_id}, seeds {args.seeds}: success (return) of 100 episodes after so many steps, mean of seeds")
    for name in args.only:
        curves = [train(args, name, seed) for seed in args.seeds]
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as f:
                for seed, curve in zip(args.seeds, curves):
                    head = {"variant": name, "env_id": args.env_id, "seed": seed}
                    f.writelines(json.dumps(head | row) + "\n" for row in curve)
        cells = []
        for points in zip(*curves):
            success, ret = (np.mean([p[k] for p in points]) for k in ("eval/success_rate", "eval/episodic_return"))
            cells.append(f"{points[0]['step']:,}: {success:.2f} ({ret:.2f})")
        worst = min(curve[-1]["eval/success_rate"] for curve in curves)
        print(f"{name:20s} {'  '.join(cells[1:])}  worst seed {worst:.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
