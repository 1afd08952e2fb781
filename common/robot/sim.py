"""Many environments at a time, whoever steps them: what gymnasium's vector API leaves to its caller.

Nothing here moves a learning curve: the observations that really followed, what an episode came to, and the state of
environments for checkpoints.
"""

import atexit
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Interval
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from common import stop
from common.checkpoint import read_state, replace_file, trainer_file
from common.cli import Count, Natural, Share, Threads, fail, flag
from common.files import Object, read_json
from common.log import lines_until
from common.parallel import World, cores
from common.robot import fetch, spaces
from common.robot.tensors import tensor_envs
from common.robot.video import Stopped
from common.run import Run, RunArgs
from common.stats import wilson


@dataclass
class SimArgs(RunArgs):
    """Flags of scripts that learn in a simulator."""

    # machine
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """the simulator is on the CPU, so a GPU is for large networks"""
    torch_threads: Threads = 1  # CPU threads of torch; more are for large networks and minibatches
    torch_deterministic: bool = True  # only deterministic kernels
    num_threads: Threads | None = None
    """threads that step physics, of each process; default: this machine's cores, shared among its processes"""
    env_groups: Count = 2
    """groups that step by turns: one group's physics runs while the policy acts for the other; 1: no overlap"""

    # evaluation
    eval_every: Natural = 10  # iterations between evaluations, 0: only at the end
    eval_episodes: Count = 100
    """episodes of an evaluation, always the same ones, without exploration; and as many of the validation, from starts
    of their own, which alone picks the best checkpoint"""
    eval_seed: Annotated[int, Interval(ge=0, lt=2**31)] = 100_000  # seed of the first evaluation episode
    stop_success: Share = 0.0  # end the run once three validations in a row have at least this success rate, 0: never
    capture_video: bool = True  # record videos in environments of their own (needs EGL or OSMesa)
    video_every: Natural = 0  # iterations between videos, 0: only at the end
    video_episodes: Count = 2  # episodes in a video


VALIDATION_SEED = 3 * 2**30  # of the first validation episode: no --eval-seed comes near


def set_up_torch(args: SimArgs) -> None:
    torch.set_num_threads(args.torch_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    if args.amp != "off":  # what autocast leaves in fp32, such as rotary angles, is to be exact
        torch.set_float32_matmul_precision("highest")


def check_numbers(args, batch_steps: int, world: World) -> None:
    """What both PPO scripts ask of their numbers; an iteration takes `batch_steps` environment steps."""
    turn = world.size * args.env_groups
    if args.num_envs % turn:
        fail(
            f"--num-envs {args.num_envs} does not divide into {world.size} process(es) x --env-groups "
            f"{args.env_groups}; try --num-envs {max(args.num_envs // turn, 1) * turn} or --env-groups 1"
        )
    rows = args.num_envs * args.num_steps
    if rows % args.num_minibatches:
        nearest = min((k for k in range(1, rows + 1) if rows % k == 0), key=lambda k: abs(k - args.num_minibatches))
        fail(
            f"a batch of {args.num_envs} x {args.num_steps} = {rows} does not divide into --num-minibatches "
            f"{args.num_minibatches}; try {nearest}"
        )
    if args.total_timesteps < batch_steps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one batch of {batch_steps} steps")


def check_policy(folder: Path, script: str, args, defaults, names: tuple[str, ...]) -> None:
    """A checkpoint that another run may start from is of the same task, observation and network: settings `names`."""
    saved = read_state(folder, script)
    for name in names:
        old, new = saved.get(name, getattr(defaults, name)), getattr(args, name)
        same = old == new or new is None or name == "env_id" and fetch.task_of(old) == fetch.task_of(new) != "other"
        if not same:
            add = {True: flag(name), False: flag(f"no_{name}")}.get(old, f"{flag(name)} {old}")
            fail(f"checkpoint '{folder}' was trained with {name} {old}, not {new}; add {add}")


def tell_changed(run: Run, folder: str, args, names: tuple[str, ...]) -> None:
    """Says which of the settings that this script trained a checkpoint with are others now."""
    saved = read_json(Path(folder) / "trainer.json", Object, optional=True) or {}
    for name in names if saved.get("script") == run.name else ():
        if saved.get(name, now := getattr(args, name)) != now:
            run.say(f"measured with {flag(name)} {now}; this policy was trained with {saved[name]}")


def check_groups(args, defaults, steps: int, world: World) -> None:
    """--advantage group compares whole episodes, of `steps` of the script's steps, within a process; what only a critic
    has, and groups alone, is refused for the other. defaults: the script's Args."""
    if args.advantage == "gae":
        if args.group_size > 1:
            fail(f"--group-size {args.group_size} is read by --advantage group alone: drop it, or add that")
        return
    if not fetch.is_fetch(args.env_id):
        fail(f"--advantage group starts several episodes at one state, as Fetch can; {args.env_id} has --advantage gae")
    own, G = args.num_envs // world.size, args.group_size
    if G < 2 or own % G:
        nearest = min((g for g in range(2, own + 1) if own % g == 0), key=lambda g: abs(g - G), default=None)
        hint = f"try --group-size {nearest}" if nearest else f"give --num-envs {G * world.size}"
        fail(f"--group-size {G}: {own} environments of a process do not divide into groups of so many; {hint}")
    if args.num_steps % steps:
        nearest = max(round(args.num_steps / steps), 1) * steps
        fail(
            f"--advantage group learns from whole episodes of {steps}, not {args.num_steps}; try --num-steps {nearest}"
        )
    names = "gae_lambda norm_adv vf_coef scale_rewards stagger critic_learning_rate critic_warmup critic_epochs"
    for name in names.split():
        if getattr(args, name, None) != getattr(defaults, name, None):
            fail(f"{flag(name)} is read by --advantage gae alone: drop it")


def physics_threads(count: int | None) -> ThreadPoolExecutor:
    """`count` threads, by default this process's share of the cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    return ThreadPoolExecutor(count or max(cores() // local, 1), thread_name_prefix="fetch")


def make_envs(
    args, num_envs: int, backend: str, pool: ThreadPoolExecutor | None = None, evaluation: bool = False, **kwargs
) -> VectorEnv:
    """`num_envs` of args.env_id that reset in the step that ends an episode (its last observation is in the infos).

    Others than Fetch show vectors and act in [-1, 1] or choices, see `spaces.Plain`; in an evaluation they end.
    """
    if backend == "torch":
        return tensor_envs(args.env_id, num_envs)
    kwargs |= spaces.limit(args.max_episode_steps)
    if backend == "native":
        grasped = 0.0 if evaluation else args.grasped_starts or 0.0
        return fetch.FetchVec(args.env_id, num_envs, args.num_threads, pool=pool, grasped=grasped, **kwargs)
    wrappers = [spaces.deaf] if backend == "gymnasium-async" else []
    if fetch.is_fetch(args.env_id):
        fetch.import_robotics()
    else:
        spaces.register_robots(args.env_id)
        wrappers += [spaces.cut, spaces.Plain] if evaluation else [spaces.Plain]
    how = {"vectorization_mode": "async" if backend == "gymnasium-async" else "sync", "wrappers": wrappers}
    kwargs |= how | {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    envs = gym.make_vec(args.env_id, num_envs, **kwargs)
    if backend == "gymnasium-async":  # deaf: however this program ends, they end with it
        atexit.register(lambda: [process.kill() for process in envs.processes])
    return envs


def refuse_nonfinite(what: str, values: np.ndarray, env_id: str, episodes: "Episodes") -> None:
    """values (n, ...) of n environments, as they stand in their episodes: one that float32 cannot hold ends it all."""
    fine = (np.abs(values) <= np.finfo(np.float32).max).reshape(len(values), -1).all(1)  # not so for NaN
    if not fine.all():
        i = int(np.argmin(fine))
        worst = np.ravel(values[i])[~(np.abs(np.ravel(values[i])) <= np.finfo(np.float32).max)][0]
        fail(f"{env_id} gave {what} {worst} after {episodes.length[i]} steps of an episode (environment {i})")


def start(envs: VectorEnv, actions: np.ndarray) -> Callable[[], tuple]:
    """Begins a step; what is returned ends it. Environments that step one after the other do so when waited for."""
    if not hasattr(envs, "step_async"):
        return partial(envs.step, actions)
    envs.step_async(actions)
    return envs.step_wait


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
    """(N,) bool `is_success` or `success` of the step just taken, also where it ended an episode; None: neither."""
    name = "is_success" if {"is_success"} & (infos.keys() | infos.get("final_info", {}).keys()) else "success"
    now, final = infos.get(name), infos.get("final_info", {}).get(name)
    if now is None and final is None:
        return None
    now, final = (np.zeros(len(dones)) if x is None else x for x in (now, final))
    return np.where(dones & infos.get("_final_info", np.zeros(len(dones), bool)), final, now).astype(bool)


def heed() -> None:
    """Between the steps of an evaluation or a video: a signal that the training loop has to answer ends it."""
    if stop.patient and stop.received is not None:
        raise Stopped


def unless_stopped(run: Run, state: dict, evaluation: Callable[[], dict]) -> dict:
    """What evaluation() finds, on the first process; the others get nothing. Every process calls it.

    Where a signal ended it (`heed`), state["owed"] is true, and a resumed run makes up for it.
    """
    found = {}
    with contextlib.suppress(Stopped):
        state["owed"] = True
        found = evaluation() if run.world.main else {}
        state["owed"] = False
    (state["owed"],) = run.world.any(state["owed"])
    return found


def make_up(run: Run, state: dict, measure: Callable[[], dict]) -> None:
    """The evaluation that a signal kept from the step that is resumed, and the line that waits for it: `line_of`."""
    if line := state.pop("owed", False):
        path = run.folder / "metrics.jsonl"
        if run.world.main:  # resumed before, it was stopped before its next checkpoint
            replace_file(path, "".join(lines_until(path, run.first * run.unit - 1)))
        run.write(run.first, line | measure())
        run.settle(run.first)


def line_of(metrics: dict, state: dict) -> dict:
    """A step's metrics, or nothing yet where its evaluation is owed: they wait for it in the state."""
    if not state.get("owed"):
        return metrics
    state["owed"] = metrics
    return {}


def check_first_ratio(run: Run, step: int, metrics: dict, most: float) -> None:
    """Before any update w = 1: rollout and update compute the same policy, or the run says by how much they do not."""
    if not metrics.get("losses/first_ratio_error", 0.0) <= most:
        off = f"before any update the ratio is off by {metrics['losses/first_ratio_error']:.1e}"
        run.warn(step, {"ratio": f"{off}: rollout and update do not compute the same policy"})


class Episodes:
    """What the running episodes of n environments came to so far."""

    def __init__(self, whole: np.ndarray):
        """whole (n,) bool: began at its beginning; a part of an episode says nothing."""
        n = len(whole)
        self.whole, self.length, self.ret, self.once = whole, np.zeros(n, np.int64), np.zeros(n), np.zeros(n, bool)

    def step(self, real: np.ndarray, rewards: np.ndarray, success: np.ndarray | None) -> None:
        """Adds a step: rewards (n,), success (n,) bool or None, where `real` (n,) bool says that it was one."""
        self.length += real
        self.ret += np.where(real, rewards, 0.0)
        if success is not None:
            self.once |= success & real

    def end(self, ended: np.ndarray, success: np.ndarray | None, distance: np.ndarray | None) -> list[dict]:
        """Closes the episodes of `ended` (n,) bool; returns those that were whole. distance (n,): from the goal, m."""
        found = []
        for i in map(int, np.flatnonzero(ended)):
            if self.whole[i]:
                episode = {"env": i, "return": float(self.ret[i]), "length": int(self.length[i])}
                if success is not None:
                    episode |= {"success": bool(success[i]), "success_once": bool(self.once[i])}
                found.append(episode | ({} if distance is None else {"final_distance": float(distance[i])}))
            self.whole[i], self.length[i], self.ret[i], self.once[i] = True, 0, 0.0, False
        return found


def summary(episodes: list[dict], prefix: str) -> dict[str, float]:
    """Means over episodes; the success rate with its interval."""
    if not episodes:
        return {}
    # 0: some environments speak of success in the last step only, or when it comes
    n, mean = len(episodes), lambda key: float(np.mean([e.get(key, 0.0) for e in episodes]))
    metrics = {f"{prefix}/episodic_return": mean("return"), f"{prefix}/episodic_length": mean("length")}
    if any("success" in e for e in episodes):
        low, high = wilson(sum(e.get("success", False) for e in episodes), n)
        metrics |= {
            f"{prefix}/success_rate": mean("success"),
            f"{prefix}/success_rate_low": low,
            f"{prefix}/success_rate_high": high,
            f"{prefix}/success_once": mean("success_once"),
        }
    if "final_distance" in episodes[0]:
        metrics[f"{prefix}/final_distance"] = mean("final_distance")
    return metrics


def outcome(run: Run, state: dict, start: str) -> str:
    """What came out of a run, beside what `start` achieves; state: its "base", "last", "steps" and "train_s"."""
    if not run.world.main:
        return ""
    last, base, text = state["last"], state["base"], ""
    if "eval/success_rate" in last:
        low, high = last["eval/success_rate_low"], last["eval/success_rate_high"]
        text += f"success {base['baseline/success_rate']:.3f} ({start}) -> {last['eval/success_rate']:.3f} "
        text += f"[{low:.3f}, {high:.3f}] of {run.args.eval_episodes} episodes, "
    if "eval/final_distance" in last:
        text += f"final distance {100 * last['eval/final_distance']:.1f} cm, "
    text += f"return {base['baseline/episodic_return']:.2f} -> {last['eval/episodic_return']:.2f}; "
    return text + f"{state['steps']:,} steps in {state['train_s']:.1f} s of training, {run.log.elapsed:.0f} s in all"


def times(run: Run, state: dict) -> dict[str, float]:
    """What a step took, and training so far."""
    state["steps"] += run.unit
    state["train_s"] += run.seconds.total()
    return {
        "time/rollout_s": run.seconds["rollout"],
        "time/update_s": run.seconds["update"],
        "time/train_s": state["train_s"],
        "time/SPS": run.unit / run.seconds.total(),
    }


def own_rows(rows: torch.Tensor, n: int, world: World) -> torch.Tensor:
    """Which rows of this process's (T * n) batch are among `rows` of the (T * N) batch of all processes."""
    env = rows % (n * world.size) - n * world.rank
    return (rows // (n * world.size) * n + env)[(env >= 0) & (env < n)]


def returns_of(rewards: torch.Tensor, dones: torch.Tensor, carry: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards so far in each episode, (T, n); `carry` (n,) goes on from batch to batch."""
    rows = []
    for r, done in zip(rewards.double(), dones):
        carry.mul_(gamma).add_(r)
        rows.append(carry.clone())
        carry.masked_fill_(done, 0.0)
    return torch.stack(rows)


class RunningStatistics(torch.nn.Module):
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
        if not squares.isfinite().all():
            fail("a running statistic met a number that is not finite, or too large to be squared")
        # eq: M2 = M2_a + M2_b + (m_b - m_a)^2 n_a n_b / (n_a + n_b)   [Chan et al. 1979]
        count, delta = self.count + n, mean - self.mean
        m2 = self.var * self.count + squares + delta**2 * self.count * n / count
        self.mean += delta * n / count
        self.var.copy_(m2 / count)
        self.count.copy_(count)

    def scale(self) -> torch.Tensor:
        """() float64: 1 / the standard deviation of the one number that these are of; 1 where it is unknown."""
        if self.count == 0:
            return torch.ones((), dtype=torch.float64)
        # numbers that hardly vary, or not at all, are no measure
        std = torch.maximum(self.var.sqrt(), 0.01 * self.mean.abs())[0]
        return 1.0 / (std + 1e-8) if std > 0 else torch.ones_like(std)


def alike(advantages: torch.Tensor, group_size: int, world: World) -> float:
    """Which share of the groups, over all processes, has episodes of one return: nothing is learnt from these.

    advantages: of each episode, those of a group in consecutive rows.
    """
    same = (advantages.view(-1, group_size) == 0).all(1).double()
    held, count = world.total(torch.stack([same.sum(), torch.ones_like(same).sum()]))
    return float(held / count)


def explained_variance(returns: torch.Tensor, values: torch.Tensor, world: World) -> float:
    """1 for a critic that knows the returns, 0 for one that knows their mean, over the rows of all processes."""
    r, e = returns.double(), (returns - values).double()
    count = torch.full((), r.numel(), dtype=torch.float64, device=r.device)
    n, r1, r2, e1, e2 = world.total(torch.stack([count, r.sum(), (r**2).sum(), e.sum(), (e**2).sum()]))
    # eq: explained variance = 1 - Var(R - V) / Var(R)
    return float(1 - (e2 / n - (e1 / n) ** 2) / (r2 / n - (r1 / n) ** 2))


def video_row(episode: dict) -> dict:
    """An episode as a row of the table of videos."""
    names = {"env": "episode", "return": "episode_return", "length": "episode_length"}
    return {names.get(key, key): value for key, value in episode.items()}


# ---- checkpoints: a group is anything with `envs`, `episodes` and `rows`, its slice of the environments --------------


def save(folder: Path | None, groups: list, carry: torch.Tensor, scaler, world: World) -> dict:
    """Writes envs.safetensors: all processes' simulators, episodes and discounted returns `carry` (n,).

    Returns the rest for the trainer's state. Every process calls it, those that do not write with None. Gymnasium's own
    environments cannot be saved.
    """
    parts, streams = [], []
    for group in groups:
        arrays, own = group.envs.get_state() if isinstance(group.envs, fetch.FetchVec) else ({}, [])
        parts.append(arrays | vars(group.episodes))
        streams += own
    local = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | {"carry": carry.cpu().numpy()}
    gathered = world.gather([(local, streams)])
    if folder is not None:
        rows = {name: np.concatenate([part[name] for part, _ in gathered]) for name in local}
        save_file(rows, trainer_file(folder, "envs.safetensors"))
    return {"env_streams": [stream for _, own in gathered for stream in own], "scaler": scaler.state_dict()}


def load(run: Run, state: dict, groups: list, carry: torch.Tensor, scaler) -> list:
    """Restores what `save` wrote into the run's checkpoint and state; returns the groups that have to look again."""
    scaler.load_state_dict(state["scaler"])
    arrays = load_file(trainer_file(run.checkpoint, "envs.safetensors"))
    own = run.world.share(len(arrays["carry"]))
    arrays = {name: value[own] for name, value in arrays.items()}
    if "physics" not in arrays:
        run.say("gymnasium's environments cannot be saved: their episodes start anew")
        return []
    carry.copy_(torch.from_numpy(arrays["carry"]))
    for group in groups:
        group.envs.set_state({name: x[group.rows] for name, x in arrays.items()}, state["env_streams"][own][group.rows])
        for name, value in vars(group.episodes).items():
            value[:] = arrays[name][group.rows]
    return groups


def load_weights(agent: torch.nn.Module, folder: Path) -> None:
    """The agent's weights and statistics from model.safetensors. Another agent's end in one line."""
    try:
        agent.load_state_dict(load_tensors(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        fail(f"'{folder / 'model.safetensors'}' does not hold this policy: {str(error)[:200]}")


def close(groups: list, *others: VectorEnv | None) -> None:
    for envs in (*(group.envs for group in groups), *others):
        if envs is not None:
            envs.close()
