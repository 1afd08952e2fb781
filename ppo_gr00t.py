"""PPO on a flow policy: the GR00T that `gr00t_finetune.py` made gets better by trial on the Fetch robot.

    policy      x_0 ~ N(0, I),  x_{k+1} = x_k + v(x_k, k / K) / K,  x_K = the next H actions: it has no density to speak of
    exploration Flow-SDE: one step of the K is x_{k+1} ~ N(mean(x_k, v), s_k^2), made so that x keeps its marginals (arXiv
                2510.25889); Flow-Noise: every step is N(x_k + v / K, sigma_phi^2) (arXiv 2505.22094)
    ratio       w = exp(log N(x_{k+1}; new mean) - log N(x_{k+1}; old mean)), summed over the actions that were executed
    advantage   over chunks of C executed actions: R_t = sum_k gamma^k r_k, discount gamma^C (GAE, arXiv 1506.02438)
    objective   minimise  mean of -min(w A, clip(w, 1 - eps, 1 + eps) A) + c_v (V - R)^2 - c_e H   (PPO, arXiv 1707.06347)

Every line of the algorithm that is an equation carries it: grep for "eq:". `diff ppo_fetch.py ppo_gr00t.py` shows what a
flow policy changes. Evaluation and deployment are the plain flow, without any noise but x_0.

Left out on purpose: other simulators, gymnasium's backends (FetchVec is the same bits), training several tasks at once.

Dims: N environments, T chunks, B = N * T decisions, C executed of H = 16 predicted actions, D = 32 padded action dims, of
which the robot has 4, K steps of the flow, M noisy ones among them, S backbone tokens, U distinct observations.

    uv run python ppo_gr00t.py                                   # fine-tunes a weak lite policy, then FetchReach
    uv run python gr00t_finetune.py --model-path lite            # demonstrations -> policy ...
    uv run python ppo_gr00t.py --model-path RUN_DIR --env-id FetchPush-v4                # ... -> better policy
    uv run python ppo_gr00t.py --model-path RUN_DIR --device cuda --amp bf16             # tiny or full: with cameras

Equations next to symbols, metrics and results: docs/ppo_gr00t.md.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from common import plot
from common.checkpoint import atomic_folder, find_checkpoint, link, load_state, prune, save_state
from common.log import Logger
from common.robot import fetch
from common.robot.data_configs import DataConfig, find_data_config
from common.robot.gr00t_n15 import EMBODIMENTS, GR00T, GR00TConfig, group_of
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
from common.stats import wilson
from common.video import no_renderer

SCRIPT = "ppo_gr00t"
ROOT = Path(__file__).resolve().parent
DIMS = 4  # action dims of Fetch: displacement and gripper

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "ppo_gr00t"
    """name of the run"""
    seed: int = 1
    """seed of critic, environments, flow noise and minibatches"""
    tags: tuple[str, ...] = ("ppo", "gr00t", "fetch")
    """wandb tags"""
    output_dir: str = "runs"
    """parent of the run folder"""
    device: str = "cpu"
    """cpu, cuda or auto; a GPU is for models with a camera"""
    torch_threads: int = 1
    """CPU threads of torch; more are for models with a camera"""
    torch_deterministic: bool = True
    """only deterministic kernels"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account"""
    resume: str | None = None
    """run folder (or one of its checkpoints) to continue, bit-exactly, with the settings it was started with"""
    eval_only: bool = False
    """measure the policy of --model-path, record a video, and stop"""
    save_every: int = 50
    """iterations between checkpoints, 0: only at the end"""
    keep: int = 2
    """newest checkpoints to keep, besides the best"""

    # task
    env_id: str = "FetchReach-v4"
    """FetchReach-v4, FetchPush-v4 or FetchPickAndPlace-v4, the tasks that have demonstrations"""
    reward_mode: Literal["sparse", "dense", "distance", "shaped"] | None = None
    """-1/0 | -distance | the same, +10 at the goal | potential-based shaping; default: by task"""
    success_reward: float = 0.1
    """shaped: reward of a step that ends at the goal"""
    shaping: float = 5.0
    """shaped: weight of g * Phi(s') - Phi(s)"""
    shaping_gamma: float = 1.0
    """shaped: g. 1 telescopes: an episode's return changes by Phi(end) - Phi(start)"""

    # policy
    model_path: str | None = None
    """run folder or checkpoint of gr00t_finetune.py or of this script, a folder in the published layout or a hub id; it
    must hold statistics of Fetch. default: fine-tune a weak lite policy first (the command is printed)"""
    data_config: str | None = None
    """what the policy sees, see common/robot/data_configs.py; default: the checkpoint's"""
    embodiment_tag: Literal["new_embodiment", "gr1", "oxe_droid", "agibot_genie1"] | None = None
    """whose rows of the embodiment layers to use; default: the checkpoint's"""
    tokenizer: str | None = None
    """folder or hub id of the tokenizer; default: bundled for tiny and lite, lerobot/eagle2hg-processor-groot-n1p5"""
    tune_llm: bool = False
    """train the language model (lite: its table of instruction tokens); its features are then not cached"""
    tune_visual: bool = False
    """train the vision tower and its connector; its features are then not cached"""
    tune_projector: bool = True
    """train the embodiment layers: state encoder, action encoder, action decoder, position table"""
    tune_diffusion_model: bool = True
    """train the diffusion transformer"""
    unfreeze: tuple[str, ...] = ()
    """ITERATION:LAYERS, e.g. 100:2 200:4 300:8: from that iteration on the language model's last layers train too"""
    lora_rank: int = 0
    """rank of the low-rank adapters, 8 to 64; 0: none, train the weights themselves"""
    lora_alpha: int = 16
    """adapters are scaled by alpha / rank"""
    lora_full_model: bool = False
    """adapters in the backbone too; its features are then not cached"""
    lora_targets: Literal["qkv", "qkvo"] = "qkv"
    """projections of each attention that get adapters"""
    lora_dropout = 0.0  # no flag: with dropout, old and new policy would differ by it
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention kernel of the backbone"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    # flow
    sampler: Literal["flow-sde", "flow-sde-chain", "flow-noise"] = "flow-sde"
    """where exploration comes from: one noisy step of the flow | noise at all of them | learned noise at all of them"""
    denoising_steps: int = 4
    """steps K of the flow, in training and evaluation"""
    noise_level: float | None = None
    """Flow-SDE: a in sigma(t) = a sqrt((1 - t) / t) at the start, 0.2 to 1; default: by task"""
    final_noise_level: float | None = None
    """Flow-SDE: a in the last iteration, reached linearly; noise that shakes the robot hides errors that are smaller;
    default: by task"""
    noisy_step: Literal["last", "any", "ignore-last"] = "last"
    """Flow-SDE: which step is noisy. last: the executed action itself is; any; ignore-last: any but it, so that nothing
    noisy is executed as it is, but a policy that is sure of its actions undoes such noise"""
    noise_range: tuple[float, float] = (0.08, 0.16)
    """Flow-Noise: bounds of the learned standard deviations, in units of normalised actions"""

    # rollout
    total_timesteps: int | None = None
    """environment steps of the run, over all processes; default: by task"""
    num_envs: int | None = None
    """environments N, over all processes; default: by task"""
    num_steps: int | None = None
    """chunks T that each environment executes in an iteration; default: by task"""
    execute_steps: int = 5
    """actions C executed of each predicted chunk of 16 before the next look"""
    stagger: bool = True
    """start the environments at different ages, so that no batch is all starts or all ends"""
    env_groups: int = 2
    """groups that step by turns: one group's physics runs while the policy acts for the other; 1: no overlap"""
    num_threads: int | None = None
    """threads that step physics, of each process; default: this machine's cores, shared among its processes"""

    # update
    learning_rate: float | None = None
    """Adam step size of the policy at the start; default: by task; 5e-6 to 2e-5 for the full model"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic at the start"""
    critic_warmup: int = 1
    """iterations at the start that train the critic alone"""
    critic_epochs: int = 10
    """passes of the critic alone after those of both; its features are stored, so they cost next to nothing"""
    anneal_lr: bool = True
    """lower the step sizes linearly to 0 over the iterations"""
    gamma: float | None = None
    """discount of an environment step, 0.9 to 0.99; default: by task"""
    gae_lambda: float = 0.95
    """GAE's lambda, of a chunk"""
    num_minibatches: int | None = None
    """minibatches in an epoch; must divide N * T; default: by task"""
    update_epochs: int | None = None
    """passes over the batch at most; default: by task"""
    target_kl: float | None = None
    """stop an iteration's update before the minibatch whose KL exceeds this, 0: never; default: by task"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """PPO's epsilon, for the ratio of a whole chunk"""
    ent_coef: float = 0.0
    """Flow-Noise: weight of the entropy bonus (Flow-SDE's entropy is a constant)"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 1.0
    """gradient clipping, of policy and critic apart"""
    anchor: Literal["none", "bc", "kl"] = "none"
    """stay near the starting policy: clone its actions in the states visited | KL of the noisy steps"""
    anchor_coef: float = 0.1
    """weight of the anchor"""
    hidden: int = 128
    """width of the critic's two hidden layers"""
    scale_rewards: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """mixed precision of backbone and DiT, bf16 also stores the frozen backbone in bf16; chain and densities stay fp32"""

    # evaluation
    eval_every: int = 8
    """iterations between evaluations, 0: only at the end"""
    eval_episodes: int = 100
    """episodes of an evaluation, always the same ones, without exploration"""
    stop_success: float = 0.0
    """end the run once three evaluations in a row have at least this success rate, 0: never"""
    eval_seed: int = 100_000
    """seed of the first evaluation episode, and of the flow's x_0 in evaluations"""
    capture_video: bool = True
    """record videos in environments of their own (needs EGL or OSMesa)"""
    video_every: int = 0
    """iterations between videos, 0: only before and after"""
    video_episodes: int = 2
    """episodes in a video"""


# What differs by task where a flag is not given.
WITH_A_BLOCK = dict(reward_mode="shaped", total_timesteps=240_000, num_envs=64, num_steps=10, learning_rate=1e-4,
                    gamma=0.95, num_minibatches=4, update_epochs=5, target_kl=0.1, noise_level=0.6,
                    final_noise_level=0.25)  # fmt: skip
RECIPES = {
    "FetchReach": dict(reward_mode="dense", total_timesteps=38_400, num_envs=64, num_steps=5, learning_rate=1e-4,
                       gamma=0.9, num_minibatches=2, update_epochs=5, target_kl=0.1, noise_level=0.8,
                       final_noise_level=0.3),
    "FetchPush": WITH_A_BLOCK,
    "FetchPickAndPlace": WITH_A_BLOCK,
}  # fmt: skip
# The default run's starting policy: a lite GR00T that saw too few frames.
START = (
    "gr00t_finetune.py --model-path lite --max-samples 90 --max-steps 400 --batch-size 32 --learning-rate 6e-3 "
    "--adam-betas 0.9 0.95 --max-grad-norm 10"
)


# ---- 2. Environments -------------------------------------------------------------------------------------------------


class Adapter:
    """Between Fetch and the policy, in the units of the checkpoint: observations in, chunks of actions out."""

    def __init__(self, args: Args, config: DataConfig, metadata: dict, source: str):
        from assets.build_fetch_demos import INSTRUCTIONS, STATE, slices

        self.instruction = INSTRUCTIONS[args.env_id]
        self.camera, self.image_size = None, 0
        parts = slices(STATE)
        if unknown := [key for key in config.state if key not in parts]:
            fail(f"'{source}' was trained on state '{unknown[0]}', which Fetch does not have: {', '.join(parts)}")
        self.columns = np.concatenate([np.arange(parts[key]["start"], parts[key]["end"]) for key in config.state])
        self.state_range, self.action_range = (
            tuple(
                np.concatenate([np.float64(metadata["statistics"][kind][key][bound]) for key in getattr(config, kind)])
                for bound in ("min", "max")
            )
            for kind in ("state", "action")
        )
        if len(self.action_range[0]) != DIMS:
            fail(
                f"'{source}' has {len(self.action_range[0])} action dims, Fetch has {DIMS}: fine-tune it on Fetch first"
            )

    def state(self, obs: dict[str, np.ndarray], width: int) -> np.ndarray:
        """(n, width) float32, normalised and padded with zeros."""
        from assets.build_fetch_demos import state_vector

        low, high = self.state_range
        x = state_vector(obs)[:, self.columns].astype(np.float64)
        # eq: y = 2 (x - low) / (high - low) - 1, 0 where nothing varies
        y = np.where(low != high, 2 * ((x - low) / np.where(low != high, high - low, 1)) - 1, 0)
        return np.pad(y, [(0, 0), (0, width - y.shape[1])]).astype(np.float32)

    def actions(self, chunk: torch.Tensor, count: int) -> np.ndarray:
        """The policy's chunk (n, H, D) -> the first `count` actions (n, count, 4) float32; FetchVec clips them."""
        low, high = self.action_range
        y = chunk[:, :count, :DIMS].cpu().numpy().astype(np.float64)
        # eq: a = (y + 1) / 2 (high - low) + low
        return ((y + 1) / 2 * (high - low) + low).astype(np.float32)

    def images(self, physics: np.ndarray, goals: np.ndarray) -> torch.Tensor:
        """Simulator states -> (n, 3, size, size) uint8, as the policy saw demonstrations: drawn, cropped, resized."""
        frames = np.stack([self.camera.draw(p, g) for p, g in zip(physics, goals)])
        x = torch.from_numpy(frames).permute(0, 3, 1, 2)
        height, width = int(0.95 * x.shape[2]), int(0.95 * x.shape[3])
        top, left = round((x.shape[2] - height) / 2), round((x.shape[3] - width) / 2)
        x = x[:, :, top : top + height, left : left + width].float() / 255
        x = F.interpolate(x, (self.image_size,) * 2, mode="bilinear", align_corners=False, antialias=True)
        return (x * 255).to(torch.uint8)  # truncated


@dataclass
class Group:
    """Some of the environments, and where their running episodes stand."""

    envs: fetch.FetchVec
    rows: slice  # which of the process's N environments
    limit: int  # steps of an episode; the group ends them, at the end of a chunk
    obs: dict | None = None  # as the environment returned it
    potential: np.ndarray | None = None  # Phi(obs), shaped reward only
    whole: np.ndarray | None = None  # (n,) bool: the running episode began at its beginning
    length: np.ndarray | None = None  # (n,) steps of the running episode
    ret: np.ndarray | None = None  # (n,) sum of rewards
    once: np.ndarray | None = None  # (n,) bool: was at the goal in some step
    wait: object = None  # finishes the chunk that is under way
    worker: ThreadPoolExecutor | None = None  # plays chunks
    draw: object = None  # called after every step, to film

    def observe(self, obs, args: Args) -> None:
        self.obs = obs
        if args.reward_mode == "shaped":
            self.potential = fetch.potential(obs, fetch.task_of(args.env_id))

    def begin(self, seeds: list[int], args: Args) -> None:
        n = self.envs.num_envs
        self.observe(self.envs.reset(seed=seeds)[0], args)
        self.once, self.whole = np.zeros(n, bool), np.ones(n, bool)
        self.length, self.ret = np.zeros(n, np.int64), np.zeros(n)

    def executed(self, args: Args) -> np.ndarray:
        """(n,) how many actions of the coming chunk count: an episode may end before the chunk does."""
        return np.minimum(args.execute_steps, self.limit - self.envs.elapsed)

    def start(self, actions: np.ndarray, args: Args) -> None:
        """Begins to execute a chunk; `self.wait()` ends it."""
        self.worker = self.worker or ThreadPoolExecutor(1)
        self.wait = self.worker.submit(self.play, actions, args).result

    def play(self, actions: np.ndarray, args: Args) -> dict:
        """Executes a chunk (n, C, 4). Returns rewards (n,) summed with discount, dones (n,), the finished episodes and,
        of the environments that ended, the last observation and simulator state.

        What an environment does after its episode's end does not count; it starts anew when the chunk is over.
        """
        n = self.envs.num_envs
        rewards, alive, episodes, last = np.zeros(n), np.ones(n, bool), [], {}
        for k in range(actions.shape[1]):
            obs = self.envs.step(actions[:, k])[0]
            distance = fetch.goal_distance(obs)
            if args.reward_mode == "shaped":
                # eq: r = c 1[success] + k (g Phi(s') - Phi(s))   [Ng, Harada, Russell 1999]
                phi, success = fetch.potential(obs, fetch.task_of(args.env_id)), distance <= fetch.GOAL_RADIUS
                r = args.success_reward * success + args.shaping * (args.shaping_gamma * phi - self.potential)
                self.potential = phi
            else:
                r = fetch.reward(obs, args.reward_mode)
            # eq: R = sum_k gamma^k r_k
            rewards += np.where(alive, args.gamma**k * r, 0.0)
            self.length += alive
            self.ret += np.where(alive, r, 0.0)
            self.once |= alive & (distance < fetch.GOAL_RADIUS)
            if self.draw:
                self.draw()
            ended = alive & (self.envs.elapsed >= self.limit)
            physics = self.envs.get_state()[0]["physics"] if ended.any() else None
            for i in np.flatnonzero(ended):
                last[int(i)] = {key: value[i].copy() for key, value in obs.items()} | {"physics": physics[i]}
                if self.whole[i]:  # a part of an episode says nothing
                    episode = {"env": int(i), "return": float(self.ret[i]), "length": int(self.length[i])}
                    episode |= {"success": bool(distance[i] < fetch.GOAL_RADIUS), "success_once": bool(self.once[i])}
                    episodes.append(episode | {"final_distance": float(distance[i])})
                self.whole[i], self.length[i], self.ret[i], self.once[i] = True, 0, 0.0, False
            alive &= ~ended
            if not alive.any():
                break
        if last:
            self.envs.reset(options={"reset_mask": ~alive})
        self.observe(self.envs.observe(), args)
        return {"rewards": rewards, "dones": ~alive, "episodes": episodes, "last": last}


def make_group(args: Args, n: int, rows: slice, pool: ThreadPoolExecutor | None = None) -> Group:
    limit = gym.spec(args.env_id).max_episode_steps
    # the environments themselves never end an episode: their autoreset would do so inside a chunk
    envs = fetch.FetchVec(args.env_id, n, args.num_threads, pool=pool, max_episode_steps=10**9)
    return Group(envs, rows, limit)


def reset_groups(groups: list[Group], args: Args, first: int) -> None:
    """Starts the first training episodes; `first` is this process's first environment among all of the run."""
    # with seed + i, runs of neighbouring seeds would share all but one of their environments
    seeds = [int(seed) for seed in np.random.SeedSequence([args.seed, 1]).generate_state(args.num_envs)]
    for group in groups:
        n, start = group.envs.num_envs, first + group.rows.start
        group.begin(seeds[start : start + n], args)
        if args.stagger:  # whole chunks, as in the episodes that follow
            chunks = math.ceil(group.limit / args.execute_steps)
            group.envs.elapsed[:] = np.arange(start, start + n) * chunks // args.num_envs * args.execute_steps
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
            world.total(n, total)
        mean = total / n
        squares = ((x - mean) ** 2).sum(0)
        if world:
            world.total(squares)
        # eq: M2 = M2_a + M2_b + (m_b - m_a)^2 n_a n_b / (n_a + n_b)   [Chan et al. 1979]
        count, delta = self.count + n, mean - self.mean
        m2 = self.var * self.count + squares + delta**2 * self.count * n / count
        self.mean += delta * n / count
        self.var.copy_(m2 / count)
        self.count.copy_(count)


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

    def __init__(self, model: GR00T, embodiment: int, args: Args):
        super().__init__()
        c = model.config
        size = c.vl_width + c.state_dim  # X
        self.model = model
        self.statistics = RunningStatistics(size)
        self.return_statistics = RunningStatistics(1)
        self.critic = mlp(size, args.hidden)
        self.critic_head = orthogonal(nn.Linear(args.hidden, 1), 1.0)
        self.noise_net = NoiseNet(size, c.action_horizon, c.action_dim, args) if args.sampler == "flow-noise" else None
        self.register_buffer("embodiment_id", torch.tensor([embodiment]), persistent=False)
        self.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    def autocast(self):
        device = self.embodiment_id.device.type
        return torch.autocast(device, self.amp) if self.amp else nullcontext()

    def backbone(self, ids: torch.Tensor, images: torch.Tensor | None, count: int) -> torch.Tensor:
        """Prompt (1, S) and images (count, 3, h, w) uint8, or none -> features (count, S, W)."""
        ids = ids.expand(count, -1)
        batch = {"eagle_input_ids": ids, "eagle_attention_mask": torch.ones_like(ids)}
        if images is not None:
            # eq: p = (x - 127.5) / 127.5
            batch["eagle_pixel_values"] = (images.to(ids.device).float() - 127.5) / 127.5
        with self.autocast():
            return self.model.backbone(batch)[0]

    def look(self, features: torch.Tensor, index: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        """What policy and critic see: VL features vl (B or 1, S, W), state (B, 1, 64), condition (B, X).

        features (U, S, W) of the backbone, one of them for each distinct observation; index (B,) says which is whose.
        Every prompt of a run has the same length, so nothing is padded and there is no mask.
        """
        with self.autocast():
            vl = self.model.process_backbone(features).float()
            vl = vl[index] if len(vl) > 1 else vl  # one row serves all
        # Of the backbone, not of the head that trains: features that drift would, standardised, drown the critic. And no
        # gradient of critic or noises reaches the backbone.
        condition = torch.cat([features.float().mean(1)[index], state], dim=-1).detach()
        state = state[:, None]
        return {"vl": vl, "state": state, "condition": condition}

    def velocity(self, look: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x (B, H, D) fp32, t (B,) float64 -> v (B, H, D) fp32; only what happens inside is in low precision."""
        return head_velocity(self, self.model.action_head, look["vl"], look["state"], x, t)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X) raw -> standardised, clipped to +-10; the std has a floor: most of a padded state is constant."""
        s = self.statistics
        std = s.var.sqrt().clamp_min(1e-3)
        return ((x - s.mean.float()) / std.float()).clamp(-10, 10)

    def value(self, condition: torch.Tensor) -> torch.Tensor:
        """(B, X) -> (B,), in units of scaled reward."""
        return self.critic_head(self.critic(self.normalize(condition))).squeeze(-1)

    def reward_scale(self) -> torch.Tensor:
        s = self.return_statistics
        return 1.0 / (s.var.sqrt()[0] + 1e-8) if s.count > 0 else torch.ones((), dtype=torch.float64)


def head_velocity(agent: Agent, head: nn.Module, vl, state, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with agent.autocast():
        return head.velocity(vl, None, state, x, t, agent.embodiment_id).float()


class FeatureCache:
    """What the backbone saw and said in one rollout, each distinct observation once.

    A frozen backbone says the same in every epoch, so its features are kept; of one that trains only the images are, and
    it runs again in every minibatch. Without a camera there is one observation: the instruction.
    """

    def __init__(self, agent: Agent, ids: torch.Tensor):
        self.agent, self.ids, self.index = agent, ids, {}
        self.frozen = not any(p.requires_grad for p in agent.model.backbone.parameters())
        self.images: list[torch.Tensor] = []  # U of (3, size, size) uint8, empty without a camera or with features
        self.features: list[torch.Tensor] = []  # U of (S, W)

    @torch.no_grad()
    def add(self, images: torch.Tensor | None, count: int) -> torch.Tensor:
        """(count,) the numbers of these observations; the backbone runs on those that are new."""
        keys = [b""] * count
        if images is not None:
            keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]
        new = [i for i, key in enumerate(keys) if key not in self.index and key not in keys[:i]]
        if new:
            chosen = None if images is None else images[new]
            self.index |= {keys[i]: len(self.index) + n for n, i in enumerate(new)}
            self.features += self.agent.backbone(self.ids, chosen, len(new)).unbind()
            if images is not None and not self.frozen:
                self.images += chosen.unbind()
        return torch.tensor([self.index[key] for key in keys], device=self.ids.device)

    def look(self, index: torch.Tensor, state: torch.Tensor, fresh: bool = False) -> dict[str, torch.Tensor]:
        """The agent's look at observations (B,) of this cache; `fresh`: of a backbone that trains, with its gradient."""
        distinct, inverse = index.unique(return_inverse=True)
        if fresh and not self.frozen:
            images = torch.stack([self.images[i] for i in distinct.tolist()]) if self.images else None
            features = self.agent.backbone(self.ids, images, len(distinct))
        else:
            features = torch.stack([self.features[i] for i in distinct.tolist()])
        return self.agent.look(features, inverse, state)


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int) -> nn.Sequential:
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(orthogonal(first, 2**0.5), nn.Tanh(), orthogonal(second, 2**0.5), nn.Tanh())


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained matrix of low rank."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, nn.Dropout(dropout)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))  # starts as the layer it adapts
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # eq: y = W x + b + (alpha / r) B A x   [LoRA, arXiv 2106.09685]
        low = F.linear(self.dropout(x).to(self.A.dtype), self.A)
        return self.linear(x) + self.scale * F.linear(low, self.B)

    def merged_weight(self) -> torch.Tensor:
        # eq: W' = W + (alpha / r) B A
        return (self.linear.weight.float() + self.scale * (self.B @ self.A)).to(self.linear.weight.dtype)


def add_lora(model: GR00T, args: Args) -> dict[str, LoRALinear]:
    """Puts adapters on the attention projections; trained are they and, as ever, the embodiment layers.

    The reference freezes the embodiment layers too, which leaves a new robot with layers that were never trained.
    """
    ends = ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
    ends += ("out_proj", "o_proj", "to_out.0") if args.lora_targets == "qkvo" else ()
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(ends)
        and (args.lora_full_model or name.startswith("action_head."))
    ]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.tune_projector and group_of(name) == "tune_projector")
    adapters = {}
    for name in chosen:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        adapters[name] = LoRALinear(linear, args.lora_rank, args.lora_alpha, args.lora_dropout).train(linear.training)
        setattr(model.get_submodule(parent), child, adapters[name])
    return adapters


@contextmanager
def merged(model: GR00T, adapters: dict[str, LoRALinear]):
    """Inside, the model is the plain one with the adapters added to its weights; outside, it is what it was."""
    kept = {}
    for name, adapter in adapters.items():
        parent, _, child = name.rpartition(".")
        kept[name] = adapter.linear.weight.data
        adapter.linear.weight.data = adapter.merged_weight().detach()
        setattr(model.get_submodule(parent), child, adapter.linear)
    try:
        yield
    finally:
        for name, adapter in adapters.items():
            parent, _, child = name.rpartition(".")
            adapter.linear.weight.data = kept[name]
            setattr(model.get_submodule(parent), child, adapter)


def set_trainable(model: GR00T, adapters: dict, args: Args, iteration: int) -> None:
    """What trains in this iteration; dropout is off everywhere and always, or old and new policy would differ by it."""
    model.set_trainable(args.tune_llm, args.tune_visual, args.tune_projector, args.tune_diffusion_model)
    if adapters:
        for name, parameter in model.named_parameters():
            is_adapter = name.endswith((".A", ".B")) and name.rpartition(".")[0] in adapters
            parameter.requires_grad_(is_adapter or (args.tune_projector and group_of(name) == "tune_projector"))
    layers = max([count for start, count in unfreezing(args) if start <= iteration], default=0)
    if layers:
        for parameter in model.backbone.text.layers[-layers:].parameters():
            parameter.requires_grad_(True)
    model.eval()


def unfreezing(args: Args) -> list[tuple[int, int]]:
    return [tuple(int(number) for number in entry.split(":")) for entry in args.unfreeze]


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def noisy_steps(args: Args) -> tuple[range, int]:
    """(where the noisy steps of a decision may begin, their number M)."""
    K, ignore_last = args.denoising_steps, args.noisy_step == "ignore-last"
    if args.sampler == "flow-noise":
        return range(1), K
    if args.sampler == "flow-sde-chain":
        return range(1), K - ignore_last
    return range(K - 1, K) if args.noisy_step == "last" else range(K - ignore_last), 1


def transition(
    v: torch.Tensor,
    x: torch.Tensor,
    k: torch.Tensor,
    noisy: torch.Tensor,
    args: Args,
    sigma: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    sigma = None
    if args.sampler == "flow-noise":
        sigma = agent.noise_net(agent.normalize(look["condition"]), k)
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
    chain = torch.zeros(len(x), M + 1, *x.shape[1:], device=x.device)
    for k in range(args.denoising_steps):
        noisy = (first <= k) & (k < first + M)
        mean, std = step_distribution(agent, look, x, torch.full_like(first, k), noisy, args)
        x_next = mean + std * noise[:, k + 1]
        for m in range(M + 1):
            here, point = (first + m == k, x) if m < M else (first + M - 1 == k, x_next)
            chain[:, m] = torch.where(here[:, None, None], point, chain[:, m])
        std = torch.where(noisy[:, None, None], std, 1.0)
        logprobs += (log_density(x_next, mean, std) * mask).sum((1, 2)) * noisy
        x = x_next
    return x, chain, logprobs


def chain_logprobs(agent, look: dict, chain: torch.Tensor, first: torch.Tensor, mask: torch.Tensor, args: Args):
    """Log-density (B,) and entropy (B,) of the noisy steps of a chain, and the (mean, std) of each.

    eq: log pi(chain) = sum_k sum_executed log N(x_{k+1}; mean_k, s_k); what precedes the noise cancels in the ratio
    """
    logprobs, entropy, steps = 0.0, 0.0, []
    noisy = torch.ones_like(first, dtype=torch.bool)
    for m in range(chain.shape[1] - 1):
        # contiguous, as in the rollout: another memory layout would take another kernel, which rounds differently
        mean, std = step_distribution(agent, look, chain[:, m].contiguous(), first + m, noisy, args)
        logprobs = logprobs + (log_density(chain[:, m + 1], mean, std) * mask).sum((1, 2))
        # eq: H = sum(log s + (1 + log(2 pi)) / 2)
        entropy = entropy + ((std.log() + 0.5 * (1 + math.log(2 * math.pi))) * mask).sum((1, 2))
        steps.append((mean, std))
    return logprobs, entropy, steps


@torch.no_grad()
def ode_actions(agent, look: dict, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """The policy as it is deployed: x_K (B, H, D) from x_0 (B, H, D) by the plain flow."""
    x, none = noise, torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    for k in range(args.denoising_steps):
        v = agent.velocity(look, x, torch.full((len(x),), k / args.denoising_steps, dtype=torch.float64).to(x.device))
        x, _ = transition(v, x, torch.full((len(x),), k, device=x.device), none, args, torch.zeros_like(x))
    return x


@torch.no_grad()
def anchor_targets(agent: Agent, start: nn.Module, cache: FeatureCache, rows: dict, generator, args: Args) -> dict:
    """What the starting policy (its action head `start`) would have done with the batch's rows, for `anchor_loss`."""
    count, device = len(rows["frame"]), rows["frame"].device
    found = {name: [] for name in (("start_mean",) if args.anchor == "kl" else ("start_x_0", "start_x_1"))}
    for part in torch.arange(count, device=device).split(256):
        index, inverse = rows["frame"][part].unique(return_inverse=True)
        with agent.autocast():
            vl = start.process_backbone(torch.stack([cache.features[i] for i in index.tolist()])).float()
            vl = vl[inverse] if len(vl) > 1 else vl
        state, noisy = rows["state"][part][:, None], torch.ones(len(part), dtype=torch.bool, device=device)

        def move(x, k, noisy):
            v = head_velocity(agent, start, vl, state, x, k.double() / args.denoising_steps)
            return transition(v, x, k, noisy, args, torch.zeros_like(x))[0]

        chain, first = rows["chain"][part], rows["first"][part]
        if args.anchor == "kl":
            means = [move(chain[:, m].contiguous(), first + m, noisy) for m in range(chain.shape[1] - 1)]
            found["start_mean"].append(torch.stack(means, dim=1))  # (B, M, H, D)
        else:
            x = torch.randn(chain[:, 0].shape, generator=generator).to(device)
            found["start_x_0"].append(x)
            for k in range(args.denoising_steps):
                x = move(x, torch.full_like(first, k), ~noisy)
            found["start_x_1"].append(x)
    return {name: torch.cat(parts) for name, parts in found.items()} | {
        "start_t": torch.rand(count, generator=generator).to(device)
    }


def anchor_loss(agent, look: dict, mb: dict, steps: list, mask: torch.Tensor, args: Args) -> torch.Tensor:
    """Distance to the starting policy, a scalar.

    kl: between the means of the noisy steps, over executed actions. bc: flow matching (arXiv 2210.02747) towards the
    actions at which the starting policy's flow ends, over the whole chunk in the robot's dims.
    """
    if args.anchor == "kl":
        # eq: KL(N(m, s) || N(m_start, s)) = (m - m_start)^2 / (2 s^2), summed over noisy steps and executed actions
        errors = [(mean - mb["start_mean"][:, m]) ** 2 / (2 * std.detach() ** 2) for m, (mean, std) in enumerate(steps)]
        return (sum(errors) * mask).sum((1, 2)).mean()
    x_0, x_1, t = mb["start_x_0"], mb["start_x_1"], mb["start_t"]
    # eq: L = mean |v((1 - t) x_0 + t x_1, t) - (x_1 - x_0)|^2
    tau = t[:, None, None]
    v = agent.velocity(look, (1 - tau) * x_0 + tau * x_1, t.double())
    return ((v - (x_1 - x_0)) ** 2)[..., :DIMS].mean()


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


def minibatch_order(num: int, generator: torch.Generator) -> torch.Tensor:
    """The order in which an epoch goes through the batch: each row once, anew in every epoch."""
    return torch.randperm(num, generator=generator)


def update(
    agent: Agent, optimizer, scaler, batch: dict[str, torch.Tensor], cache: FeatureCache, args: Args, generator,
    world: World,
) -> dict:  # fmt: skip
    """Epochs of minibatch steps on one batch. Returns the metrics of the last minibatch that was looked at.

    batch: (T, n) tensors of this process's n of the N environments, and state (T, n, 64), chain (T, n, M + 1, H, D).
    Minibatches are drawn from all N * T rows; a process computes those of its own environments.
    """
    T, n = batch["rewards"].shape
    N, first = n * world.size, n * world.rank
    flat = {key: value.flatten(0, 1) for key, value in batch.items()}
    size = args.num_envs * args.num_steps // args.num_minibatches
    actor, critic = (group["params"] for group in optimizer.param_groups)
    metrics, first_ratio_error, grad_norm, steps, skipped, stopped = {}, None, torch.zeros(()), 0, 0, False
    for _ in range(args.update_epochs):
        for rows in minibatch_order(T * N, generator).split(size):
            mine = (rows % N >= first) & (rows % N < first + n)
            local = (rows[mine] // N) * n + rows[mine] % N - first
            mb = {key: value[local.to(value.device)] for key, value in flat.items()}
            share = len(local) / len(rows)
            look = cache.look(mb["frame"], mb["state"], fresh=True)
            mask = executed_mask(mb["lengths"], mb["chain"][:, 0])
            logprobs, entropy, noisy = chain_logprobs(agent, look, mb["chain"], mb["first"], mask, args)
            advantages = normalize_advantages(mb["advantages"], world) if args.norm_adv else mb["advantages"]
            loss, metrics = ppo_loss(
                logprobs, mb["logprobs"], advantages, entropy, agent.value(mb["condition"]), mb["returns"],
                clip_coef=args.clip_coef, ent_coef=args.ent_coef, vf_coef=args.vf_coef,
            )  # fmt: skip
            if args.anchor != "none":
                anchor = anchor_loss(agent, look, mb, noisy, mask, args)
                # eq: L <- L + c_a L_anchor
                loss, metrics["anchor"] = loss + args.anchor_coef * anchor, anchor.detach()
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
            world.all_sum([p.grad for p in (*actor, *critic) if p.grad is not None])
            grad_norm, _ = (nn.utils.clip_grad_norm_(params, args.max_grad_norm) for params in (actor, critic))
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


def fit_critic(agent: Agent, optimizer, batch: dict, args: Args, generator, world: World) -> dict:
    """Epochs for the critic alone, on the features of the rollout."""
    x, returns = batch["condition"].flatten(0, 1), batch["returns"].flatten(0, 1)
    losses, critic = [torch.zeros(())], optimizer.param_groups[1]["params"]
    for _ in range(args.critic_epochs):
        for rows in minibatch_order(len(x), generator).to(x.device).split(math.ceil(len(x) / args.num_minibatches)):
            # eq: L_V = (V - R)^2 / 2
            loss = 0.5 * ((agent.value(x[rows]) - returns[rows]) ** 2).mean() / world.size
            optimizer.zero_grad()  # to None: the policy's weights take no step
            loss.backward()
            world.all_sum([p.grad for p in critic])
            norm = nn.utils.clip_grad_norm_(critic, args.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    return {"critic_loss": losses[-1], "critic_grad_norm": norm if args.critic_epochs else 0.0}


# ---- 5. Rollout ------------------------------------------------------------------------------------------------------


def look_at(group: Group, adapter: Adapter, cache: FeatureCache) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """State (n, 64), number in the cache (n,) and the agent's look at a group's present observations."""
    images = None
    if adapter.camera:
        arrays = group.envs.get_state()[0]
        images = adapter.images(arrays["physics"], arrays["goal"])
    return remember(group.obs, images, adapter, cache)


def remember(obs: dict, images: torch.Tensor | None, adapter: Adapter, cache: FeatureCache):
    width, device = cache.agent.model.config.state_dim, cache.ids.device
    state = torch.from_numpy(adapter.state(obs, width)).to(device)
    index = cache.add(images, len(state))
    return state, index, cache.look(index, state)


@torch.no_grad()
def rollout(
    agent: Agent, groups: list[Group], adapter: Adapter, ids: torch.Tensor, args: Args, generator, world: World
) -> tuple[dict, FeatureCache, list[dict]]:
    """T chunks of all environments with frozen weights and statistics.

    Returns the batch (torch, (T, n, ...) on the agent's device), the observations it refers to, and one dict for each
    episode that ended. While one group's physics runs, the policy acts for another.
    """
    T, n, device = args.num_steps, sum(g.envs.num_envs for g in groups), world.device
    N, mine = n * world.size, slice(n * world.rank, n * (world.rank + 1))
    H, D = agent.model.config.action_horizon, agent.model.config.action_dim
    begins, _ = noisy_steps(args)
    cache, episodes = FeatureCache(agent, ids), []
    columns: dict[str, list[list]] = {}  # name -> step -> group

    def put(t: int, **values) -> None:
        for name, value in values.items():
            columns.setdefault(name, [[] for _ in range(T)])[t].append(torch.as_tensor(value).to(device))

    for t in range(T + 1):
        # noise for all environments of the run: numbers do not depend on groups or processes
        if t < T:
            noise = torch.randn((N, args.denoising_steps + 1, H, D), generator=generator)[mine].to(device)
            first = torch.randint(begins.start, begins.stop, (N,), generator=generator)[mine].to(device)
        for group in groups:
            if t > 0:
                out = group.wait()
                episodes += out["episodes"]
            state, frame, look = look_at(group, adapter, cache)
            if t > 0:
                after = look["condition"].clone()
                if out["last"]:  # the state that followed is the episode's last, not the next one's first
                    ended = list(out["last"])
                    obs = {k: np.stack([out["last"][i][k] for i in ended]) for k in out["last"][ended[0]]}
                    images = adapter.images(obs["physics"], obs["desired_goal"]) if adapter.camera else None
                    after[ended] = remember(obs, images, adapter, cache)[2]["condition"]
                rewards, dones = out["rewards"].astype(np.float32), out["dones"]
                put(t - 1, next_condition=after, rewards=rewards, dones=dones, terminations=np.zeros_like(dones))
            if t < T:
                lengths = torch.from_numpy(group.executed(args)).to(device)
                mask = executed_mask(lengths, noise[group.rows, 0])
                x, chain, logprobs = sample_chain(agent, look, noise[group.rows], first[group.rows], mask, args)
                put(t, state=state, frame=frame, condition=look["condition"], chain=chain, first=first[group.rows],
                    lengths=lengths, logprobs=logprobs)  # fmt: skip
                group.start(adapter.actions(x, args.execute_steps), args)
    batch = {name: torch.stack([torch.cat(parts) for parts in steps]) for name, steps in columns.items()}
    return batch, cache, episodes


def returns_of(rewards: torch.Tensor, dones: torch.Tensor, carry: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards so far in each episode, (T, n); `carry` (n,) goes on from batch to batch."""
    rows = []
    for r, done in zip(rewards.double(), dones):
        carry.mul_(gamma).add_(r)
        rows.append(carry.clone())
        carry.masked_fill_(done, 0.0)
    return torch.stack(rows)


def chunk_advantages(rewards: torch.Tensor, values, next_values, batch: dict, args: Args):
    """GAE over chunks, (T, N): `gae` with the discount of a whole chunk; one that its episode's end cut is shorter."""
    C = args.execute_steps
    # eq: delta = R + gamma^n V(s') - V(s),  n <= C actions executed
    next_values = next_values * args.gamma ** (batch["lengths"] - C)
    return gae(rewards, values, next_values, batch["terminations"], batch["dones"], args.gamma**C, args.gae_lambda)


# ---- 6. Evaluate and record ------------------------------------------------------------------------------------------


@torch.no_grad()
def play_episodes(
    agent: Agent, group: Group, adapter: Adapter, ids: torch.Tensor, args: Args, seeds: list[int]
) -> list[dict]:
    """One episode in each environment of the group by the plain flow, x_0 always from the same stream."""
    c, generator = agent.model.config, torch.Generator().manual_seed(args.eval_seed)
    group.begin(seeds, args)
    episodes: list[dict] = []
    while len(episodes) < len(seeds):
        look = look_at(group, adapter, FeatureCache(agent, ids))[2]
        noise = torch.randn((len(seeds), c.action_horizon, c.action_dim), generator=generator).to(ids.device)
        actions = adapter.actions(ode_actions(agent, look, noise, args), args.execute_steps)
        episodes += group.play(actions, args)["episodes"]
    return episodes


def evaluate(agent: Agent, group: Group, adapter: Adapter, ids: torch.Tensor, args: Args) -> dict[str, float]:
    """Success is that of the last step; `once` counts episodes that were at the goal in any step."""
    seeds = [args.eval_seed + i for i in range(args.eval_episodes)]
    return summary(play_episodes(agent, group, adapter, ids, args, seeds), "eval")


def summary(episodes: list[dict], prefix: str) -> dict[str, float]:
    """Means over episodes; the success rate with its interval."""
    if not episodes:
        return {}
    n, mean = len(episodes), lambda key: float(np.mean([e[key] for e in episodes]))
    metrics = {f"{prefix}/episodic_return": mean("return"), f"{prefix}/episodic_length": mean("length")}
    if "success" in episodes[0]:
        low, high = wilson(sum(e["success"] for e in episodes), n, z=1.96)
        metrics |= {
            f"{prefix}/success_rate": mean("success"),
            f"{prefix}/success_rate_low": low,
            f"{prefix}/success_rate_high": high,
            f"{prefix}/success_once": mean("success_once"),
        }
    if "final_distance" in episodes[0]:
        metrics[f"{prefix}/final_distance"] = mean("final_distance")
    return metrics


def record_video(
    agent: Agent, adapter: Adapter, ids: torch.Tensor, args: Args, path: Path, step: int, beside: Path | None
) -> list[dict]:
    """Writes an mp4 of a few evaluation episodes, with `beside` (an earlier one) on its left; one table row each.

    Drawn from simulator states in an environment of its own: drawing changes what PickAndPlace computes next.
    """
    import imageio.v3 as imageio

    from assets.build_fetch_demos import Camera

    group, camera = make_group(args, args.video_episodes, slice(0, args.video_episodes)), Camera(args.env_id, 240)
    frames: list[list[np.ndarray]] = [[] for _ in range(args.video_episodes)]

    def draw() -> None:
        arrays = group.envs.get_state()[0]
        for film, physics, goal in zip(frames, arrays["physics"], arrays["goal"]):
            if len(film) < group.limit:
                film.append(camera.draw(physics, goal))

    group.draw = draw
    seeds = [args.eval_seed + i for i in range(args.video_episodes)]
    episodes = play_episodes(agent, group, adapter, ids, args, seeds)
    camera.close()
    group.envs.close()
    film = np.concatenate(frames)
    if beside:
        film = np.concatenate([imageio.imread(beside)[: len(film)], film], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, film, fps=25, macro_block_size=1)
    return [
        {"global_step": step, "episode": e["env"], "video": str(path), "episode_return": e["return"],
         "episode_length": e["length"], "success": e["success"], "success_once": e["success_once"],
         "final_distance": e["final_distance"]} for e in episodes
    ]  # fmt: skip


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


def resolve(args: Args) -> Args:
    """Fills in what depends on the task."""
    recipe = RECIPES.get(fetch.task_of(args.env_id), {})
    return replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})


def check(args: Args, world: World) -> None:
    """Everything that can be wrong with the flags, before anything is built."""
    if fetch.task_of(args.env_id) not in RECIPES or not args.env_id.endswith("-v4"):
        fail(f"--env-id {args.env_id}: demonstrations exist of {', '.join(f'{task}-v4' for task in RECIPES)}")
    fetch.import_robotics()
    names = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden", "env_groups", "eval_episodes")
    for name in (*names, "denoising_steps", "video_episodes"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lora_rank", "critic_warmup", "critic_epochs", "anchor_coef", "target_kl", "ent_coef"):
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if not 1 <= args.execute_steps <= 16:
        fail(f"--execute-steps {args.execute_steps}: a predicted chunk has 16 actions; give 1 to 16")
    if not 0 < args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        fail(f"--gamma {args.gamma} --gae-lambda {args.gae_lambda}: both lie between 0 and 1")
    positive = ("learning_rate", "critic_learning_rate", "clip_coef", "noise_level", "final_noise_level")
    for name in positive:
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if not 0 < args.noise_range[0] < args.noise_range[1]:
        fail(f"--noise-range {args.noise_range[0]} {args.noise_range[1]}: two positive numbers, the smaller one first")
    if not noisy_steps(args)[0] or not noisy_steps(args)[1]:
        fail("--denoising-steps 1 with --noisy-step ignore-last leaves no step to be noisy; add --noisy-step last")
    if args.sampler == "flow-noise" and not args.critic_warmup:
        fail("--critic-warmup 0: Flow-Noise learns its features' statistics from the first iteration; give at least 1")
    if any(len(e.split(":")) != 2 or not e.replace(":", "").isdigit() for e in args.unfreeze):
        fail(f"--unfreeze {' '.join(args.unfreeze)}: give ITERATION:LAYERS, such as 100:2 200:4")
    trained = args.tune_llm or args.tune_visual or args.lora_full_model or args.unfreeze
    if args.lora_rank and args.unfreeze:
        fail("--unfreeze trains layers themselves, --lora-rank adapters in their place: give one of them")
    if args.anchor != "none" and trained:
        fail("--anchor compares with the starting policy on the same features: it needs a frozen backbone")
    if args.lora_full_model and not args.lora_rank:
        fail("--lora-full-model needs --lora-rank")
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
            f"a batch of {args.num_envs} x {args.num_steps} = {batch} chunks does not divide into --num-minibatches "
            f"{args.num_minibatches}; try {nearest}"
        )
    if args.total_timesteps < batch * args.execute_steps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one batch of {batch * args.execute_steps} steps")
    if args.eval_only and not args.model_path:
        fail("--eval-only measures the policy of --model-path: give a run folder")


def resolve_model_path(path: str) -> str:
    """A run folder stands for its best checkpoint, or its last."""
    folder = Path(path)
    for name in ("best", "last"):
        if (folder / "checkpoints").is_dir() and (folder / name).exists():
            return str((folder / name).resolve())
    return path


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        fail(f"{path} is not JSON: {error}")


def read_checkpoint(args: Args) -> tuple[Args, DataConfig, dict]:
    """The checkpoint's folder and data config, and its statistics; what is missing ends the program, nothing is guessed."""
    path = resolve_model_path(args.model_path)
    if not Path(path).is_dir():
        from common.robot.gr00t_n15 import resolve as resolve_repository

        path = str(resolve_repository(path))
    folder, source = Path(path), args.model_path
    old = read_json(folder / "trainer.json").get("args", {})
    args = replace(
        args, model_path=path,
        data_config=args.data_config or old.get("data_config") or "fetch",
        embodiment_tag=args.embodiment_tag or old.get("embodiment_tag") or "new_embodiment",
    )  # fmt: skip
    stored = read_json(folder / "experiment_cfg" / "metadata.json")
    if args.embodiment_tag not in stored:
        fail(
            f"checkpoint '{source}' has no statistics for --embodiment-tag {args.embodiment_tag} (it has: "
            f"{', '.join(stored) or 'none'}); fine-tune it on Fetch first: gr00t_finetune.py --model-path {source}"
        )
    metadata = stored[args.embodiment_tag]
    config = find_data_config(args.data_config, metadata["modalities"] | {"language": {"": {}}})
    if read_json(folder / "config.json").get("backbone_cfg", {}).get("instruction_vocab"):
        config = replace(config, video=())  # the lite model has no camera
        if args.unfreeze:
            fail("--unfreeze: the lite model has no language model, --tune-llm trains its table of instruction tokens")
    for kind in ("state", "action"):
        for key, mode in getattr(config, kind).items():
            if mode != "min_max":
                fail(f"--data-config {args.data_config}: {kind}.{key} is {mode}; this script knows min_max alone")
            if not {"min", "max"} <= set(metadata["statistics"][kind].get(key, {})):
                fail(f"checkpoint '{source}' has no statistics of {kind}.{key}; was another data config used?")
    if config.video not in ((), ("front",)):
        fail(
            f"--data-config {args.data_config} has cameras {', '.join(config.video)}; Fetch is drawn from 'front' alone"
        )
    return args, config, metadata


def fine_tune_start(args: Args, run_dir: Path, say) -> Args:
    """Makes the default run's starting policy: few frames, few steps, so that there is something to improve."""
    command = [*START.split(), "--no-closed-loop", "--eval-trajs", "1", "--output-dir", str(run_dir / "start")]
    command += ["--torch-threads", str(args.torch_threads)]
    say(f"no --model-path: fine-tuning a starting policy with {' '.join(command)}")
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], capture_output=True, text=True)
    if done.returncode:
        fail(f"the starting policy could not be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    (folder,) = (run_dir / "start" / "gr00t_finetune").iterdir()
    return replace(args, model_path=str(folder))


def prompt(instruction: str, views: int, image_tokens: int, form: str = "plain") -> str:
    """The chat text: all cameras, `image_tokens` placeholders each, then the instruction."""
    images = "".join(f"<image {i + 1}><img>{'<IMG_CONTEXT>' * image_tokens}</img>" for i in range(views))
    instruction = str([instruction]) if form == "bracketed" else instruction
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")
EAGLE_TOKENS = (*IMAGE_TOKENS, "<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>", "<interval>", "</interval>")


def load_tokenizer(source: str, image_token_id: int | None):
    """A Qwen tokenizer with the image tokens; `image_token_id` is what the model takes for a place of an image."""
    from transformers import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source)
        if len(tokenizer) < 256:  # nothing found makes an empty one
            raise ValueError("it has no vocabulary, or the hub cannot be reached")
    except Exception as error:  # offline, no such repository, no vocabulary in the folder
        reason = str(error).splitlines()[0]
        fail(
            f"no tokenizer in '{source}' ({reason}); the weights come without one: give --tokenizer a folder or hub id "
            "with the vocab.json and merges.txt of Qwen3 (lerobot/eagle2hg-processor-groot-n1p5, Qwen/Qwen3-1.7B)"
        )
    # a plain Qwen3 tokenizer lacks these: appended in this order they get the ids the model was trained with
    tokenizer.add_special_tokens({"additional_special_tokens": list(EAGLE_TOKENS)})
    found = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    if image_token_id is not None and found != image_token_id:
        fail(f"tokenizer '{source}' gives <IMG_CONTEXT> the id {found}, the model expects {image_token_id}")
    return tokenizer


def load_agent(args: Args, config: DataConfig, metadata: dict, device: torch.device):
    """Policy, adapter, prompt (1, S) and LoRA's adapters, from the checkpoint of --model-path."""
    frozen = not (args.tune_llm or args.tune_visual or args.unfreeze)
    model = GR00T.from_pretrained(
        args.model_path, device=device, attn_implementation=args.attn_implementation,
        backbone_dtype=torch.bfloat16 if args.amp == "bf16" and frozen and config.video else torch.float32,
    )  # fmt: skip
    adapter = Adapter(args, config, metadata, args.model_path)
    c = model.config
    toy = c.instruction_vocab or c.image_token_index == GR00TConfig.tiny().image_token_index
    tokenizer = load_tokenizer(
        args.tokenizer or (str(ROOT / "assets" / "tiny-qwen2") if toy else "lerobot/eagle2hg-processor-groot-n1p5"),
        None if c.instruction_vocab else c.image_token_index,
    )
    text = prompt(adapter.instruction, len(config.video), c.tokens_per_image) if config.video else adapter.instruction
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=device)
    if config.video:
        from assets.build_fetch_demos import Camera

        adapter.image_size = c.image_size
        adapter.camera = Camera(args.env_id, metadata["modalities"]["video"]["front"]["resolution"][0])
    adapters = add_lora(model, args) if args.lora_rank else {}
    if args.gradient_checkpointing:
        model.gradient_checkpointing(True)
    agent = Agent(model, EMBODIMENTS[args.embodiment_tag], args).to(device)
    return agent, adapter, ids, adapters


def main(args: Args) -> None:
    stop = StopSignal()
    world = setup_world(args.device)
    torch.set_num_threads(args.torch_threads)
    checkpoint = None
    if args.resume:
        free = {"resume", "device", "track", "wandb_mode"}  # may differ from the run's own settings
        if given := [k for k, v in asdict(args).items() if k not in free and v != asdict(Args())[k]]:
            fail(
                f"--resume continues with the run's own settings; drop --{given[0].replace('_', '-')} or start a new run "
                "with --model-path"
            )
        checkpoint = find_checkpoint(args.resume)
        run_dir = checkpoint.parent.parent
        args = replace(read_config(run_dir, Args), **{k: getattr(args, k) for k in free})
    args = resolve(args)
    check(args, world)
    if args.model_path:
        args, config, metadata = read_checkpoint(args)
    seed_everything(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    if not checkpoint:
        made = [str(create_run(__file__, args.exp_name, args.seed, args.output_dir))] if world.main else []
        run_dir = Path(world.gather(made)[0])
        if not args.model_path:
            made = [fine_tune_start(args, run_dir, print)] if world.main else []
            args, config, metadata = read_checkpoint(world.gather(made)[0])
        if world.main:
            write_config(run_dir, args, world)
    logger = Logger(
        run_dir, asdict(args), track=args.track, wandb_mode=args.wandb_mode, tags=args.tags, enabled=world.main
    )
    exit_code = 1  # unless the end is reached
    try:
        exit_code = run(args, world, stop, logger, run_dir, checkpoint, config, metadata)
    finally:
        logger.finish(exit_code)
        close_world(world)
    sys.exit(exit_code)


def run(
    args: Args, world: World, stop, logger, run_dir: Path, checkpoint: Path | None, config: DataConfig, metadata: dict
) -> int:
    # ---- setup: environments, agent, optimizer; the arithmetic of the batch ----
    n, first = args.num_envs // world.size, args.num_envs // world.size * world.rank
    decisions = args.num_envs * args.num_steps
    batch_size = decisions * args.execute_steps
    iterations = args.total_timesteps // batch_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine share its cores
    threads = args.num_threads or max(len(os.sched_getaffinity(0)) // local, 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
    per_group = n // args.env_groups
    groups = [
        make_group(args, per_group, slice(i * per_group, (i + 1) * per_group), pool) for i in range(args.env_groups)
    ]
    reset_groups(groups, args, first)
    eval_group = make_group(args, args.eval_episodes, slice(0, args.eval_episodes), pool) if world.main else None
    agent, adapter, ids, adapters = load_agent(args, config, metadata, world.device)
    model = agent.model
    start = None
    if args.anchor != "none":
        start = GR00T.from_pretrained(args.model_path, device=world.device).action_head.requires_grad_(False)
    trained: set[str] = set()  # whatever trains in some iteration
    for iteration in (1, *(at for at, _ in unfreezing(args))):
        set_trainable(model, adapters, args, iteration)
        trained |= {name for name, p in model.named_parameters() if p.requires_grad}
    actor = [p for name, p in model.named_parameters() if name in trained]
    if not actor:
        fail("nothing of the policy trains; leave --tune-projector or --tune-diffusion-model on")
    actor += list(agent.noise_net.parameters()) if agent.noise_net else []
    critic = [*agent.critic.parameters(), *agent.critic_head.parameters()]
    rates = (args.learning_rate, args.critic_learning_rate)
    optimizer = torch.optim.Adam([{"params": p, "lr": r} for p, r in zip((actor, critic), rates)], eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    # noise and minibatch order come from the same streams in every process
    names = ("noise", "order", "anchor")
    generators = {name: torch.Generator().manual_seed(args.seed * 3 + i) for i, name in enumerate(names)}
    state = {
        "script": SCRIPT, "args": {"data_config": args.data_config, "embodiment_tag": args.embodiment_tag},
        "iteration": 0, "global_step": 0, "train_s": 0.0, "elapsed": 0.0, "best": None, "base": {}, "last": {},
        "optimizer_steps": 0, "streak": 0,
    }  # fmt: skip
    recent: deque[dict] = deque(maxlen=100)  # the last training episodes
    carry = torch.zeros(n, dtype=torch.float64, device=world.device)  # discounted return so far, for reward scaling
    no_video = "" if args.capture_video else "--no-capture-video"
    before = run_dir / "videos" / "step-000000000.mp4"

    def measure(step: int) -> dict[str, float]:
        """Evaluates; remembers the result and whether it is the best so far (success, then return)."""
        state["last"] = metrics = evaluate(agent, eval_group, adapter, ids, args) if world.main else {}
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
        no_video = no_renderer()
        try:
            if not no_video:
                path, beside = run_dir / "videos" / f"step-{step:09d}.mp4", before if before.exists() else None
                logger.table("video_table", step, record_video(agent, adapter, ids, args, path, step, beside))
        except Exception as error:  # whatever a graphics driver throws must not end a training run
            no_video = f"{type(error).__name__}: {error}"
        if no_video:
            logger.say(f"video is off, training is not: {no_video}")

    def save() -> None:
        env_arrays, env_streams = [], []
        for group in groups:
            arrays, streams = group.envs.get_state()
            mine = {"whole": group.whole, "length": group.length, "ret": group.ret, "once": group.once}
            env_arrays.append(arrays | mine)
            env_streams += streams
        local = {key: np.concatenate([arrays[key] for arrays in env_arrays]) for key in env_arrays[0]}
        parts = world.gather([(local | {"carry": carry.cpu().numpy()}, env_streams)])
        if not world.main:
            return
        folder = run_dir / "checkpoints" / f"step-{state['global_step']:09d}"
        with atomic_folder(folder) as temporary:
            with merged(model, adapters):
                model.save_pretrained(temporary)
            (temporary / "experiment_cfg").mkdir()
            stored = json.dumps({args.embodiment_tag: metadata}, indent=1)
            (temporary / "experiment_cfg" / "metadata.json").write_text(stored + "\n")
            rest = {k: v.contiguous() for k, v in agent.state_dict().items() if not k.startswith("model.")}
            for name, a in adapters.items():  # what a continued run needs beside the merged weights
                rest |= {f"lora.{name}.{part}": t for part, t in (("A", a.A), ("B", a.B), ("weight", a.linear.weight))}
            save_file({k: v.detach().contiguous() for k, v in rest.items()}, temporary / "agent.safetensors")
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
        saved = load_state(folder, optimizer, SCRIPT)
        rest = load_file(folder / "agent.safetensors", device=str(world.device))
        weights = GR00T.from_pretrained(folder, device=world.device, backbone_dtype=None).state_dict()
        with torch.no_grad():
            for name, a in adapters.items():
                for part, to in (("A", a.A), ("B", a.B), ("weight", a.linear.weight)):
                    to.copy_(rest.pop(f"lora.{name}.{part}"))
            for name, to in model.state_dict().items():
                if name in weights:
                    to.copy_(weights[name])
        agent.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()} | rest)
        state.update({key: saved[key] for key in state})
        recent.extend(saved["recent"])
        scaler.load_state_dict(saved["scaler"])
        for name, g in generators.items():
            g.set_state(torch.frombuffer(bytearray.fromhex(saved["generators"][name]), dtype=torch.uint8))
        arrays = load_arrays(folder / "envs.safetensors")
        carry.copy_(torch.from_numpy(arrays["carry"][first : first + n]))
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
        logger.say(f"evaluated {args.model_path}; {run_dir}")
        return 0

    if checkpoint:
        load(checkpoint)
        logger.truncate(state["global_step"], state["elapsed"])
        logger.say(f"resuming {run_dir} after {state['global_step']:,} steps")
    else:
        logger.say(
            f"{args.env_id}, reward {args.reward_mode}, '{adapter.instruction}' in {ids.shape[1]} tokens, "
            f"{len(config.video)} camera(s): {args.num_envs} environments x {args.num_steps} chunks of "
            f"{args.execute_steps} = {batch_size} steps a batch, {args.num_minibatches} minibatches of "
            f"{decisions // args.num_minibatches} chunks, {iterations} iterations = {iterations * batch_size:,} steps\n"
            f"{args.model_path}: {sum(p.numel() for p in actor):,} of {sum(p.numel() for p in model.parameters()):,} "
            f"parameters and a critic train; {args.sampler}, K {args.denoising_steps}, gamma "
            f"{args.gamma}, lr {args.learning_rate:g}, {args.update_epochs} epochs, target KL {args.target_kl}; "
            f"log {run_dir}"
        )
        metrics = measure(0)
        state["base"] = {key.replace("eval/", "baseline/"): value for key, value in metrics.items()}
        if world.main:
            logger.say(
                f"starting policy: success {metrics['eval/success_rate']:.3f}, return {metrics['eval/episodic_return']:.2f}"
            )
        film(0)
        logger.log(0, state["base"] | metrics)
    logger.progress(iterations, state["iteration"])

    # ---- the loop ----
    for iteration in range(state["iteration"] + 1, iterations + 1):
        set_trainable(model, adapters, args, iteration)
        if args.anneal_lr:
            for group, rate in zip(optimizer.param_groups, rates):
                # eq: lr_i = lr (1 - (i - 1) / I)
                group["lr"] = rate * (1 - (iteration - 1) / iterations)
        # eq: a_i = a_1 + (a_I - a_1) (i - 1) / (I - 1)
        share = (iteration - 1) / max(iterations - 1, 1)
        noise_level = args.noise_level + (args.final_noise_level - args.noise_level) * share
        now = replace(args, noise_level=noise_level)  # the settings of this iteration

        # ---- 1. rollout with frozen weights and statistics ----
        began = time.time()
        batch, cache, episodes = rollout(agent, groups, adapter, ids, now, generators["noise"], world)
        rollout_s = time.time() - began

        # ---- 2. values, advantages, returns: in units of scaled reward ----
        if iteration == 1:  # from now on fixed: a critic whose inputs keep moving learns everything anew
            agent.statistics.update(batch["condition"].flatten(0, 1), world)
        if args.scale_rewards:
            discounted = returns_of(batch["rewards"], batch["dones"], carry, args.gamma**args.execute_steps)
            agent.return_statistics.update(discounted.reshape(-1, 1), world)
        rewards = batch["rewards"] * (agent.reward_scale().float() if args.scale_rewards else 1.0)
        with torch.no_grad():
            T = args.num_steps
            batch["values"] = agent.value(batch["condition"].flatten(0, 1)).view(T, n)
            next_values = agent.value(batch.pop("next_condition").flatten(0, 1)).view(T, n)
        batch["advantages"], batch["returns"] = chunk_advantages(rewards, batch["values"], next_values, batch, args)
        if start is not None:
            rows = {key: batch[key].flatten(0, 1) for key in ("frame", "state", "chain", "first")}
            targets = anchor_targets(agent, start, cache, rows, generators["anchor"], now)
            batch |= {key: value.unflatten(0, (T, n)) for key, value in targets.items()}

        # ---- 3. update ----
        metrics = {"optimizer_steps": 0}
        if iteration > args.critic_warmup:
            metrics = update(agent, optimizer, scaler, batch, cache, now, generators["order"], world)
        metrics |= fit_critic(agent, optimizer, batch, args, generators["order"], world)
        update_s = time.time() - began - rollout_s

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
        explained = 1 - (e2 / decisions - (e / decisions) ** 2) / (r2 / decisions - (r / decisions) ** 2)
        metrics = {f"losses/{name}": float(value) for name, value in metrics.items()}
        metrics |= summary(list(recent), "charts") | {
            "losses/explained_variance": float(explained),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/noise_level": noise_level,
            "charts/reward_scale": float(agent.reward_scale()) if args.scale_rewards else 1.0,
            "charts/distinct_observations": len(cache.index),
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
            "time/train_s": state["train_s"],
            "time/SPS": batch_size / (rollout_s + update_s),
        }
        if world.device.type == "cuda":
            metrics["time/memory_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
        if metrics.get("losses/first_ratio_error", 0.0) > (1e-3 if args.amp == "off" else 0.1):
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
    for group in groups + ([eval_group] if eval_group else []):
        group.envs.close()
    if world.main:
        logger.finish()  # closes the bar
        figures = plot.draw([run_dir], SCRIPT, run_dir)
        last, base = state["last"], state["base"]
        print(
            f"success {base['baseline/success_rate']:.3f} (starting policy) -> {last['eval/success_rate']:.3f} "
            f"[{last['eval/success_rate_low']:.3f}, {last['eval/success_rate_high']:.3f}] of {args.eval_episodes} "
            f"episodes, final distance {last['eval/final_distance'] * 100:.1f} cm, return "
            f"{base['baseline/episodic_return']:.2f} -> {last['eval/episodic_return']:.2f}; "
            f"{state['global_step']:,} steps in {state['train_s']:.1f} s of training, {logger.elapsed:.0f} s in all\n"
            f"figures {', '.join(str(f) for f in figures)}; policy {run_dir}/best"
        )
    return 0


if __name__ == "__main__":
    main(parse(Args, __doc__))
