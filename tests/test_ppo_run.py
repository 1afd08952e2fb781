"""Whole runs of ppo_fetch.py: probes with known values, resume, determinism, what it refuses, and that it learns."""

import json
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
from conftest import ROOT, flags_of, rows, run_script, timeless, two_forks
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import load_file, save_file
from test_docs import documented_metrics
from test_ppo_math import WORLD

import ppo_fetch
from common import stop, streams
from common.robot import fetch, sim
from common.robot.video import Videos
from ppo_fetch import Agent, Args, Group, finish_step, gae, rollout

FETCH = dict(  # FetchReach, 4 iterations of 8 x 10 steps
    num_envs=8, num_steps=10, total_timesteps=320, hidden=16, num_minibatches=2, update_epochs=2, eval_episodes=2,
    eval_every=2, capture_video=False, num_threads=2,
)  # fmt: skip
GROUPS = FETCH | dict(advantage="group", group_size=4, max_episode_steps=10, learning_rate=1e-2)  # of whole episodes
GYM = dict(env_backend="gymnasium", eval_episodes=2, eval_every=0, capture_video=False, env_groups=1, num_minibatches=4,
           target_kl=0.03)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs main() in this process; returns (exit code, run folder)."""

    def start(**flags):
        place = {} if "resume" in flags else {"output_dir": tmp_path / "runs"}
        code = run_script(ppo_fetch, ["ppo_fetch.py", *flags_of(**place | flags)], monkeypatch)
        runs = sorted((tmp_path / "runs" / "ppo_fetch").glob("*"), key=lambda p: p.stat().st_mtime)
        return code, runs[-1] if runs else None

    return start


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- probe environments: the right answer is known -------------------------------------------------------------------


class ConstantReward(gym.Env):
    """Reward 1 at every step; after 5 steps a time limit cuts (truncation) or the world ends (termination).

    A time limit is no part of the world, so the observation shows the time only where it ends the world.
    """

    observation_space, action_space = gym.spaces.Box(-10, 10, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, terminate: bool):
        self.terminate = terminate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.t += 1
        done = self.t == 5
        return (
            np.array([self.t * self.terminate], np.float32),
            1.0,
            done and self.terminate,
            done and not self.terminate,
            {},
        )


class RandomWalk(gym.Env):
    """Episodes of random length that end either way; the observation is (episode, step, noise), whatever the action."""

    observation_space, action_space = gym.spaces.Box(-1e3, 1e3, (3,)), gym.spaces.Box(-1, 1, (1,))
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {}

    def look(self):
        return np.array([self.episode, self.t, self.np_random.normal()], np.float32)

    def step(self, action):
        self.t += 1
        end = self.np_random.random() < 0.25
        how = self.np_random.random() < 0.5
        return self.look(), float(self.np_random.normal()), end and how, end and not how, {}


class Bandit(gym.Env):
    """One step; the reward of the action is known, so the best action is too."""

    observation_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, discrete: bool):
        self.action_space = gym.spaces.Discrete(4) if discrete else gym.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        if isinstance(self.action_space, gym.spaces.Discrete):
            best = 2 * (self.obs[0] > 0) + (self.obs[1] > 0)
            return self.obs, float(action == best), True, False, {}
        return self.obs, -float((action[0] - self.obs[0]) ** 2), True, False, {}


class Solved(ConstantReward):
    """At the goal whatever one does."""

    def __init__(self):
        super().__init__(terminate=True)

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {"is_success": 1.0}


gym.register("ProbeTruncated-v0", lambda: ConstantReward(False))
gym.register("ProbeTerminated-v0", lambda: ConstantReward(True))
gym.register("ProbeSolved-v0", Solved)
gym.register("ProbeBandit-v0", lambda: Bandit(False))
gym.register("ProbeDiscreteBandit-v0", lambda: Bandit(True))


@pytest.mark.parametrize("how", ["Truncated", "Terminated"])
def test_a_constant_reward_is_worth_what_it_should_be(how, run):
    """r = 1, gamma = 0.9, 5 steps: cut by a time limit V = 1 / (1 - 0.9) = 10 everywhere; ended, (1 - 0.9^k) / 0.1."""
    code, folder = run(
        env_id=f"Probe{how}-v0", total_timesteps=20_000, num_envs=8, num_steps=25, gamma=0.9, learning_rate=3e-3,
        hidden=32, **GYM | {"target_kl": 0},
    )  # fmt: skip
    assert code == 0
    args = ppo_fetch.resolve(replace(Args(), env_id=f"Probe{how}-v0", hidden=32, gamma=0.9))
    agent = Agent(1, ConstantReward.action_space, args)
    agent.load_state_dict(load_file(folder / "last" / "model.safetensors"))
    with torch.no_grad():
        values = agent.value(torch.arange(5.0)[:, None] * (how == "Terminated")) / agent.reward_scale()
    remaining = torch.arange(5.0, 0, -1)
    expected = torch.full((5,), 10.0) if how == "Truncated" else (1 - 0.9**remaining) / 0.1
    torch.testing.assert_close(values.float(), expected, atol=0.3, rtol=0)
    if how == "Terminated":  # with the time limit nothing varies that could be explained
        assert rows(folder)[-1]["losses/explained_variance"] > 0.9


@pytest.mark.parametrize("discrete", [False, True])
def test_a_bandit_is_solved(discrete, run):
    code, folder = run(
        env_id=f"Probe{'Discrete' if discrete else ''}Bandit-v0", total_timesteps=16_000, num_envs=8, num_steps=32,
        hidden=32, learning_rate=3e-3, **(GYM | {"eval_episodes": 50}),
    )  # fmt: skip
    first, last = rows(folder)[0], rows(folder)[-1]
    if discrete:
        assert first["eval/episodic_return"] < 0.6 and last["eval/episodic_return"] > 0.9
    else:
        assert first["eval/episodic_return"] < -0.2 and last["eval/episodic_return"] > -0.03


def test_both_autoreset_modes_give_the_same_advantages():
    """NEXT_STEP adds a step without action or reward after each end: it must reach neither the sums nor the loss."""
    args = replace(ppo_fetch.resolve(replace(Args(), env_id="Walk-v0")), num_envs=3, num_steps=60, hidden=8, gamma=0.9)
    torch.manual_seed(0)
    agent = Agent(3, RandomWalk.action_space, args)
    collected = {}
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        group = Group(SyncVectorEnv([RandomWalk] * 3, autoreset_mode=mode), slice(0, 3), [1, 2, 3], args)
        batch, _ = rollout(agent, [group], args, torch.Generator().manual_seed(0), WORLD)
        with torch.no_grad():
            values, next_values = agent.value(batch["obs"]), agent.value(batch["next_obs"])
        advantages, _ = gae(batch["rewards"], values, next_values, batch["terminations"], batch["dones"], 0.9, 0.95)
        for env in range(3):
            real = batch["valid"][:, env]
            keep = [
                batch[k][real, env].reshape(real.sum(), -1).float()
                for k in ("obs", "next_obs", "rewards", "terminations")
            ]
            last = int(batch["dones"][real, env].nonzero()[-1])
            collected[mode, env] = torch.cat([*keep, advantages[real, env][:, None]], dim=1)[: last + 1]
    for env in range(3):
        same, following = collected[AutoresetMode.SAME_STEP, env], collected[AutoresetMode.NEXT_STEP, env]
        assert len(following) > 20  # several whole episodes
        n = min(len(same), len(following))
        torch.testing.assert_close(same[:n], following[:n], rtol=0, atol=0)
        assert (following[:, 1] == 0).sum() > 4 and torch.equal(
            following[:, 3], following[:, 0]
        )  # no row spans a reset


def test_the_value_after_a_time_limit_is_that_of_the_last_observation():
    """The reset observation looks like a million; nothing of it may get into the step before it."""

    class Jackpot(RandomWalk):
        def look(self):
            return np.array([1e3 if self.t == 0 else 0.0, self.t, 0.0], np.float32)

    args = replace(ppo_fetch.resolve(replace(Args(), env_id="Walk-v0")), num_envs=2, num_steps=40, hidden=8)
    group = Group(SyncVectorEnv([Jackpot] * 2, autoreset_mode=AutoresetMode.SAME_STEP), slice(0, 2), [0, 1], args)
    batch, _ = rollout(Agent(3, RandomWalk.action_space, args), [group], args, torch.Generator().manual_seed(0), WORLD)
    assert batch["dones"].sum() > 5
    assert batch["next_obs"][..., 0].max() == 0 and batch["obs"][1:][batch["dones"][:-1]][:, 0].min() == 1e3


# ---- Fetch -----------------------------------------------------------------------------------------------------------


def collect(args: Args, backend: str, groups: int = 1, seed=0):
    torch.manual_seed(seed)
    args = replace(args, env_backend=backend, env_groups=groups)
    made = ppo_fetch.make_groups(args, WORLD)
    agent = Agent(made[0].x.shape[1], made[0].envs.single_action_space, args)
    return rollout(agent, made, args, torch.Generator().manual_seed(0), WORLD)


def reach_args(**changes) -> Args:
    return ppo_fetch.resolve(replace(Args(), num_envs=4, num_steps=60, stagger=False, **changes))


@pytest.mark.parametrize("mode", ["sparse", "dense", "distance", "shaped", "env"])
def test_native_and_gymnasium_backends_collect_the_same_bits(mode):
    args = reach_args(reward_mode=mode)
    (a, ended_a), (b, ended_b) = collect(args, "native"), collect(args, "gymnasium")
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert ended_a == ended_b and len(ended_a) == 4 and all(e["length"] == 50 for e in ended_a)
    assert a["dones"].sum() == 4 and a["terminations"].sum() == 0


def test_environments_in_processes_collect_the_same_bits_too():
    args = replace(reach_args(), num_envs=2)
    (a, ended_a), (b, ended_b) = collect(args, "native"), collect(args, "gymnasium-async")
    assert all(torch.equal(a[key], b[key]) for key in a) and ended_a == ended_b


def test_groups_that_overlap_collect_the_same_bits_as_one():
    args = reach_args()
    (a, _), (b, _) = collect(args, "native"), collect(args, "native", groups=2)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)  # a matrix product may round by its batch size


def test_shaping_telescopes_over_an_episode(monkeypatch):
    """With g = 1 an episode's shaping adds up to k (Phi(end) - Phi(start)), whatever happens in between."""
    monkeypatch.setattr(ppo_fetch, "SUCCESS_REWARD", 0.0)
    args = reach_args(env_id="FetchPush-v4", reward_mode="shaped")
    group = Group(sim.make_envs(args, 4, "native"), slice(0, 4), [1, 2, 3, 4], args)
    start, episodes = group.potential.copy(), []
    rng = np.random.default_rng(0)
    for _ in range(50):
        before = group.x
        group.wait = sim.start(group.envs, rng.uniform(-1, 1, (4, 4)))
        transition, ended = finish_step(group, args)
        episodes += ended
    assert not np.array_equal(before, group.x)
    final = transition["next_obs"]  # delta observations: state 25, achieved 3, goal 3, ...
    end = {"observation": final[:, :25], "achieved_goal": final[:, 25:28], "desired_goal": final[:, 28:31]}
    expected = ppo_fetch.SHAPING * (fetch.potential(end, "FetchPush") - start)
    np.testing.assert_allclose([e["return"] for e in episodes], expected, atol=1e-4)


def test_staggered_starts_spread_the_ends_over_time():
    args = replace(reach_args(), stagger=True, num_envs=10, num_steps=50)
    batch, episodes = collect(args, "native")
    ends = batch["dones"].float().sum(1)
    assert ends.max() == 1 and ends.sum() == 10
    assert len(episodes) == 1  # only the one that began at age 0; parts of episodes are not reported


def test_grasped_starts_are_for_training_alone():
    args = reach_args(env_id="FetchPickAndPlace-v4", grasped_starts=1.0)
    (trained,) = ppo_fetch.make_groups(replace(args, env_groups=1), WORLD)
    evaluated = Group(sim.make_envs(args, 4, "native", evaluation=True), slice(0, 4), [1, 2, 3, 4], args)
    away = [np.linalg.norm(group.x[:, -3:], axis=1) for group in (trained, evaluated)]  # of the block, from the gripper
    assert away[0].max() < 0.01 and away[1].min() > 0.1


def test_gymnasiums_environments_have_no_grasped_starts_and_nobody_has_to_say_so(run):
    flags = FETCH | dict(env_id="FetchPickAndPlace-v4", env_backend="gymnasium", total_timesteps=100)
    code, folder = run(**flags)
    assert code == 0 and json.loads((folder / "config.json").read_text())["args"]["grasped_starts"] == 0


def test_a_run_logs_what_the_page_documents_and_resumes_to_the_same_bits(run, figures):
    code, whole = run(
        **FETCH | {"num_steps": 15, "total_timesteps": 480}, save_every=2
    )  # long enough for whole episodes
    assert code == 0
    logged = {key for row in rows(whole) for key in row} - {"step"}
    assert logged | {"charts/groups_alike"} == documented_metrics("ppo_fetch.md")
    assert [row["step"] for row in rows(whole)] == [0, 120, 240, 360, 480]
    assert (whole / "learning.png").stat().st_size > 5000 and (whole / "health.png").stat().st_size > 5000
    assert (whole / "report.html").stat().st_size > 50_000
    config = json.loads((whole / "config.json").read_text())
    assert config["versions"]["mujoco"] and config["args"]["gamma"] == 0.9
    assert (whole / "ppo_fetch.py").read_text() == (ROOT / "ppo_fetch.py").read_text()
    reference, final = timeless(whole), load_file(whole / "last" / "model.safetensors")
    code, resumed = run(resume=str(whole / "checkpoints" / "step-000000240"))
    assert code == 0 and resumed == whole
    assert timeless(whole) == reference
    again = load_file(whole / "last" / "model.safetensors")
    assert all(torch.equal(again[key], final[key]) for key in final)


def test_a_group_begins_every_episode_at_one_start_and_goes_its_own_ways():
    args = replace(reach_args(env_id="FetchPush-v4", advantage="group", group_size=3), num_envs=6, num_steps=50)
    groups = ppo_fetch.make_groups(args, WORLD)  # two that overlap, a group of three in each
    agent = Agent(groups[0].x.shape[1], groups[0].envs.single_action_space, args)
    for iteration in range(2):
        starts = [group.envs.get_state()[0] for group in groups]
        for start in starts:
            for name in ("physics", "pose", "goal", "elapsed"):
                assert all(np.array_equal(row, start[name][0]) for row in start[name]), (iteration, name)
        assert not np.array_equal(starts[0]["goal"][0], starts[1]["goal"][0])
        assert not np.array_equal(starts[0]["physics"][0], starts[1]["physics"][0])
        batch, episodes = rollout(agent, groups, args, torch.Generator().manual_seed(iteration), WORLD)
        assert batch["dones"][-1].all() and batch["dones"].sum() == 6 and len(episodes) == 6
        assert torch.equal(batch["obs"][0, 0], batch["obs"][0, 2])
        assert not torch.equal(batch["obs"][1, 0], batch["obs"][1, 2])


def test_without_a_critic_none_is_trained_and_the_run_resumes_to_the_same_bits(run):
    code, whole = run(**GROUPS, save_every=1, keep=9)
    assert code == 0
    reference, final = timeless(whole), load_file(whole / "last" / "model.safetensors")
    for row in reference[1:]:
        assert row["losses/first_ratio_error"] == 0 == row["losses/value_loss"] == row["charts/groups_alike"]
        assert row["losses/optimizer_steps"] and "losses/explained_variance" not in row
    first = load_file(whole / "checkpoints" / "step-000000080" / "model.safetensors")
    for key in final:
        moved = not torch.equal(first[key], final[key])
        assert moved == key.startswith(("actor", "log_std", "statistics.")), key
    code, again = run(resume=str(whole / "checkpoints" / "step-000000160"))
    assert code == 0 and again == whole and timeless(whole) == reference
    assert all(torch.equal(value, final[key]) for key, value in load_file(whole / "last" / "model.safetensors").items())


def test_groups_that_cannot_be_are_refused_in_one_line(run, capsys):
    for flags, words in (
        ({"group_size": 4}, "--advantage group alone"),
        ({"advantage": "group", "group_size": 5}, "try --group-size 4"),
        ({"advantage": "group", "group_size": 1}, "try --group-size 2"),
        ({"advantage": "group", "num_steps": 60}, "try --num-steps 50"),
        ({"advantage": "group", "gae_lambda": 0.9}, "--gae-lambda is read by --advantage gae alone"),
        ({"advantage": "group", "norm_adv": False}, "--norm-adv"),
        ({"advantage": "group", "stagger": False}, "--stagger"),
        (
            {"advantage": "group", "env_id": "ProbeSolved-v0", "env_backend": "gymnasium", "num_minibatches": 4},
            "--advantage gae",
        ),
    ):
        code, folder = run(**flags)
        err = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and folder is None and len(err) == 1 and words in err[0], err


def test_same_seed_same_numbers_other_seed_other_numbers_and_video_changes_none(run):
    from gl import gl_missing

    a, b, c = (run(**FETCH | {"seed": seed})[1] for seed in (1, 1, 2))
    assert timeless(a) == timeless(b) and timeless(a)[1:] != timeless(c)[1:]
    if why := gl_missing():
        pytest.skip(f"no video here: {why}")
    filmed = run(**FETCH | {"capture_video": True, "video_every": 2, "video_episodes": 1})[1]
    assert timeless(filmed) == timeless(a) and same_weights(filmed / "last", a / "last")
    table = rows(filmed, "video_table")
    assert [row["global_step"] for row in table] == [160, 320]
    columns = {"step", "global_step", "episode", "video", "episode_return", "episode_length", "final_distance"}
    assert set(table[0]) == columns | {"success", "success_once"} and table[0]["episode_length"] == 50
    import imageio

    frames = imageio.mimread(table[0]["video"], memtest=False)
    assert len(frames) == 50 and frames[0].shape == (240, 240, 3)
    assert np.std(frames[0]) > 10 and not np.array_equal(frames[0], frames[-1])  # a picture, and it moves


def test_training_goes_on_without_a_renderer_and_says_so(run, monkeypatch, capsys):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    code, folder = run(**FETCH | {"capture_video": True, "video_every": 1})
    out = capsys.readouterr().out
    assert code == 0 and out.count("video is off") == 1 and "libegl1" in out
    assert not (folder / "videos").exists()


def test_an_evaluation_leaves_statistics_and_streams_alone(run):
    often, seldom = run(**FETCH | {"eval_every": 1})[1], run(**FETCH | {"eval_every": 0})[1]
    assert same_weights(often / "last", seldom / "last")


def test_do_nothing_is_measured_and_the_interval_holds(run):
    _, folder = run(**FETCH | {"eval_episodes": 40})
    first = rows(folder)[0]
    assert first["baseline/success_rate"] <= 0.1 and first["baseline/episodic_length"] == 50
    assert first["eval/success_rate_low"] <= first["eval/success_rate"] <= first["eval/success_rate_high"]


def test_eval_only_and_init_from_use_the_saved_policy_and_refuse_foreign_ones(run, capsys):
    _, folder = run(**FETCH)
    wanted = [row for row in rows(folder) if "eval/success_rate" in row]
    best = max(wanted, key=lambda r: (r["validation/success_rate"], r["validation/episodic_return"]))
    assert (folder / "best").exists() == (best["step"] > 0)  # what was not trained yet is not saved
    if best["step"] == 0:
        best = wanted[-1]
    code, measured = run(init_from=str(folder), eval_only=True, hidden=16, eval_episodes=2, capture_video=False)
    assert code == 0 and rows(measured)[0]["eval/episodic_return"] == best["eval/episodic_return"]
    for flags, words in (
        ({"env_id": "FetchPush-v4", "hidden": 16}, "--env-id FetchReach-v4"),
        ({"hidden": 32}, "--hidden 16"),
        ({"hidden": 16, "observation_mode": "full"}, "--observation-mode delta"),
        ({"hidden": 16, "normalize_obs": False}, "add --normalize-obs"),
    ):
        capsys.readouterr()
        code, _ = run(init_from=str(folder), eval_only=True, **flags)
        assert code == 2 and words in capsys.readouterr().err
    found = load_file(folder / "last" / "model.safetensors")
    found.pop("critic_head.bias")
    save_file(found, folder / "last" / "model.safetensors")
    code, _ = run(init_from=str(folder / "last"), eval_only=True, hidden=16)
    assert code == 2 and "critic_head.bias" in capsys.readouterr().err.strip().splitlines()[-1]


def test_fetch_reach_is_learned_in_seconds(run):
    """6,400 steps of the default recipe; doing nothing succeeds in 2 of 100 episodes."""
    code, folder = run(total_timesteps=6400, eval_every=0, eval_episodes=50, capture_video=False)
    last = rows(folder)[-1]
    assert code == 0 and last["eval/success_rate"] >= 0.8, last["eval/success_rate"]
    assert last["losses/optimizer_steps"] <= 40 and rows(folder)[0]["baseline/success_rate"] < 0.1


def test_a_stopped_run_saves_and_names_the_command_that_continues_it(run, monkeypatch, capsys):
    whole = run(**FETCH)[1]
    seen = []

    def interrupt(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    original = ppo_fetch.update
    monkeypatch.setattr(ppo_fetch, "update", interrupt)
    time.sleep(1.1)  # run folders are named by the second
    code, folder = run(**FETCH)
    assert code == 143 and f"--resume {folder}" in capsys.readouterr().out
    monkeypatch.setattr(ppo_fetch, "update", original)
    code, _ = run(resume=str(folder))
    assert code == 0 and timeless(folder) == timeless(whole)


@pytest.mark.parametrize("which, step", [(5, 160), (6, 320)], ids=["the validation between", "the last evaluation"])
def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_up_for_it(which, step, run, monkeypatch):
    """An evaluation may last: it does not wait for its end, and what it would have found is found later."""
    whole = run(**FETCH)[1]
    calls, steps, play, finish = [], [], ppo_fetch.play, ppo_fetch.finish_step

    def interrupted(*args):
        calls.append(1)
        if len(calls) == which:  # doing nothing; evaluation and validation before training, after 2 iterations, after 4
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(ppo_fetch, "finish_step", lambda *a: steps.append(1) or finish(*a))
        return play(*args)

    monkeypatch.setattr(ppo_fetch, "play", interrupted)
    time.sleep(1.1)  # run folders are named by the second
    code, folder = run(**FETCH)
    assert code == 143 and steps == [] and rows(folder)[-1]["step"] == step - 80
    log = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(log + json.dumps({"step": step}) + "\n")  # resumed before, and killed
    code, _ = run(resume=str(folder))
    assert code == 0 and timeless(folder) == timeless(whole)
    assert same_weights(folder / "last", whole / "last")
    assert (folder / "best").exists() == (whole / "best").exists()


def test_a_signal_ends_a_video_which_is_left_out_and_the_next_is_not(run, monkeypatch, capsys, tmp_path):
    class Run:
        folder, unit, world, say, tables = tmp_path, 1, WORLD, print, []

        def table(self, *rows):
            self.tables.append(rows)

    monkeypatch.setattr("common.robot.video.no_renderer", lambda: "")
    monkeypatch.setattr(stop, "received", signal.SIGTERM)
    monkeypatch.setattr(stop, "patient", True)
    args = ppo_fetch.resolve(replace(Args(), env_id="ProbeSolved-v0", **GYM))
    act, filmed = (lambda x: np.zeros((2, 1))), []

    def record(path):
        envs = sim.make_envs(args, 2, "gymnasium", evaluation=True)
        filmed.append(ppo_fetch.play(act, envs, 0, args, draw=lambda: None))
        return []

    made = Run()
    videos = Videos(made, True)
    videos.film(1, record)
    assert filmed == made.tables == [] and capsys.readouterr().out == ""
    monkeypatch.setattr(stop, "received", None)
    videos.film(2, record)
    assert len(filmed) == len(made.tables) == 1


def test_a_run_may_end_when_it_has_succeeded_three_times(run):
    code, folder = run(
        env_id="ProbeSolved-v0", total_timesteps=8000, num_envs=4, num_steps=10, hidden=8, stop_success=0.9,
        **(GYM | {"eval_every": 2}),
    )  # fmt: skip
    assert code == 0
    # evaluations at 0, 80 and 160 steps; the run has 200 iterations
    assert rows(folder)[-1]["step"] == 160 and (folder / "last" / "model.safetensors").exists()


def test_validation_picks_the_best_and_may_end_a_run_and_evaluation_does_neither(run, monkeypatch):
    """Here evaluations succeed, from the first one on, and validations get better."""
    seeds = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            seeds.append(seed)
            self.reported = 100_000 <= seed < 100_002
            self.reward = -1.0 if self.reported else float(len(seeds))
        return ConstantReward.reset(self, seed=seed)

    def step(self, action):
        obs, _, *ends, _ = ConstantReward.step(self, action)
        return obs, self.reward, *ends, {"is_success": float(self.reported)}

    monkeypatch.setattr(Solved, "reset", reset)
    monkeypatch.setattr(Solved, "step", step)
    flags = GYM | dict(eval_every=1, num_envs=4, num_steps=10, hidden=8, total_timesteps=160, stop_success=0.9)
    code, folder = run(env_id="ProbeSolved-v0", **flags)
    assert code == 0 and [row["eval/success_rate"] for row in rows(folder)] == [1.0] * 5
    assert [row["validation/success_rate"] for row in rows(folder)] == [0.0] * 5
    assert (folder / "best").resolve().name == "step-000000160"
    validation = set(range(sim.VALIDATION_SEED, sim.VALIDATION_SEED + 2))
    assert set(seeds) > validation | {100_000, 100_001}
    assert len(set(seeds)) == 4 + 4 + 1  # of training, and of a look before it: all others


@pytest.mark.parametrize("num_minibatches, base", [(2, FETCH), (40, FETCH), (2, GROUPS)], ids=["2", "40", "group"])
def test_two_processes_agree_with_one(num_minibatches, base, run, monkeypatch):
    """Same environments, noise and minibatches; only the order of float sums differs. Of two rows, a process may have
    none."""
    flags = base | {"capture_video": False, "env_groups": 1, "num_minibatches": num_minibatches, "target_kl": 0}
    code, single = run(**flags)
    main = ppo_fetch.main
    monkeypatch.setattr(ppo_fetch, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code_two, double = run(**flags)
    assert code == code_two == 0 and single != double
    found = [(timeless(folder), load_file(folder / "last" / "model.safetensors")) for folder in (single, double)]
    (rows_1, weights_1), (rows_2, weights_2) = found
    for a, b in zip(rows_1, rows_2, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
    for key in weights_1:
        torch.testing.assert_close(weights_1[key], weights_2[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"env_id": "FetchReach-v3"}, "FetchReach-v4"),
        ({"env_id": "FetchJump-v4"}, "FetchPickAndPlace-v4"),
        ({"env_id": "CartPole-v1"}, "--env-backend gymnasium"),
        ({"env_id": "NoSuchThing-v0", "env_backend": "gymnasium"}, "NoSuchThing"),
        ({"env_id": "CartPole-v1", "env_backend": "gymnasium", "reward_mode": "dense"}, "--reward-mode env"),
        ({"num_minibatches": 3}, "try 2"),
        ({"num_envs": 31}, "--num-envs 30"),
        ({"total_timesteps": 10}, "batch of 800"),
        ({"reward_mode": "sprase"}, "sprase"),
        ({"grasped_starts": 0.5}, "FetchPickAndPlace-v4"),
        ({"gamma": 1.5}, "--gamma"),
        ({"eval_only": True}, "--init-from"),
        ({"resume": "/nowhere/run"}, "does not exist"),
        ({"init_from": "/nowhere/run"}, "does not exist"),
    ],
)
def test_wrong_input_ends_in_one_line_with_exit_code_2(flags, words, run, capsys):
    code, _ = run(**flags)
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and words in err[-1] and sum(line.startswith("error") for line in err) == 1


def test_no_random_stream_of_a_run_is_used_twice_or_by_the_next_seed(run, monkeypatch):
    found, original = [], streams.stream_seed

    def spy(seed, name, *indices):
        found.append(original(seed, name, *indices))
        return found[-1]

    monkeypatch.setattr(streams, "stream_seed", spy)
    monkeypatch.setattr(ppo_fetch, "stream_seed", spy)
    for seed in (1, 2):
        run(**FETCH | {"seed": seed})
    assert len(found) == len(set(found)) == 2 * (8 + 4 + 4)  # environments, noise and minibatch order of each iteration
    assert len({number % 2**32 for number in found}) == len(found)  # what an environment's seed keeps of it


def test_environments_that_cannot_be_saved_start_anew_and_say_so(run, capsys, monkeypatch):
    seeds, reset = [], Solved.reset
    monkeypatch.setattr(Solved, "reset", lambda self, seed=None, **how: seeds.append(seed) or reset(self, seed=seed))
    code, folder = run(env_id="ProbeSolved-v0", total_timesteps=160, num_envs=4, num_steps=10, save_every=2, **GYM)
    assert code == 0
    first = {seed for seed in seeds if seed is not None}
    seeds.clear()
    code, again = run(resume=str(folder / "checkpoints" / "step-000000080"))
    assert code == 0 and again == folder and "start anew" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == [0, 40, 80, 120, 160]
    assert len({seed for seed in seeds if seed is not None} - first) == 4  # other episodes than at the start
