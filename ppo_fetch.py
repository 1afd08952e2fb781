"""PPO on the Fetch robot: a policy learns to move a gripper, or a block with it, to a goal.

    data        N environments x T steps a iteration, B = N * T transitions; an episode is cut at 50 steps, never "dead"
    advantage   d_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t),   A_t = d_t + gamma lambda (1 - done_t) A_{t+1}
                s'_t is the state that followed, also where the episode ended there (GAE, arXiv 1506.02438)
    objective   minimise  mean of -min(w A, clip(w, 1 - eps, 1 + eps) A) + c_v (V - R)^2 - c_e H
                w = exp(logp - logp_old), R = A + V_old (PPO, arXiv 1707.06347)

Every line of the algorithm that is an equation carries it: grep for "eq:".

Against the PPO file that most people copy: time limits are bootstrapped through, running statistics are frozen for an
iteration and saved, the KL limit is checked before each step, evaluation is apart, and physics runs on threads.
Left out on purpose: recurrent policies, image observations, hindsight replay (it is off-policy).

Dims: N environments, T steps, B = N * T, D observation, A action.

    uv run python ppo_fetch.py                                   # FetchReach, dense reward: half a minute on a laptop
    uv run python ppo_fetch.py --env-id FetchPush-v4             # shaped reward, six minutes
    uv run python ppo_fetch.py --env-id CartPole-v1 --env-backend gymnasium
    uv run torchrun --nproc-per-node 4 ppo_fetch.py --env-id FetchPush-v4

Equations next to symbols, metrics and results: docs/ppo_fetch.md.
"""

import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from common import plot
from common.checkpoint import atomic_folder, find_checkpoint, link, load_state, prune, save_state
from common.log import Logger
from common.robot import fetch
from common.run import (
    StopSignal,
    World,
    close_world,
    create_run,
    fail,
    parse,
    read_config,
    seed_everything,
    setup_world,
    write_config,
)

SCRIPT = "ppo_fetch"

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "ppo_fetch"
    """name of the run"""
    seed: int = 1
    """seed of weights, environments, action noise and minibatches"""
    tags: tuple[str, ...] = ("ppo", "fetch")
    """wandb tags"""
    output_dir: str = "runs"
    """parent of the run folder"""
    device: str = "cpu"
    """cpu, cuda or auto; the simulator is on the CPU, so a GPU is for large networks"""
    torch_threads: int = 1
    """CPU threads of torch; more are for wide networks and large minibatches"""
    torch_deterministic: bool = True
    """only deterministic kernels"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account"""
    resume: str | None = None
    """run folder (or one of its checkpoints) to continue, bit-exactly, with the settings it was started with"""
    init_from: str | None = None
    """run folder or checkpoint whose policy and statistics to start from (a new run)"""
    eval_only: bool = False
    """measure the policy of --init-from, record a video, and stop"""
    save_every: int = 50
    """iterations between checkpoints, 0: only at the end"""
    keep: int = 2
    """newest checkpoints to keep, besides the best"""

    # task
    env_id: str = "FetchReach-v4"
    """FetchReach-v4, FetchPush-v4, FetchSlide-v4, FetchPickAndPlace-v4, or any Gymnasium id with another backend"""
    env_backend: Literal["native", "gymnasium", "gymnasium-async"] = "native"
    """native: FetchVec, physics on threads; gymnasium: one after the other; gymnasium-async: a process each"""
    observation_mode: Literal["observation", "observation_goal", "full", "delta"] = "delta"
    """what the policy sees, see common/robot/fetch.py; other environments: their own observation"""
    reward_mode: Literal["sparse", "dense", "distance", "shaped", "env"] | None = None
    """-1/0 | -distance | the same, +10 at the goal | potential-based shaping | the environment's own; default: by task"""
    success_reward: float = 0.1
    """shaped: reward of a step that ends at the goal"""
    shaping: float = 5.0
    """shaped: weight of g * Phi(s') - Phi(s)"""
    shaping_gamma: float = 1.0
    """shaped: g. 1 telescopes: an episode's return changes by Phi(end) - Phi(start); --gamma's value leaves the
    discounted optimum unchanged, but hardly teaches anything (docs/ppo_fetch.md)"""

    # rollout
    total_timesteps: int | None = None
    """environment steps of the run, over all processes; default: by task"""
    num_envs: int | None = None
    """environments N, over all processes; default: by task"""
    num_steps: int = 25
    """steps T that each environment takes in an iteration, 20 to 50 for Fetch"""
    stagger: bool = True
    """start the environments at different ages, so that no batch is all starts or all ends (native backend)"""
    env_groups: int = 2
    """groups that step by turns: one group's physics runs while the policy acts for the other; 1: no overlap"""
    num_threads: int | None = None
    """threads that step physics, of each process; default: this machine's cores, shared among its processes"""

    # update
    learning_rate: float | None = None
    """Adam step size at the start; default: by task"""
    anneal_lr: bool = True
    """lower the step size linearly to 0 over the iterations"""
    gamma: float | None = None
    """discount, 0.9 to 0.99; default: by task"""
    gae_lambda: float = 0.95
    """GAE's lambda"""
    num_minibatches: int | None = None
    """minibatches in an epoch; must divide N * T; default: by task"""
    update_epochs: int | None = None
    """passes over the batch at most, 3 to 10; default: by task"""
    target_kl: float | None = None
    """stop an iteration's update before the minibatch whose KL exceeds this, 0.01 to 0.05; 0: never; default: by task"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """PPO's epsilon"""
    clip_vloss: bool = False
    """clip the value loss as well; its range is in units of (scaled) return"""
    ent_coef: float = 0.0
    """weight of the entropy bonus; actions that do nothing (the gripper of Reach) drift under it"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient clipping"""
    hidden: int | None = None
    """width of the two hidden layers; default: by task"""
    log_std_init: float = -0.5
    """initial log standard deviation of the actions, whose box is [-1, 1]"""
    normalize_obs: bool = True
    """standardise observations by running statistics"""
    scale_rewards: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """mixed precision of the hidden layers; everything after them stays in fp32"""
    compile: bool = False
    """torch.compile the loss of a minibatch, and the policy that acts; pays on a CPU for long runs only, if at all"""

    # evaluation
    eval_every: int = 10
    """iterations between evaluations, 0: only at the end"""
    eval_episodes: int = 100
    """episodes of an evaluation, always the same ones, mean actions"""
    stop_success: float = 0.0
    """end the run once three evaluations in a row have at least this success rate, 0: never"""
    eval_seed: int = 100_000
    """seed of the first evaluation episode"""
    capture_video: bool = True
    """record videos in an environment of their own (needs EGL or OSMesa)"""
    video_every: int = 0
    """iterations between videos, 0: only at the end"""
    video_episodes: int = 2
    """episodes in a video"""


# What differs by task where a flag is not given. "other": whatever is not Fetch, near cleanRL's settings.
WITH_A_BLOCK = dict(reward_mode="shaped", num_envs=64, learning_rate=5e-4, gamma=0.95, num_minibatches=8,
                    update_epochs=10, target_kl=0.05, hidden=256)  # fmt: skip
RECIPES = {
    "FetchReach": dict(reward_mode="dense", total_timesteps=12_000, num_envs=32, learning_rate=1e-3, gamma=0.9,
                       num_minibatches=4, update_epochs=10, target_kl=0.03, hidden=64),
    "FetchPush": WITH_A_BLOCK | dict(total_timesteps=1_000_000),
    "FetchPickAndPlace": WITH_A_BLOCK | dict(total_timesteps=1_200_000),
    "FetchSlide": WITH_A_BLOCK | dict(total_timesteps=800_000),
    "other": dict(reward_mode="env", total_timesteps=500_000, num_envs=8, learning_rate=3e-4, gamma=0.99,
                  num_minibatches=4, update_epochs=10, target_kl=0.03, hidden=64),
}  # fmt: skip


def task_of(env_id: str) -> str:
    """FetchPush-v4, FetchPushDense-v4 -> FetchPush; anything but Fetch -> other."""
    return env_id.removesuffix("-v4").removesuffix("Dense") if fetch.is_fetch(env_id) else "other"


# ---- 2. Environments -------------------------------------------------------------------------------------------------


def make_envs(args: Args, num_envs: int, backend: str, pool: ThreadPoolExecutor | None = None) -> VectorEnv:
    """`num_envs` environments that reset in the step that ends an episode (its last observation is in the infos)."""
    if backend == "native":
        return fetch.FetchVec(args.env_id, num_envs, args.num_threads, pool=pool)
    if fetch.is_fetch(args.env_id):
        fetch.import_robotics()
    return gym.make_vec(
        args.env_id,
        num_envs,
        vectorization_mode="async" if backend == "gymnasium-async" else "sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


def features(obs, args: Args) -> np.ndarray:
    """What the policy sees, (N, D) float32, from what the environment returns."""
    if fetch.is_fetch(args.env_id):
        return fetch.flatten(obs, args.observation_mode)
    parts = [obs[key] for key in sorted(obs)] if isinstance(obs, dict) else [obs]
    return np.concatenate([np.asarray(part, dtype=np.float32).reshape(len(part), -1) for part in parts], axis=1)


def successors(next_obs, infos: dict, dones: np.ndarray):
    """The observations that really followed: `next_obs`, with `final_obs` where the episode ended in this step.

    Without `final_obs` (NEXT_STEP autoreset) `next_obs` is the true successor as it is.
    """
    if not dones.any() or "final_obs" not in infos:
        return next_obs
    ended, final = np.flatnonzero(dones), infos["final_obs"]
    if not isinstance(next_obs, dict):
        true = next_obs.copy()
        true[ended] = np.stack([final[i] for i in ended])
        return true
    true = {key: value.copy() for key, value in next_obs.items()}
    for key in true:
        true[key][ended] = np.stack([final[i][key] for i in ended])
    return true


def success_flags(infos: dict, dones: np.ndarray) -> np.ndarray | None:
    """(N,) bool `is_success` of the step just taken, also where it ended an episode; None: the task has no such thing."""
    now, final = infos.get("is_success"), infos.get("final_info", {}).get("is_success")
    if now is None and final is None:
        return None
    now, final = (np.zeros(len(dones)) if x is None else x for x in (now, final))
    return np.where(dones & infos.get("_final_info", np.zeros(len(dones), bool)), final, now).astype(bool)


@dataclass
class Group:
    """Some of the environments, and where their running episodes stand."""

    envs: VectorEnv
    rows: slice  # which of the process's N environments
    obs: object = None  # as the environment returned it
    x: np.ndarray | None = None  # features(obs), (n, D)
    potential: np.ndarray | None = None  # Phi(obs), shaped reward only
    ended: np.ndarray | None = None  # (n,) bool: the last step ended the episode
    whole: np.ndarray | None = None  # (n,) bool: the running episode began at its beginning
    length: np.ndarray | None = None  # (n,) steps of the running episode
    ret: np.ndarray | None = None  # (n,) sum of rewards
    once: np.ndarray | None = None  # (n,) bool: was at the goal in some step
    wait: object = None  # finishes the step that is under way

    def observe(self, obs, args: Args) -> None:
        self.obs, self.x = obs, features(obs, args)
        if args.reward_mode == "shaped":
            self.potential = fetch.potential(obs, task_of(args.env_id))

    def begin(self, seeds: list[int], args: Args) -> None:
        n = self.envs.num_envs
        self.observe(self.envs.reset(seed=seeds)[0], args)
        self.ended, self.once, self.whole = np.zeros(n, bool), np.zeros(n, bool), np.ones(n, bool)
        self.length, self.ret = np.zeros(n, np.int64), np.zeros(n)

    def start(self, actions: np.ndarray) -> None:
        """Begins a step; `self.wait()` ends it. Plain gymnasium environments step when waited for."""
        if hasattr(self.envs, "step_async"):
            self.envs.step_async(actions)
            self.wait = self.envs.step_wait
        else:
            self.wait = lambda: self.envs.step(actions)


def reset_groups(groups: list[Group], args: Args, first: int) -> None:
    """Starts the first training episodes; `first` is this process's first environment among all of the run."""
    # with seed + i, runs of neighbouring seeds would share all but one of their environments
    seeds = [int(seed) for seed in np.random.SeedSequence([args.seed, 1]).generate_state(args.num_envs)]
    for group in groups:
        n, start = group.envs.num_envs, first + group.rows.start
        group.begin(seeds[start : start + n], args)
        if args.stagger and isinstance(group.envs, fetch.FetchVec):
            group.envs.elapsed[:] = np.arange(start, start + n) * group.envs.max_episode_steps // args.num_envs
            group.whole = group.envs.elapsed == 0


# ---- 3. Model --------------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of everything seen so far, in float64, part of the checkpoint."""

    def __init__(self, size: int):
        super().__init__()
        for name, value in {"mean": torch.zeros(size), "var": torch.ones(size), "count": torch.zeros(())}.items():
            self.register_buffer(name, value.double())

    def update(self, x: torch.Tensor, world: World | None = None) -> None:
        """Adds the rows of x (B, size), from all processes."""
        x = x.double()
        n, total = torch.full((), len(x), dtype=torch.float64, device=x.device), x.sum(0)
        if world:
            world.all_sum([n, total])
        mean = total / n
        squares = ((x - mean) ** 2).sum(0)
        if world:
            world.all_sum([squares])
        # eq: M2 = M2_a + M2_b + (m_b - m_a)^2 n_a n_b / (n_a + n_b)   [Chan et al. 1979]
        count, delta = self.count + n, mean - self.mean
        m2 = self.var * self.count + squares + delta**2 * self.count * n / count
        self.mean += delta * n / count
        self.var.copy_(m2 / count)
        self.count.copy_(count)


class Agent(nn.Module):
    """Two separate tanh networks: the policy's parameters (mean or logits) and the value; state-independent log-std."""

    def __init__(self, obs_dim: int, action_space: gym.Space, args: Args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.statistics = RunningStatistics(obs_dim)
        self.return_statistics = RunningStatistics(1)
        self.normalize_obs = args.normalize_obs
        self.actor, self.critic = mlp(obs_dim, args.hidden), mlp(obs_dim, args.hidden)
        self.actor_head = orthogonal(nn.Linear(args.hidden, outputs), 0.01)
        self.critic_head = orthogonal(nn.Linear(args.hidden, 1), 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
        self.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) raw -> standardised, clipped to +-10. The std has a floor: a blocked finger's is numerical noise."""
        if not self.normalize_obs:
            return x
        s = self.statistics
        std = s.var.sqrt().clamp_min(1e-3)
        return ((x - s.mean.float()) / std.float()).clamp(-10, 10)

    def trunk(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The hidden layers, the only part in low precision: heads, densities and losses are fp32."""
        with torch.autocast(x.device.type, self.amp) if self.amp else nullcontext():
            h = net(x)
        return h.float()

    def policy(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, A) mean of the actions, or logits."""
        return self.actor_head(self.trunk(self.actor, self.normalize(x)))

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B,), in units of scaled reward."""
        return self.critic_head(self.trunk(self.critic, self.normalize(x))).squeeze(-1)

    def reward_scale(self) -> torch.Tensor:
        s = self.return_statistics
        return 1.0 / (s.var.sqrt()[0] + 1e-8) if s.count > 0 else torch.ones((), dtype=torch.float64)


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int) -> nn.Sequential:
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(orthogonal(first, 2**0.5), nn.Tanh(), orthogonal(second, 2**0.5), nn.Tanh())


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def sample(agent: Agent, policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Actions from the policy's parameters (B, A) and standard noise: normal (B, A), or uniform (B, 1) if discrete."""
    if agent.discrete:
        cdf = policy.softmax(-1).cumsum(-1)
        return (cdf < noise * cdf[:, -1:]).sum(-1)  # (B,)
    return policy + agent.log_std.exp() * noise  # (B, A); stored unclipped, executed clipped


def logprobs_entropy(agent: Agent, policy: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) log-density of the (unclipped) actions and (B,) entropy, both fp32."""
    if agent.discrete:
        logp = policy.log_softmax(-1)
        return logp.gather(-1, actions.long()[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    log_std = agent.log_std
    # eq: log N(a; mu, s) = -((a - mu) / s)^2 / 2 - log s - log(2 pi) / 2, summed over dimensions
    z = (actions - policy) * torch.exp(-log_std)
    logp = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    # eq: H = sum(log s + (1 + log(2 pi)) / 2)
    return logp, (log_std + 0.5 * (1 + np.log(2 * np.pi))).sum().expand_as(logp)


def gae(rewards, values, next_values, terminations, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimation. All (T, N).

    values: V(s_t). next_values: V of the state that followed s_t, `final_obs` where the episode ended.
    terminations: the state that followed is terminal, its value is 0. dones: the episode ended there, terminated or cut
    by a time limit: the sum stops, but after a time limit the next value still counts.

    Returns (advantages, returns), (T, N). Source: arXiv 1506.02438; time limits: arXiv 1712.00378.
    """
    advantages = torch.zeros_like(rewards)
    # eq: delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    deltas = rewards + gamma * (next_values * ~terminations.bool()) - values
    running = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        # eq: A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}
        running = deltas[t] + gamma * gae_lambda * (running * ~dones[t].bool())
        advantages[t] = running
    return advantages, advantages + values


def ppo_loss(
    logprobs, old_logprobs, advantages, entropy, values, old_values, returns, *,
    clip_coef: float = 0.2, clip_vloss: bool = False, ent_coef: float = 0.0, vf_coef: float = 0.5,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The clipped surrogate, the value loss and the entropy bonus; all inputs (B,) float32, advantages as they weigh.

    Returns (loss, metrics); metrics are detached means over B. Source: arXiv 1707.06347, eq. 7 and 9.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()  # eq: w = pi(a|s) / pi_old(a|s)
    # eq: L_pi = -min(w A, clip(w, 1 - eps, 1 + eps) A)
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()
    # eq: L_V = (V - R)^2 / 2
    value_error = (values - returns) ** 2
    if clip_vloss:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        value_error = torch.max(value_error, (clipped - returns) ** 2)
    value_loss = 0.5 * value_error.mean()
    # eq: L = L_pi + c_v L_V - c_e H
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy.mean()
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.mean(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # eq: k3 = (w - 1) - log w   [joschu.net/blog/kl-approx]
            "old_approx_kl": -log_ratio.mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
            "ratio_max_error": (ratio - 1).abs().max(),
        }
    return loss, metrics


def normalize_advantages(advantages: torch.Tensor, world: World) -> torch.Tensor:
    """Zero mean, unit std over the minibatch's rows on all processes; a single row stays as it is."""
    a = advantages.double()
    sums = [torch.stack([torch.full_like(a.sum(), len(a)), a.sum(), (a**2).sum()])]
    world.all_sum(sums)
    n, total, squares = sums[0]
    if n < 2:
        return advantages
    # eq: A <- (A - mean A) / (std A + 1e-8)
    std = ((squares - total**2 / n) / (n - 1)).clamp_min(0).sqrt()
    return ((a - total / n) / (std + 1e-8)).float()


def minibatch_order(num: int, generator: torch.Generator) -> torch.Tensor:
    """The order in which an epoch goes through the batch: each row once, anew in every epoch."""
    return torch.randperm(num, generator=generator)


def minibatch_loss(agent: Agent, mb: dict, advantages: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """`ppo_loss` of a minibatch's rows under the present weights; with --compile one graph, networks included."""
    logprobs, entropy = logprobs_entropy(agent, agent.policy(mb["obs"]), mb["actions"])
    return ppo_loss(
        logprobs, mb["logprobs"], advantages, entropy, agent.value(mb["obs"]), mb["values"], mb["returns"],
        clip_coef=args.clip_coef, clip_vloss=args.clip_vloss, ent_coef=args.ent_coef, vf_coef=args.vf_coef,
    )  # fmt: skip


def update(
    agent: Agent, optimizer, scaler, batch: dict[str, torch.Tensor], args: Args, generator, world: World
) -> dict:
    """Epochs of minibatch steps on one batch. Returns the metrics of the last minibatch that was looked at.

    batch: (T, n) tensors of this process's n of the N environments, and obs (T, n, D), actions (T, n[, A]).
    Minibatches are drawn from all N * T rows; a process computes those of its own environments.
    """
    T, n = batch["rewards"].shape
    N, first = n * world.size, n * world.rank
    flat = {key: value.flatten(0, 1) for key, value in batch.items()}
    valid = flat["valid"].nonzero().squeeze(-1) if world.size == 1 else torch.arange(T * N)
    size = args.num_envs * args.num_steps // args.num_minibatches
    loss_of = torch.compile(minibatch_loss) if args.compile else minibatch_loss
    metrics, first_ratio_error, grad_norm, steps, skipped, stopped = {}, None, torch.zeros(()), 0, 0, False
    for _ in range(args.update_epochs):
        for rows in valid[minibatch_order(len(valid), generator)].split(size):
            mine = (rows % N >= first) & (rows % N < first + n)
            local = (rows[mine] // N) * n + rows[mine] % N - first
            mb = {key: value[local] for key, value in flat.items()}
            share = len(local) / len(rows)
            advantages = normalize_advantages(mb["advantages"], world) if args.norm_adv else mb["advantages"]
            loss, metrics = loss_of(agent, mb, advantages, args)
            if world.size > 1:  # means over the rows of all processes; the maximum has no sum
                worst = metrics.pop("ratio_max_error")
                means = [torch.stack([m * share if share else torch.zeros_like(m) for m in metrics.values()])]
                world.all_sum(means)
                metrics = dict(zip(metrics, means[0])) | {"ratio_max_error": worst}
                loss = loss * share if share else 0.0 * sum(p.sum() for p in agent.parameters())
            if first_ratio_error is None:
                first_ratio_error = metrics["ratio_max_error"]
            # before the step: the policy that has drifted too far is not driven further
            if args.target_kl and metrics["approx_kl"] > args.target_kl:
                stopped = True
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            world.all_sum([p.grad for p in agent.parameters()])
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            before = scaler.get_scale()
            scaler.step(optimizer)  # fp16: skipped if a gradient is not finite
            scaler.update()
            took = scaler.get_scale() >= before
            steps, skipped = steps + took, skipped + (not took)
        if stopped:
            break
    metrics.pop("ratio_max_error")
    return metrics | {
        "grad_norm": grad_norm,
        "first_ratio_error": first_ratio_error,
        "optimizer_steps": steps,
        "skipped_steps": skipped,
        "kl_stop": float(stopped),
    }


# ---- 5. Rollout ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(agent: Agent, groups: list[Group], args: Args, generator, world: World) -> tuple[dict, list[dict]]:
    """T steps of all environments with frozen weights and statistics.

    Returns the batch (torch, (T, n, ...) on the agent's device; observations raw, rewards as the environment gave them)
    and one dict for each episode that ended. While one group's physics runs, the policy acts for another.
    """
    T, n, device = args.num_steps, sum(g.envs.num_envs for g in groups), world.device
    N, first = n * world.size, n * world.rank
    action_space = groups[0].envs.single_action_space
    shape = () if agent.discrete else action_space.shape
    D = groups[0].x.shape[1]
    batch = {
        "obs": np.zeros((T, n, D), np.float32),
        "next_obs": np.zeros((T, n, D), np.float32),
        "actions": np.zeros((T, n, *shape), np.int64 if agent.discrete else np.float32),
        "logprobs": np.zeros((T, n), np.float32),
        "rewards": np.zeros((T, n), np.float32),
        "terminations": np.zeros((T, n), bool),
        "dones": np.zeros((T, n), bool),
        "valid": np.ones((T, n), bool),
    }
    episodes = []
    for t in range(T + 1):
        # noise for all environments of the run: numbers do not depend on groups or processes
        size = (N, 1) if agent.discrete else (N, *shape)
        draw = torch.rand if agent.discrete else torch.randn
        noise = draw(size, generator=generator)[first : first + n] if t < T else None
        for group in groups:
            rows = group.rows
            if t > 0:
                finish_step(group, {key: value[t - 1, rows] for key, value in batch.items()}, args, episodes)
            if t < T:
                x = torch.from_numpy(group.x).to(device)
                policy = agent.policy(x)
                actions = sample(agent, policy, noise[rows].to(device))
                batch["obs"][t, rows] = group.x
                batch["actions"][t, rows] = actions.cpu().numpy()
                batch["logprobs"][t, rows] = logprobs_entropy(agent, policy, actions)[0].cpu().numpy()
                executed = batch["actions"][t, rows]
                if not agent.discrete:
                    executed = executed.clip(action_space.low, action_space.high)
                group.start(executed)
    return {key: torch.from_numpy(value).to(device) for key, value in batch.items()}, episodes


def finish_step(group: Group, out: dict[str, np.ndarray], args: Args, episodes: list[dict]) -> None:
    """Waits for a group's step and writes reward, ends and true successors into `out`, finished episodes to `episodes`."""
    next_obs, rewards, terminations, truncations, infos = group.wait()
    dones = terminations | truncations
    if group.envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
        out["valid"][:] = ~group.ended  # after an end this "step" was the reset: no reward, no action, not to be learnt
    after = successors(next_obs, infos, dones)
    if args.reward_mode == "shaped":
        # eq: r = c 1[success] + k (g Phi(s') - Phi(s))   [Ng, Harada, Russell 1999]
        phi = fetch.potential(after, task_of(args.env_id))
        success = fetch.goal_distance(after) <= fetch.GOAL_RADIUS
        rewards = args.success_reward * success + args.shaping * (args.shaping_gamma * phi - group.potential)
    elif args.reward_mode != "env":
        rewards = fetch.reward(after, args.reward_mode)
    out["rewards"][:], out["terminations"][:], out["dones"][:] = rewards, terminations, dones
    out["next_obs"][:] = features(after, args)
    real = out["valid"]
    group.length += real
    group.ret += np.where(real, rewards, 0.0)
    flags = success_flags(infos, dones)
    if flags is not None:
        group.once |= flags & real
    for i in np.flatnonzero(dones):
        if group.whole[i]:  # a part of an episode says nothing
            episode = {"env": int(i), "return": float(group.ret[i]), "length": int(group.length[i])}
            if flags is not None:
                episode |= {"success": bool(flags[i]), "success_once": bool(group.once[i])}
            if fetch.is_fetch(args.env_id):
                last = {key: value[i : i + 1] for key, value in after.items()}
                episode["final_distance"] = float(fetch.goal_distance(last)[0])
            episodes.append(episode)
        group.whole[i], group.length[i], group.ret[i], group.once[i] = True, 0, 0.0, False
    group.ended = dones
    group.observe(next_obs, args)


def returns_of(rewards: torch.Tensor, dones: torch.Tensor, carry: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards so far in each episode, (T, n); `carry` (n,) goes on from batch to batch."""
    rows = []
    for r, done in zip(rewards.double(), dones):
        carry.mul_(gamma).add_(r)
        rows.append(carry.clone())
        carry.masked_fill_(done, 0.0)
    return torch.stack(rows)


# ---- 6. Evaluate and record ------------------------------------------------------------------------------------------


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson score)."""
    z, p = 1.96, correct / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)


def mean_actions(agent: Agent, device: torch.device):
    """The policy without noise: a function from features (n, D) to actions, for evaluation and video."""

    def act(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            policy = agent.policy(torch.from_numpy(x).to(device))
        return (policy.argmax(-1) if agent.discrete else policy).cpu().numpy()

    return act


def do_nothing(action_space):
    """The baseline that a success rate is compared with: zero actions, or action 0."""
    return lambda x: np.zeros((len(x), *action_space.shape), dtype=action_space.dtype)


def evaluate(act, envs: VectorEnv, args: Args) -> dict[str, float]:
    """One episode in each of `envs`, always the same starts. Statistics stay as they are.

    Success is that of the last step; `once` counts episodes that were at the goal in any step.
    """
    n, space = envs.num_envs, envs.single_action_space
    group = Group(envs, slice(0, n))
    group.begin([args.eval_seed + i for i in range(n)], args)
    out = {key: np.zeros(n) for key in ("rewards", "terminations", "dones", "next_obs")} | {"valid": np.ones(n, bool)}
    out["next_obs"] = np.zeros_like(group.x)
    first: dict[int, dict] = {}  # an environment's first episode; later ones may be cut off by the end
    while len(first) < n:
        actions = act(group.x)
        group.start(actions.clip(space.low, space.high) if hasattr(space, "low") else actions)
        ended: list[dict] = []
        finish_step(group, out, args, ended)
        for episode in ended:
            first.setdefault(episode["env"], episode)
    return summary(list(first.values()), "eval")


def summary(episodes: list[dict], prefix: str) -> dict[str, float]:
    """Means over episodes; the success rate with its interval."""
    if not episodes:
        return {}
    n, mean = len(episodes), lambda key: float(np.mean([e[key] for e in episodes]))
    metrics = {f"{prefix}/episodic_return": mean("return"), f"{prefix}/episodic_length": mean("length")}
    if "success" in episodes[0]:
        low, high = wilson(sum(e["success"] for e in episodes), n)
        metrics |= {
            f"{prefix}/success_rate": mean("success"),
            f"{prefix}/success_rate_low": low,
            f"{prefix}/success_rate_high": high,
            f"{prefix}/success_once": mean("success_once"),
        }
    if "final_distance" in episodes[0]:
        metrics[f"{prefix}/final_distance"] = mean("final_distance")
    return metrics


def record_video(act, args: Args, path: Path, step: int) -> list[dict]:
    """Writes an mp4 of a few evaluation episodes, from an environment that nothing else uses; one table row each.

    Never from a training environment: drawing calls `mj_forward`, which changes what PickAndPlace computes next.
    """
    import imageio

    if fetch.is_fetch(args.env_id):
        fetch.import_robotics()
        env = gym.make(args.env_id, render_mode="rgb_array", width=240, height=240)
    else:
        env = gym.make(args.env_id, render_mode="rgb_array")
    rows, frames = [], []
    for i in range(args.video_episodes):
        obs, _ = env.reset(seed=args.eval_seed + i)
        row = {"global_step": step, "episode": i, "video": str(path), "episode_return": 0.0, "episode_length": 0}
        done, once = False, False
        while not done:
            batched = {key: value[None] for key, value in obs.items()} if isinstance(obs, dict) else obs[None]
            action = act(features(batched, args))[0]
            if hasattr(env.action_space, "low"):
                action = action.clip(env.action_space.low, env.action_space.high)
            obs, reward, terminated, truncated, info = env.step(action)
            frames.append(env.render())
            row["episode_return"] += float(reward)
            row["episode_length"] += 1
            once |= bool(info.get("is_success", False))
            done = terminated or truncated
        if "is_success" in info:
            row |= {"success": bool(info["is_success"]), "success_once": once}
        if fetch.is_fetch(args.env_id):
            row["final_distance"] = float(np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"]))
        rows.append(row)
    fps = env.metadata.get("render_fps", 25)
    env.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, frames, fps=fps, macro_block_size=1)
    return rows


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


def resolve(args: Args) -> Args:
    """Fills in what depends on the task."""
    recipe = RECIPES[task_of(args.env_id)]
    return replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})


def check(args: Args, world: World) -> None:
    """Everything that can be wrong with the flags, before anything is built."""
    if args.env_backend == "native" and not fetch.is_fetch(args.env_id):
        old = args.env_id.rsplit("-v", 1)[0]
        if old.removesuffix("Dense") in fetch.TASKS:
            fail(f"--env-id {args.env_id}: only the -v4 Fetch tasks reset correctly; use {old}-v4")
        fail(
            f"--env-id {args.env_id}: the native backend knows {', '.join(f'{task}-v4' for task in fetch.TASKS)}; "
            "for another Gymnasium id add --env-backend gymnasium"
        )
    if not fetch.is_fetch(args.env_id):
        try:
            gym.spec(args.env_id)
        except gym.error.Error as error:
            fail(f"--env-id {args.env_id}: {error}")
        if args.reward_mode != "env":
            fail(f"--reward-mode {args.reward_mode} is for the Fetch tasks; {args.env_id} has --reward-mode env")
    else:
        fetch.import_robotics()
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden", "env_groups", "eval_episodes"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 < args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        fail(f"--gamma {args.gamma} --gae-lambda {args.gae_lambda}: both lie between 0 and 1")
    if args.learning_rate <= 0 or args.clip_coef <= 0:
        fail("--learning-rate and --clip-coef must be positive")
    per_turn = world.size * args.env_groups
    if args.num_envs % per_turn:
        fail(
            f"--num-envs {args.num_envs} does not divide into {world.size} process(es) x --env-groups "
            f"{args.env_groups}; try --num-envs {max(args.num_envs // per_turn, 1) * per_turn} or --env-groups 1"
        )
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches:
        nearest = min((k for k in range(1, batch + 1) if batch % k == 0), key=lambda k: abs(k - args.num_minibatches))
        fail(
            f"a batch of {args.num_envs} x {args.num_steps} = {batch} steps does not divide into --num-minibatches "
            f"{args.num_minibatches}; try {nearest}"
        )
    if args.total_timesteps < batch:
        fail(f"--total-timesteps {args.total_timesteps} is less than one batch of {batch} steps")


def video_off() -> str | None:
    """Picks the off-screen renderer, before the first frame. Returns why there is none."""
    from ctypes.util import find_library

    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        found = next((name for name in ("EGL", "OSMesa") if find_library(name)), None)
        if found is None:
            return "neither EGL nor OSMesa is installed (Debian: apt-get install libegl1 libgl1 libgl1-mesa-dri)"
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = found.lower()
    return None


def main(args: Args) -> None:
    stop = StopSignal()
    world = setup_world(args.device)
    torch.set_num_threads(args.torch_threads)
    checkpoint = None
    if args.resume:
        free = {"resume", "device", "track", "wandb_mode"}  # may differ from the run's own settings
        if given := [k for k, v in asdict(args).items() if k not in free and v != asdict(Args())[k]]:
            fail(
                f"--resume continues with the run's own settings; drop --{given[0].replace('_', '-')} or use --init-from"
            )
        checkpoint = find_checkpoint(args.resume)
        run_dir = checkpoint.parent.parent
        args = replace(read_config(run_dir, Args), **{k: getattr(args, k) for k in free})
    args = resolve(args)
    check(args, world)
    if args.eval_only and not args.init_from:
        fail("--eval-only measures the policy of --init-from: give a run folder")
    seed_everything(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    if not checkpoint:
        made = [str(create_run(__file__, args.exp_name, args.seed, args.output_dir))] if world.main else []
        run_dir = Path(world.gather(made)[0])
        if world.main:
            write_config(run_dir, args, world)
    logger = Logger(
        run_dir, asdict(args), track=args.track, wandb_mode=args.wandb_mode, tags=args.tags, enabled=world.main
    )
    exit_code = 1  # unless the end is reached
    try:
        exit_code = run(args, world, stop, logger, run_dir, checkpoint)
    finally:
        logger.finish(exit_code)
        close_world(world)
    sys.exit(exit_code)


def load_agent(agent: Agent, folder: Path, args: Args) -> None:
    """Weights and statistics of a checkpoint of the same task, observation and network."""
    try:
        saved = json.loads((folder / "trainer.json").read_text())
    except (OSError, ValueError):
        fail(f"'{folder}' is not a checkpoint of {SCRIPT}.py")
    if saved.get("script") != SCRIPT:
        fail(f"checkpoint '{folder}' belongs to {saved.get('script')}, not to {SCRIPT}")
    for name, have in (("env_id", args.env_id), ("observation_mode", args.observation_mode), ("hidden", args.hidden)):
        same = task_of(saved[name]) == task_of(have) if name == "env_id" else saved[name] == have
        if not same or (name == "env_id" and task_of(have) == "other" and saved[name] != have):
            flag = name.replace("_", "-")
            fail(
                f"checkpoint '{folder}' was trained with --{flag} {saved[name]}, not {have}; add --{flag} {saved[name]}"
            )
    agent.load_state_dict(load_file(folder / "model.safetensors"))


def run(args: Args, world: World, stop, logger, run_dir: Path, checkpoint: Path | None) -> int:
    # ---- setup: environments, agent, optimizer; the arithmetic of the batch ----
    n, first = args.num_envs // world.size, args.num_envs // world.size * world.rank
    batch_size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // batch_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine share its cores
    threads = args.num_threads or max(len(os.sched_getaffinity(0)) // local, 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
    per_group = n // args.env_groups
    groups = [
        Group(make_envs(args, per_group, args.env_backend, pool), slice(i * per_group, (i + 1) * per_group))
        for i in range(args.env_groups)
    ]
    action_space = groups[0].envs.single_action_space
    if not isinstance(action_space, (gym.spaces.Box, gym.spaces.Discrete)):
        fail(f"{args.env_id} has a {type(action_space).__name__} action space; this script acts in Box and Discrete")
    reset_groups(groups, args, first)
    # FetchVec is gymnasium bit for bit: evaluation uses it whatever the training backend
    eval_backend = "native" if fetch.is_fetch(args.env_id) else "gymnasium"
    eval_envs = make_envs(args, args.eval_episodes, eval_backend, pool) if world.main else None
    agent = Agent(groups[0].x.shape[1], action_space, args).to(world.device)
    if args.init_from:
        best = Path(args.init_from) / "best"
        load_agent(agent, find_checkpoint(str(best if best.exists() else args.init_from)), args)
    if args.compile:  # for acting as for the update, or in low precision the two would round differently
        agent.policy = torch.compile(agent.policy)
    act = mean_actions(agent, world.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    # action noise and minibatch order come from the same streams in every process
    generators = {name: torch.Generator().manual_seed(args.seed * 2 + i) for i, name in enumerate(("noise", "order"))}
    state = {
        "script": SCRIPT, "env_id": args.env_id, "observation_mode": args.observation_mode, "hidden": args.hidden,
        "iteration": 0, "global_step": 0, "train_s": 0.0, "elapsed": 0.0, "best": None, "base": {}, "last": {},
        "optimizer_steps": 0, "streak": 0,
    }  # fmt: skip
    recent: deque[dict] = deque(maxlen=100)  # the last training episodes
    carry = torch.zeros(n, dtype=torch.float64, device=world.device)  # discounted return so far, for reward scaling
    no_video = "" if args.capture_video else "--no-capture-video"

    def measure(step: int) -> dict[str, float]:
        """Evaluates; remembers the result and whether it is the best so far (success, then return)."""
        state["last"] = metrics = evaluate(act, eval_envs, args) if world.main else {}
        good = args.stop_success > 0 and metrics.get("eval/success_rate", 0.0) >= args.stop_success
        state["streak"] = state["streak"] + 1 if good else 0
        score = [metrics.get("eval/success_rate", 0.0), metrics.get("eval/episodic_return", 0.0)]
        if world.main and (state["best"] is None or score > state["best"]["score"]):
            state["best"] = {"score": score, "step": step}
        return metrics

    def film(step: int) -> None:
        nonlocal no_video
        if no_video or not world.main:
            return
        no_video = video_off() or ""
        try:
            if not no_video:
                rows = record_video(act, args, run_dir / "videos" / f"step-{step:09d}.mp4", step)
                logger.table("video_table", step, rows)
        except Exception as error:  # whatever a graphics driver throws must not end a training run
            no_video = f"{type(error).__name__}: {error}"
        if no_video:
            logger.say(f"video is off, training is not: {no_video}")

    def save() -> None:
        env_arrays, env_streams = [], []
        for group in groups:
            arrays, streams = group.envs.get_state() if isinstance(group.envs, fetch.FetchVec) else ({}, [])
            mine = {"whole": group.whole, "length": group.length, "ret": group.ret, "once": group.once}
            env_arrays.append(arrays | mine)
            env_streams += streams
        local = {key: np.concatenate([arrays[key] for arrays in env_arrays]) for key in env_arrays[0]}
        parts = world.gather([(local | {"carry": carry.cpu().numpy()}, env_streams)])
        if not world.main:
            return
        folder = run_dir / "checkpoints" / f"step-{state['global_step']:09d}"
        with atomic_folder(folder) as temporary:
            save_file({k: v.contiguous() for k, v in agent.state_dict().items()}, temporary / "model.safetensors")
            save_arrays(
                {key: np.concatenate([p[0][key] for p in parts]) for key in parts[0][0]}, temporary / "envs.safetensors"
            )
            extra = {
                "elapsed": logger.elapsed,
                "recent": list(recent),
                "env_streams": [stream for part in parts for stream in part[1]],
                "generators": {name: g.get_state().numpy().tobytes().hex() for name, g in generators.items()},
                "scaler": scaler.state_dict(),
            }
            save_state(temporary, optimizer, state | extra)
        link(run_dir, "last", folder)
        if state["best"] and state["best"]["step"] == state["global_step"]:
            link(run_dir, "best", folder)
        prune(run_dir, args.keep)

    def load(folder: Path) -> None:
        load_agent(agent, folder, args)
        saved = load_state(folder, optimizer, SCRIPT)
        state.update({key: saved[key] for key in state})
        recent.extend(saved["recent"])
        scaler.load_state_dict(saved["scaler"])
        for name, g in generators.items():
            g.set_state(torch.frombuffer(bytearray.fromhex(saved["generators"][name]), dtype=torch.uint8))
        arrays = load_arrays(folder / "envs.safetensors")
        carry.copy_(torch.from_numpy(arrays["carry"][first : first + n]))
        if "physics" not in arrays:
            logger.say(f"--env-backend {args.env_backend} cannot save its environments: their episodes start anew")
            return
        for group in groups:
            rows = slice(first + group.rows.start, first + group.rows.stop)
            group.envs.set_state({k: v[rows] for k, v in arrays.items()}, saved["env_streams"][rows])
            group.observe(group.envs.observe(), args)
            for name in ("whole", "length", "ret", "once"):
                setattr(group, name, arrays[name][rows].copy())

    if args.eval_only:
        metrics = measure(0)
        logger.log(0, metrics)
        for name, value in metrics.items():
            logger.say(f"{name:28s} {value:.4f}")
        film(0)
        logger.say(f"evaluated {args.init_from}; {run_dir}")
        return 0

    if checkpoint:
        load(checkpoint)
        logger.truncate(state["global_step"], state["elapsed"])
        logger.say(f"resuming {run_dir} after {state['global_step']:,} steps")
    else:
        logger.say(
            f"{args.env_id}, reward {args.reward_mode}, {groups[0].x.shape[1]} observations ({args.observation_mode}): "
            f"{args.num_envs} environments x {args.num_steps} steps = {batch_size} a batch, "
            f"{args.num_minibatches} minibatches of {batch_size // args.num_minibatches}, "
            f"{iterations} iterations = {iterations * batch_size:,} steps\n"
            f"gamma {args.gamma}, lr {args.learning_rate:g}, {args.update_epochs} epochs, target KL {args.target_kl}, "
            f"hidden {args.hidden}; log {run_dir}"
        )
        if world.main:
            idle = evaluate(do_nothing(action_space), eval_envs, args)
            state["base"] = {key.replace("eval/", "baseline/"): value for key, value in idle.items()}
            if "eval/success_rate" in idle:
                logger.say(
                    f"doing nothing: success {idle['eval/success_rate']:.3f}, return {idle['eval/episodic_return']:.2f}"
                )
        logger.log(0, state["base"] | measure(0))
    logger.progress(iterations, state["iteration"])

    # ---- the loop ----
    for iteration in range(state["iteration"] + 1, iterations + 1):
        if args.anneal_lr:
            # eq: lr_i = lr (1 - (i - 1) / I)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)

        # ---- 1. rollout with frozen weights and statistics ----
        start = time.time()
        batch, episodes = rollout(agent, groups, args, generators["noise"], world)
        rollout_s = time.time() - start

        # ---- 2. values, advantages, returns: in units of scaled reward ----
        if args.scale_rewards:
            discounted = returns_of(batch["rewards"], batch["dones"], carry, args.gamma)
            agent.return_statistics.update(discounted.reshape(-1, 1), world)
        rewards = batch["rewards"] * (agent.reward_scale().float() if args.scale_rewards else 1.0)
        with torch.no_grad():
            T = args.num_steps
            batch["values"] = agent.value(batch["obs"].flatten(0, 1)).view(T, n)
            next_values = agent.value(batch["next_obs"].flatten(0, 1)).view(T, n)
        batch["advantages"], batch["returns"] = gae(
            rewards, batch["values"], next_values, batch["terminations"], batch["dones"], args.gamma, args.gae_lambda
        )

        # ---- 3. update ----
        metrics = update(agent, optimizer, scaler, batch, args, generators["order"], world)
        # only now: the statistics that the actions were sampled with are those that they were scored with
        agent.statistics.update(batch["obs"].flatten(0, 1), world)
        update_s = time.time() - start - rollout_s

        # ---- 4. log ----
        state["iteration"], state["global_step"] = iteration, iteration * batch_size
        state["train_s"] += rollout_s + update_s
        state["optimizer_steps"] += metrics["optimizer_steps"]
        step = state["global_step"]
        recent.extend(world.gather(episodes))
        moments = [torch.stack([f(x) for x in (batch["returns"].double(), (batch["returns"] - batch["values"]).double())
                                for f in (torch.sum, lambda x: (x**2).sum())])]  # fmt: skip
        world.all_sum(moments)
        r, r2, e, e2 = moments[0]
        # eq: explained variance = 1 - Var(R - V) / Var(R)
        explained = 1 - (e2 / batch_size - (e / batch_size) ** 2) / (r2 / batch_size - (r / batch_size) ** 2)
        metrics = {f"losses/{name}": float(value) for name, value in metrics.items()}
        metrics |= summary(list(recent), "charts") | {
            "losses/explained_variance": float(explained),
            "losses/action_std": 0.0 if agent.discrete else agent.log_std.exp().mean().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/reward_scale": float(agent.reward_scale()) if args.scale_rewards else 1.0,
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
            "time/train_s": state["train_s"],
            "time/SPS": batch_size / (rollout_s + update_s),
        }
        if metrics["losses/first_ratio_error"] > 1e-3:
            logger.say(
                f"warning, step {step}: before any update the ratio is off by {metrics['losses/first_ratio_error']:.1e}: "
                "rollout and update do not compute the same policy"
            )

        # ---- 5. evaluate, record, save, stop ----
        ending = iteration == iterations
        if ending or (args.eval_every and iteration % args.eval_every == 0):
            metrics |= measure(step)
            ending |= any(world.gather([state["streak"] >= 3]))
        if ending or (args.video_every and iteration % args.video_every == 0):
            film(step)
        logger.log(step, metrics)
        logger.advance(
            success=metrics.get("charts/success_rate"), ret=metrics.get("charts/episodic_return"),
            eval=state["last"].get("eval/success_rate"),
        )  # fmt: skip
        stopped = any(world.gather([stop.number is not None]))
        is_best = state["best"] is not None and state["best"]["step"] == step
        if stopped or ending or any(world.gather([is_best])) or (args.save_every and iteration % args.save_every == 0):
            save()
        if stopped:
            logger.say(f"stopped at step {step}; continue with: uv run python {SCRIPT}.py --resume {run_dir}")
            return stop.exit_code
        if ending:
            break

    # ---- the end: what came out of it, and where it is ----
    for envs in [group.envs for group in groups] + ([eval_envs] if eval_envs else []):
        envs.close()
    if world.main:
        logger.finish()  # closes the bar
        figures = plot.draw([run_dir], SCRIPT, run_dir)
        last, base = state["last"], state["base"]
        if "eval/success_rate" in last:
            distance = last.get("eval/final_distance")
            print(
                f"success {base['baseline/success_rate']:.3f} (doing nothing) -> {last['eval/success_rate']:.3f} "
                f"[{last['eval/success_rate_low']:.3f}, {last['eval/success_rate_high']:.3f}] of {args.eval_episodes} "
                f"episodes, {f'final distance {distance * 100:.1f} cm, ' if distance is not None else ''}",
                end="",
            )
        print(
            f"return {base['baseline/episodic_return']:.2f} -> {last['eval/episodic_return']:.2f}; "
            f"{state['global_step']:,} steps in {state['train_s']:.1f} s of training, {logger.elapsed:.0f} s in all\n"
            f"figures {', '.join(str(f) for f in figures)}; policy {run_dir}/best"
        )
    return 0


if __name__ == "__main__":
    main(parse(Args, __doc__))
