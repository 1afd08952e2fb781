"""Any Gymnasium environment as one that a Gaussian or categorical policy can act in: numbers in, numbers out.

An environment of another kind than Fetch is wrapped in `Plain`: what it shows becomes a vector, what it is told comes
from a box [-1, 1] or from choices 0 ... n - 1. What cannot be made so ends in one line before anything else is built.
"""

import contextlib
import io
import multiprocessing
import signal
import warnings
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from common.cli import fail, flag
from common.robot import fetch

LONGEST = 10_000  # steps of an episode where neither the environment nor --max-episode-steps sets a limit
WIDEST = 100_000  # numbers in an observation


# ---- observations ----------------------------------------------------------------------------------------------------


def parts_of(space: gym.Space) -> list[gym.Space]:
    """The spaces that a nested Dict or Tuple is made of."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inner = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [part for one in inner for part in parts_of(one)]
    return [space]


def is_image(space: gym.Space) -> bool:
    """Whether it looks like a picture (h, w) or (h, w, channels), channels first or last."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    return space.dtype == np.uint8 or min(sorted(space.shape)[-2:]) >= 32


def unseen(space: gym.Space) -> str:
    """Why a policy of this project cannot see such observations; empty if it can."""
    for part in parts_of(space):
        if is_image(part):
            return f"shows an image {part.shape}; policies here see vectors: give it numbers, or a wrapper that does"
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            kind = type(part).__name__
            return f"shows a {kind} space; Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple become a vector"
    width = sum(spaces.flatdim(part) for part in parts_of(space))
    if not 0 < width <= WIDEST:
        return f"shows {width:,} numbers when its observation is flattened; 1 to {WIDEST:,} can be seen"
    return ""


# ---- actions ---------------------------------------------------------------------------------------------------------


class Actions:
    """Between a policy's actions and an environment's."""

    def __init__(self, space: gym.Space):
        """space: the environment's. `policy` is what the policy acts in: Box(-1, 1) with a number for each that the
        environment takes, unbounded where it is; or MultiDiscrete, a choice from 0 on for each of its. What comes
        nearest to doing nothing is `policy.zero` (A,)."""
        self.space, self.shape, self.dtype = space, space.shape, space.dtype
        if isinstance(space, spaces.Box):
            low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
            self.low, self.high = low, high
            # the largest float32 as a bound is none
            self.bounded = np.isfinite(low) & np.isfinite(high) & (np.abs(low) < 1e30) & (np.abs(high) < 1e30)
            limit = np.where(self.bounded, 1.0, np.inf).astype(np.float32)
            self.policy = spaces.Box(-limit, limit)
            self.policy.zero = self.nothing()
        else:
            self.start = np.ravel(getattr(space, "start", 0))
            sizes = np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))
            self.policy = spaces.MultiDiscrete([2] * int(np.prod(space.shape)) if self.binary else sizes)
            self.policy.zero = np.zeros(len(self.policy.nvec), np.int64)

    @property
    def binary(self) -> bool:
        return isinstance(self.space, spaces.MultiBinary)

    def nothing(self) -> np.ndarray:
        """(A,) what the policy says for actions of 0, or as near as the box allows."""
        span = np.where(self.bounded & (self.high > self.low), self.high - self.low, 1.0)
        at = np.where(self.bounded, 2 * (np.clip(0.0, self.low, self.high) - self.low) / span - 1, 0.0)
        return at.astype(np.float32)

    def executed(self, action: np.ndarray):
        """(..., A) of the policy -> what environments take, inside their space, of its shape and dtype."""
        shape = (*np.shape(action)[:-1], *self.shape)
        if not isinstance(self.space, spaces.Box):
            values = (np.asarray(action) + self.start).astype(self.dtype).reshape(shape)
            return values[()] if isinstance(self.space, spaces.Discrete) else values
        a = np.asarray(action, np.float64)
        low, span = np.where(self.bounded, self.low, 0.0), np.where(self.bounded, self.high - self.low, 0.0)
        # eq: low + (a + 1) (high - low) / 2; unbounded: a
        values = np.where(self.bounded, low + (a.clip(-1, 1) + 1) / 2 * span, a).clip(self.low, self.high)
        if self.dtype.kind in "iu":
            values = np.rint(values)
        return np.asarray(values.astype(self.dtype).reshape(shape).clip(self.space.low, self.space.high))


def unable(space: gym.Space) -> str:
    """Why a policy of this project cannot act in this space; empty if it can."""
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        kind = type(space).__name__
        return f"has a {kind} action space; policies here act in Box, Discrete, MultiDiscrete and MultiBinary"
    if not np.prod(space.shape):
        return f"has an empty action space {space}: there is nothing to learn"
    return ""


# ---- the environment -------------------------------------------------------------------------------------------------


class Plain(gym.Wrapper):
    """An environment whose observations are vectors (D,), float32 or float64, and that takes a policy's actions (A,).

    Choices become one-hot (gymnasium.spaces.flatten). Readings keep the precision they have.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        flat = spaces.flatten_space(env.observation_space)
        self.dtype = np.result_type(flat.dtype, np.float32)  # an integer's is float64, a flag's float32
        self.observation_space = spaces.Box(-np.inf, np.inf, flat.shape, self.dtype)
        self.actions = Actions(env.action_space)
        self.action_space = self.actions.policy

    def seen(self, obs) -> np.ndarray:
        return np.asarray(spaces.flatten(self.env.observation_space, obs), self.dtype)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.seen(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(self.actions.executed(action))
        return self.seen(obs), reward, terminated, truncated, info


def deaf(env: gym.Env) -> gym.Env:
    """In a process of its own an environment leaves signals to the program that started it, which ends it."""
    if multiprocessing.parent_process() is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return env


def register_robots(env_id: str) -> None:
    """Lets gymnasium know gymnasium-robotics' environments (AntMaze, HandReach, …) where this id is not its own."""
    if env_id not in gym.registry and ":" not in env_id and find_spec("gymnasium_robotics"):
        fetch.import_robotics()


def examine(env_id: str, max_episode_steps: int | None = None) -> Actions:
    """Builds one environment, looks, acts and closes it. Whatever is wrong with it ends the program in one line.

    Returns what acting in it is.
    """
    env = None
    register_robots(env_id)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = gym.make(env_id, **limit(max_episode_steps))
            why = unseen(env.observation_space) or unable(env.action_space)
            endless = why or walk(env)
            env.close()
    except Exception as error:  # whatever a simulator or its packages throw
        text = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, (gym.error.Error, ImportError)) else f"{type(error).__name__}: "
        fail(
            f"--env-id {env_id} cannot be made: {kind}{text}" if env is None else f"{env_id} does not run: {kind}{text}"
        )
    if why or endless:
        fail(f"--env-id {env_id} {why or endless}")
    return Actions(env.action_space)


def check(args, log_std_init: float) -> None:
    """Flags of a script for another environment than Fetch, and that environment; log_std_init: where none is given."""
    if args.env_backend == "native":
        fail(
            f"--env-id {args.env_id}: the native backend knows {', '.join(f'{task}-v4' for task in fetch.TASKS)}; "
            "for another Gymnasium id add --env-backend gymnasium"
        )
    if args.env_backend == "torch":
        for name, right in {"max_episode_steps": None, "env_groups": 1, "capture_video": False}.items():
            if getattr(args, name) != right:
                way = {1: "add --env-groups 1", False: "add --no-capture-video"}.get(right, f"drop {flag(name)}")
                fail(f"--env-backend torch steps one simulator, which sets limits and draws itself: {way}")
    if args.reward_mode != "env":
        fail(f"--reward-mode {args.reward_mode} is for the Fetch tasks; {args.env_id} has --reward-mode env")
    for name in ("observation_mode", "num_threads"):
        if getattr(args, name) is not None:
            fail(f"{flag(name)} {getattr(args, name)} is for the Fetch tasks and changes nothing here: drop it")
    if args.env_backend == "torch":  # a simulator is started once
        return
    actions = examine(args.env_id, args.max_episode_steps)
    if args.log_std_init != log_std_init and not isinstance(actions.policy, spaces.Box):
        fail(f"--log-std-init {args.log_std_init} is for actions in a box; {args.env_id} has choices: drop it")


def limit(max_episode_steps: int | None) -> dict[str, int]:
    """The time limit as an argument of gym.make; none: the environment's own."""
    return {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}


def cut(env: gym.Env) -> gym.Env:
    """For evaluation: an environment without a time limit gets one."""
    return gym.wrappers.TimeLimit(env, LONGEST) if env.spec.max_episode_steps is None else env


def walk(env: gym.Env) -> str:
    """A step, or without a time limit an episode, of doing nothing. Returns why it cannot be evaluated, or nothing."""
    plain = Plain(env)
    obs, _ = plain.reset(seed=0)
    for t in range(LONGEST if env.spec.max_episode_steps is None else 1):
        if not np.isfinite(obs).all():
            return f"shows numbers that are not finite, {obs[~np.isfinite(obs)][:3]}, after {t} steps of doing nothing"
        obs, reward, terminated, truncated, _ = plain.step(plain.action_space.zero)
        if not np.isfinite(reward):
            return f"gives the reward {reward} in step {t + 1} of doing nothing"
        if terminated or truncated:
            return ""
    if env.spec.max_episode_steps is None:
        return f"has no time limit, and doing nothing has not ended after {LONGEST:,} steps: give --max-episode-steps"
    return ""
