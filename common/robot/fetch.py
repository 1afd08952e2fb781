"""The Fetch robot (gymnasium-robotics, -v4 tasks), many at a time, bit for bit what gymnasium computes.

`FetchVec` keeps one MuJoCo state per environment and steps them on a pool of threads: `mj_step` releases the GIL, so
W threads give about W cores of physics without processes, pipes or copies. Beside it, vectorised functions turn its
goal dictionaries into the float32 vectors and the rewards that a policy is trained with.

Three things make it faster than stepping gymnasium's environments, none of which changes a bit of any number:
1. names are looked up once instead of 30 times a step;
2. after the fingers are put back to zero, gymnasium recomputes the whole dynamics (`mj_forward`), of which only
   positions (`mj_kinematics`, `mj_comPos`) are read before the next step computes everything anew;
3. what is elementwise is computed for all environments at once.
"""

import contextlib
import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.cli import fail
from common.parallel import cores

try:
    import mujoco
except (RuntimeError, AttributeError, ImportError) as error:  # it looks for its renderer at once
    fail(f"MuJoCo does not start: {error}; MUJOCO_GL is an installed one of egl, osmesa and glfw, or unset")

TASKS = ("FetchReach", "FetchPush", "FetchSlide", "FetchPickAndPlace")
GOAL_RADIUS = 0.05  # m: a goal is reached within this distance
HOLD = np.array([1.0, 0.0, 1.0, 0.0])  # gymnasium adds this quaternion to the gripper's at every step: it points down


def is_fetch(env_id: str) -> bool:
    return env_id.endswith("-v4") and env_id.removesuffix("-v4").removesuffix("Dense") in TASKS


def refuse_other_version(env_id: str) -> None:
    """FetchReach-v2, FetchPush, fetchpush-v4, … end in one line with the id that works."""
    found = re.fullmatch(rf"({'|'.join(TASKS)})(Dense)?(-v\d+)?", env_id, re.IGNORECASE)
    if found and not is_fetch(env_id):
        task = next(task for task in TASKS if task.lower() == found[1].lower())
        right = f"{task}{'Dense' if found[2] else ''}-v4"
        fail(
            f"--env-id {env_id}: use {right}; earlier versions are gone from gymnasium-robotics, v4 mended their resets"
        )


def task_of(env_id: str) -> str:
    """FetchPush-v4, FetchPushDense-v4 -> FetchPush; anything but Fetch -> other."""
    return env_id.removesuffix("-v4").removesuffix("Dense") if is_fetch(env_id) else "other"


class PlainEnums:
    """MuJoCo 3.12 or newer as gymnasium-robotics 1.4.2 needs it: that compares enums with numpy's integers, which no
    longer holds for equal ones. The enums that it so compares are plain integers here, the rest is MuJoCo's."""

    CAST = {"mjtJoint": ("mjJNT_FREE", "mjJNT_BALL", "mjJNT_SLIDE", "mjJNT_HINGE"), "mjtEq": ("mjEQ_WELD",)}

    def __getattr__(self, name: str):
        value = getattr(mujoco, name)
        cast = {member: int(getattr(value, member)) for member in self.CAST.get(name, ())}
        return SimpleNamespace(**cast) if cast else value


def import_robotics() -> None:
    """Registers gymnasium-robotics. With MuJoCo 3.12 or newer its release 1.4.2 gets `PlainEnums`, and says so."""
    with contextlib.redirect_stderr(io.StringIO()):  # a notice about environments of other robots
        import gymnasium_robotics
        from gymnasium_robotics.utils import mujoco_utils

    gym.register_envs(gymnasium_robotics)
    recent = tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 12)
    if recent and gymnasium_robotics.__version__ == "1.4.2" and mujoco_utils.mujoco is mujoco:
        mujoco_utils.mujoco = PlainEnums()
        print(f"MuJoCo {mujoco.__version__}: gymnasium-robotics 1.4.2 gets its enums as integers", file=sys.stderr)


class FetchVec(VectorEnv):
    """`num_envs` copies of one Fetch task; autoreset in the same step, as `gym.make_vec` with `SAME_STEP`.

    Args:
        env_id: FetchReach-v4, FetchPush-v4, FetchSlide-v4, FetchPickAndPlace-v4 or their …Dense-v4 twins.
        num_envs: N.
        num_threads: threads that step physics; default: the cores of this machine.
        pool: a ThreadPoolExecutor to share with other instances instead.
        grasped: share of episodes that begin with the block in the gripper, for training, as the tasks' authors did
            (half of them, arXiv 1707.01495). Above 0 a random stream draws other starts than gymnasium's.
        make_kwargs: passed to `gym.make` (reward_type, max_episode_steps).

    Observations are {"observation": (N, 10 or 25), "achieved_goal": (N, 3), "desired_goal": (N, 3)} float64 in metres
    and metres per step; actions (N, 4) in [-1, 1]: three displacements of 5 cm at most and the gripper.
    Where an episode ends, the observation is the next episode's first one, the last one of the old episode is in
    `infos["final_obs"]`, its infos in `infos["final_info"]`. `step_async` starts a step and returns, `step_wait`
    finishes it. Nothing here can render: drawing a frame recomputes the dynamics, which changes PickAndPlace.

    Source: gymnasium-robotics 1.4.2, envs/fetch; tests/test_fetch.py holds both to the same bits.
    """

    def __init__(
        self, env_id: str, num_envs: int, num_threads: int | None = None, *, pool=None, grasped=0.0, **make_kwargs
    ):
        if not is_fetch(env_id):
            raise ValueError(f"FetchVec steps {', '.join(f'{task}-v4' for task in TASKS)}, not {env_id}")
        import_robotics()
        from gymnasium_robotics.utils.rotations import mat2euler

        self._euler = mat2euler
        template = gym.make(env_id, **make_kwargs)
        self.spec, env = template.spec, template.unwrapped
        self.num_envs, self.render_mode = num_envs, None
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": [], "render_fps": 25}
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.max_episode_steps = self.spec.max_episode_steps
        self.num_threads = num_threads or cores()
        self._pool = pool or ThreadPoolExecutor(self.num_threads, thread_name_prefix="fetch")
        self._owns_pool, self._pending = pool is None, None

        # the task, as the simulator's own class set it up
        self._env = env
        self._model = m = env.model
        self._substeps, self._dt = env.n_substeps, env.n_substeps * m.opt.timestep
        self._has_object, self._blocked = env.has_object, env.block_gripper
        site, joint = (lambda name: m.site(name).id), (lambda name: m.joint(name))
        self._grip, self._object = site("robot0:grip"), site("object0") if self._has_object else None
        weld = [i for i in range(m.neq) if m.eq_type[i] == int(mujoco.mjtEq.mjEQ_WELD)]
        assert len(weld) == 1 and m.nmocap == 1, "a Fetch model has one mocap body, welded to the gripper"
        ends = int(m.eq_obj1id[weld[0]]), int(m.eq_obj2id[weld[0]])
        self._body = ends[1] if m.body_mocapid[ends[0]] != -1 else ends[0]
        names = [m.joint(j).name for j in range(m.njnt)]
        fingers = [joint(name) for name in [name for name in names if name.startswith("robot")][-2:]]
        qpos, qvel = (slice(int(a[0]), int(a[1]) + 1) for a in zip(*((f.qposadr[0], f.dofadr[0]) for f in fingers)))
        if self._has_object:
            self._object_qpos = int(joint("object0:joint").qposadr[0])
        # which joint each gripper actuator moves, and whether it takes a displacement
        self._actuators = [
            (a, int(m.jnt_qposadr[m.actuator_trnid[a, 0]]) if m.actuator_biastype[a] else None) for a in range(m.nu)
        ]

        # one simulator state per environment, and views into it that stay valid as long as it lives
        self._data = [mujoco.MjData(m) for _ in range(num_envs)]
        body = self._body
        self._views = [
            (d.mocap_pos[0], d.mocap_quat[0], d.xpos[body], d.xquat[body], d.qpos[qpos], d.qvel[qvel], d.qvel)
            for d in self._data
        ]
        self._goal = np.zeros((num_envs, 3))
        self.elapsed = np.zeros(num_envs, dtype=np.int64)  # steps taken in the running episode; may be set
        self._rng: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int | None] = [None] * num_envs
        self._jacobian = np.zeros((num_envs, 3, m.nv))
        self._displacement = np.zeros((num_envs, 3))
        self._gripper = np.zeros((num_envs,))
        self._now, self._last = self._buffers(), self._buffers()  # raw readings: of this state, of a finished episode

        self._grasped, self._grasp = grasped, self._grasp_block() if grasped else None

    def _buffers(self) -> dict[str, np.ndarray]:
        shapes = {"grip": 3, "grip_velp": 3, "finger": 2, "finger_vel": 2}
        if self._has_object:
            shapes |= {"object": 3, "object_mat": 9, "object_velp": 3, "object_velr": 3}
        return {name: np.zeros((self.num_envs, size)) for name, size in shapes.items()}

    # ---- one environment, on a worker thread ----

    def _read(self, i: int, to: dict[str, np.ndarray]) -> None:
        """Copies what an observation is made of out of simulator state i."""
        m, d, jacobian = self._model, self._data[i], self._jacobian[i]
        *_, finger, finger_vel, qvel = self._views[i]
        to["grip"][i] = d.site_xpos[self._grip]
        to["finger"][i], to["finger_vel"][i] = finger, finger_vel
        mujoco.mj_jacSite(m, d, jacobian, None, self._grip)
        np.matmul(jacobian, qvel, out=to["grip_velp"][i])  # m / s
        if self._has_object:
            to["object"][i], to["object_mat"][i] = d.site_xpos[self._object], d.site_xmat[self._object]
            mujoco.mj_jacSite(m, d, jacobian, None, self._object)
            np.matmul(jacobian, qvel, out=to["object_velp"][i])
            mujoco.mj_jacSite(m, d, None, jacobian, self._object)
            np.matmul(jacobian, qvel, out=to["object_velr"][i])

    def _positions(self, d) -> None:
        mujoco.mj_kinematics(self._model, d)
        mujoco.mj_comPos(self._model, d)  # the Jacobians need it

    def _rest(self, d, block: np.ndarray | None) -> None:
        """The robot as every episode begins, and the block (where there is one) at these x and y on the table."""
        mujoco.mj_resetData(self._model, d)
        d.time, d.qpos[:], d.qvel[:] = self._env.initial_time, self._env.initial_qpos, self._env.initial_qvel
        if block is not None:
            d.qpos[self._object_qpos : self._object_qpos + 2] = block
        self._positions(d)

    def _grasp_block(self) -> np.ndarray:
        """The simulator's state where the gripper, from where it begins, has gone down to the block and closed."""
        d, kind = self._data[0], mujoco.mjtState.mjSTATE_INTEGRATION
        self._rest(d, self._env.initial_gripper_xpos[:2])
        for self._gripper[0], steps in ((1.0, 15), (-1.0, 5)):
            for _ in range(steps):
                away = d.site_xpos[self._object] - d.site_xpos[self._grip]
                self._displacement[0] = away.clip(-0.02, 0.02)  # m, slowly: the fingers open on the way
                self._step_one(0)
        state = np.zeros(mujoco.mj_stateSize(self._model, kind))
        mujoco.mj_getState(self._model, d, state, kind)
        return state

    def _reset_one(self, i: int) -> None:
        """Draws block and goal in the order of the original (the random stream is part of the contract)."""
        m, d, env = self._model, self._data[i], self._env
        if self._rng[i] is None:
            self._rng[i], self._seeds[i] = seeding.np_random()
        rng, center = self._rng[i], env.initial_gripper_xpos
        if self._grasped and rng.uniform() < self._grasped:
            mujoco.mj_resetData(m, d)
            mujoco.mj_setState(m, d, self._grasp, mujoco.mjtState.mjSTATE_INTEGRATION)
            self._positions(d)
        else:
            xy = center[:2] if self._has_object else None
            while self._has_object and np.linalg.norm(xy - center[:2]) < 0.1:
                xy = center[:2] + rng.uniform(-env.obj_range, env.obj_range, size=2)
            self._rest(d, xy)
        goal = center[:3] + rng.uniform(-env.target_range, env.target_range, size=3)
        if self._has_object:
            goal += env.target_offset
            goal[2] = env.height_offset
            if env.target_in_the_air and rng.uniform() < 0.5:
                goal[2] += rng.uniform(0, 0.45)
        self._goal[i], self.elapsed[i] = goal, 0

    def _step_one(self, i: int) -> None:
        d = self._data[i]
        mocap_pos, mocap_quat, xpos, xquat, finger, *_ = self._views[i]
        np.add(xpos, self._displacement[i], out=mocap_pos)
        np.add(xquat, HOLD, out=mocap_quat)
        for actuator, joint in self._actuators:
            d.ctrl[actuator] = self._gripper[i] if joint is None else d.qpos[joint] + self._gripper[i]
        mujoco.mj_step(self._model, d, self._substeps)
        if self._blocked:
            finger[:] = 0.0
            self._positions(d)

    def _work(self, indices) -> None:
        """One worker's share of a step: the next environment that nobody has taken, until none is left."""
        for i in indices:
            self._step_one(i)
            if self._done[i]:
                self._read(i, self._last)
                self._final_goal[i] = self._goal[i]
                self._reset_one(i)
            self._read(i, self._now)

    # ---- all environments ----

    def _observation(self, raw: dict[str, np.ndarray], goal: np.ndarray) -> dict[str, np.ndarray]:
        dt = self._dt
        grip, grip_velp, finger_vel = raw["grip"], raw["grip_velp"] * dt, raw["finger_vel"] * dt
        if not self._has_object:
            parts, achieved = [grip, raw["finger"], grip_velp, finger_vel], grip
        else:
            achieved = raw["object"]
            velp, velr = raw["object_velp"] * dt - grip_velp, raw["object_velr"] * dt
            euler = self._euler(raw["object_mat"].reshape(-1, 3, 3))  # radians
            parts = [grip, achieved, achieved - grip, raw["finger"], euler, velp, velr, grip_velp, finger_vel]
        observation = np.concatenate(parts, axis=1)
        return {"observation": observation, "achieved_goal": achieved.copy(), "desired_goal": goal.copy()}

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Starts new episodes, in all environments or in those of `options["reset_mask"]` (N,) bool.

        `seed`: environment i gets seed + i (or its entry of the list); without one its random stream goes on.
        """
        assert self._pending is None, "reset between step_async and step_wait"
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                self._rng[i], self._seeds[i] = seeding.np_random(seeds[i])
            self._reset_one(i)
            self._read(i, self._now)
        return self._observation(self._now, self._goal), {}

    def step_async(self, actions: np.ndarray) -> None:
        """Starts a step of all environments on the pool; actions (N, 4) are clipped to [-1, 1]."""
        assert self._pending is None, "step_async twice without step_wait"
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 4):
            raise ValueError(f"actions of shape {actions.shape}; expected ({self.num_envs}, 4)")
        clipped = np.clip(actions, self.single_action_space.low, self.single_action_space.high)
        self._displacement[:] = clipped[:, :3] * 0.05  # m; in the actions' own precision, as the original
        self._gripper[:] = 0.0 if self._blocked else clipped[:, 3]
        self.elapsed += 1
        self._done = self.elapsed >= self.max_episode_steps
        self._final_goal = np.zeros((self.num_envs, 3))
        indices = iter(range(self.num_envs))  # shared by the workers: each draws the next environment under the GIL
        workers = min(self.num_threads, self.num_envs)
        self._pending = [self._pool.submit(self._work, indices) for _ in range(workers)]

    def step_wait(self):
        """Finishes the step: observations, rewards (N,), terminations (N,), truncations (N,), infos."""
        assert self._pending is not None, "step_wait without step_async"
        pending, self._pending = self._pending, None
        for future in pending:
            future.result()
        obs, done, infos = self._observation(self._now, self._goal), self._done, {}
        achieved, goal = obs["achieved_goal"], obs["desired_goal"]
        if done.any():
            last = self._observation(self._last, self._final_goal)
            achieved = np.where(done[:, None], last["achieved_goal"], achieved)
            goal = np.where(done[:, None], self._final_goal, goal)
        d = np.linalg.norm(achieved - goal, axis=-1)
        rewards = -(d > self._env.distance_threshold).astype(np.float64) if self._env.reward_type == "sparse" else -d
        success = (d < self._env.distance_threshold).astype(np.float32)
        if done.any():
            final = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(done):
                final[i] = {key: value[i].copy() for key, value in last.items()}
            ended = {"is_success": np.where(done, success, np.float32(0)), "_is_success": done.copy()}
            infos |= {"final_obs": final, "_final_obs": done.copy(), "final_info": ended, "_final_info": done.copy()}
        if not done.all():
            infos |= {"is_success": np.where(done, np.float32(0), success), "_is_success": ~done}
        return obs, rewards, np.zeros(self.num_envs, dtype=bool), done.copy(), infos

    def step(self, actions: np.ndarray):
        self.step_async(actions)
        return self.step_wait()

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the present state, without stepping."""
        return self._observation(self._now, self._goal)

    @property
    def np_random(self) -> tuple:
        return tuple(self._rng)

    @property
    def np_random_seed(self) -> tuple:
        return tuple(self._seeds)

    # ---- state, for checkpoints ----

    def get_state(self) -> tuple[dict[str, np.ndarray], list]:
        """Everything a continued run needs: arrays (simulator state, goals, readings) and random streams (JSON)."""
        m, kind = self._model, mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.zeros((self.num_envs, mujoco.mj_stateSize(m, kind)))
        for d, row in zip(self._data, physics):
            mujoco.mj_getState(m, d, row, kind)
        # the welded body's pose starts the next step; in PickAndPlace it lags a substep behind the positions
        pose = np.stack([np.concatenate([d.xpos[self._body], d.xquat[self._body]]) for d in self._data])
        arrays = {"physics": physics, "pose": pose, "goal": self._goal.copy(), "elapsed": self.elapsed.copy()}
        arrays |= {f"now.{name}": value.copy() for name, value in self._now.items()}
        return arrays, [rng.bit_generator.state if rng else None for rng in self._rng]

    def set_state(self, arrays: dict[str, np.ndarray], random_streams: list) -> None:
        """Restores what `get_state` returned (same task, same number of environments)."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        for i, d in enumerate(self._data):
            mujoco.mj_resetData(self._model, d)
            mujoco.mj_setState(self._model, d, arrays["physics"][i], kind)
            self._positions(d)
            d.xpos[self._body], d.xquat[self._body] = arrays["pose"][i, :3], arrays["pose"][i, 3:]
            if random_streams[i] is not None:
                self._rng[i], _ = seeding.np_random(0)
                self._rng[i].bit_generator.state = random_streams[i]
        self._goal[:], self.elapsed[:] = arrays["goal"], arrays["elapsed"]
        for name, value in self._now.items():
            value[:] = arrays[f"now.{name}"]

    def close_extras(self, **kwargs) -> None:
        if self._owns_pool:
            self._pool.shutdown()
        self._env.close()


# ---- what a policy is trained with: float32 vectors and rewards ------------------------------------------------------
#
# `obs` is a dictionary as FetchVec returns it; N environments, distances in metres.


def flatten(obs: dict[str, np.ndarray], mode: str) -> np.ndarray:
    """(N, D) float32. observation: the state, D = 10 (Reach) or 25; observation_goal: and the goal (13 / 28); full: and
    the achieved goal (16 / 31); delta: and what a controller would look at, goal - achieved and, where there is a
    block, block - gripper (19 / 37). The differences are taken in float64: positions are near 1, differences near 0."""
    state, achieved, goal = obs["observation"], obs["achieved_goal"], obs["desired_goal"]
    parts = [state]
    if mode in ("full", "delta"):
        parts.append(achieved)
    if mode != "observation":
        parts.append(goal)
    if mode == "delta":
        parts.append(goal - achieved)
        if state.shape[1] == 25:
            parts.append(achieved - state[:, :3])
    return np.concatenate(parts, axis=1).astype(np.float32)


def goal_distance(obs: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) distance of what is to be moved (gripper or block) from its goal."""
    return np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1)


def potential(obs: dict[str, np.ndarray], task: str) -> np.ndarray:
    """(N,) Phi, higher is better: how far the gripper is from where it should be, and the block from its goal.

    Reach: -d. Push, Slide: -(min(|gripper - p|, 0.3) + 3 d) with the push point p 6 cm behind the block on the line to
    its goal; the gripper counts only while the block is away from the goal. PickAndPlace: p is the block itself, and
    0.2 more until the fingers, within 3 cm of it, have closed to its width of 5 cm.
    """
    d = goal_distance(obs)
    if task == "FetchReach":
        return -d
    gripper, block, goal = obs["observation"][:, :3], obs["achieved_goal"], obs["desired_goal"]
    point = block
    if task != "FetchPickAndPlace":
        point = block - 0.06 * (goal - block) / np.maximum(d, 1e-6)[:, None]
    reach = np.minimum(np.linalg.norm(gripper - point, axis=-1), 0.3)
    if task == "FetchPickAndPlace":
        opening = obs["observation"][:, 9:11].sum(1)  # 0 to 0.1
        closed = 1.0 - ((opening - 0.05) / 0.05).clip(0.0, 1.0)
        reach = reach + 0.2 * (1.0 - closed * (reach < 0.03))
    return -(np.where(d > GOAL_RADIUS, reach, 0.0) + 3.0 * d)


def reward(obs: dict[str, np.ndarray], mode: str) -> np.ndarray:
    """(N,) reward for arriving in `obs`: sparse -1 / 0; dense -d; distance -d, or 10 - d at the goal."""
    d = goal_distance(obs)
    if mode == "sparse":
        return -(d > GOAL_RADIUS).astype(np.float64)
    return -d + (10.0 * (d <= GOAL_RADIUS) if mode == "distance" else 0.0)
