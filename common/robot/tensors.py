"""Environments that step as one on a GPU and speak torch, as the vector environments that this project knows.

Isaac Lab, mjlab and ManiSkill simulate thousands at once and reset those that have ended within the step. What they
have in common is read here: `num_envs`, `device` and `single_action_space`; observations that are tensors (N, ...) or
dictionaries of them, of which "policy" is what the policy sees; actions (N, A) on the device.
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from common.cli import fail
from common.robot.spaces import Actions, unable

MADE: dict[str, "TensorVec"] = {}  # by Gymnasium id


def tensor_envs(env_id: str, num_envs: int) -> "TensorVec":
    """The only simulator of this id: training and evaluation take turns, as not every one can be had twice."""
    envs = MADE[env_id] = MADE.get(env_id) or TensorVec(env_id, num_envs)
    if envs.num_envs != num_envs:
        only = f"--env-backend torch has one simulator, of {envs.num_envs} environments, for evaluation too"
        fail(f"{only}: give --eval-episodes {envs.num_envs}")
    return envs


class TensorVec(VectorEnv):
    """`num_envs` environments of a Gymnasium id whose entry point takes num_envs and returns them all as one.

    The policy acts in [-1, 1] where the action space has bounds, see `Actions`. Everything that is shown is copied to
    the CPU once a step. A simulator has one seed: the first of those that `reset` gets.

    Where a simulator does not tell an episode's last observation, the one before stands in for it in `final_obs`: its
    value is what rsl_rl bootstraps a time limit with, too.
    """

    resets = 0  # whoever has counted fewer than these has been interrupted by somebody else

    def __init__(self, env_id: str, num_envs: int):
        try:
            self.env = gym.make(env_id, num_envs=num_envs, disable_env_checker=True)
            inner = self.env.unwrapped
            self.num_envs, self.device, space = inner.num_envs, inner.device, inner.single_action_space
        except Exception as error:  # whatever a simulator or its packages throw
            fail(f"--env-backend torch cannot make {env_id}: {type(error).__name__}: {' '.join(str(error).split())}")
        if self.num_envs != num_envs or (why := unable(space)):
            fail(
                f"{env_id} {why if self.num_envs == num_envs else f'made {self.num_envs} environments, not {num_envs}'}"
            )
        self.metadata, self.render_mode = {"autoreset_mode": AutoresetMode.SAME_STEP}, None
        self.actions, self.told = Actions(space), False
        self.single_action_space = self.actions.policy

    def seen(self, obs) -> np.ndarray:
        """Tensors (N, ...), or nested dictionaries of them, -> (N, D) float32, keys sorted."""
        if isinstance(obs, dict):
            parts = [obs["policy"]] if "policy" in obs else [obs[key] for key in sorted(obs)]
            return np.concatenate([self.seen(part) for part in parts], axis=1)
        return self.array(obs, np.float32).reshape(self.num_envs, -1)

    def array(self, values, dtype) -> np.ndarray:
        """(N, ...) on whatever device -> a copy that the simulator does not write to."""
        return np.array(torch.as_tensor(values).detach().cpu().numpy(), dtype)

    def reset(self, *, seed=None, options=None):
        seed = seed[0] if isinstance(seed, list) else seed
        self.resets += 1
        self.last = self.seen(self.env.reset(seed=seed, options=options)[0])
        return self.last, {}

    def step(self, actions: np.ndarray):
        given = torch.as_tensor(self.actions.executed(actions), device=self.device)
        obs, rewards, terminations, truncations, told = self.env.step(given)
        flat = [self.array(x, t).reshape(-1) for x, t in ((rewards, float), (terminations, bool), (truncations, bool))]
        obs, done, infos = self.seen(obs), flat[1] | flat[2], {}
        for name in {"success", "is_success"} & told.keys():  # of this step, whatever was reset after it
            infos[name] = self.array(told[name], bool).reshape(-1)
            infos |= {"final_info": {name: infos[name]}, "_final_info": done}
        if done.any():
            final = told.get("final_obs", told.get("final_observation"))
            if final is None and not self.told:
                self.told = True
                print(f"{self.env.spec.id} hides last observations: those before stand in for them", file=sys.stderr)
            infos |= {"final_obs": self.last if final is None else self.seen(final), "_final_obs": done}
        self.last = obs
        return obs, *flat, infos

    def close_extras(self, **kwargs) -> None:
        MADE.pop(self.env.spec.id, None)
        self.env.close()
