"""Environments of every kind under ppo_fetch.py: each is learnt, or refused in one line before anything is made."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import flags_of, rows, run_script
from gymnasium import spaces

import ppo_fetch
import ppo_gr00t
from common.robot import fetch, sim
from common.robot.spaces import Actions
from common.robot.tensors import TensorVec
from common.stats import wilson

BOX = spaces.Box(-1, 1, (2,))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs main() in this process, without figures; returns (exit code, run folder or None)."""
    monkeypatch.setattr("common.plot.draw", lambda *args: [])

    def start(module=ppo_fetch, **flags):
        base = {} if module is ppo_gr00t else {"env_backend": "gymnasium"}
        argv = flags_of(**{"output_dir": tmp_path / "runs", "capture_video": False} | base | flags)
        code = run_script(module, [module.__file__, *argv], monkeypatch)
        runs = sorted((tmp_path / "runs").glob("*/*"), key=lambda path: path.stat().st_mtime)
        return code, runs[-1] if runs else None

    return start


class Made(gym.Env):
    """Made of any spaces; a step is an episode unless a subclass says otherwise."""

    def __init__(self, observation_space=BOX, action_space=BOX):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.obs, self.t = self.observation_space.sample(), 0
        return self.obs, {}

    def reward(self, action) -> float:
        return 0.0

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), self.reward(action), True, False, {}


class Endless(Made):
    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Poison(Made):
    """Episodes of 20 steps; in the 15th step of an episode, a number that is none."""

    def __init__(self, where: str, value: float):
        super().__init__()
        self.where, self.value = where, value

    def step(self, action):
        self.t += 1
        obs, reward = self.observation_space.sample(), 1.0
        if self.t == 15:
            obs, reward = (obs * self.value, 1.0) if self.where == "observation" else (obs, self.value)
        return obs, reward, False, self.t == 20, {}


def needs_box2d():
    raise gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')


def needs_mujoco_py():
    import a_package_that_nobody_has  # noqa: F401


def broken():
    raise RuntimeError("no licence\nfound")


def register(name: str, entry, **kwargs) -> str:
    gym.register(f"{name}-v0", entry, **kwargs)
    return f"{name}-v0"


TEXT, PICTURE = spaces.Text(5), spaces.Box(0, 255, (64, 48, 3), np.uint8)
NODES = spaces.Graph(spaces.Box(-1, 1, (2,)), None)
REFUSED = {  # environment -> words of the line
    "Text": (lambda: Made(TEXT), "shows a Text space"),
    "Graph": (lambda: Made(spaces.Dict(a=BOX, b=NODES)), "shows a Graph space"),
    "Sequence": (lambda: Made(spaces.Tuple([BOX, spaces.Sequence(BOX)])), "shows a Sequence space"),
    "Image": (lambda: Made(PICTURE), "an image (64, 48, 3)"),
    "DictImage": (lambda: Made(spaces.Dict(camera=PICTURE, state=BOX)), "an image (64, 48, 3)"),
    "FloatImage": (lambda: Made(spaces.Box(0, 1, (3, 84, 84))), "an image (3, 84, 84)"),
    "Wide": (lambda: Made(spaces.Discrete(10**7)), "10,000,000 numbers"),
    "Empty": (lambda: Made(spaces.Box(-1, 1, (0,))), "shows 0 numbers"),
    "DictActions": (lambda: Made(BOX, spaces.Dict(a=BOX)), "has a Dict action space"),
    "TupleActions": (lambda: Made(BOX, spaces.Tuple([BOX])), "has a Tuple action space"),
    "TextActions": (lambda: Made(BOX, TEXT), "has a Text action space"),
    "NoActions": (lambda: Made(BOX, spaces.Box(-1, 1, (0,))), "empty action space"),
    "Box2D": (needs_box2d, "Box2D is not installed"),
    "MujocoPy": (needs_mujoco_py, "a_package_that_nobody_has"),
    "Broken": (broken, "RuntimeError: no licence found"),
    "Endless": (Endless, "--max-episode-steps"),
    "InfStart": (lambda: Made(spaces.Box(np.inf, np.inf, (2,))), "not finite"),
    "Steps": (lambda: Raises(), "ValueError: step went wrong"),
}


class Raises(Made):
    def step(self, action):
        raise ValueError("step went wrong")


IDS = {name: register(f"Refused{name}", entry) for name, (entry, _) in REFUSED.items()}


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_an_environment_that_cannot_be_learnt_is_refused_in_one_line_before_the_folder_exists(name, run, capsys):
    code, folder = run(env_id=IDS[name])
    assert code == 2 and folder is None and REFUSED[name][1] in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"env_id": "FetchReach-v2"}, "use FetchReach-v4"),
        ({"env_id": "fetchpushdense-v1", "env_backend": "native"}, "use FetchPushDense-v4"),
        ({"env_id": "FetchSlide"}, "use FetchSlide-v4"),
        ({"env_id": "CartPole-v9"}, "`v1`"),
        ({"env_id": "Hopper-v3"}, "Hopper-v3 cannot be made"),
        ({"env_id": "NoSuchThing-v0"}, "NoSuchThing"),
        ({"env_id": "no_such_module:Env-v0"}, "No module named 'no_such_module'"),
        ({"env_id": "json:Env-v0"}, "Environment `Env` doesn't exist"),
        ({"env_id": ":CartPole-v1"}, "cannot be made"),
        ({"env_id": "a b"}, "Malformed"),
        ({"env_id": "CartPole-v1", "observation_mode": "delta"}, "--observation-mode"),
        ({"env_id": "CartPole-v1", "reward_mode": "dense"}, "--reward-mode"),
        ({"env_id": "CartPole-v1", "num_threads": 2}, "--num-threads"),
        ({"env_id": "CartPole-v1", "stagger": False}, "--no-stagger"),
        ({"env_id": "CartPole-v1", "log_std_init": -1.0}, "--log-std-init"),
        ({"env_id": "FetchReach-v4", "stagger": False}, "--no-stagger"),
        ({"env_id": "CartPole-v1", "max_episode_steps": 0}, "max"),
        ({"env_id": "FetchReach-v4", "max_episode_steps": 0}, "max"),
        ({"env_id": "FetchReach-v1", "module": ppo_gr00t}, "use FetchReach-v4"),
        ({"env_id": "FetchSlide-v4", "module": ppo_gr00t}, "FetchPush-v4"),
        ({"env_id": "CartPole-v1", "module": ppo_gr00t}, "FetchReach-v4"),
    ],
)
def test_an_id_or_a_flag_that_does_nothing_is_refused_in_one_line(flags, words, run, capsys):
    code, folder = run(**flags)
    assert code == 2 and folder is None and words in one_line(capsys.readouterr().err)


SHORT = dict(total_timesteps=64, num_envs=2, num_steps=16, env_groups=1, eval_episodes=1, eval_every=0, hidden=8,
             num_minibatches=4)  # fmt: skip


@pytest.mark.parametrize("where", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_number_that_is_none_ends_the_run_in_one_line_that_names_environment_and_step(where, value, run, capsys):
    if value == 1e300 and where == "observation":
        pytest.skip("float32 has no such number")
    name = f"Poison{where}{len(str(value))}-v0"
    gym.register(name, lambda: Poison(where, value), max_episode_steps=20)
    code, _ = run(env_id=name, **SHORT)
    line = one_line("\n".join(x for x in capsys.readouterr().err.splitlines() if x.startswith("error")))
    assert code == 2 and f"{name} gave the {where} " in line and "after 14 steps" in line


def test_an_id_of_the_users_own_module_is_what_gym_make_takes(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_robots.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('MyPole-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=50)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, folder = run(env_id="my_robots:MyPole-v0", **SHORT | {"save_every": 2})
    assert code == 0 and (folder / "last").exists()
    middle = str(sorted((folder / "checkpoints").iterdir())[0])
    resume = dict(env_backend=None, output_dir=None, capture_video=None, resume=middle)
    code, _ = run(**resume)  # a folder is data: what it says imports nothing
    assert code == 2 and "add --env-id my_robots:MyPole-v0" in one_line(capsys.readouterr().err.splitlines()[-1])
    assert run(**resume, env_id="my_robots:MyPole-v0")[0] == 0
    sys.modules.pop("my_robots")


def test_an_id_with_dense_in_it_trains_on_the_dense_reward():
    for module in (ppo_fetch, ppo_gr00t):
        for given, expected in ((None, "dense"), ("shaped", "shaped")):
            args = module.resolve(replace(module.Args(), env_id="FetchPushDense-v4", reward_mode=given))
            assert args.reward_mode == expected and args.num_minibatches
        assert module.resolve(replace(module.Args(), env_id="FetchPush-v4")).reward_mode == "shaped"
    from common.robot.fetch_robot import FetchRobot

    class Blind:
        class config:
            video = ()

    assert FetchRobot(Blind, "FetchPushDense-v4").instruction == FetchRobot(Blind, "FetchPush-v4").instruction
    assert not fetch.is_fetch("FetchReach") and not fetch.is_fetch("FetchReach-v2")


NO_EGL = """
import ctypes
load = ctypes.CDLL.__init__
def missing(self, name=None, *rest, **options):
    if "EGL" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *rest, **options)
ctypes.CDLL.__init__ = missing
ctypes.util.find_library = lambda name: None
"""


@pytest.mark.parametrize("renderer, before", [("bogus", ""), ("egl", "import ctypes.util" + NO_EGL)])
def test_a_renderer_that_is_not_there_ends_in_one_line(renderer, before):
    import subprocess

    root = Path(ppo_fetch.__file__).parent
    out = subprocess.run([sys.executable, "-c", before + "\nimport common.robot.fetch"], cwd=root,
                         env=os.environ | {"MUJOCO_GL": renderer}, capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 2 and "egl" in one_line(out.stderr) and "MuJoCo does not start" in out.stderr


# ---- what is learnt --------------------------------------------------------------------------------------------------


class Match(Made):
    """One step: which action is right is a matter of the observation. What it is told must be in its own space."""

    def __init__(self, observation_space, action_space, draw, score):
        super().__init__(observation_space, action_space)
        self.draw, self.score = draw, score

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.key = int(self.np_random.integers(16))
        return self.draw(self.key), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        return self.draw(self.key), float(self.score(self.key, action)), True, False, {}


def box(low, high, shape=(1,), dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


def near(target, span):
    """The score of an action anywhere in a box: 0 at the target, -1 when it is `span` off."""
    return lambda key, action: -np.mean(np.abs(np.asarray(action, np.float64) - target)) / span


def bit(key, action):
    """Whether the action is the lowest bit of the key."""
    return np.all(np.asarray(action) == key % 2)


BIT, TWO = box(0, 1), spaces.Discrete(2)
NESTED = spaces.Dict(a=spaces.Tuple([spaces.Discrete(2, start=5), box(-1, 1, (2, 2))]), b=spaces.MultiBinary((2, 2)))
LOOKUP = np.random.default_rng(0).permutation(np.arange(16) % 4)


def nested(key):
    return {"a": (np.int64(5 + key % 2), np.zeros((2, 2), np.float32)), "b": np.ones((2, 2), np.int8)}


def plain(key):
    return np.array([key % 2], np.float32)


# name -> observations, actions, how the key is shown, the score of an action, what a trained policy gets at least
LEARNT = {
    "wide": (BIT, box(-100, 100), plain, near(40, 100), -0.1),
    "far": (BIT, box(10, 20), plain, near(17, 5), -0.1),
    "small": (BIT, box(0, 0.01), plain, near(0.002, 0.005), -0.1),
    "matrix": (BIT, box(-3, 3, (2, 2)), plain, near(np.array([[1, -1], [2, 0]]), 3), -0.15),
    "scalar": (BIT, box(-5, 5, ()), plain, near(3, 5), -0.1),
    "integer": (BIT, box(0, 10, dtype=np.int64), plain, near(8, 5), -0.15),
    "unbounded": (BIT, box(-np.inf, np.inf), plain, near(1.5, 1), -0.15),
    "half bounded": (BIT, spaces.Box(np.array([0, -1], np.float32), np.array([np.inf, 1], np.float32)), plain,
                     near(np.array([1, 0.5]), 1), -0.15),  # fmt: skip
    "start": (BIT, spaces.Discrete(2, start=1), plain, lambda key, action: action == 1 + key % 2, 0.9),
    "several": (BIT, spaces.MultiDiscrete([[3, 2], [2, 4]]), plain,
                lambda key, action: (action == np.array([[2, key % 2], [1, 3]])).mean(), 0.9),  # fmt: skip
    "bits": (BIT, spaces.MultiBinary(3), plain, lambda key, action: (action == [1, 0, key % 2]).mean(), 0.9),
    "lookup": (spaces.Discrete(16), spaces.Discrete(4), np.int64, lambda key, action: action == LOOKUP[key], 0.9),
    "places": (spaces.MultiDiscrete([4, 4]), spaces.Discrete(4), lambda key: np.array([key // 4, key % 4]),
               lambda key, action: action == (3, 0, 2, 1)[key % 4], 0.9),  # fmt: skip
    "flags": (spaces.MultiBinary(4), TWO, lambda key: np.array([key >> i & 1 for i in range(4)], np.int8), bit, 0.9),
    "nested": (NESTED, TWO, nested, bit, 0.9),
    "large": (box(0, 2e8, dtype=np.float64), TWO, lambda key: np.array([1e8 + key % 2]), bit, 0.9),
    "tiny": (box(-1, 1), TWO, lambda key: np.array([1e-5 * (key % 2)], np.float32), bit, 0.9),
}  # fmt: skip
QUICK = dict(
    total_timesteps=3072, num_envs=16, num_steps=16, env_groups=1, eval_episodes=32, eval_every=0, hidden=16,
    learning_rate=1e-2, update_epochs=6, target_kl=0.1, num_minibatches=4,
)  # fmt: skip


@pytest.mark.parametrize("name", LEARNT)
def test_what_an_environment_shows_and_takes_is_learnt(name, run):
    *made, worth = LEARNT[name]
    env_id = register(f"Learnt{name.title().replace(' ', '')}", lambda: Match(*made))
    code, folder = run(env_id=env_id, **QUICK)
    first, last = rows(folder)[0], rows(folder)[-1]
    assert code == 0 and first["eval/episodic_return"] < worth <= last["eval/episodic_return"], last
    assert last["losses/first_ratio_error"] == 0


class OnDevice(gym.Env):
    """A stand-in for Isaac Lab: all environments are one object that speaks torch and resets within the step those
    that ended, whose last observation nobody sees. Each episode of 4 steps asks for the action that it shows."""

    def __init__(self, num_envs: int, tells: bool = False, box=(-np.inf, np.inf)):
        self.num_envs, self.device, self.tells = num_envs, torch.device("cpu"), tells
        self.single_action_space = spaces.Box(*box, (1,), np.float32)
        self.single_observation_space = spaces.Dict(policy=spaces.Box(-np.inf, np.inf, (2,)))
        self.t, self.seeds = torch.zeros(num_envs, dtype=torch.long), []

    def draw(self):
        return torch.rand(self.num_envs, generator=self.generator) * 2 - 1

    def look(self):
        self.buffer[:] = torch.stack([self.wanted, self.t.float()], 1)  # always the same memory
        return {"policy": self.buffer, "critic": torch.full((self.num_envs, 7), torch.nan)}

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer, self.wanted = torch.zeros(self.num_envs, 2), self.draw()
        self.t[:] = 0
        return self.look(), {}

    def step(self, action):
        assert action.shape == (self.num_envs, 1) and action.dtype == torch.float32 and action.device == self.device
        rewards, self.t = -((action[:, 0] - self.wanted) ** 2), self.t + 1
        cut = self.t == 4
        told = {"log": {}, "success": rewards > -0.01}
        if self.tells:  # as ManiSkill does
            told["final_obs"] = {"policy": self.look()["policy"].clone()}
        self.t, self.wanted = self.t * ~cut, torch.where(cut, self.draw(), self.wanted)
        return self.look(), rewards, torch.zeros_like(cut), cut, told


@pytest.mark.parametrize("tells", [False, True])
def test_a_simulator_on_a_gpu_is_a_vector_environment_like_the_others(tells, capsys):
    register(f"OnDevice{tells}", lambda num_envs: OnDevice(num_envs, tells, (-2, 6)))
    envs = TensorVec(f"OnDevice{tells}-v0", 3)
    first = envs.reset(seed=[7, 8, 9])[0].copy()
    assert envs.env.unwrapped.seeds == [7] and first.shape == (3, 2) and first.dtype == np.float32
    assert envs.single_action_space.low == -1 and envs.single_action_space.high == 1
    for t in range(1, 5):
        before = envs.last.copy()
        obs, rewards, terminations, truncations, infos = envs.step(np.array([[-1], [0], [1]], np.float32))
        np.testing.assert_allclose(rewards, -((np.array([-2, 2, 6]) - first[:, 0]) ** 2), rtol=1e-5)
        assert not terminations.any() and truncations.all() == (t == 4)
        if t < 4:
            assert obs[:, 1].tolist() == [t] * 3 and "final_obs" not in infos
    after = sim.successors(obs, infos, truncations)
    assert obs[:, 1].tolist() == [0] * 3 and np.array_equal(after[:, 0], first[:, 0])
    assert after[:, 1].tolist() == [4.0 if tells else 3.0] * 3 and (tells or np.array_equal(after, before))
    assert capsys.readouterr().err.count("hides last observations") == (not tells)
    assert not sim.success_flags(infos, truncations).any()


def test_a_simulator_on_a_gpu_is_learnt_and_what_it_cannot_is_refused_in_one_line(run, capsys):
    made = []
    register("OnDevice", lambda num_envs: made.append(OnDevice(num_envs)) or made[-1])
    flags = QUICK | dict(env_id="OnDevice-v0", env_backend="torch", gamma=0.5, eval_episodes=16, eval_every=4)
    code, folder = run(**flags)
    assert code == 0 and rows(folder)[-1]["losses/first_ratio_error"] == 0
    assert rows(folder)[0]["eval/episodic_return"] < -0.5 and rows(folder)[-1]["eval/episodic_return"] > -0.1
    assert rows(folder)[-1]["eval/episodic_length"] == 4 == rows(folder)[-1]["charts/episodic_length"]
    (env,) = made  # a simulator may be had once: after an evaluation, training goes on in episodes of its own
    trained = [seed for seed in env.seeds if seed not in (100_000, sim.VALIDATION_SEED)]
    assert len(env.seeds) == 5 + 4 + 4 and len(set(trained)) == len(trained) == 4
    capsys.readouterr()
    wrong = register("OneOnly", lambda num_envs: OnDevice(1))
    for changed, words in (
        ({"env_groups": 2}, "add --env-groups 1"),
        ({"max_episode_steps": 9}, "drop --max-episode-steps"),
        ({"capture_video": True}, "add --no-capture-video"),
        ({"eval_episodes": 3}, "give --eval-episodes 16"),
        ({"env_id": wrong}, "made 1 environments, not 16"),
        ({"env_id": "NoSuchThing-v0"}, "cannot make NoSuchThing-v0"),
        ({"env_id": "CartPole-v1"}, "cannot make CartPole-v1: TypeError"),
    ):
        code, _ = run(**flags | changed)
        assert code == 2 and words in one_line(capsys.readouterr().err)


def test_actions_reach_the_ends_of_their_box_and_no_further():
    space = spaces.Box(np.array([0, -np.inf, -3], np.float32), np.array([0.01, np.inf, np.inf], np.float32))
    actions = Actions(space)
    assert actions.policy.low.tolist() == [-1, -np.inf, -np.inf] and actions.policy.high[0] == 1
    for a, expected in (([-1, -7, -7], [0, -7, -3]), ([1, 7, 7], [0.01, 7, 7]), ([-9, 0, 0], [0, 0, 0])):
        done = actions.executed(np.array(a, np.float32))
        assert done.tolist() == np.array(expected, np.float32).tolist() and space.contains(done)
    assert actions.executed(actions.policy.zero).tolist() == [0, 0, 0]  # doing nothing is 0, not the middle of the box
    whole = Actions(spaces.Box(0, 255, (2, 3), np.uint8))
    assert whole.executed(np.zeros((4, 6))).shape == (4, 2, 3)  # of several environments at once
    assert Actions(spaces.Discrete(3, start=1)).executed(np.array([[0], [2]])).tolist() == [1, 3]
    assert whole.executed(np.linspace(-1, 1, 6)).tolist() == [[0, 51, 102], [153, 204, 255]]


def test_readings_keep_their_precision_and_floors_know_the_unit():
    args = replace(ppo_fetch.resolve(replace(ppo_fetch.Args(), env_id="Other-v0")), hidden=8)
    x = 1e8 + torch.rand(100, 1, dtype=torch.float64)
    for readings in (x, 1e-5 * torch.rand(100, 1), 1e-5 * torch.rand(100, 1) + 1):
        agent = ppo_fetch.Agent(1, BOX, args)
        agent.statistics.update(readings)
        assert agent.normalize(readings).dtype == torch.float32
        assert agent.normalize(readings).std() == pytest.approx(1, abs=0.05 if readings.dtype == torch.float64 else 0.7)
    noise = 1 + 1e-7 * torch.randn(100, 1)  # roundings of float32: not a signal
    agent = ppo_fetch.Agent(1, BOX, args)
    agent.statistics.update(noise)
    assert agent.normalize(noise).abs().max() < 0.3
    fetch_agent = ppo_fetch.Agent(1, BOX, replace(args, env_id="FetchReach-v4"))
    fetch_agent.statistics.update(1e-5 * torch.randn(100, 1))
    assert fetch_agent.normalize(1e-5 * torch.randn(100, 1)).abs().max() < 0.1  # metres: a blocked finger's noise


@pytest.mark.parametrize("module", [ppo_fetch, ppo_gr00t])
def test_returns_that_do_not_vary_are_no_measure_of_rewards(module):
    class Bare:
        scale_rewards = True

    for values, most in ((np.zeros(50), 1), (np.ones(50), 100), (np.full(50, 1e4) + np.arange(50) * 1e-6, 0.01)):
        agent = Bare()
        agent.return_statistics = module.RunningStatistics(1)
        agent.return_statistics.update(torch.from_numpy(values)[:, None])
        assert 0 < module.Agent.reward_scale(agent) <= most * 1.0001
    with pytest.raises(SystemExit):
        agent.return_statistics.update(torch.tensor([[torch.nan]]))


class Tells(Made):
    """Episodes of 6 steps that a time limit ends; what it says of success, and when."""

    def __init__(self, key: str, last_only: bool):
        super().__init__()
        self.key, self.last_only = key, last_only

    def step(self, action):
        self.t += 1
        ended = self.t == 6
        info = {self.key: self.t >= 5} if ended or not self.last_only else {}
        return self.observation_space.sample(), 0.0, False, ended, info


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize("last_only", [True, False])
def test_success_is_heard_under_both_names_at_any_step_or_the_last(key, last_only, run):
    env_id = register(f"Tells{key.replace('_', '')}{last_only}", lambda: Tells(key, last_only))
    code, folder = run(env_id=env_id, **SHORT)
    assert code == 0 and rows(folder)[0]["eval/success_rate"] == rows(folder)[-1]["charts/success_rate"] == 1.0


@pytest.mark.parametrize("env_id", ["RefusedEndless-v0", "FetchReach-v4"])
def test_an_episode_ends_when_the_flag_says(env_id, run):
    backend = "native" if env_id.startswith("Fetch") else "gymnasium"
    code, folder = run(env_id=env_id, env_backend=backend, max_episode_steps=7, **SHORT)
    assert code == 0
    assert rows(folder)[0]["eval/episodic_length"] == rows(folder)[-1]["charts/episodic_length"] == 7


def test_an_evaluation_without_a_time_limit_ends(monkeypatch):
    monkeypatch.setattr("common.robot.spaces.LONGEST", 12)
    args = ppo_fetch.resolve(replace(ppo_fetch.Args(), env_id="RefusedEndless-v0", eval_episodes=2))
    envs = sim.make_envs(args, 2, "gymnasium", evaluation=True)
    assert ppo_fetch.evaluate(ppo_fetch.do_nothing(envs.single_action_space), envs, args)["eval/episodic_length"] == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_not_for_the_processes_of_environments(number):
    args = ppo_fetch.resolve(replace(ppo_fetch.Args(), env_id="CartPole-v1"))
    envs = sim.make_envs(args, 2, "gymnasium-async")
    envs.reset(seed=1)
    for process in envs.processes:
        os.kill(process.pid, number)
    time.sleep(0.2)
    assert envs.step(np.zeros((2, 1), np.int64))[1].tolist() == [1.0, 1.0]
    assert all(process.is_alive() for process in envs.processes)
    envs.close()


def test_a_video_that_needs_a_package_says_which_and_training_goes_on(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    monkeypatch.setattr("common.robot.video.no_renderer", lambda: "")
    code, folder = run(env_id="CartPole-v1", **SHORT | {"capture_video": True})
    out = capsys.readouterr().out
    assert code == 0 and "video is off" in out and "pygame is not installed" in out
    assert Path(out.strip().splitlines()[-1].split("model ")[1]).exists()  # what the last line names is there


def test_no_interval_begins_below_zero():
    for n in range(1, 200):
        assert 0 <= wilson(0, n)[0] < 1e-12 and 1 - 1e-12 < wilson(n, n)[1] <= 1 and f"{wilson(0, n)[0]:.3f}" == "0.000"
