"""ppo_fetch.py against stable-baselines3's PPO and a cleanRL-style loop: FetchReach, or Gymnasium's classic control.

Every contender runs in a process of its own, one after the other, seed by seed, so that a machine whose speed drifts
drifts under all of them. All are measured alike: after every 1,600 env steps or so, 100 episodes of the mean action with
fixed seeds; evaluation time does not count. Reported: env steps and seconds until 95 % succeed, steps a second.

    uv run --group bench python benchmarks/ppo_vs_peers.py --out docs/results/ppo_fetch/peers.jsonl
    uv run --group bench python benchmarks/ppo_vs_peers.py --suite classic --out docs/results/ppo_fetch/classic.jsonl

    ours              ppo_fetch.py as it is
    sb3               its PPO for dictionaries at its defaults: 1 x 2048, batch 64, 10 epochs, gamma 0.99, lr 3e-4
    sb3, zoo          its zoo's settings of the nearest task, Reacher-v2: 1 x 512, batch 32, 5 epochs, gamma 0.9, lr 1e-4
    sb3, 8 x 1024     batch 256, else the defaults: our guess at what suits eight environments, not theirs
    sb3, our settings the same class with our observations, normalisation and hyperparameters: what the code itself costs
    cleanrl-style     1 x 2048, 32 minibatches, a time limit counts as the end, one normaliser per environment

The classic suite asks for the return of 50 such episodes after as many env steps for all, every 8,192 or so: ours, and
sb3 at its defaults (1 x 2048, batch 64, 10 epochs, gamma 0.99, lr 3e-4 throughout). `--flags` are added to ours.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

from common.robot import fetch
from common.robot.fetch import FetchVec

EVAL_EVERY = 1_600  # env steps
EPISODES = 50  # of an evaluation of the classic suite
STEPS = {"ours": 12_000, "sb3": 80_000, "sb3, zoo": 80_000, "sb3, 8 x 1024": 80_000, "sb3, our settings": 24_000}
STEPS["cleanrl-style"] = 80_000
CLASSIC = {"CartPole-v1": 50_000} | dict.fromkeys(  # env steps of a run
    ("Acrobot-v1", "Pendulum-v1", "Hopper-v5", "HalfCheetah-v5"), 100_000
)


@dataclass
class Args:
    suite: Literal["fetch", "classic"] = "fetch"  # steps to success, or return after as many steps
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of every contender
    only: tuple[str, ...] = ()  # contenders to run; default: all
    envs: tuple[str, ...] = tuple(CLASSIC)  # environments of the classic suite
    flags: str = ""  # flags of ours in the classic suite, in one string
    out: str | None = None  # JSONL file for the curves
    child: str | None = None  # (used by the benchmark itself) run one contender and print its curve as JSON


class Curve:
    """Success against env steps and training seconds; the clock stops during an evaluation."""

    def __init__(self):
        self.envs, self.start, self.paused, self.rows = FetchVec("FetchReach-v4", 100), time.time(), 0.0, []
        self.next = 0

    def measure(self, steps: int, act) -> None:
        """`act`: dictionary of observations (100, ...) -> mean actions (100, 4)."""
        if steps < self.next:
            return
        self.next = steps + EVAL_EVERY
        pause = time.time()
        obs, _ = self.envs.reset(seed=100_000)
        for _ in range(50):
            obs, _, _, _, infos = self.envs.step(act(obs))
        success = infos["final_info"]["is_success"].mean(dtype=np.float64)  # 95 of 100 in float32 are less than 0.95
        self.rows.append({"steps": steps, "seconds": pause - self.start - self.paused, "success": success})
        self.paused += time.time() - pause


# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(seed: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo_fetch.py"), "--seed", str(seed), "--eval-every", "2"]
        command += ["--no-capture-video", "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True)
        (run,) = Path(folder, "ppo_fetch").iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {"steps": r["step"], "seconds": r.get("time/train_s", 0.0), "success": r["eval/success_rate"]}
        for r in rows
        if "eval/success_rate" in r
    ]


def sb3(seed: int, name: str) -> list[dict]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    fetch.import_robotics()
    torch.set_num_threads(1)

    class Delta(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (19,), np.float32)

        def observation(self, obs):
            return fetch.flatten({key: value[None] for key, value in obs.items()}, "delta")[0]

    if name == "sb3, our settings":
        envs = make_vec_env("FetchReachDense-v4", 32, seed=seed, wrapper_class=Delta)
        envs = VecNormalize(envs, gamma=0.9)
        model = PPO(
            "MlpPolicy", envs, n_steps=25, batch_size=200, n_epochs=10, gamma=0.9, gae_lambda=0.95,
            learning_rate=lambda left: 1e-3 * left, target_kl=0.02, policy_kwargs={"log_std_init": -0.5}, seed=seed,
            device="cpu",
        )  # fmt: skip  # its limit is 1.5 times target_kl
    elif name == "sb3, zoo":
        envs = VecNormalize(make_vec_env("FetchReachDense-v4", 1, seed=seed), gamma=0.9)
        model = PPO(
            "MultiInputPolicy", envs, n_steps=512, batch_size=32, n_epochs=5, gamma=0.9, gae_lambda=1.0,
            learning_rate=0.000104019, clip_range=0.3, ent_coef=7.52585e-08, vf_coef=0.950368, max_grad_norm=0.9,
            seed=seed, device="cpu",
        )  # fmt: skip
    elif name == "sb3, 8 x 1024":
        envs = make_vec_env("FetchReachDense-v4", 8, seed=seed)
        model = PPO("MultiInputPolicy", envs, n_steps=1024, batch_size=256, n_epochs=10, seed=seed, device="cpu")
    else:
        envs = make_vec_env("FetchReachDense-v4", 1, seed=seed)
        model = PPO("MultiInputPolicy", envs, seed=seed, device="cpu")
    curve = Curve()

    def act(obs):
        if isinstance(envs, VecNormalize):
            obs = envs.normalize_obs(fetch.flatten(obs, "delta") if name == "sb3, our settings" else obs)
        return model.predict(obs, deterministic=True)[0]

    class Measure(BaseCallback):
        """Once a rollout is over its policy has been trained on what came before: measure where the next one starts."""

        def _on_rollout_start(self):
            curve.measure(self.num_timesteps, act)

        def _on_step(self):
            return not (curve.rows[-1]["success"] >= 0.99)

    model.learn(STEPS[name], callback=Measure())
    curve.measure(10**9 if curve.rows[-1]["success"] >= 0.99 else model.num_timesteps, act)
    return [row for row in curve.rows if row["steps"] < 10**9]


def cleanrl_style(seed: int) -> list[dict]:
    """What most people copy: per-environment wrappers, `done` for both kinds of end, no bootstrap through time limits."""
    fetch.import_robotics()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    T, gamma, lam, total = 2048, 0.99, 0.95, STEPS["cleanrl-style"]

    env = gym.make("FetchReachDense-v4")
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))
    env = gym.wrappers.ClipAction(env)
    env = normalizer = gym.wrappers.NormalizeObservation(env)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
    env = gym.wrappers.NormalizeReward(env, gamma=gamma)
    env = gym.wrappers.TransformReward(env, lambda r: np.clip(r, -10, 10))

    def layer(inputs, outputs, gain=2**0.5):
        made = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(made.weight, gain)
        nn.init.zeros_(made.bias)
        return made

    D, A = env.observation_space.shape[0], 4
    actor = nn.Sequential(layer(D, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, A, 0.01))
    critic = nn.Sequential(layer(D, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))
    log_std = nn.Parameter(torch.zeros(A))
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)
    curve = Curve()

    @torch.no_grad()
    def act(obs):
        flat = np.concatenate([obs[key] for key in sorted(obs)], axis=1)
        rms = normalizer.obs_rms
        x = np.clip((flat - rms.mean) / np.sqrt(rms.var + 1e-8), -10, 10)
        return actor(torch.from_numpy(x).float()).numpy()

    obs, done = torch.tensor(env.reset(seed=seed)[0]).float(), 0.0
    iterations = total // T
    for iteration in range(iterations):
        curve.measure(iteration * T, act)
        if curve.rows[-1]["success"] >= 0.99:
            break
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - iteration / iterations)
        O, X, L, R, V, Z = (torch.zeros(T, *s) for s in ((D,), (A,), (), (), (), ()))
        for t in range(T):
            O[t], Z[t] = obs, done
            with torch.no_grad():
                dist = torch.distributions.Normal(actor(obs), log_std.exp())
                X[t] = dist.sample()
                L[t], V[t] = dist.log_prob(X[t]).sum(), critic(obs)[0]
            raw, R[t], terminated, truncated, _ = env.step(X[t].numpy())
            done = float(terminated or truncated)
            obs = torch.tensor(env.reset()[0] if done else raw).float()
        with torch.no_grad():
            advantages, running, following = torch.zeros(T), 0.0, critic(obs)[0]
            for t in reversed(range(T)):
                alive = 1.0 - (done if t == T - 1 else Z[t + 1])
                running = R[t] + gamma * following * alive - V[t] + gamma * lam * alive * running
                advantages[t], following = running, V[t]
            returns = advantages + V
        for _ in range(10):
            for mb in torch.randperm(T).split(T // 32):
                dist = torch.distributions.Normal(actor(O[mb]), log_std.exp())
                ratio = (dist.log_prob(X[mb]).sum(1) - L[mb]).exp()
                a = (advantages[mb] - advantages[mb].mean()) / (advantages[mb].std() + 1e-8)
                policy_loss = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
                value = critic(O[mb])[:, 0]
                clipped = V[mb] + (value - V[mb]).clamp(-0.2, 0.2)
                value_loss = 0.5 * torch.max((value - returns[mb]) ** 2, (clipped - returns[mb]) ** 2).mean()
                optimizer.zero_grad()
                (policy_loss + 0.5 * value_loss).backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
    return curve.rows


# ---- classic control -------------------------------------------------------------------------------------------------


def ours_classic(seed: int, env_id: str, flags: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo_fetch.py"), "--env-id", env_id, "--env-backend", "gymnasium"]
        command += ["--seed", str(seed), "--total-timesteps", str(CLASSIC[env_id]), "--eval-episodes", str(EPISODES)]
        command += ["--no-capture-video", "--output-dir", folder]
        every = "--eval-every" not in flags and ["--eval-every", "4"] or []
        done = subprocess.run([*command, *every, *flags.split()], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        (run,) = Path(folder, "ppo_fetch").iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {"steps": r["step"], "seconds": r.get("time/train_s", 0.0), "return": r["eval/episodic_return"]}
        for r in rows
        if "eval/episodic_return" in r
    ]


def sb3_classic(seed: int, env_id: str, flags: str) -> list[dict]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    start, paused, rows = time.time(), 0.0, []
    model, envs = (
        PPO("MlpPolicy", env_id, seed=seed, device="cpu"),
        gym.make_vec(env_id, EPISODES, vectorization_mode="sync"),
    )

    def measure(steps: int) -> None:
        nonlocal paused
        pause = time.time()
        (obs, _), total, alive = envs.reset(seed=100_000), 0.0, np.ones(EPISODES, bool)
        while alive.any():
            obs, rewards, terminations, truncations, _ = envs.step(model.predict(obs, deterministic=True)[0])
            total += (rewards * alive).sum()
            alive &= ~(terminations | truncations)
        rows.append({"steps": steps, "seconds": pause - start - paused, "return": total / EPISODES})
        paused += time.time() - pause

    class Measure(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps % (4 * 2048) == 0:
                measure(self.num_timesteps)

        def _on_step(self):
            return True

    model.learn(CLASSIC[env_id], callback=Measure())
    measure(model.num_timesteps)
    return rows


RUN_CLASSIC = {"ours": ours_classic, "sb3": sb3_classic}


def classic(args: Args) -> None:
    if args.child:
        print(json.dumps(RUN_CLASSIC[args.child](args.seeds[0], args.envs[0], args.flags)))
        return
    for env_id in args.envs:
        for name in args.only or RUN_CLASSIC:
            last = []
            for seed in args.seeds:
                words = ["--seeds", str(seed), "--envs", env_id, f"--flags={args.flags}"]
                rows = child(name, "--suite", "classic", *words)
                keep(args.out, {"contender": name, "flags": args.flags, "env": env_id, "seed": seed}, rows)
                last.append(rows[-1]["return"])
                rate = rows[-1]["steps"] / max(rows[-1]["seconds"], 1e-9)
                curve = " ".join(f"{row['return']:.0f}" for row in rows)
                print(f"{env_id} {name} seed {seed}: {curve} ({rate:.0f} steps/s)", flush=True)
            print(f"{env_id:12s} {name:5s} {args.flags} last, mean of seeds: {mean(last):.1f}", flush=True)


def child(name: str, *words: str) -> list[dict]:
    """What contender `name` prints in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(out: str | None, head: dict, rows: list[dict]) -> None:
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as f:
            f.writelines(json.dumps(head | row) + "\n" for row in rows)


RUN = {
    "ours": ours,
    **{name: lambda seed, name=name: sb3(seed, name) for name in STEPS if name.startswith("sb3")},
    "cleanrl-style": cleanrl_style,
}


def reached(rows: list[dict], share: float = 0.95) -> dict | None:
    return next((row for row in rows if row["success"] >= share - 1e-6), None)  # 0.95 may have been a float32


def main(args: Args) -> None:
    if args.suite == "classic":
        return classic(args)
    if args.child:
        print(json.dumps(RUN[args.child](args.seeds[0])))
        return
    found: dict[str, list[dict]] = {name: [] for name in args.only or RUN}
    for seed in args.seeds:
        for name in found:
            rows = child(name, "--seeds", str(seed))
            at = reached(rows)
            rate = rows[-1]["steps"] / rows[-1]["seconds"]
            found[name].append({"at": at, "rate": rate, "best": max(row["success"] for row in rows)})
            text = f"95 % after {at['steps']:6,} steps, {at['seconds']:5.1f} s" if at else "95 % not reached"
            print(f"seed {seed}  {name:18s} {text}, {rate:5.0f} steps/s, last {rows[-1]['success']:.2f}", flush=True)
            keep(args.out, {"contender": name, "seed": seed}, rows)
    mine = found.get("ours", [])
    for name, runs in found.items():
        if name == "ours" or not mine:
            continue
        pairs = [(a["at"], b["at"]) for a, b in zip(runs, mine) if a["at"] and b["at"]]
        line = (
            f"{name} / ours, median over seeds: steps/s {median(a['rate'] / b['rate'] for a, b in zip(runs, mine)):.2f}"
        )
        if pairs:
            line += "".join(
                f", {unit} to 95 % {median(a[unit] / b[unit] for a, b in pairs):.1f}x" for unit in ("steps", "seconds")
            )
        print(line + f" ({len(pairs)} of {len(runs)} seeds got there)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
