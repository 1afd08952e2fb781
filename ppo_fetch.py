"""PPO on the Fetch robot: a policy learns to move a gripper, or a block with it, to a goal.

    data        N environments, T steps an iteration, B = N * T transitions; an episode is cut at 50 steps, never "dead"
    advantage   d_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t),   A_t = d_t + gamma lambda (1 - done_t) A_{t+1}
                s'_t is the state that followed, also where the episode ended there (GAE, arXiv 1506.02438)
    objective   minimise  mean of -min(w A, clip(w, 1 - eps, 1 + eps) A) + c_v (V - R)^2 - c_e H
                w = exp(logp - logp_old), R = A + V_old (PPO, arXiv 1707.06347)

Every line of the algorithm that is an equation carries it: grep for "eq:". Symbols and results: docs/ppo_fetch.md.

Against the PPO file that most people copy: time limits are bootstrapped through, running statistics are frozen for an
iteration and saved, the KL limit is checked before each step, evaluation is apart, and physics runs on threads.
Left out on purpose: recurrent policies, image observations, hindsight replay (it is off-policy).

Dims: N environments, T steps, B = N * T, D observation, A action.

    uv run python ppo_fetch.py                                   # FetchReach, dense reward: half a minute on a laptop
    uv run python ppo_fetch.py --env-id FetchPush-v4             # shaped reward, six minutes
    uv run python ppo_fetch.py --env-id CartPole-v1 --env-backend gymnasium
    uv run torchrun --nproc-per-node 4 ppo_fetch.py --env-id FetchPush-v4
"""

import common.stop  # noqa: F401, first: Ctrl-C is heard while the rest is imported

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from annotated_types import Interval
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors.torch import save_file

from common.checkpoint import find_checkpoint
from common.cli import Count, Fraction, Name, Natural, NonNegative, Positive, Seed, Share, Text, fail, parse
from common.language.stats import with_means
from common.parallel import World, clip_gradients, sum_gradients
from common.robot import fetch, sim, spaces
from common.robot.sim import RunningStatistics, SimArgs, own_rows
from common.robot.video import Videos, write_mp4
from common.run import FREE, Run
from common.streams import stream_seed, torch_stream

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args(SimArgs):
    exp_name: Name = "ppo_fetch"
    seed: Seed = 1
    tags: tuple[str, ...] = ("ppo", "fetch")
    eval_every: Natural | None = None  # iterations between evaluations, 0: only at the end; default: by task
    init_from: Text | None = None  # run folder or checkpoint whose policy and statistics to start from (a new run)

    # task
    env_id: Text = "FetchReach-v4"
    """FetchReach-v4, FetchPush-v4, FetchSlide-v4, FetchPickAndPlace-v4, or any Gymnasium id with another backend"""
    env_backend: Literal["native", "gymnasium", "gymnasium-async", "torch"] = "native"
    """native: FetchVec, physics on threads; gymnasium: one after the other; gymnasium-async: a process each; torch: all
    as one, on a GPU. These three cannot be saved: a resumed run begins new episodes"""
    observation_mode: Literal["observation", "observation_goal", "full", "delta"] | None = None
    """what the policy sees of Fetch, see common/robot/fetch.py; default: delta; others: their own observation"""
    reward_mode: Literal["sparse", "dense", "distance", "shaped", "env"] | None = None
    """-1/0 | -distance | the same, +10 at the goal | potential-based shaping | the environment's; default: by task"""
    max_episode_steps: Count | None = None
    """time limit of an episode; default: the environment's own (evaluation cuts at 10,000 steps where there is none)"""

    # rollout
    total_timesteps: Count | None = None  # environment steps of the run, over all processes; default: by task
    num_envs: Count | None = None  # environments N, over all processes; default: by task
    num_steps: Count | None = None
    """steps T that each environment takes in an iteration; default: by task, whole episodes with --advantage group"""
    grasped_starts: Share | None = None
    """share of training episodes that begin with the block in the gripper; default: 0, native FetchPickAndPlace 0.25"""
    stagger: bool = True
    """start the environments at different ages, so that no batch is all starts or all ends (native backend)"""

    # update
    learning_rate: Positive | None = None  # Adam step size at the start; default: by task
    anneal_lr: bool = True  # lower the step size linearly to 0 over the iterations
    gamma: Share | None = None  # discount, 0.9 to 0.99; default: by task, 1 with --advantage group
    advantage: Literal["gae", "group"] = "gae"
    """an action is compared with: a critic's value | the return of other episodes from the same start, no critic"""
    group_size: Count | None = None  # --advantage group: episodes G that begin at one start, 4 to 32; default: 8
    gae_lambda: Share = 0.95  # GAE's lambda
    num_minibatches: Count | None = None  # minibatches in an epoch; must divide N * T; default: by task
    update_epochs: Count = 10  # passes over the batch at most, 3 to 10
    target_kl: NonNegative | None = None
    """end an iteration's update before the minibatch whose KL exceeds this, 0.01 to 0.05; 0: never; default: by task"""
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: Fraction = 0.2  # PPO's epsilon
    ent_coef: NonNegative = 0.0
    """weight of the entropy bonus; actions that do nothing (the gripper of Reach) drift under it"""
    vf_coef: NonNegative = 0.5  # weight of the value loss
    max_grad_norm: NonNegative = 0.5  # gradient norm to clip to, 0: never
    hidden: Count | None = None  # width of the two hidden layers; default: by task
    log_std_init: Annotated[float, Interval(ge=-10, le=2)] = -0.5
    """initial log standard deviation of the actions, whose box is [-1, 1]"""
    normalize_obs: bool = True  # standardise observations by running statistics
    scale_rewards: bool = True  # divide rewards by the running standard deviation of the discounted return
    amp: Literal["off", "bf16", "fp16"] = "off"
    """mixed precision of the hidden layers; everything after them stays in fp32"""
    compile: bool = False
    """torch.compile the loss of a minibatch, and the policy that acts; pays on a CPU for long runs only, if at all"""


SUCCESS_REWARD, SHAPING, SHAPING_GAMMA = 0.1, 5.0, 1.0  # c, k and g of the shaped reward: see `reward_of`

# What differs by task where a flag is not given. "other": whatever is not Fetch, near what others use for one
# environment of 2,048 steps, but for the KL limit.
SMALL = dict(num_steps=25, num_minibatches=4, target_kl=0.03, hidden=64, eval_every=10)
REACH = SMALL | dict(observation_mode="delta", reward_mode="dense", num_envs=32, learning_rate=1e-3, gamma=0.9)
LARGE = dict(num_steps=25, num_minibatches=8, target_kl=0.05, hidden=256, num_envs=64, learning_rate=5e-4, gamma=0.95)
LARGE |= dict(observation_mode="delta", reward_mode="shaped", eval_every=25)
RECIPES = {
    "FetchReach": REACH | dict(total_timesteps=12_000),
    "FetchPush": LARGE | dict(total_timesteps=1_000_000),
    "FetchPickAndPlace": LARGE | dict(total_timesteps=600_000, grasped_starts=0.25),
    "FetchSlide": LARGE | dict(total_timesteps=800_000),
    "other": dict(num_steps=256, num_minibatches=32, target_kl=0.05, hidden=64, reward_mode="env")
    | dict(total_timesteps=500_000, num_envs=8, learning_rate=3e-4, gamma=0.99, eval_every=25),
}
GROUPED = dict(num_steps=50, gamma=1.0, group_size=8)  # --advantage group, whatever the task


# ---- 2. Environments -------------------------------------------------------------------------------------------------


def features(obs, args: Args) -> np.ndarray:
    """What the policy sees, (n, D) float32 (float64 if that is what an environment measures in)."""
    if fetch.is_fetch(args.env_id):
        return fetch.flatten(obs, args.observation_mode)
    return obs  # a vector already, see `spaces.Plain`


def executable(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """What the environment gets: actions clipped to the box; choices as they are. From [-1, 1], `spaces.Actions` goes
    on to the environment's own box."""
    if not np.isfinite(actions).all():
        fail("the policy's actions are no longer finite: an update went too far; try a smaller --learning-rate")
    return actions.clip(space.low, space.high) if isinstance(space, gym.spaces.Box) else actions


def potential_of(obs, args: Args) -> np.ndarray | float:
    """Phi (n,) of the shaped reward."""
    return fetch.potential(obs, fetch.task_of(args.env_id)) if args.reward_mode == "shaped" else 0.0


def reward_of(obs, before: np.ndarray | float, args: Args) -> np.ndarray:
    """(n,) reward for arriving in `obs` of Fetch; before: Phi of the state that was left."""
    if args.reward_mode != "shaped":
        return fetch.reward(obs, args.reward_mode)
    success, phi = fetch.goal_distance(obs) <= fetch.GOAL_RADIUS, potential_of(obs, args)
    # eq: r = c 1[success] + k (g Phi(s') - Phi(s))   [Ng, Harada, Russell 1999]
    return SUCCESS_REWARD * success + SHAPING * (SHAPING_GAMMA * phi - before)


class Group:
    """Some of the environments, reset, and where their running episodes stand."""

    def __init__(self, envs: VectorEnv, rows: slice, seeds: list[int], args: Args):
        """rows: which of the process's environments. seeds: one for each of them."""
        n = envs.num_envs
        self.envs, self.rows = envs, rows
        self.episodes = sim.Episodes(whole=np.ones(n, bool))
        self.ended = np.zeros(n, bool)  # by the last step
        self.wait = None  # ends the step that is under way
        self.observe(envs.reset(seed=seeds)[0], args)
        self.resets = getattr(envs, "resets", 0)

    def observe(self, obs, args: Args) -> None:
        self.x = features(obs, args)  # (n, D)
        sim.refuse_nonfinite("the observation", self.x, args.env_id, self.episodes)
        self.potential = potential_of(obs, args)


def make_groups(args: Args, world: World, pool=None, *resumed: int) -> list[Group]:
    """This process's environments at their first training episodes, or new ones after the step `resumed`; `pool` steps
    physics."""
    # 32 bits: what any simulator takes for a seed
    # those of a group are one stream, from which starts alone are drawn: they all begin every episode at one start
    streams = [i // args.group_size for i in range(args.num_envs)]
    seeds = [stream_seed(args.seed, "environment", i, *resumed) % 2**32 for i in streams]
    mine = world.share(args.num_envs)
    n, groups = (mine.stop - mine.start) // args.env_groups, []
    for first in range(mine.start, mine.stop, n):
        envs = sim.make_envs(args, n, args.env_backend, pool)
        rows = slice(first - mine.start, first - mine.start + n)
        groups.append(Group(envs, rows, seeds[first : first + n], args))
        if args.stagger and args.advantage == "gae" and isinstance(envs, fetch.FetchVec):
            envs.elapsed[:] = np.arange(first, first + n) * envs.max_episode_steps // args.num_envs
            groups[-1].episodes.whole[:] = envs.elapsed == 0
    return groups


# ---- 3. Model --------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Two separate tanh networks: the policy's parameters (mean or logits) and the value; state-independent log-std."""

    def __init__(self, obs_dim: int, action_space: gym.Space, args: Args):
        super().__init__()
        box = isinstance(action_space, gym.spaces.Box)
        self.choices = [] if box else np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", 0))).tolist()
        outputs = sum(self.choices) or action_space.shape[0]
        self.statistics = RunningStatistics(obs_dim)
        self.return_statistics = RunningStatistics(1)
        self.normalize_obs, self.scale_rewards = args.normalize_obs, args.scale_rewards
        self.actor, self.critic = mlp(obs_dim, args.hidden), mlp(obs_dim, args.hidden)
        self.actor_head = orthogonal(nn.Linear(args.hidden, outputs), 0.01)
        self.critic_head = orthogonal(nn.Linear(args.hidden, 1), 1.0)
        if box:
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
        # below it a deviation is noise: of a blocked finger, in metres; elsewhere nothing is known of the unit
        self.least_std = 1e-3 if fetch.is_fetch(args.env_id) else 1e-8
        self.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) raw -> standardised in the precision of x, clipped to +-10, float32. The std has a floor: some
        roundings of the mean, which are noise, and `least_std`."""
        if not self.normalize_obs:
            return x.float()
        s = self.statistics
        std = torch.maximum(s.var.sqrt(), 16 * torch.finfo(x.dtype).eps * s.mean.abs()).clamp_min(self.least_std)
        return ((x - s.mean.to(x.dtype)) / std.to(x.dtype)).clamp(-10, 10).float()

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
        """() float64, what rewards are multiplied by."""
        return self.return_statistics.scale() if self.scale_rewards else torch.ones((), dtype=torch.float64)


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int) -> nn.Sequential:
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(orthogonal(first, 2**0.5), nn.Tanh(), orthogonal(second, 2**0.5), nn.Tanh())


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def sample(agent: Agent, policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Actions (B, A) from the policy's parameters and standard noise (B, A): normal, or uniform for choices."""
    if agent.choices:
        cdfs = [logits.softmax(-1).cumsum(-1) for logits in policy.split(agent.choices, -1)]
        return torch.stack([(cdf < u * cdf[:, -1:]).sum(-1) for cdf, u in zip(cdfs, noise.split(1, -1))], -1)
    return policy + agent.log_std.exp() * noise  # (B, A); stored unclipped, executed clipped


def logprobs_entropy(agent: Agent, policy: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) log-density of the (unclipped) actions and (B,) entropy, both fp32."""
    if agent.choices:
        logps = [logits.log_softmax(-1) for logits in policy.split(agent.choices, -1)]
        taken = [logp.gather(-1, a) for logp, a in zip(logps, actions.view(len(policy), -1).split(1, -1))]
        return torch.cat(taken, -1).sum(-1), sum(-(logp.exp() * logp).sum(-1) for logp in logps)
    log_std = agent.log_std
    # eq: log N(a; mu, s) = -((a - mu) / s)^2 / 2 - log s - log(2 pi) / 2, summed over dimensions
    z = (actions - policy) * torch.exp(-log_std)
    logp = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    # eq: H = sum(log s + (1 + log(2 pi)) / 2)
    return logp, (log_std + 0.5 * (1 + math.log(2 * math.pi))).sum().expand_as(logp)


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


def group_advantages(rewards, num_generations: int, scale_rewards: str = "group", baseline: str = "group"):
    """Advantage of each completion over the others of its prompt.

    rewards: (B,) with the G completions of a prompt in consecutive rows -> (B,) float32 or float64.
    scale_rewards: "group" (GRPO), "batch" (Lite PPO, arXiv 2508.08221) or "none" (Dr. GRPO, arXiv 2503.20783).
    A completion whose reward is NaN or infinite is no part of its group: its advantage is 0.
    """
    G = num_generations
    groups, n, silent = with_means(rewards.view(-1, G))  # (P, G), (P, 1) rewards of the group, (P, G) bool
    centred = groups - groups.mean(1, keepdim=True)  # eq: A_i = r_i - mean_group(r)
    if baseline == "others":  # eq: A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean)   (RLOO, arXiv 2402.14740)
        centred = centred * n / (n - 1)
    if scale_rewards == "group":
        std = groups.std(1, keepdim=True) * ((G - 1) / (n - 1)).sqrt()  # over n - 1
        centred = centred / (std + 1e-4)  # eq: A_i / (std_group(r) + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (rewards[rewards.isfinite()].std() + 1e-4)  # eq: A_i / (std_batch(r) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be group, batch or none, not {scale_rewards!r}")
    return centred.masked_fill(silent, 0.0).reshape(-1)


def episode_advantages(rewards, dones, gamma: float, group_size: int) -> torch.Tensor:
    """Advantages (T, N) without a critic: each episode's return against those of its group, the same in all its steps.

    rewards, dones (T, N): whole episodes of one length; group_size environments in consecutive columns began at one
    start.
    """
    length, N = len(rewards) // int(dones[:, 0].sum()), rewards.shape[1]
    steps = torch.arange(length, device=rewards.device)[:, None]
    # eq: R = sum_t gamma^t r_t,  A = (R - mean_group(R)) / (std_group(R) + 1e-4) in every step
    returns = (rewards.view(-1, length, N).double() * gamma**steps).sum(1)  # (episodes, N)
    advantages = group_advantages(returns.reshape(-1), group_size).view_as(returns)
    return advantages.float().repeat_interleave(length, 0)


def ppo_loss(
    logprobs, old_logprobs, advantages, entropy, values, returns, *, clip_coef=0.2, ent_coef=0.0, vf_coef=0.5
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate, the value loss and the entropy bonus; all inputs (B,) float32, advantages as they weigh.

    Returns (loss, metrics); metrics are detached means over B. Source: arXiv 1707.06347, eq. 7 and 9.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()  # eq: w = pi(a|s) / pi_old(a|s)
    # eq: L_pi = -min(w A, clip(w, 1 - eps, 1 + eps) A)
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()
    # eq: L_V = (V - R)^2 / 2
    value_loss = 0.5 * ((values - returns) ** 2).mean()
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
    n, total, squares = world.total(torch.stack([torch.full_like(a.sum(), len(a)), a.sum(), (a**2).sum()]))
    if n < 2:
        return advantages
    # eq: A <- (A - mean A) / (std A + 1e-8)
    std = ((squares - total**2 / n) / (n - 1)).clamp_min(0).sqrt()
    return ((a - total / n) / (std + 1e-8)).float()


def advantages_of(agent: Agent, batch: dict, carry: torch.Tensor, args: Args, world: World) -> tuple[dict, dict]:
    """Advantages and returns (T, n), in units of scaled reward, and metrics; carry: see `sim.returns_of`."""
    if args.advantage == "group":
        advantages = episode_advantages(batch["rewards"], batch["dones"], args.gamma, args.group_size)
        found = {"charts/groups_alike": sim.alike(advantages[batch["dones"]], args.group_size, world)}
        return {"advantages": advantages, "returns": torch.zeros_like(advantages)}, found
    if args.scale_rewards:
        discounted = sim.returns_of(batch["rewards"], batch["dones"], carry, args.gamma)
        agent.return_statistics.update(discounted.reshape(-1, 1), world)
    rewards = batch["rewards"] * agent.reward_scale().float()
    with torch.no_grad():
        values, next_values = agent.value(batch["obs"]), agent.value(batch["next_obs"])
    ends = batch["terminations"], batch["dones"]
    advantages, returns = gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    metrics = {"losses/explained_variance": sim.explained_variance(returns, values, world)}
    return {"advantages": advantages, "returns": returns}, metrics


def minibatch_order(num: int, generator: torch.Generator) -> torch.Tensor:
    """The order in which an epoch goes through the batch: each row once, anew in every epoch."""
    return torch.randperm(num, generator=generator)


def minibatch_loss(agent: Agent, mb: dict, advantages: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """`ppo_loss` of a minibatch's rows under the present weights; with --compile one graph, networks included."""
    logprobs, entropy = logprobs_entropy(agent, agent.policy(mb["obs"]), mb["actions"])
    weights = dict(clip_coef=args.clip_coef, ent_coef=args.ent_coef, vf_coef=args.vf_coef)
    values = agent.value(mb["obs"]) if args.advantage == "gae" else mb["returns"]
    return ppo_loss(logprobs, mb["logprobs"], advantages, entropy, values, mb["returns"], **weights)


def update(agent: Agent, loss_of, optimizer, scaler, batch: dict, args: Args, generator, world: World) -> dict:
    """Epochs of minibatch steps on one batch. Returns the metrics of the last minibatch that was looked at.

    loss_of: `minibatch_loss`. batch: tensors (T, n, ...) of this process's n of the N environments. Minibatches are
    drawn from all N * T rows; a process computes those of its own environments.
    """
    T, n = batch["rewards"].shape
    flat = {key: value.flatten(0, 1) for key, value in batch.items()}
    valid = flat["valid"].nonzero().squeeze(-1) if world.size == 1 else torch.arange(T * n * world.size)
    size = args.num_envs * args.num_steps // args.num_minibatches
    metrics, first_ratio_error, norms, steps, skipped, stopped = {}, None, [torch.zeros(())], 0, 0, False
    for _ in range(args.update_epochs):
        for rows in valid[minibatch_order(len(valid), generator)].split(size):
            local = own_rows(rows, n, world)
            advantages = flat["advantages"][local]
            if args.norm_adv and args.advantage == "gae":
                advantages = normalize_advantages(advantages, world)
            share = len(local) / len(rows)
            if not share:  # no row is this process's: it computes one that does not count
                local, advantages = local.new_zeros(1), advantages.new_zeros(1)
            mb = {key: value[local] for key, value in flat.items()}
            loss, metrics = loss_of(agent, mb, advantages, args)
            worst = metrics.pop("ratio_max_error")
            if world.size > 1:  # means over the rows of all processes
                metrics = dict(zip(metrics, world.total(torch.stack([m * share for m in metrics.values()]))))
                loss = loss * share
            first_ratio_error = worst if first_ratio_error is None else first_ratio_error
            # before the step: the policy that has drifted too far is not driven further
            if args.target_kl and not metrics["approx_kl"] <= args.target_kl:
                stopped = True
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            groups = [group["params"] for group in optimizer.param_groups]
            sum_gradients([p for params in groups for p in params], world)
            scaler.unscale_(optimizer)
            norms = [clip_gradients(params, args.max_grad_norm) for params in groups]
            took = all(bool(norm.isfinite()) for norm in norms)
            if took or scaler.is_enabled():  # then it skips the step itself, and tries a smaller scale next
                scaler.step(optimizer)
            scaler.update()
            steps, skipped = steps + took, skipped + (not took)
        if stopped:
            break
    facts = {"optimizer_steps": steps, "skipped_steps": skipped, "kl_stop": float(stopped)}
    return metrics | facts | {"grad_norm": norms[0], "first_ratio_error": first_ratio_error}


# ---- 5. Rollout ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(agent: Agent, groups: list[Group], args: Args, generator, world: World) -> tuple[dict, list[dict]]:
    """T steps of all environments with frozen weights and statistics.

    Returns the batch (torch, (T, n, ...) on the agent's device; observations raw, rewards as the environment gave them)
    and one dict for each episode that ended. While one group's physics runs, the policy acts for another.
    """
    T, mine, device = args.num_steps, world.share(args.num_envs), world.device
    n, space = mine.stop - mine.start, groups[0].envs.single_action_space
    batch = {
        "obs": np.zeros((T, n, groups[0].x.shape[1]), groups[0].x.dtype),
        "next_obs": np.zeros((T, n, groups[0].x.shape[1]), groups[0].x.dtype),
        "actions": np.zeros((T, n, *space.shape), np.int64 if agent.choices else np.float32),
        "logprobs": np.zeros((T, n), np.float32),
        "rewards": np.zeros((T, n), np.float32),
        "terminations": np.zeros((T, n), bool),
        "dones": np.zeros((T, n), bool),
        "valid": np.ones((T, n), bool),
    }
    draw, episodes = torch.rand if agent.choices else torch.randn, []
    for group in groups:
        if group.resets != getattr(group.envs, "resets", 0):  # an evaluation had the only simulator: new episodes
            seeds = torch.randint(2**31, (args.num_envs,), generator=generator)[mine].tolist()
            group.__init__(group.envs, group.rows, seeds, args)
    for t in range(T + 1):
        # noise for all environments of the run: numbers do not depend on groups or processes
        noise = draw((args.num_envs, *space.shape), generator=generator)[mine] if t < T else None
        for group in groups:
            rows = group.rows
            if t > 0:
                transition, ended = finish_step(group, args)
                episodes += ended
                for name, value in transition.items():
                    batch[name][t - 1, rows] = value
            if t < T:
                policy = agent.policy(torch.from_numpy(group.x).to(device))
                actions = sample(agent, policy, noise[rows].to(device))
                batch["obs"][t, rows] = group.x
                batch["actions"][t, rows] = actions.cpu().numpy()
                batch["logprobs"][t, rows] = logprobs_entropy(agent, policy, actions)[0].cpu().numpy()
                group.wait = sim.start(group.envs, executable(batch["actions"][t, rows], space))
    return {key: torch.from_numpy(value).to(device) for key, value in batch.items()}, episodes


def finish_step(group: Group, args: Args) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Waits for a group's step. Returns its transition, arrays (n, ...), and the whole episodes that it ended."""
    next_obs, rewards, terminations, truncations, infos = group.wait()
    dones, real = terminations | truncations, np.ones(len(terminations), bool)
    if group.envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
        real = ~group.ended  # after an end this "step" was the reset: no reward, no action, not to be learnt
    after = sim.successors(next_obs, infos, dones)
    if args.reward_mode != "env":
        rewards = reward_of(after, group.potential, args)
    sim.refuse_nonfinite("the reward", rewards, args.env_id, group.episodes)
    x = features(after, args)
    sim.refuse_nonfinite("the observation", x, args.env_id, group.episodes)
    success = sim.success_flags(infos, dones)
    group.episodes.step(real, rewards, success)
    distance = fetch.goal_distance(after) if fetch.is_fetch(args.env_id) else None
    episodes = group.episodes.end(dones, success, distance)
    group.ended = dones
    group.observe(next_obs, args)
    transition = {"rewards": rewards, "terminations": terminations, "dones": dones, "valid": real}
    return transition | {"next_obs": x}, episodes


# ---- 6. Evaluate and record ------------------------------------------------------------------------------------------


def mean_actions(agent: Agent, device: torch.device):
    """The policy without noise: a function from features (n, D) to actions, for evaluation and video."""

    def act(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            policy = agent.policy(torch.from_numpy(x).to(device))
        if agent.choices:
            policy = torch.stack([logits.argmax(-1) for logits in policy.split(agent.choices, -1)], -1)
        return policy.cpu().numpy()

    return act


def do_nothing(action_space):
    """The baseline that a success rate is compared with: zero actions, or choice 0."""
    zero = getattr(action_space, "zero", np.zeros(action_space.shape, action_space.dtype))
    return lambda x: np.repeat(zero[None], len(x), axis=0)


def play(act, envs: VectorEnv, seed: int, args: Args, draw=None) -> list[dict]:
    """One episode in each of `envs`, always the same starts (`seed` on); draw() is called before every step."""
    n = envs.num_envs
    group = Group(envs, slice(0, n), [seed + i for i in range(n)], args)
    first: dict[int, dict] = {}  # an environment's first episode; later ones may be cut off by the end
    while len(first) < n:
        sim.heed()
        if draw:
            draw()
        group.wait = sim.start(envs, executable(act(group.x), envs.single_action_space))
        for episode in finish_step(group, args)[1]:
            first.setdefault(episode["env"], episode)
    return [first[i] for i in range(n)]


def evaluate(act, envs, args: Args, name: str = "eval") -> dict[str, float]:
    """Success is that of the last step; `once` counts episodes that were at the goal in any step."""
    seed = {"eval": args.eval_seed, "validation": sim.VALIDATION_SEED}[name]
    return sim.summary(play(act, envs, seed, args), name)


def measure(run: Run, step: int, act, envs, state: dict, args: Args) -> dict[str, float]:
    """Evaluates, to report it, and validates, which picks the best (success, then return) and may end the run."""
    found = sim.unless_stopped(run, state, lambda: evaluate(act, envs, args) | evaluate(act, envs, args, "validation"))
    if state.get("owed"):
        return {}
    state["last"] = metrics = found
    success = metrics.get("validation/success_rate", 0.0)
    state["streak"] = state["streak"] + 1 if args.stop_success and success >= args.stop_success else 0
    if run.world.main:
        run.is_best(step, success, metrics["validation/episodic_return"])
    if run.world.any(state["streak"] >= 3)[0]:
        run.end()
    return metrics


def record_video(path: Path, act, args: Args) -> list[dict]:
    """Writes an mp4 of a few evaluation episodes, one after the other; returns a row of the table for each.

    Never from a training environment: drawing calls `mj_forward`, which changes what PickAndPlace computes next.
    """
    size = {"width": 240, "height": 240} if fetch.is_fetch(args.env_id) else {}
    envs = sim.make_envs(args, args.video_episodes, "gymnasium", evaluation=True, render_mode="rgb_array", **size)
    frames: list[tuple] = []  # step -> environment -> picture
    episodes = play(act, envs, args.eval_seed, args, draw=lambda: frames.append(envs.render()))
    film = [frame[e["env"]] for e in episodes for frame in frames[: e["length"]]]
    write_mp4(path, film, envs.metadata.get("render_fps", 25))
    envs.close()
    return [sim.video_row(episode) for episode in episodes]


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


# settings that change what the policy computes: a checkpoint carries them, and whoever uses it has the same
POLICY = ("env_id", "observation_mode", "hidden", "normalize_obs")


def resolve(args: Args) -> Args:
    """Fills in what depends on the task and on the kind of advantage."""
    recipe = RECIPES.get(fetch.task_of(args.env_id), {})
    if fetch.is_fetch(args.env_id) and "Dense" in args.env_id:
        recipe = recipe | {"reward_mode": "dense"}  # what the id promises
    recipe = recipe | (GROUPED if args.advantage == "group" else {"group_size": 1})
    return replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})


def check(args: Args, world: World) -> None:
    """Everything that can be wrong with the flags, before anything is built."""
    fetch.refuse_other_version(args.env_id)
    if fetch.is_fetch(args.env_id):
        fetch.import_robotics()
    else:
        spaces.check(args, Args.log_std_init)
    if not args.stagger and args.env_backend != "native":
        fail(f"--no-stagger is for --env-backend native; {args.env_backend} starts all environments at once: drop it")
    picks = fetch.task_of(args.env_id) == "FetchPickAndPlace" and args.env_backend == "native"
    if args.grasped_starts and not picks:
        fail(f"--grasped-starts {args.grasped_starts} is for FetchPickAndPlace-v4, --env-backend native: give 0")
    sim.check_numbers(args, args.num_envs * args.num_steps, world)
    sim.check_groups(args, Args, args.max_episode_steps or 50, world)
    if args.eval_only and not args.init_from:
        fail("--eval-only measures the policy of --init-from: give a run folder")
    if args.init_from:
        sim.check_policy(find_checkpoint(args.init_from, best=True), "ppo_fetch", args, Args, POLICY)


def train(run: Run, args: Args) -> None:
    """Builds environments, agent and optimizer, or takes them from a checkpoint; then the loop."""
    world, pool = run.world, sim.physics_threads(args.num_threads)
    run.unit = args.num_envs * args.num_steps  # environment steps of an iteration
    iterations = args.total_timesteps // run.unit
    groups = make_groups(args, world, pool)
    # FetchVec is gymnasium bit for bit: evaluation uses it whatever the training backend
    eval_backend = "native" if fetch.is_fetch(args.env_id) else args.env_backend.removesuffix("-async")
    eval_envs = sim.make_envs(args, args.eval_episodes, eval_backend, pool, evaluation=True) if world.main else None
    space = groups[0].envs.single_action_space
    agent = Agent(groups[0].x.shape[1], space, args).to(world.device)
    if args.init_from or run.checkpoint:
        sim.load_weights(agent, run.checkpoint or find_checkpoint(args.init_from, best=True))
    loss_of = torch.compile(minibatch_loss) if args.compile else minibatch_loss
    if args.compile:  # for acting as for the update, or in low precision the two would round differently
        agent.policy = torch.compile(agent.policy)
    act, videos = mean_actions(agent, world.device), Videos(run, args.capture_video)
    state = {"steps": 0, "train_s": 0.0, "streak": 0, "base": {}, "last": {}, "recent": []}
    if args.eval_only:
        run.write(0, measure(run, 0, act, eval_envs, state, args))
        videos.film(0, record_video, act, args)
        run.say("\n".join(f"{name:28s} {value:.4f}" for name, value in state["last"].items()))
        return
    rates = [args.learning_rate]
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    carry = torch.zeros(args.num_envs // world.size, dtype=torch.float64, device=world.device)  # for `sim.returns_of`

    def write(folder: Path | None) -> dict:
        if folder:
            save_file({k: v.contiguous() for k, v in agent.state_dict().items()}, folder / "model.safetensors")
        # the settings of the policy: see `sim.check_policy`
        return {name: getattr(args, name) for name in POLICY} | sim.save(folder, groups, carry, scaler, world)

    state = run.resume(state, optimizer)
    if run.checkpoint:
        loaded = sim.load(run, state, groups, carry, scaler)
        for group in loaded:
            group.observe(group.envs.observe(), args)
        groups = loaded or make_groups(args, world, pool, run.first)
        sim.make_up(run, state, lambda: measure(run, run.first, act, eval_envs, state, args))
    else:
        idle = evaluate(do_nothing(space), eval_envs, args) if world.main else {}
        state["base"] = {key.replace("eval/", "baseline/"): value for key, value in idle.items()}
        recipe = ", ".join(f"{name} {getattr(args, name)}" for name in RECIPES["other"])
        run.say(
            f"{args.env_id}: {recipe}; {args.num_envs} environments x {args.num_steps} steps = {run.unit} a batch, in "
            f"{args.num_minibatches} minibatches; {iterations} batches = {iterations * run.unit:,} steps; {run.folder}"
        )
        run.write(0, state["base"] | measure(run, 0, act, eval_envs, state, args))

    for step in run.steps(iterations):
        # ---- 1. rollout with frozen weights and statistics ----
        with run.clock("rollout"):
            batch, episodes = rollout(agent, groups, args, torch_stream(args.seed, "noise", step), world)
        with run.clock("update"):
            # ---- 2. values, advantages, returns ----
            weighed, found = advantages_of(agent, batch, carry, args, world)

            # ---- 3. update ----
            for group, rate in zip(optimizer.param_groups, rates):
                # eq: lr_i = lr (1 - i / I),  i = 0 ... I - 1
                group["lr"] = rate * (1 - step / iterations) if args.anneal_lr else rate
            order = torch_stream(args.seed, "order", step)
            metrics = update(agent, loss_of, optimizer, scaler, batch | weighed, args, order, world)
            # only now: the statistics that the actions were sampled with are those that they were scored with
            agent.statistics.update(batch["obs"].flatten(0, 1), world)

        # ---- 4. log ----
        state["recent"] = (state["recent"] + world.gather(episodes))[-100:]
        metrics = {f"losses/{name}": float(value) for name, value in metrics.items()}
        metrics |= found | sim.summary(state["recent"], "charts") | sim.times(run, state)
        metrics |= {
            "losses/action_std": 0.0 if agent.choices else agent.log_std.exp().mean().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/reward_scale": float(agent.reward_scale()),
        }
        sim.check_first_ratio(run, step + 1, metrics, 1e-3)

        # ---- 5. evaluate, film, save, stop ----
        if run.due(step + 1, args.eval_every):
            metrics |= measure(run, step + 1, act, eval_envs, state, args)
        if run.due(step + 1, args.video_every):
            videos.film(step + 1, record_video, act, args)
        shown = {"success": metrics.get("charts/success_rate"), "ret": metrics.get("charts/episodic_return")}
        shown["eval"], line = state["last"].get("eval/success_rate"), sim.line_of(metrics, state)
        run.end_step(step + 1, line, state, optimizer, write, **shown)
    sim.close(groups, eval_envs)
    run.finish(sim.outcome(run, state, "doing nothing"))


def main(args: Args) -> None:
    own = {"env_id"} if ":" in args.env_id else set()  # what a folder says imports no module: say it with --resume too
    run = Run(__file__, args, FREE | own)
    if run.args.env_backend != "native" and run.args.grasped_starts is None:
        run.args = replace(run.args, grasped_starts=0.0)  # the recipe's are FetchVec's
    args = resolve(run.args)
    if run.checkpoint and (args.env_id != run.saved["env_id"] or ":" in args.env_id and not own):
        fail(f"'{run.checkpoint}' is of another environment, or of a module's: add --env-id {run.saved['env_id']}")
    check(args, run.world)
    sim.set_up_torch(args)
    with run.open(args):
        train(run, args)
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main(parse(Args, __doc__))
