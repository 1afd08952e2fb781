"""Exercises 8 to 10: a policy that is a flow from noise to actions, and how to explore with it.

t = 0 is noise, t = 1 is data. Dims: B samples, H actions of a chunk, D numbers of an action. `velocity(x, t)` is the
network: x (B, H, D), t (B,) -> (B, H, D). Replace the `raise` lines. Tools: torch only.
"""

import torch  # noqa: F401, for you


def flow_matching_loss(velocity, x_1, x_0, t, mask):
    """8. What the network learns: the velocity of the straight way from noise to data.

    x_1 (B, H, D) actions, x_0 (B, H, D) noise, t (B,), mask (B, H, D) 1 where an entry is an action -> ()
    eq: x_t = (1 - t) x_0 + t x_1,  u = dx_t / dt
    eq: L = sum m |velocity(x_t, t) - u|^2 / sum m
    """
    raise NotImplementedError


def sample_actions(velocity, x_0, num_steps):
    """9. From noise to actions: Euler's method.

    x_0 (B, H, D) noise, num_steps K -> (B, H, D)
    eq: x_{k+1} = x_k + velocity(x_k, k / K) / K,  k = 0 ... K - 1
    """
    raise NotImplementedError


def transition(v, x, k, num_steps, noise_level):
    """10a. Flow-SDE: one step of the flow with noise in it, such that x keeps the distribution it has without.

    v, x (B, H, D): velocity at x; k (B,) int64 step; num_steps K; noise_level a -> mean (B, H, D), std (B, 1, 1)
    eq: t = k / K,  sigma^2 = a^2 (1 - t) / t  with 1 / K in place of t = 0
    eq: x_0^ = x - t v,  score = -x_0^ / (1 - t)
    eq: mean = x + (v + sigma^2 / 2 score) / K,  std = sigma sqrt(1 / K)
    """
    raise NotImplementedError


def log_density(x, mean, std):
    """10b. What PPO needs of it: the log-density of each entry of x under its normal.

    x, mean (B, H, D), std (B, 1, 1) -> (B, H, D)
    eq: log N(x; m, s) = -((x - m) / s)^2 / 2 - log s - log(2 pi) / 2
    """
    raise NotImplementedError
