"""Exercises 6 and 7: from rewards over time to a step of the policy.

Dims: T steps, N environments, B = T * N. Replace the `raise` lines. Tools: torch only.
"""

import torch  # noqa: F401, for you


def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """6. Generalised advantage estimation where episodes end in two ways.

    All (T, N). values: V(s_t). next_values: V of the state that followed, also where the episode ended there.
    terminations (bool): that state is terminal, nothing more can be earned. dones (bool): the episode ended there,
    terminated or cut by a time limit: what follows in the arrays belongs to the next episode.
    -> advantages (T, N), returns (T, N)

    eq: delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    eq: A_t = delta_t + gamma lambda (1 - done_t) A_{t+1},  A_T = 0 beyond the last step
    eq: R_t = A_t + V(s_t)
    """
    raise NotImplementedError


def ppo_loss(logprobs, old_logprobs, advantages, entropy, values, returns, *, clip_coef=0.2, ent_coef=0.0, vf_coef=0.5):
    """7. The clipped surrogate, the critic's error, the entropy bonus.

    All (B,) -> ()
    eq: w = pi / pi_old,  L_pi = -mean min(w A, clip(w, 1 - eps, 1 + eps) A)
    eq: L_V = mean (V - R)^2 / 2
    eq: L = L_pi + c_v L_V - c_e mean H
    """
    raise NotImplementedError
