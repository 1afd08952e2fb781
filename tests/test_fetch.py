"""FetchVec computes what gymnasium computes, to the bit, and keeps the vector-env contract."""

import gc
import os
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from common.robot import fetch
from common.robot.fetch import TASKS, FetchVec


def reference(env_id: str, n: int, **kwargs):
    fetch.import_robotics()
    return gym.make_vec(
        env_id, n, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **kwargs
    )


def assert_same(ours, theirs, where=""):
    """Same keys, dtypes, masks and bits, however deep."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, tuple) or getattr(theirs, "dtype", None) is np.dtype(object):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            assert (a is None) == (b is None), f"{where}[{i}]"
            if b is not None:
                assert_same(a, b, f"{where}[{i}]")
    else:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        np.testing.assert_array_equal(ours, theirs, err_msg=where)


@pytest.mark.parametrize("task", TASKS)
def test_every_bit_equals_gymnasium_over_ten_episodes(task):
    """2 environments x 5 episodes of 50 steps: observations, rewards, ends, infos with final observations."""
    n = 2
    ours, theirs = FetchVec(f"{task}-v4", n, num_threads=2), reference(f"{task}-v4", n)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=11), theirs.reset(seed=11))
    rng, moved, ends = np.random.default_rng(0), 0, 0
    goal = ours.observe()["desired_goal"]
    for t in range(250):
        # towards the block or the goal half of the time, so that there is contact; beyond the box, so that it clips
        obs = ours.observe()
        target = obs["achieved_goal"] if task != "FetchReach" else obs["desired_goal"]
        aim = (target - obs["observation"][:, :3]) * 10
        actions = np.concatenate([aim, np.zeros((n, 1))], axis=1) + rng.normal(size=(n, 4)) * (0.3 if t % 2 else 1.5)
        actions = actions.astype(np.float32)
        a, b = ours.step(actions), theirs.step(actions)
        for name, x, y in zip(("obs", "reward", "terminated", "truncated", "infos"), a, b):
            assert_same(x, y, f"step {t} {name}")
        moved += np.abs(a[0]["achieved_goal"] - obs["achieved_goal"]).max() > 1e-3
        ends += a[3].sum()
    assert ends == 10 and moved > 50, "the test must see ten ends and much movement"
    assert not np.array_equal(goal, ours.observe()["desired_goal"])
    ours.close(), theirs.close()


def test_dense_ids_and_float64_actions_equal_gymnasium():
    ours, theirs = FetchVec("FetchPushDense-v4", 2), reference("FetchPushDense-v4", 2)
    assert_same(
        ours.reset(seed=[5, None])[0]["achieved_goal"][:1], theirs.reset(seed=[5, None])[0]["achieved_goal"][:1]
    )
    assert_same(ours.reset(seed=[5, 9]), theirs.reset(seed=[5, 9]))
    rng = np.random.default_rng(1)
    for _ in range(55):
        actions = rng.uniform(-2, 2, size=(2, 4))
        for x, y in zip(ours.step(actions)[:2], theirs.step(actions)[:2]):
            assert_same(x, y)


def test_rewards_given_by_keyword_and_other_time_limits():
    ours = FetchVec("FetchReach-v4", 1, reward_type="dense", max_episode_steps=3)
    theirs = reference("FetchReach-v4", 1, reward_type="dense", max_episode_steps=3)
    ours.reset(seed=0), theirs.reset(seed=0)
    for _ in range(7):
        for x, y in zip(ours.step(np.ones((1, 4), np.float32)), theirs.step(np.ones((1, 4), np.float32))):
            assert_same(x, y)


def test_masked_reset_touches_only_the_masked():
    ours, theirs = FetchVec("FetchPush-v4", 3), reference("FetchPush-v4", 3)
    ours.reset(seed=3), theirs.reset(seed=3)
    for _ in range(5):
        ours.step(np.ones((3, 4), np.float32)), theirs.step(np.ones((3, 4), np.float32))
    mask = np.array([False, True, False])
    a = ours.reset(options={"reset_mask": mask})
    b = theirs.reset(options={"reset_mask": mask.copy()})
    assert_same(a[0], b[0])
    actions = np.full((3, 4), 0.5, np.float32)
    assert_same(ours.step(actions)[0], theirs.step(actions)[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_numbers_do_not_depend_on_threads_or_on_neighbours(threads):
    alone = FetchVec("FetchPush-v4", 1, num_threads=1)
    many = FetchVec("FetchPush-v4", 5, num_threads=threads)
    alone.reset(seed=42), many.reset(seed=[1, 2, 42, 3, 4])
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.uniform(-1, 1, (5, 4)).astype(np.float32)
        a, b = alone.step(actions[2:3]), many.step(actions)
        for key in a[0]:
            np.testing.assert_array_equal(a[0][key][0], b[0][key][2])


@pytest.mark.parametrize("task, how", [("FetchReach", {}), ("FetchPickAndPlace", {"grasped": 0.5})])
def test_saved_state_continues_to_the_same_bits(task, how):
    """PickAndPlace's positions lag a substep behind: its welded body's pose has to be part of the state."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (80, 3, 4)).astype(np.float32)
    first, second = FetchVec(f"{task}-v4", 3, **how), FetchVec(f"{task}-v4", 3, **how)
    first.reset(seed=1)
    for a in actions[:30]:
        first.step(a)
    arrays, streams = first.get_state()
    second.reset(seed=99)
    second.step(actions[0])
    second.set_state({key: value.copy() for key, value in arrays.items()}, streams)
    assert_same(second.observe(), first.observe())
    for a in actions[30:]:  # beyond the end of the episode, so that the random streams are compared too
        for x, y in zip(first.step(a), second.step(a)):
            assert_same(x, y)


def test_a_share_of_episodes_begins_with_a_block_that_can_be_lifted():
    envs = FetchVec("FetchPickAndPlace-v4", 40, grasped=0.5)
    first, _ = envs.reset(seed=0)
    held = np.linalg.norm(first["achieved_goal"] - first["observation"][:, :3], axis=1) < 0.01
    assert 10 < held.sum() < 30 and len(np.unique(first["desired_goal"], axis=0)) == 40
    for _ in range(8):
        obs, *_ = envs.step(np.tile([0.0, 0.0, 1.0, -0.5], (40, 1)))
    height = obs["achieved_goal"][:, 2]
    assert height[held].min() > 0.6 and height[~held].max() < 0.43  # m; the table is at 0.42
    assert_same(envs.reset(seed=0)[0], first)


def test_step_async_lets_two_instances_share_one_pool():
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(2)
    pair = [FetchVec("FetchReach-v4", 2, pool=pool) for _ in range(2)]
    lone = FetchVec("FetchReach-v4", 2)
    [envs.reset(seed=8) for envs in [*pair, lone]]
    actions = np.full((2, 4), 0.3, np.float32)
    for _ in range(5):
        [envs.step_async(actions) for envs in pair]
        results = [envs.step_wait()[0] for envs in pair]
        expected = lone.step(actions)[0]
        assert_same(results[0], expected), assert_same(results[1], expected)
    with pytest.raises(AssertionError):
        lone.step_wait()


def test_observations_lie_in_the_space_and_are_fresh_arrays():
    envs = FetchVec("FetchSlide-v4", 2)
    obs, infos = envs.reset(seed=0)
    assert envs.observation_space.contains(obs) and infos == {}
    kept = {key: value.copy() for key, value in obs.items()}
    nxt, *_ = envs.step(np.ones((2, 4), np.float32))
    assert_same(obs, kept)  # stepping must not write into what was handed out
    assert envs.observation_space.contains(nxt)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert envs.np_random_seed == (0, 1) and len(envs.np_random) == 2


class One(gym.Env):
    """A FetchVec of one environment, seen as a plain environment, for gymnasium's checkers (it has none for vectors)."""

    def __init__(self, env_id="FetchPush-v4"):
        self.envs = FetchVec(env_id, 1)
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs, _ = self.envs.reset(seed=seed)
        self._np_random = self.envs.np_random[0]
        return {key: value[0] for key, value in obs.items()}, {}

    def step(self, action):
        obs, rewards, terminated, truncated, infos = self.envs.step(action[None])
        if truncated[0]:
            last = infos["final_obs"][0]
            return last, np.float32(rewards[0]), False, True, {"is_success": infos["final_info"]["is_success"][0]}
        obs = {key: value[0] for key, value in obs.items()}
        # a single sparse environment returns float32, vectors of them float64
        return (
            obs,
            np.float32(rewards[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            {"is_success": infos["is_success"][0]},
        )


@pytest.mark.filterwarnings("ignore:.*Box observation space:UserWarning", "ignore:.*check:UserWarning")
@pytest.mark.parametrize("task", TASKS)
def test_passes_gymnasiums_own_checkers(task):
    from gymnasium.utils.env_checker import check_env
    from gymnasium.utils.env_match import check_environments_match

    fetch.import_robotics()
    check_env(One(f"{task}-v4"), skip_render_check=True)
    theirs = gym.make(f"{task}-v4")  # its time limit is a wrapper, ours is inside
    check_environments_match(One(f"{task}-v4"), theirs, num_steps=49, seed=3, info_comparison="equivalence")


def test_works_under_gymnasiums_own_vector_wrappers():
    from gymnasium.wrappers.vector import ClipReward, RecordEpisodeStatistics

    envs = ClipReward(RecordEpisodeStatistics(FetchVec("FetchReach-v4", 2)), -0.5, 0.5)
    envs.reset(seed=0)
    for _ in range(50):
        _, rewards, _, truncated, infos = envs.step(np.zeros((2, 4), np.float32))
    assert truncated.all() and (rewards >= -0.5).all()
    np.testing.assert_array_equal(infos["episode"]["l"], [50, 50])


def test_wrong_shapes_and_ids_are_refused():
    with pytest.raises(ValueError, match="FetchReach-v4"):
        FetchVec("CartPole-v1", 1)
    envs = FetchVec("FetchReach-v4", 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        envs.step(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="seeds"):
        envs.reset(seed=[1, 2, 3])


class Member:
    """Of an enum of MuJoCo 3.12 and later: equal to its like, not to a number of numpy's."""

    def __init__(self, value):
        self.value = int(value)

    def __int__(self):
        return self.value

    def __eq__(self, other):
        return isinstance(other, Member) and other.value == self.value


@pytest.mark.parametrize("version, robotics, shimmed", [("3.12.0", "1.4.2", True), ("4.0.0", "1.4.2", True),
                                                        ("3.11.0", "1.4.2", False), ("4.0.0", "1.4.3", False)])  # fmt: skip
def test_enums_that_no_longer_equal_numbers_are_numbers_for_the_release_that_compares_them(
    version, robotics, shimmed, monkeypatch, capsys
):
    import gymnasium_robotics
    from gymnasium_robotics.utils import mujoco_utils

    env = reference("FetchPush-v4", 1).envs[0].unwrapped
    enums = {
        name: SimpleNamespace(**{key: Member(getattr(getattr(mujoco, name), key)) for key in keys})
        for name, keys in fetch.PlainEnums.CAST.items()
    }
    later = SimpleNamespace(**vars(mujoco) | enums | {"__version__": version})
    for module in (fetch, mujoco_utils):
        monkeypatch.setattr(module, "mujoco", later)
    monkeypatch.setattr(gymnasium_robotics, "__version__", robotics)
    with pytest.raises(AssertionError):
        mujoco_utils.set_joint_qpos(env.model, env.data, "robot0:slide0", 0.1)
    for _ in range(2):
        fetch.import_robotics()
    err = capsys.readouterr().err
    if not shimmed:
        assert mujoco_utils.mujoco is later and err == ""
        return
    assert err.count("\n") == 1 and version in err
    mujoco_utils.set_joint_qpos(env.model, env.data, "robot0:slide0", 0.1)
    assert mujoco_utils.get_joint_qpos(env.model, env.data, "robot0:slide0") == 0.1
    block = np.arange(7.0)
    mujoco_utils.set_joint_qpos(env.model, env.data, "object0:joint", block)  # a free joint: seven numbers
    assert np.array_equal(mujoco_utils.get_joint_qpos(env.model, env.data, "object0:joint"), block)
    env.data.mocap_pos[:] = 9
    mujoco_utils.reset_mocap2body_xpos(env.model, env.data)  # looks for the weld
    assert (env.data.mocap_pos != 9).all() and mujoco_utils.mujoco.mj_step is mujoco.mj_step


def test_a_hundred_resets_and_thousands_of_steps_leave_memory_as_it_was():
    """The long soak is benchmarks/fetch_speed.py --soak; this one would show a leak of 1 kB a step."""
    envs = FetchVec("FetchReach-v4", 8)
    envs.reset(seed=0)
    actions = np.zeros((8, 4), np.float32)

    def rss() -> float:
        gc.collect()
        pages = int(open("/proc/self/statm").read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    for _ in range(60):
        envs.step(actions)
    before = rss()
    for _ in range(600):  # 4,800 environment steps, 96 episodes
        envs.step(actions)
    assert rss() - before < 4.0  # MB


# ---- features and rewards --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def push_obs():
    envs = FetchVec("FetchPush-v4", 64)
    obs, _ = envs.reset(seed=0)
    for _ in range(3):
        obs, *_ = envs.step(np.random.default_rng(0).uniform(-1, 1, (64, 4)))
    return obs


@pytest.mark.parametrize(
    "mode, reach, other", [("observation", 10, 25), ("observation_goal", 13, 28), ("full", 16, 31), ("delta", 19, 37)]
)
def test_observation_modes_have_the_documented_sizes_and_parts(mode, reach, other, push_obs):
    obs, _ = FetchVec("FetchReach-v4", 2).reset(seed=0)
    x, y = fetch.flatten(obs, mode), fetch.flatten(push_obs, mode)
    assert x.shape == (2, reach) and y.shape == (64, other) and x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(y[:, :25], push_obs["observation"].astype(np.float32))
    if mode == "delta":
        goal, block = push_obs["desired_goal"], push_obs["achieved_goal"]
        np.testing.assert_allclose(y[:, 31:34], goal - block, rtol=1e-6)
        np.testing.assert_allclose(y[:, 34:], push_obs["observation"][:, 6:9], rtol=1e-6)


def test_rewards_are_the_simulators_and_the_origins(push_obs):
    sparse, dense = reference("FetchPush-v4", 1).envs[0].unwrapped, reference("FetchPushDense-v4", 1).envs[0].unwrapped
    goals = push_obs["achieved_goal"], push_obs["desired_goal"]
    np.testing.assert_array_equal(fetch.reward(push_obs, "sparse"), sparse.compute_reward(*goals, {}))
    np.testing.assert_array_equal(fetch.reward(push_obs, "dense"), dense.compute_reward(*goals, {}))
    near = {"achieved_goal": np.zeros((3, 3)), "desired_goal": np.diag([0.049, 0.051, 0.2])}
    np.testing.assert_allclose(fetch.reward(near, "distance"), [10 - 0.049, -0.051, -0.2])


def test_potential_rises_when_the_gripper_gets_behind_the_block_and_when_the_block_nears_the_goal():
    block, goal = np.array([1.3, 0.7, 0.42]), np.array([1.4, 0.7, 0.42])

    def phi(gripper, block):
        state = np.zeros((1, 25))
        state[0, :3] = gripper
        return fetch.potential(
            {"observation": state, "achieved_goal": block[None], "desired_goal": goal[None]}, "FetchPush"
        )[0]

    behind, front, far = block - [0.06, 0, 0], block + [0.06, 0, 0], block + [0, 0, 0.5]
    assert phi(behind, block) > phi(front, block) > phi(far, block)
    assert phi(behind, block) == pytest.approx(-0.3) and phi(far, block) == pytest.approx(-0.6)
    assert phi(behind + [0.02, 0, 0], block + [0.02, 0, 0]) > phi(behind, block)
    assert phi(far, goal) == pytest.approx(0.0)  # at the goal the gripper may be anywhere
