"""PPO on a flow policy: the GR00T that `gr00t_finetune.py` made gets better by trial on the Fetch robot.

    policy      x_0 ~ N(0, I),  x_{k+1} = x_k + v(x_k, k / K) / K,  x_K = the next H actions: without a density
    exploration Flow-SDE: one step of the K is x_{k+1} ~ N(mean(x_k, v), s_k^2), made so that x keeps its marginals
                (arXiv 2510.25889); Flow-Noise: every step is N(x_k + v / K, sigma_phi^2) (arXiv 2505.22094)
    ratio       w = exp(log N(x_{k+1}; new mean) - log N(x_{k+1}; old mean)), summed over the actions that were executed
    advantage   over chunks of C executed actions: R_t = sum_k gamma^k r_k, discount gamma^C (GAE, arXiv 1506.02438)
    objective   minimise  mean of -min(w A, clip(w, 1 - eps, 1 + eps) A) + c_v (V - R)^2 - c_e H (PPO, arXiv 1707.06347)

Every line of the algorithm that is an equation carries it: grep for "eq:". Symbols and results: docs/ppo_gr00t.md.
`diff ppo_fetch.py ppo_gr00t.py` shows what a flow policy changes. Evaluation is the plain flow, x_0 its only noise.
Left out on purpose: other simulators, gymnasium's backends (FetchVec is the same bits), training several tasks at once.

Dims: N environments, T chunks, B = N * T decisions, C executed of H = 16 predicted actions, D padded action dims (N1.5:
32, N1.7: 132), of which the robot has 4, K steps of the flow, M noisy ones, S backbone tokens, U distinct observations.

    uv run python ppo_gr00t.py                                   # fine-tunes a weak lite policy, then FetchReach
    uv run python gr00t_finetune.py --model-path lite            # demonstrations -> policy ...
    uv run python ppo_gr00t.py --model-path RUN_DIR --env-id FetchPush-v4                # ... -> better policy
    uv run python ppo_gr00t.py --model-path RUN_DIR --device cuda --amp bf16             # tiny or full: with cameras
"""

import common.stop  # noqa: F401, first: Ctrl-C is heard while the rest is imported

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from annotated_types import Interval
from safetensors.torch import save_file

from common.checkpoint import trainer_file
from common.cli import Count, Fraction, Name, Natural, NonNegative, Positive, Seed, Share, Text, fail, flag, parse
from common.language.stats import with_means
from common.parallel import World, clip_gradients, sum_gradients
from common.robot import fetch, sim
from common.robot.feature_cache import FeatureCache, prompted
from common.robot.fetch_robot import Camera, FetchRobot, fine_tuned, read_interface
from common.robot.files import read_tensors
from common.robot.gr00t import Network
from common.robot.lora import load_adapters
from common.robot.policy import GR00TArgs, Interface, read_stored, save_policy, trained_parts
from common.robot.sim import RunningStatistics, SimArgs, own_rows
from common.robot.video import Videos, write_mp4
from common.run import FREE, Run
from common.streams import stream_seed, torch_stream

DIMS = 4  # action dims of Fetch: displacement and gripper
ACTING = ("denoising_steps", "execute_steps")  # change what a policy does: a checkpoint carries them
EPISODE = 50  # steps; FetchVec's own time limit would reset within a chunk, so the script ends episodes

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args(GR00TArgs, SimArgs):
    exp_name: Name = "ppo_gr00t"
    seed: Seed = 1
    tags: tuple[str, ...] = ("ppo", "gr00t", "fetch")
    eval_every: Natural = 8
    model_path: Text | None = None
    """run folder or checkpoint of gr00t_finetune.py or of this script, a folder in the published layout or a hub id; it
    must hold statistics of Fetch. default: fine-tune a weak lite policy first (the command is printed)"""

    # task
    env_id: Text = "FetchReach-v4"
    """FetchReach-v4, FetchPush-v4 or FetchPickAndPlace-v4, the tasks that have demonstrations"""
    reward_mode: Literal["sparse", "dense", "distance", "shaped"] | None = None
    """-1/0 | -distance | the same, +10 at the goal | potential-based shaping; default: by task"""

    # flow
    sampler: Literal["flow-sde", "flow-sde-chain", "flow-noise"] = "flow-sde"
    """where exploration comes from: one noisy step of the flow | noise at all of them | learned noise at all of them"""
    denoising_steps: Count = 4  # steps K of the flow, in training and evaluation
    noise_level: Positive | None = None
    """Flow-SDE: a in sigma(t) = a sqrt((1 - t) / t) at the start, 0.2 to 1; default: by task"""
    final_noise_level: Positive | None = None
    """Flow-SDE: a in the last iteration, reached linearly; noise that shakes the robot hides errors that are smaller;
    default: by task"""
    noisy_step: Literal["last", "any"] = "last"
    """Flow-SDE: which step is noisy. last: the executed action itself is; any: drawn for each decision, but a policy
    that is sure of its actions undoes the noise of earlier steps"""
    noise_range: tuple[Positive, Positive] = (0.08, 0.16)
    """Flow-Noise: bounds of the learned standard deviations, in units of normalised actions"""

    # rollout
    total_timesteps: Count | None = None  # environment steps of the run, over all processes; default: by task
    num_envs: Count = 64  # environments N, over all processes
    num_steps: Count | None = None
    """chunks T that each environment executes in an iteration; default: by task, 10 with --advantage group"""
    execute_steps: Annotated[int, Interval(ge=1, le=1000)] = 5
    """actions C executed of each predicted chunk of 16 before the next look"""
    stagger: bool = True  # start the environments at different ages, so that no batch is all starts or all ends

    # update
    learning_rate: Positive = 1e-4  # Adam step size of the policy at the start; 5e-6 to 2e-5 for the full model
    critic_learning_rate: Positive = 1e-3  # Adam step size of the critic at the start
    critic_warmup: Natural = 1  # iterations at the start that train the critic alone
    critic_epochs: Natural = 10
    """passes of the critic alone after those of both; its features are stored, so they cost next to nothing"""
    anneal_lr: bool = True  # lower the step sizes linearly to 0 over the iterations
    gamma: Share | None = None
    """discount of an environment step, 0.9 to 0.99; default: by task, 1 with --advantage group"""
    advantage: Literal["gae", "group"] = "gae"
    """an action is compared with: a critic's value | the return of other episodes from the same start, no critic"""
    group_size: Count | None = None  # --advantage group: episodes G that begin at one start, 4 to 32; default: 8
    gae_lambda: Share = 0.95  # GAE's lambda, of a chunk
    num_minibatches: Count | None = None  # minibatches in an epoch; must divide N * T; default: by task
    update_epochs: Count = 5  # passes over the batch at most
    target_kl: NonNegative = 0.1  # stop an iteration's update before the minibatch whose KL exceeds this, 0: never
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: Fraction = 0.2  # PPO's epsilon, for the ratio of a whole chunk
    ent_coef: NonNegative = 0.0  # Flow-Noise: weight of the entropy bonus (Flow-SDE's entropy is a constant)
    vf_coef: NonNegative = 0.5  # weight of the value loss
    max_grad_norm: NonNegative = 1.0  # gradient norm to clip to, 0: never; of policy and critic apart
    hidden: Count = 128  # width of the critic's two hidden layers
    scale_rewards: bool = True  # divide rewards by the running standard deviation of the discounted return
    amp: Literal["off", "bf16", "fp16"] = "off"
    """mixed precision of backbone and DiT, bf16 stores a frozen backbone in bf16 too; chain and densities stay fp32"""
    lora_dropout = 0.0  # no flag: with dropout, old and new policy would differ by it


SUCCESS_REWARD, SHAPING, SHAPING_GAMMA = 0.1, 5.0, 1.0  # c, k and g of the shaped reward: see `reward_of`

# What differs by task where a flag is not given.
SMALL = dict(num_minibatches=2, num_steps=5, noise_level=0.8, final_noise_level=0.3, gamma=0.9)
LARGE = dict(num_minibatches=4, num_steps=10, noise_level=0.6, final_noise_level=0.25, gamma=0.95)
RECIPES = {
    "FetchReach": SMALL | dict(reward_mode="dense", total_timesteps=38_400),
    "FetchPush": LARGE | dict(reward_mode="shaped", total_timesteps=240_000),
    "FetchPickAndPlace": LARGE | dict(reward_mode="shaped", total_timesteps=240_000),
}
GROUPED = dict(num_steps=10, gamma=1.0, group_size=8)  # --advantage group, whatever the task
# The default run's starting policy: a lite GR00T that saw too few frames.
START = (
    "gr00t_finetune.py --model-path lite --max-samples 90 --max-steps 400 --batch-size 32 --learning-rate 6e-3 "
    "--adam-betas 0.9 0.95 --max-grad-norm 10 --no-closed-loop --eval-trajs 1"
)


# ---- 2. Environments -------------------------------------------------------------------------------------------------


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

    def __init__(self, envs: fetch.FetchVec, rows: slice, seeds: list[int], args: Args):
        """rows: which of the process's environments. seeds: one for each of them."""
        n = envs.num_envs
        self.envs, self.rows = envs, rows
        self.episodes = sim.Episodes(whole=np.ones(n, bool))
        self.worker = ThreadPoolExecutor(1)  # plays chunks
        self.wait = None  # ends the chunk that is under way
        envs.reset(seed=seeds)
        self.observe(args)

    def observe(self, args: Args) -> None:
        # a camera draws what the simulator's state says
        self.obs = self.envs.observe() | {"physics": self.envs.get_state()[0]["physics"]}
        self.potential = potential_of(self.obs, args)


def make_envs(args: Args, num_envs: int, pool=None) -> fetch.FetchVec:
    """Environments that never end an episode themselves: their autoreset would do so inside a chunk."""
    return fetch.FetchVec(args.env_id, num_envs, args.num_threads, pool=pool, max_episode_steps=10**9)


def make_groups(args: Args, world: World, pool=None) -> list[Group]:
    """This process's environments at their first training episodes; `pool` steps physics."""
    # 32 bits: what any simulator takes for a seed
    # those of a group are one stream, from which starts alone are drawn: they all begin every episode at one start
    seeds = [stream_seed(args.seed, "environment", i // args.group_size) % 2**32 for i in range(args.num_envs)]
    mine = world.share(args.num_envs)
    n, groups = (mine.stop - mine.start) // args.env_groups, []
    for first in range(mine.start, mine.stop, n):
        envs = make_envs(args, n, pool)
        rows = slice(first - mine.start, first - mine.start + n)
        groups.append(Group(envs, rows, seeds[first : first + n], args))
        if args.stagger and args.advantage == "gae":  # whole chunks, as in the episodes that follow
            chunks = math.ceil(EPISODE / args.execute_steps)
            envs.elapsed[:] = np.arange(first, first + n) * chunks // args.num_envs * args.execute_steps
            groups[-1].episodes.whole[:] = envs.elapsed == 0
    return groups


# ---- 3. Model --------------------------------------------------------------------------------------------------------


class NoiseNet(nn.Module):
    """Flow-Noise: standard deviations of all actions at a step of the flow, between two bounds."""

    def __init__(self, inputs: int, horizon: int, dims: int, args: Args):
        super().__init__()
        self.steps, self.shape = args.denoising_steps, (horizon, dims)
        self.net = mlp(inputs + args.denoising_steps, 64)
        self.head = orthogonal(nn.Linear(64, horizon * dims), 0.01)
        self.low, self.high = (2 * math.log(bound) for bound in args.noise_range)

    def forward(self, condition: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """(B, X) features, (B,) step of the flow -> (B, H, D)"""
        h = self.head(self.net(torch.cat([condition, F.one_hot(k, self.steps).float()], dim=-1)))
        # eq: log sigma^2 = lo + (hi - lo) (tanh(h) + 1) / 2   [ReinFlow, arXiv 2505.22094]
        return torch.exp(0.5 * (self.low + (self.high - self.low) * (h.tanh() + 1) / 2)).unflatten(-1, self.shape)


class Agent(nn.Module):
    """The flow policy, a critic that sends no gradient into it, running statistics, and for Flow-Noise its network."""

    def __init__(self, model: Network, embodiment: int, prompt: torch.Tensor, args: Args):
        """embodiment: row of the embodiment layers. prompt (1, S): the task's instruction as token ids."""
        super().__init__()
        c = model.config
        size = c.vl_width + c.state_dim  # X
        self.model = model
        self.statistics = RunningStatistics(size)
        self.return_statistics = RunningStatistics(1)
        self.scale_rewards = args.scale_rewards
        self.critic = mlp(size, args.hidden)
        self.critic_head = orthogonal(nn.Linear(args.hidden, 1), 1.0)
        self.noise_net = NoiseNet(size, c.action_horizon, c.action_dim, args) if args.sampler == "flow-noise" else None
        self.register_buffer("embodiment_id", torch.tensor([embodiment]), persistent=False)
        self.register_buffer("prompt", prompt, persistent=False)
        self.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    def own_state(self) -> dict[str, torch.Tensor]:
        return {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("model.")}

    def autocast(self):
        return torch.autocast(self.prompt.device.type, self.amp) if self.amp else nullcontext()

    def backbone(self, images: torch.Tensor | None, count: int) -> torch.Tensor:
        """The prompt with images (count, 3, h, w) uint8, or none -> features (count, S, W)."""
        with self.autocast():
            return self.model.backbone(prompted(self.model.config, self.prompt, images, count))[0]

    def look(self, features: torch.Tensor, index: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        """What policy and critic see: VL features vl (B or 1, S, W), state (B, 1, state_dim), condition (B, X).

        features (U, S, W) of the backbone, one of them for each distinct observation; index (B,) says which is whose.
        Every prompt of a run has the same length, so nothing is padded.
        """
        with self.autocast():
            vl = self.model.process_backbone(features).float()
            vl = vl[index] if len(vl) > 1 else vl  # one row serves all
        # Of the backbone, not of the head that trains: features that drift would, standardised, drown the critic. And
        # no gradient of critic or noises reaches the backbone.
        condition = torch.cat([features.float().mean(1)[index], state], dim=-1).detach()
        return {"vl": vl, "state": state[:, None], "condition": condition}

    def velocity(self, look: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x (B, H, D) fp32, t (B,) float64 -> v (B, H, D) fp32; only what happens inside is in low precision."""
        with self.autocast():
            kinds = self.model.kinds_of(self.prompt)
            return self.model.velocity(look["vl"], kinds, look["state"], x, t, self.embodiment_id).float()

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X) raw -> standardised, clipped to +-10; the std has a floor: most of a padded state is constant."""
        s = self.statistics
        std = s.var.sqrt().clamp_min(1e-3)
        return ((x - s.mean.float()) / std.float()).clamp(-10, 10)

    def value(self, condition: torch.Tensor) -> torch.Tensor:
        """(B, X) -> (B,), in units of scaled reward."""
        return self.critic_head(self.critic(self.normalize(condition))).squeeze(-1)

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


def noisy_steps(args: Args) -> tuple[range, int]:
    """(where the noisy steps of a decision may begin, their number M)."""
    K = args.denoising_steps
    if args.sampler != "flow-sde":
        return range(1), K
    return range(K - 1, K) if args.noisy_step == "last" else range(K), 1


def transition(v, x, k, noisy, args: Args, sigma=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution of x_{k+1}, the same function for rollout, update and evaluation.

    v, x (B, H, D) fp32: velocity at x_k; k (B,) int step; noisy (B,) bool: the others take the ODE's step; sigma
    (B, H, D): Flow-Noise's standard deviations. Returns mean (B, H, D) and std, 0 where not noisy.
    Source: Flow-SDE arXiv 2510.25889 (pi_RL), Flow-Noise arXiv 2505.22094 (ReinFlow).
    """
    K, on = args.denoising_steps, noisy.float()[:, None, None]
    # eq: x_{k+1} = x_k + v / K
    mean = x + v / K
    if args.sampler == "flow-noise":
        # eq: x_{k+1} ~ N(x_k + v / K, sigma_phi^2)
        return mean, on * sigma
    t = k.float()[:, None, None] / K
    # eq: sigma^2(t) = a^2 (1 - t) / t, with 1 / K in place of t = 0
    variance = args.noise_level**2 * (1 - t) / t.clamp_min(1 / K)
    # eq: dx = (v + sigma^2 / 2 score) dt + sigma dw,  score = -x_0^ / (1 - t),  x_0^ = x - t v
    mean = mean - on * (variance / (2 * K * (1 - t))) * (x - t * v)
    # eq: s = sigma sqrt(1 / K)
    return mean, on * (variance / K).sqrt()


def log_density(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Elementwise log-density of a normal, fp32."""
    # eq: log N(x; m, s) = -((x - m) / s)^2 / 2 - log s - log(2 pi) / 2
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def executed_mask(lengths: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, H, D) 1 for the actions that were executed (the first `lengths` (B,) of a chunk) in the robot's own dims."""
    H, D = like.shape[1:]
    steps = torch.arange(H, device=like.device)[:, None] < lengths[:, None, None]  # (B, H, 1)
    return (steps & (torch.arange(D, device=like.device) < DIMS)).float()


def step_distribution(agent, look: dict, x: torch.Tensor, k: torch.Tensor, noisy: torch.Tensor, args: Args):
    """mean and std of x_{k+1} under the agent's policy."""
    v = agent.velocity(look, x, k.double() / args.denoising_steps)
    sigma = agent.noise_net(agent.normalize(look["condition"]), k) if args.sampler == "flow-noise" else None
    return transition(v, x, k, noisy, args, sigma)


@torch.no_grad()
def sample_chain(agent, look: dict, noise: torch.Tensor, first: torch.Tensor, mask: torch.Tensor, args: Args):
    """Runs the flow with exploration.

    noise (B, K + 1, H, D) standard normal: x_0 and what each step may add; first (B,) the first noisy step; mask
    (B, H, D). Returns x_K (B, H, D), the chain (B, M + 1, H, D) before, between and after the noisy steps, and the
    log-density (B,) of these steps.
    """
    _, M = noisy_steps(args)
    x, logprobs = noise[:, 0].contiguous(), torch.zeros(len(noise), device=noise.device)
    points = [x]
    for k in range(args.denoising_steps):
        noisy = (first <= k) & (k < first + M)
        mean, std = step_distribution(agent, look, x, torch.full_like(first, k), noisy, args)
        x = mean + std * noise[:, k + 1]
        points.append(x)
        std = torch.where(noisy[:, None, None], std, 1.0)
        logprobs += (log_density(x, mean, std) * mask).sum((1, 2)) * noisy
    rows, visited = torch.arange(len(x), device=x.device), torch.arange(M + 1, device=x.device)
    chain = torch.stack(points, dim=1)[rows[:, None], first[:, None] + visited]
    return x, chain, logprobs


def chain_logprobs(agent, look: dict, chain: torch.Tensor, first: torch.Tensor, mask: torch.Tensor, args: Args):
    """Log-density (B,) and entropy (B,) of the noisy steps of a chain (B, M + 1, H, D).

    eq: log pi(chain) = sum_k sum_executed log N(x_{k+1}; mean_k, s_k); what precedes the noise cancels in the ratio
    """
    logprobs, entropy = 0.0, 0.0
    noisy = torch.ones_like(first, dtype=torch.bool)
    for m in range(chain.shape[1] - 1):
        # contiguous, as in the rollout: another memory layout would take another kernel, which rounds differently
        mean, std = step_distribution(agent, look, chain[:, m].contiguous(), first + m, noisy, args)
        logprobs = logprobs + (log_density(chain[:, m + 1], mean, std) * mask).sum((1, 2))
        # eq: H = sum(log s + (1 + log(2 pi)) / 2)
        entropy = entropy + ((std.log() + 0.5 * (1 + math.log(2 * math.pi))) * mask).sum((1, 2))
    return logprobs, entropy


@torch.no_grad()
def ode_actions(agent, look: dict, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """The policy as it is deployed: x_K (B, H, D) from x_0 (B, H, D) by the plain flow."""
    x, none = noise, torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    for k in range(args.denoising_steps):
        v = agent.velocity(look, x, torch.full((len(x),), k / args.denoising_steps, dtype=torch.float64).to(x.device))
        x, _ = transition(v, x, torch.full((len(x),), k, device=x.device), none, args, torch.zeros_like(x))
    return x


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


def chunk_advantages(rewards: torch.Tensor, values, next_values, batch: dict, args: Args):
    """GAE over chunks, (T, N): `gae` with the discount of a whole chunk; one that its episode's end cut is shorter."""
    C = args.execute_steps
    # eq: delta = R + gamma^n V(s') - V(s),  n <= C actions executed
    next_values = next_values * args.gamma ** (batch["lengths"] - C)
    return gae(rewards, values, next_values, batch["terminations"], batch["dones"], args.gamma**C, args.gae_lambda)


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
    chunk_gamma = args.gamma**args.execute_steps
    if args.advantage == "group":
        advantages = episode_advantages(batch["rewards"], batch["dones"], chunk_gamma, args.group_size)
        found = {"charts/groups_alike": sim.alike(advantages[batch["dones"]], args.group_size, world)}
        return {"advantages": advantages, "returns": torch.zeros_like(advantages)}, found
    if args.scale_rewards:
        discounted = sim.returns_of(batch["rewards"], batch["dones"], carry, chunk_gamma)
        agent.return_statistics.update(discounted.reshape(-1, 1), world)
    rewards = batch["rewards"] * agent.reward_scale().float()
    with torch.no_grad():
        values, next_values = agent.value(batch["condition"]), agent.value(batch["next_condition"])
    advantages, returns = chunk_advantages(rewards, values, next_values, batch, args)
    metrics = {"losses/explained_variance": sim.explained_variance(returns, values, world)}
    return {"advantages": advantages, "returns": returns}, metrics


def minibatch_order(num: int, generator: torch.Generator) -> torch.Tensor:
    """The order in which an epoch goes through the batch: each row once, anew in every epoch."""
    return torch.randperm(num, generator=generator)


def minibatch_loss(agent: Agent, mb: dict, advantages: torch.Tensor, args: Args, cache: FeatureCache):
    """`ppo_loss` of a minibatch's decisions, about observations of `cache`, under the present weights."""
    look = cache.look(mb["frame"], mb["state"], fresh=True)
    mask = executed_mask(mb["lengths"], mb["chain"][:, 0])
    logprobs, entropy = chain_logprobs(agent, look, mb["chain"], mb["first"], mask, args)
    weights = dict(clip_coef=args.clip_coef, ent_coef=args.ent_coef, vf_coef=args.vf_coef)
    values = agent.value(mb["condition"]) if args.advantage == "gae" else mb["returns"]
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


def fit_critic(agent: Agent, optimizer, batch: dict, args: Args, generator, world: World) -> dict:
    """Epochs for the critic alone, on the features of the rollout."""
    T, n = batch["rewards"].shape
    x, returns = batch["condition"].flatten(0, 1), batch["returns"].flatten(0, 1)
    critic, loss, norm = optimizer.param_groups[1]["params"], returns.new_zeros(()), 0.0
    for _ in range(args.critic_epochs):
        everything = minibatch_order(T * n * world.size, generator)  # of all processes
        for rows in everything.split(math.ceil(len(everything) / args.num_minibatches)):
            local = own_rows(rows, n, world).to(x.device)
            # eq: L_V = (V - R)^2 / 2
            loss = 0.5 * ((agent.value(x[local]) - returns[local]) ** 2).sum() / len(rows)
            optimizer.zero_grad()  # to None: the policy's weights take no step
            loss.backward()
            sum_gradients(critic, world)
            norm = clip_gradients(critic, args.max_grad_norm)
            optimizer.step()
    return {"critic_loss": world.total(loss.detach()), "critic_grad_norm": norm}


# ---- 5. Rollout ------------------------------------------------------------------------------------------------------


def look_at(obs: dict, robot: FetchRobot, cache: FeatureCache):
    """State (n, 64), number in the cache (n,) and the agent's look at a group's observations."""
    state = torch.from_numpy(robot.state(obs)).to(cache.agent.prompt.device)
    index = cache.add(robot.images(obs["physics"], obs["desired_goal"]), len(state))
    return state, index, cache.look(index, state)


@torch.no_grad()
def rollout(
    agent: Agent, robot: FetchRobot, groups: list[Group], args: Args, generator, world: World
) -> tuple[dict, FeatureCache, list[dict]]:
    """T chunks of all environments with frozen weights and statistics.

    Returns the batch (torch, (T, n, ...) on the agent's device), the observations it refers to, and one dict for each
    episode that ended. While one group's physics runs, the policy acts for another.
    """
    T, mine, device = args.num_steps, world.share(args.num_envs), world.device
    H, D = agent.model.config.action_horizon, agent.model.config.action_dim
    cache, batch, episodes = FeatureCache(agent), {}, []

    def put(t: int, rows: slice, **values) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).to(device)
            if name not in batch:
                batch[name] = value.new_zeros(T, mine.stop - mine.start, *value.shape[1:])
            batch[name][t, rows] = value

    for t in range(T + 1):
        # noise for all environments of the run: numbers do not depend on groups or processes
        if t < T:
            shape, begins = (args.num_envs, args.denoising_steps + 1, H, D), noisy_steps(args)[0]
            noise = torch.randn(shape, generator=generator)[mine].to(device)
            first = torch.randint(begins.start, begins.stop, shape[:1], generator=generator)[mine].to(device)
        for group in groups:
            rows = group.rows
            if t > 0:
                chunk, last, ended = group.wait()
                episodes += ended
            state, frame, look = look_at(group.obs, robot, cache)
            if t > 0:
                after = look["condition"].clone()
                if last:  # the state that followed is the episode's last, not the next one's first
                    obs = {key: np.stack([one[key] for one in last.values()]) for key in group.obs}
                    after[list(last)] = look_at(obs, robot, cache)[2]["condition"]
                put(t - 1, rows, next_condition=after, **chunk)
            if t < T:
                lengths = torch.from_numpy(np.minimum(args.execute_steps, EPISODE - group.envs.elapsed)).to(device)
                mask = executed_mask(lengths, noise[rows, 0])
                x, chain, logprobs = sample_chain(agent, look, noise[rows], first[rows], mask, args)
                put(t, rows, state=state, frame=frame, condition=look["condition"], chain=chain, first=first[rows])
                put(t, rows, lengths=lengths, logprobs=logprobs, valid=lengths > 0)
                actions = robot.actions(x, args.execute_steps)
                group.wait = group.worker.submit(play_chunk, group, actions, args).result
    return batch, cache, episodes


def play_chunk(group: Group, actions: np.ndarray, args: Args, draw=None) -> tuple[dict, dict[int, dict], list[dict]]:
    """Executes chunks of actions (n, C, 4); draw() is called after every step.

    Returns rewards and ends, (n,) each; the last observation of each environment that ended; and the whole episodes
    that ended. What an environment does after its episode's end does not count; it starts anew when the chunk is over.
    """
    n, envs, last, episodes = len(actions), group.envs, {}, []
    rewards, alive = np.zeros(n), np.ones(n, bool)
    for k in range(actions.shape[1]):
        obs = envs.step(actions[:, k])[0]
        r, group.potential = reward_of(obs, group.potential, args), potential_of(obs, args)
        # eq: R = sum_k gamma^k r_k
        rewards += np.where(alive, args.gamma**k * r, 0.0)
        distance = fetch.goal_distance(obs)
        group.episodes.step(alive, r, distance < fetch.GOAL_RADIUS)
        if draw:
            draw()
        ended = alive & (envs.elapsed >= EPISODE)
        if ended.any():
            everything = obs | {"physics": envs.get_state()[0]["physics"]}
            last |= {int(i): {key: x[i].copy() for key, x in everything.items()} for i in np.flatnonzero(ended)}
            episodes += group.episodes.end(ended, distance < fetch.GOAL_RADIUS, distance)
        alive &= ~ended
        if not alive.any():
            break
    if last:
        envs.reset(options={"reset_mask": ~alive})
    group.observe(args)
    chunk = {"rewards": rewards.astype(np.float32), "dones": ~alive, "terminations": np.zeros(n, bool)}
    return chunk, last, episodes


# ---- 6. Evaluate and record ------------------------------------------------------------------------------------------


def plain_flow(agent: Agent, robot: FetchRobot, args: Args):
    """The policy as it is deployed: a function from a group and the stream of x_0 to actions (n, C, 4)."""
    c, device = agent.model.config, agent.prompt.device

    @torch.no_grad()
    def act(group: Group, generator) -> np.ndarray:
        obs, cache = group.obs, FeatureCache(agent)
        state, _, look = look_at(obs, robot, cache)
        noise = torch.randn(len(state), c.action_horizon, c.action_dim, generator=generator).to(device)
        return robot.actions(ode_actions(agent, look, noise, args), args.execute_steps)

    return act


def play(act, envs: fetch.FetchVec, seed: int, args: Args, draw=None) -> list[dict]:
    """One episode in each of `envs`, always the same starts (`seed` on) and x_0; draw() is called after every step."""
    n = envs.num_envs
    group = Group(envs, slice(0, n), [seed + i for i in range(n)], args)
    x_0, episodes = torch_stream(seed, "x_0"), []
    while len(episodes) < n:
        sim.heed()
        episodes += play_chunk(group, act(group, x_0), args, draw)[2]
    return episodes


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

    Left of them are those of the starting policy. Drawn from simulator states in an environment of its own: drawing
    calls `mj_forward`, which changes what PickAndPlace computes next.
    """
    envs, camera = make_envs(args, args.video_episodes), Camera(args.env_id, 240)
    frames: list[list[np.ndarray]] = []  # step -> environment -> picture

    def draw() -> None:
        arrays = envs.get_state()[0]
        frames.append([camera.draw(physics, goal) for physics, goal in zip(arrays["physics"], arrays["goal"])])

    episodes = play(act, envs, args.eval_seed, args, draw)
    film = np.concatenate([[frame[i] for frame in frames] for i in range(args.video_episodes)])
    write_mp4(path, film, fps=25, beside=path.with_name("step-000000000.mp4"))
    envs.close()
    camera.close()
    return [sim.video_row(episode) for episode in episodes]


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


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
    if fetch.task_of(args.env_id) not in RECIPES:
        fail(f"--env-id {args.env_id}: demonstrations exist of {', '.join(f'{task}-v4' for task in RECIPES)}")
    fetch.import_robotics()
    sim.check_numbers(args, args.num_envs * args.num_steps * args.execute_steps, world)
    if args.noise_range[0] >= args.noise_range[1]:
        fail(f"--noise-range {args.noise_range[0]} {args.noise_range[1]}: two positive numbers, the smaller one first")
    sim.check_groups(args, Args, math.ceil(EPISODE / args.execute_steps), world)
    if args.sampler == "flow-noise" and args.advantage == "gae" and not args.critic_warmup:
        fail("--critic-warmup 0: Flow-Noise learns its features' statistics from the first iteration; give at least 1")
    for name, sampler in (("noisy_step", "flow-sde"), ("noise_range", "flow-noise"), ("ent_coef", "flow-noise")):
        if getattr(args, name) != getattr(Args, name) and args.sampler != sampler:
            fail(f"{flag(name)} is read by --sampler {sampler} alone, not by {args.sampler}: drop it")
    if args.eval_only and not args.model_path:
        fail("--eval-only measures the policy of --model-path: give a run folder")


def fine_tune_start(args: Args, run: Run) -> Args:
    """Makes the default run's starting policy: few frames, few steps, so that there is something to improve."""
    return replace(args, model_path=fine_tuned(f"{START} --torch-threads {args.torch_threads}", run))


def load_agent(args: Args, interface: Interface, run: Run) -> tuple[Agent, FetchRobot, dict]:
    """Policy and critic, the robot, and LoRA's adapters; with --resume as they were saved."""
    device, frozen = run.world.device, not (args.tune_llm or args.tune_visual)
    dtype = torch.bfloat16 if args.amp == "bf16" and frozen and interface.config.video else torch.float32
    model = read_stored(args.model_path).network.from_pretrained(
        args.model_path, device=device, attn_implementation=args.attn_implementation, backbone_dtype=dtype
    )
    robot, adapters = FetchRobot(interface, args.env_id), trained_parts(model, args)
    model.eval()  # dropout is off everywhere and always, or old and new policy would differ by it
    agent = Agent(model, interface.embodiment, robot.prompt(), args).to(device)
    if run.checkpoint:
        own = read_tensors(trainer_file(run.checkpoint, "agent.safetensors"), agent.own_state())
        agent.load_state_dict(agent.state_dict() | own)
        load_adapters(adapters, run.checkpoint)
    return agent, robot, adapters


def train(run: Run, args: Args, interface: Interface) -> None:
    """Builds environments, agent and optimizer, or takes them from a checkpoint; then the loop."""
    world, pool = run.world, sim.physics_threads(args.num_threads)
    run.unit = args.num_envs * args.num_steps * args.execute_steps  # environment steps of an iteration
    iterations = args.total_timesteps // run.unit
    groups = make_groups(args, world, pool)
    eval_envs = make_envs(args, args.eval_episodes, pool) if world.main else None
    agent, robot, adapters = load_agent(args, interface, run)
    act, videos = plain_flow(agent, robot, args), Videos(run, args.capture_video)
    state = {"steps": 0, "train_s": 0.0, "streak": 0, "base": {}, "last": {}, "recent": []}
    if args.eval_only:
        sim.tell_changed(run, args.model_path, args, ACTING)
        run.write(0, measure(run, 0, act, eval_envs, state, args))
        videos.film(0, record_video, act, args)
        run.say("\n".join(f"{name:28s} {value:.4f}" for name, value in state["last"].items()))
        return
    actor = [p for p in agent.model.parameters() if p.requires_grad]  # never none: the VL part has no flag
    actor += agent.noise_net.parameters() if agent.noise_net else []
    critic = [*agent.critic.parameters(), *agent.critic_head.parameters()]
    rates = [args.learning_rate, args.critic_learning_rate]
    optimizer = torch.optim.Adam([{"params": p, "lr": r} for p, r in zip((actor, critic), rates)], eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    carry = torch.zeros(args.num_envs // world.size, dtype=torch.float64, device=world.device)  # for `sim.returns_of`

    def write(folder: Path | None) -> dict:
        save_policy(folder, agent.model, adapters, {args.embodiment_tag: interface.metadata}, interface.about)
        if folder:
            save_file(agent.own_state(), trainer_file(folder, "agent.safetensors"))
        return {name: getattr(args, name) for name in ACTING} | sim.save(folder, groups, carry, scaler, world)

    state = run.resume(state, optimizer)
    if run.checkpoint:
        for group in sim.load(run, state, groups, carry, scaler):
            group.observe(args)
        sim.make_up(run, state, lambda: measure(run, run.first, act, eval_envs, state, args))
    else:
        run.say(
            f"{args.env_id}: {args.num_envs} environments x {args.num_steps} chunks of {args.execute_steps} = "
            f"{run.unit} steps a batch, {iterations} iterations = {iterations * run.unit:,} steps; {run.folder}"
        )
        metrics = measure(run, 0, act, eval_envs, state, args)
        state["base"] = {key.replace("eval/", "baseline/"): value for key, value in metrics.items()}
        videos.film(0, record_video, act, args)
        run.write(0, state["base"] | metrics)

    for step in run.steps(iterations):
        # eq: a_i = a_0 + (a_{I-1} - a_0) i / (I - 1)
        noise_level = args.noise_level + (args.final_noise_level - args.noise_level) * (step / max(iterations - 1, 1))
        now = replace(args, noise_level=noise_level)

        # ---- 1. rollout with frozen weights and statistics ----
        with run.clock("rollout"):
            noise = torch_stream(args.seed, "noise", step)
            batch, cache, episodes = rollout(agent, robot, groups, now, noise, world)
        with run.clock("update"):
            # ---- 2. values, advantages, returns ----
            # from now on fixed: a critic whose inputs keep moving learns everything anew
            if step == 0 and args.advantage == "gae":
                agent.statistics.update(batch["condition"].flatten(0, 1), world)
            weighed, found = advantages_of(agent, batch, carry, args, world)
            batch = batch | weighed
            del batch["next_condition"]  # not for minibatches

            # ---- 3. update ----
            for group, rate in zip(optimizer.param_groups, rates):
                # eq: lr_i = lr (1 - i / I),  i = 0 ... I - 1
                group["lr"] = rate * (1 - step / iterations) if args.anneal_lr else rate
            order, metrics = torch_stream(args.seed, "order", step), {"optimizer_steps": 0}
            if step >= args.critic_warmup or args.advantage == "group":
                loss_of = partial(minibatch_loss, cache=cache)
                metrics = update(agent, loss_of, optimizer, scaler, batch, now, order, world)
            if args.advantage == "gae":
                metrics |= fit_critic(agent, optimizer, batch, args, order, world)

        # ---- 4. log ----
        state["recent"] = (state["recent"] + world.gather(episodes))[-100:]
        metrics = {f"losses/{name}": float(value) for name, value in metrics.items()}
        metrics |= found | sim.summary(state["recent"], "charts") | sim.times(run, state)
        metrics |= {
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/noise_level": noise_level,
            "charts/distinct_observations": len(cache.index),
            "charts/reward_scale": float(agent.reward_scale()),
        }
        if world.device.type == "cuda":
            metrics["time/memory_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
        sim.check_first_ratio(run, step + 1, metrics, 1e-3 if args.amp == "off" else 0.1)

        # ---- 5. evaluate, film, save, stop ----
        if run.due(step + 1, args.eval_every):
            metrics |= measure(run, step + 1, act, eval_envs, state, args)
        if run.due(step + 1, args.video_every):
            videos.film(step + 1, record_video, act, args)
        shown = {"success": metrics.get("charts/success_rate"), "ret": metrics.get("charts/episodic_return")}
        shown["eval"], line = state["last"].get("eval/success_rate"), sim.line_of(metrics, state)
        run.end_step(step + 1, line, state, optimizer, write, **shown)
    sim.close(groups, eval_envs)
    run.finish(sim.outcome(run, state, "starting policy"))


def main(args: Args) -> None:
    run = Run(__file__, args, FREE | {"data_config"})  # with --resume it is the checkpoint's
    args, interface = resolve(run.args), None
    check(args, run.world)
    sim.set_up_torch(args)
    if source := run.checkpoint or args.model_path:
        args, interface = read_interface(replace(args, model_path=str(source)))
    with run.open(args):
        if not interface:
            args, interface = read_interface(fine_tune_start(args, run))
            run.configure(args)
        train(run, args, interface)
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main(parse(Args, __doc__))
