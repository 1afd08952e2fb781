"""Exercises 1 to 5: what turns the rewards of sampled answers into a gradient.

Dims: P prompts, G completions of each, B = P * G rows with the completions of a prompt one after the other, T tokens,
V vocabulary. Replace the `raise` lines. Tools: torch only.
"""

import torch  # noqa: F401, for you


def group_advantages(rewards, num_generations):
    """1. How much better a completion did than the others of its prompt.

    rewards (B,), num_generations G -> (B,)
    eq: A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4),  std over n - 1

    A group is G rows in a row. Where all of a group are equal there is nothing to learn: 0, never NaN.
    """
    raise NotImplementedError


def completion_mask(completion_ids, eos_ids):
    """2. Which tokens are the model's answer.

    completion_ids (B, T) int64, eos_ids a list of end tokens -> (B, T) bool
    eq: m_t = 1 up to and including the first end token, 0 after it

    Stopping is an action like any other: it is rewarded. What was padded behind it is not an action. Some models have
    several end tokens, and often the padding is one of them.
    """
    raise NotImplementedError


def k3(logprobs, ref_logprobs):
    """3a. An estimate of how far the policy is from the reference, from the token that was sampled alone.

    logprobs, ref_logprobs, of any equal shape -> the same shape
    eq: k3 = exp(d) - d - 1,  d = log ref - log policy

    Never negative, unlike log policy - log ref, and with the same mean over samples of the policy: KL(policy || ref).
    """
    raise NotImplementedError


def k3_gradient(logprobs, ref_logprobs):
    """3b. Its derivative by `logprobs`, by hand: what each token feels when k3 is in the loss.

    logprobs, ref_logprobs, of any equal shape -> the same shape
    eq: d k3 / d log policy = ?

    Then look at its sign: which way is a token pushed that the policy likes more than the reference does?
    """
    raise NotImplementedError


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, beta, epsilon=0.2):
    """4. The loss whose gradient makes good completions likelier, but not at any price.

    logprobs, old_logprobs, ref_logprobs (B, T) (ref_logprobs None where beta is 0), advantages (B,), mask (B, T) bool
    -> ()
    eq: w = exp(log pi - log pi_old),  l = -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta k3
    eq: L = 1/B sum_i 1/n_i sum_t m_it l_it,  n_i = sum_t m_it

    Where the mask is 0 the log-probs may be anything, also so large that their exponential is inf, and 0 * inf is NaN.
    """
    raise NotImplementedError


def sample_tokens(logits, uniform, temperature):
    """5. One token a row, from one uniform number a row.

    logits (B, V), uniform (B,) in [0, 1), temperature -> tokens (B,) int64, their log-probs (B,)
    eq: pi = softmax(logits / T),  a = min { a : sum_{b <= a} pi(b) > u }

    The log-probs are those of the distribution that was sampled from. Temperature 0: the likeliest token. Sums of
    floats may end just below 1, and u may lie above that: a must be a token all the same.
    """
    raise NotImplementedError
