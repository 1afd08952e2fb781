"""The functions of the five scripts under the exercises' signatures: look at them in the scripts, after yours.

Each script is imported where it is first needed: a toy of PPO need not wait for transformers.
"""

from importlib import import_module
from types import SimpleNamespace

import torch


def group_advantages(rewards, num_generations):
    return import_module("grpo_arithmetic").group_advantages(rewards, num_generations)


def completion_mask(completion_ids, eos_ids):
    return import_module("grpo_arithmetic").completion_mask(completion_ids, eos_ids)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, beta, epsilon=0.2):
    settings = {"loss_type": "grpo", "max_completion_length": logprobs.shape[1], "beta": beta, "epsilon": epsilon}
    return import_module("grpo_arithmetic").grpo_loss(
        logprobs, old_logprobs, ref_logprobs, advantages, mask, **settings
    )[0]


def k3(logprobs, ref_logprobs):
    """`grpo_loss` of one token without advantage at beta 1, token by token."""
    rows = zip(logprobs.reshape(-1, 1, 1), ref_logprobs.reshape(-1, 1, 1))
    no, mask = logprobs.new_zeros(1), torch.ones(1, 1, dtype=torch.bool)
    return torch.stack([grpo_loss(lp, lp.detach(), ref, no, mask, beta=1.0) for lp, ref in rows]).view_as(logprobs)


def k3_gradient(logprobs, ref_logprobs):
    leaf = logprobs.detach().clone().requires_grad_()
    return torch.autograd.grad(k3(leaf, ref_logprobs).sum(), leaf)[0]


def sample_tokens(logits, uniform, temperature):
    return import_module("grpo_arithmetic").sample_tokens(logits, uniform, temperature)


def gae(*args):
    return import_module("ppo_fetch").gae(*args)


def ppo_loss(*args, **settings):
    return import_module("ppo_fetch").ppo_loss(*args, **settings)[0]


class Network:
    """A velocity where `gr00t_finetune.py` expects GR00T."""

    def __init__(self, velocity):
        self.config, self.of = SimpleNamespace(action_horizon=0, action_dim=0), velocity

    def vl_features(self, batch):
        return None, None

    def velocity(self, features, mask, state, x, t, embodiment_id):
        return self.of(x, t)


def flow_matching_loss(velocity, x_1, x_0, t, mask):
    batch = {"action": x_1, "state": x_1[:, :, 0], "action_mask": mask, "embodiment_id": None}
    return import_module("gr00t_finetune").flow_matching_loss(Network(velocity), batch, x_0, t)


def sample_actions(velocity, x_0, num_steps):
    batch = {"state": x_0[:, :, 0], "embodiment_id": None}
    return import_module("gr00t_finetune").sample_actions(Network(velocity), batch, x_0, num_steps)


def transition(v, x, k, num_steps, noise_level):
    args = SimpleNamespace(sampler="flow-sde", denoising_steps=num_steps, noise_level=noise_level)
    return import_module("ppo_gr00t").transition(v, x, k, torch.ones(len(x), dtype=torch.bool), args)


def log_density(x, mean, std):
    return import_module("ppo_gr00t").log_density(x, mean, std)
