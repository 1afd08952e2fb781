"""The Fetch robot as a policy sees it and acts in it: what an observation holds, the camera, units, chunks of actions.

The demonstrations are recorded in this layout, and closed loop, PPO and serving act in it.

Dims: N environments, 28 state numbers, 4 action numbers, H actions of a chunk, D padded state or action dims.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch

from common.cli import fail
from common.robot.data_configs import DataConfig
from common.robot.fetch import import_robotics
from common.robot.policy import Interface, read_stored, trained_parts
from common.robot.video import no_renderer

INSTRUCTIONS = {
    "FetchReach-v4": "reach the target",
    "FetchPush-v4": "push the block to the target",
    "FetchPickAndPlace-v4": "pick up the block and move it to the target",
}
# The whole simulator state that gymnasium shows, from which a training script takes the parts it wants. The experts do
# not look at the block's rotation and velocities: from 120 episodes, an MLP that sees them too ends 50-56 % of Push
# episodes at the goal, one that does not 72-86 % (three seeds of 100 episodes; the other tasks 97 % or more).
STATE = {  # observation.state, in this order: metres, metres per step, radians, radians per step
    "gripper_position": 3,
    "gripper_velocity": 3,
    "fingers": 2,  # how far each is open, 0 to 0.05
    "finger_velocity": 2,
    "object_relative": 3,  # block - gripper; all that concerns the block is 0 in Reach, which has none
    "object_rotation": 3,  # Euler angles
    "object_velocity": 3,  # relative to the gripper
    "object_angular_velocity": 3,
    "goal": 3,
    "goal_relative": 3,  # goal - what is to be there: the gripper in Reach, else the block
}
ACTION = {  # -1 to 1
    "displacement": 3,  # of 5 cm
    "gripper": 1,  # of closing (-1) or opening (1), ignored but in PickAndPlace
}
VIEW = {"distance": 1.0, "azimuth": 180.0, "elevation": -35.0, "lookat": np.array([1.3, 0.75, 0.53])}


def slices(parts: dict[str, int]) -> dict[str, dict[str, int]]:
    """{"a": 3, "b": 2} -> {"a": {"start": 0, "end": 3}, "b": {"start": 3, "end": 5}}"""
    ends = np.cumsum(list(parts.values())).tolist()
    return {name: {"start": end - size, "end": end} for (name, size), end in zip(parts.items(), ends)}


def state_vector(obs: dict[str, np.ndarray]) -> np.ndarray:
    """FetchVec's observations of any Fetch task -> (N, 28) float32, laid out as STATE.

    Differences are taken in float64: positions are near 1 m, differences near 0.
    """
    o, achieved, goal = obs["observation"], obs["achieved_goal"], obs["desired_goal"]
    if o.shape[1] == 10:  # Reach: gripper 3, fingers 2, their velocities 3 and 2
        gripper, fingers, velocity, finger_velocity = np.split(o, [3, 5, 8], axis=1)
        block = [np.zeros((len(o), 12))]
    else:
        gripper, _, relative, fingers, rotation, velp, velr, velocity, finger_velocity = np.split(
            o, [3, 6, 9, 11, 14, 17, 20, 23], axis=1
        )
        block = [relative, rotation, velp, velr]
    parts = [gripper, velocity, fingers, finger_velocity, *block, goal, goal - achieved]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Camera:
    """Draws simulator states of one task as the data set's front camera saw them, target marker included."""

    def __init__(self, env_id: str, size: int):
        if why := no_renderer():
            fail(f"no pictures: {why}; --no-video records the rest")
        import_robotics()
        self.size = size
        self.env = gym.make(env_id, render_mode="rgb_array", width=size, height=size, default_camera_config=VIEW)
        self.env.reset(seed=0)

    def draw(self, physics: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """A row of `FetchVec.get_state()[0]["physics"]` and the goal (3,) -> (size, size, 3) uint8."""
        env = self.env.unwrapped
        mujoco.mj_setState(env.model, env.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_kinematics(env.model, env.data)  # the marker is placed relative to sites
        env.goal = goal.copy()
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def misfit(config: DataConfig) -> str:
    """Why a policy with this data config cannot act in Fetch; empty if it can."""
    if not set(config.state) <= set(STATE) or list(config.action) != list(ACTION):
        return f"it needs the actions {', '.join(ACTION)} and state of {', '.join(STATE)}"
    if config.relative:
        return f"its actions {', '.join(config.relative)} are relative to the state, Fetch's are displacements"
    if config.video not in ((), ("front",)):
        return f"it is drawn from the camera 'front' alone, not from {', '.join(config.video)}"
    return ""


def read_interface(args) -> tuple:
    """args, and the Interface of the checkpoint args.model_path, prepared for the instruction of args.env_id.

    Nothing is guessed, and what is wrong with weights, units or tokenizer ends the program before they are loaded.
    args: those of ppo_gr00t.py; the folder, the data config and the embodiment that are meant come back in it.
    """
    stored = read_stored(args.model_path)
    about = stored.acts(args.data_config, args.embodiment_tag, args.tokenizer)
    interface = stored.interface(about)
    if reason := misfit(interface.config):
        fail(f"'{args.model_path}' does not fit Fetch: {reason}; fine-tune it on Fetch first")
    if args.execute_steps > interface.horizon:
        fail(f"--execute-steps {args.execute_steps}: at most {interface.horizon}, a chunk of '{args.model_path}'")
    own = dict(data_config=about.name, embodiment_tag=about.embodiment_tag, tokenizer=about.tokenizer)
    model, _ = stored.network.plan(stored.folder, attn_implementation=args.attn_implementation)
    trained_parts(model, args)  # or why not
    interface.fit(model.config, [INSTRUCTIONS[args.env_id]])
    return replace(args, model_path=str(stored.folder), **own), interface


def fine_tuned(command: str, run) -> str:
    """The run folder of gr00t_finetune.py with these flags: a policy that `run`, of another script, may start from."""
    script, *words = [*command.split(), "--output-dir", str(run.folder / "start")]
    if run.world.main:
        run.say(f"no --model-path: fine-tuning a starting policy with {' '.join([script, *words])}")
        path = Path(__file__).parents[2] / script
        done = subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True)
        if done.returncode:
            fail(f"the starting policy could not be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    run.world.gather([])  # the others wait
    (folder,) = (run.folder / "start" / "gr00t_finetune").iterdir()
    return str(folder)


class FetchRobot:
    """Between FetchVec and a policy, in the policy's units: observations in, chunks of actions out."""

    def __init__(self, interface: Interface, env_id: str):
        """A data config that does not fit is the caller's to refuse: see `misfit`."""
        self.interface, self.instruction, self.camera = interface, INSTRUCTIONS[env_id.replace("Dense", "")], None
        if interface.config.video:
            (view,) = interface.config.video
            self.camera = Camera(env_id, interface.metadata["modalities"]["video"][view]["resolution"][0])

    def state(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """FetchVec's observations -> (N, D) float32, normalised and padded with zeros."""
        vector = state_vector(obs).astype(np.float64)
        return self.interface.state({key: vector[:, at["start"] : at["end"]] for key, at in slices(STATE).items()})

    def images(self, physics: np.ndarray, goals: np.ndarray) -> torch.Tensor | None:
        """Simulator states (N, …) and goals (N, 3) -> (N, 3, size, size) uint8; None where the policy has no camera."""
        if self.camera is None:
            return None
        frames = np.stack([self.camera.draw(p, g) for p, g in zip(physics, goals)])
        return torch.stack(list(self.interface.images(frames[:, None])))

    def prompt(self) -> torch.Tensor:
        """(1, S) the token ids of the instruction, with those of a picture where the policy has a camera."""
        size = self.camera.size if self.camera else 0
        images = self.interface.images(np.zeros((1, 1, size, size, 3), np.uint8)) if self.camera else None
        batch = self.interface.batch(np.zeros((1, self.interface.state_dim), np.float32), [self.instruction], images)
        return next(ids for name, ids in batch.items() if name.endswith("input_ids"))

    def observation(self, obs: dict[str, np.ndarray], physics: np.ndarray, goals: np.ndarray) -> dict:
        """N of FetchVec's observations and simulator states as `Policy.get_action` takes a batch of them."""
        vector, config = state_vector(obs).astype(np.float64)[:, None], self.interface.config
        places = slices(STATE)
        seen = {f"state.{key}": vector[..., places[key]["start"] : places[key]["end"]] for key in config.state}
        if self.camera:
            frames = [self.camera.draw(p, g) for p, g in zip(physics, goals)]
            seen[f"video.{config.video[0]}"] = np.stack(frames)[:, None]
        return seen | {f"annotation.{config.language}": [self.instruction] * len(vector)}

    def actions(self, chunk: torch.Tensor, count: int) -> np.ndarray:
        """The policy's chunk (N, H, D) -> its first `count` actions (N, count, 4) float32; FetchVec clips them."""
        actions = self.interface.actions(chunk[:, :count].cpu().numpy()).astype(np.float32)
        if not np.isfinite(actions).all():
            fail("the policy's actions are no longer finite: an update went too far; try a smaller --learning-rate")
        return actions

    def close(self) -> None:
        if self.camera:
            self.camera.close()
