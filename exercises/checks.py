"""What the exercises are graded by: examples with the right value, and typical wrong values with what to say of them.

A check calls a function and raises Wrong with a sentence, or NotYet where nothing is filled in. The right values are
written anew here, by definition; tests/test_exercises.py holds the scripts' own functions against all of them.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch


class Wrong(Exception):
    """A sentence for whoever filled something in."""


class NotYet(Exception):
    """Nothing is filled in."""


def call(f, *args, **options):
    """The result of `f`; whatever goes wrong inside becomes a sentence."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    try:
        out = f(*args, **options)
    except (NotImplementedError, Wrong) as e:
        raise NotYet if isinstance(e, NotImplementedError) else e from None
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        file = getattr(getattr(f, "__code__", None), "co_filename", None)
        at = ([at] + [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file])[-1]
        reason = (str(e).splitlines() or [""])[0]
        raise Wrong(f"it stops with {type(e).__name__}: {reason} (line {at.lineno}: `{at.line}`)") from None
    if out is None:
        raise Wrong("it returns nothing: is there a `return` at its end?")
    if any(not torch.equal(a.nan_to_num(), x.detach().nan_to_num()) for a, x in zip(before, tensors)):
        raise Wrong("it changes its arguments in place: the caller still needs them; x = x + y instead of x += y")
    return out


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def show(x: torch.Tensor) -> str:
    return str([round(v, 4) for v in x.double().flatten().tolist()][:8])[1:-1] + (", ..." if x.numel() > 8 else "")


def expect(out, right: torch.Tensor, what: str, mistakes: dict[str, torch.Tensor], hint="", tolerance=1e-5) -> None:
    """Raises Wrong unless `out` is `right`: the sentence of the mistake whose value it has, else both values."""
    if not isinstance(out, torch.Tensor):
        raise Wrong(f"it should return a tensor of shape {tuple(right.shape)}, not a {type(out).__name__}")
    out = out.detach()
    if (right.dtype == torch.bool) != (out.dtype == torch.bool):
        raise Wrong(f"it should return {right.dtype}, not {out.dtype}")
    if not close(out, right, tolerance):
        for sentence, value in mistakes.items():
            if close(out, value, tolerance):
                raise Wrong(sentence)
        if out.shape != right.shape:
            raise Wrong(f"it should return shape {tuple(right.shape)}, yours is {tuple(out.shape)}")
        raise Wrong(f"{what}: should be {show(right)}; yours is {show(out)}. {hint}".strip())


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- language models -------------------------------------------------------------------------------------------------


def check_advantages(f) -> None:
    r = tensor(1, 0, 0, 0, 1, 1, 1, 0)
    groups, G = r.view(2, 4), 4
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    other = r.view(4, 2)  # view(G, -1) in place of view(-1, G)
    down, across = ((other - other.mean(d, keepdim=True)) / (other.std(d, keepdim=True) + 1e-4) for d in (0, 1))
    unlike = {
        "your advantages of a group do not sum to 0: subtract the group's mean": groups / (std + 1e-4),
        "your advantages of a group do not sum to 0: you subtract its sum, it should be its mean": (
            (groups - groups.sum(1, keepdim=True)) / (std + 1e-4)
        ),
        "you compare with the whole batch: a hard prompt would look bad and an easy one good. Each group of G rows has "
        "its own mean and std: rewards.view(-1, G)": (r - r.mean()) / (r.std() + 1e-4),
        "your mean is the group's, your std the whole batch's (Lite PPO does that; the equation here does not)": (
            centred / (r.std() + 1e-4)
        ),
        "your groups are every second row: the G completions of a prompt lie one after the other, view(-1, G)": down,
        "your groups are every second row, and your result is in their order: view(-1, G)": down.T,
        "your groups have P rows: view(G, -1) should be view(-1, G), a row for each prompt": across,
        "you subtract the mean but do not divide by the std: this is Dr. GRPO, the equation here divides": centred,
        "your std is over n: take it over n - 1, as torch's std does by default": (
            centred / (groups.std(1, correction=0, keepdim=True) + 1e-4)
        ),
        "you divide by the variance: take its square root, the std": centred / (std**2 + 1e-4),
        "the sign is the wrong way round: better than the group's mean is positive": -centred / (std + 1e-4),
    }
    what, right = "rewards 1 0 0 0 | 1 1 1 0 in groups of 4", (centred / (std + 1e-4)).flatten()
    expect(call(f, r, G), right, what, {say: value.reshape(-1) for say, value in unlike.items()}, tolerance=1e-3)
    if not torch.isfinite(call(f, torch.ones(4), 4)).all():
        raise Wrong("a group of equal rewards gives NaN, 0 / 0: add 1e-4 to the std before you divide")
    bare = {"your epsilon is not the equation's: std + 1e-4": (centred / (std + 1e-8)).flatten()}
    expect(call(f, r, G), right, what, bare, "Look at what is added to the std.", 1e-6)


def check_mask(f) -> None:
    end = 9
    ids = torch.tensor([[5, 6, 9, 9, 9], [9, 9, 9, 9, 9], [5, 6, 7, 8, 5], [5, 8, 9, 5, 5]])
    t = torch.arange(5)

    def upto(lengths) -> torch.Tensor:
        return t < torch.tensor(lengths)[:, None]

    what = "ids 5 6 9 9 9 | 9 9 9 9 9 | 5 6 7 8 5 | 5 8 9 5 5 with end token 9"
    mistakes = {
        "your mask is one token too short: the end token is part of the answer. Untrained, stopping is never rewarded": (
            upto([2, 0, 5, 2])
        ),
        "your mask is one token too long: what stands behind the first end token was never chosen": upto([4, 2, 5, 4]),
        "you leave out end tokens wherever they are. The first one is trained; behind it nothing is, end token or not": (
            ids != end
        ),
        "you count end tokens only: what follows the first one is masked whatever it is": (
            (ids != end) | ((ids == end).cumsum(1) == 1)
        ),
        "a completion that was cut before its end has no tokens in your mask: it was sampled, so all of it counts": (
            upto([3, 1, 0, 3])
        ),
        "your mask is the wrong way round: True is what is trained": ~upto([3, 1, 5, 3]),
        "your mask reaches to the last end token, not to the first": upto([5, 5, 5, 3]),
    }
    expect(call(f, ids, [9]), upto([3, 1, 5, 3]), what, mistakes)
    one = {
        "there may be several end tokens, and you look at the first of the list only (torch.isin takes them all)": (
            upto([3, 1, 5, 3])
        ),
        "there may be several end tokens, and you look at the last of the list only (torch.isin takes them all)": (
            upto([3, 1, 5, 3])
        ),
        "there may be several end tokens, and you look at one of them only (torch.isin takes them all)": (
            upto([5, 5, 4, 2])
        ),
    }
    expect(call(f, ids, [9, 8]), upto([3, 1, 4, 2]), "the same ids with end tokens 9 and 8", one)


def check_k3(f) -> None:
    lp, ref = tensor(-1.0, -0.5, -2.0), tensor(-1.0, -1.5, -1.2)
    d = ref - lp
    mistakes = {
        "your d is the wrong way round: d = log ref - log policy. Yours estimates another divergence": (-d).exp()
        + d
        - 1,
        "this is k1, the bare difference of log-probs: its mean is right, but it is negative for many a token": -d,
        "the sign of d in the first or second term is wrong: exp(d) - d - 1 is 0 at d = 0 and positive elsewhere": (
            d.exp() + d - 1
        ),
        "this is k2, d^2 / 2: near k3 while the two are near, far away not": d**2 / 2,
        "the sign is the wrong way round: a distance is not negative": -(d.exp() - d - 1),
        "the 1 is missing: at equal log-probs the distance must be 0": d.exp() - d,
    }
    expect(call(f, lp, ref), d.exp() - d - 1, "log policy -1 -0.5 -2, log ref -1 -1.5 -1.2", mistakes, tolerance=1e-6)
    near = torch.full((1,), -1.0)
    value = call(f, near, near + 1e-4).item()
    if abs(value - 0.5e-8) > 0.1e-8:
        raise Wrong(
            f"in float32 at d = 1e-4 you get {value:.1e} instead of 5e-9: exp(d) - 1 loses its digits. torch.expm1"
        )


def check_k3_gradient(f) -> None:
    lp, ref = tensor(-1.0, -0.5, -2.0), tensor(-1.0, -1.5, -1.2)
    d = ref - lp
    mistakes = {
        "this is the derivative by d; d falls as log policy rises, so the sign turns": d.exp() - 1,
        "this is the gradient of d^2 / 2 (k2)": -d,
        "this is k3 itself, not its derivative": d.exp() - d - 1,
        "the term -d is forgotten: its derivative by log policy is +1": -d.exp(),
        "this is the gradient of k3 with d the wrong way round": (-d).exp() * -1 + 1,
    }
    hint = "Chain rule: d = log ref - log policy, so d(d) / d(log policy) = -1."
    expect(call(f, lp, ref), 1 - d.exp(), "log policy -1 -0.5 -2, log ref -1 -1.5 -1.2", mistakes, hint, 1e-6)


def loss_by_hand(
    lp, old, ref, A, mask, beta, eps=0.2, low=min, sign=1.0, kl_sign=1.0, d_sign=1, over="rows"
) -> torch.Tensor:
    """The GRPO loss by loops over rows and tokens; what stands behind `eps` are ways to get it wrong."""
    rows, tokens = [], []
    for i in range(len(lp)):
        losses = []
        for t in range(lp.shape[1]):
            if mask[i, t]:
                w, a = math.exp(lp[i, t] - old[i, t]), A[i].item()
                inside = min(max(w, 1 - eps), 1 + eps)
                d = d_sign * (ref[i, t] - lp[i, t]).item() if beta else 0.0
                losses.append(-sign * low(w * a, inside * a) + kl_sign * beta * (math.exp(d) - d - 1))
        rows.append(sum(losses) / (len(losses) if over == "rows" else lp.shape[1] if over == "width" else 1))
        tokens += losses
    return torch.tensor(sum(tokens) / len(tokens) if over == "tokens" else sum(rows) / len(rows), dtype=torch.float64)


def check_loss(f) -> None:
    x = -1.0  # where the mask is 0
    lp = tensor([-0.5, -1.0, -0.2], [-2.0, x, x], [-0.3, -0.7, x], [-1.5, -0.4, x])
    old = tensor([-0.9, -1.0, -0.1], [-1.2, x, x], [-0.3, -0.2, x], [-1.8, -0.5, x])
    ref = tensor([-0.6, -0.8, -0.3], [-1.5, x, x], [-0.4, -0.6, x], [-1.0, -0.9, x])
    A = tensor(0.5, -0.5, 1.0, -1.0)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, False]])
    given, what = (lp, old, ref, A, mask), "four completions of 3, 1, 2 and 2 tokens"

    def hand(beta=0.0, **wrong):
        return loss_by_hand(*given, beta, **wrong)

    mistakes = {
        "the sign is the wrong way round: the loss falls where good completions get likelier": hand(sign=-1.0),
        "max in place of min: PPO takes the more pessimistic of the two, so that the clip takes gain away, never loss": (
            hand(low=max)
        ),
        "the ratio is never clipped": hand(eps=1e9),
        "you take the clipped ratio alone: then a bad token that got too likely is not pushed down. min(w A, clip(w) A)": (
            hand(low=lambda a, b: b)
        ),
        "every token counts once (that is DAPO); the equation averages each completion first, then the completions": (
            hand(over="tokens")
        ),
        "you divide by the width T: padding is no token. Each row by its own number of unmasked tokens": (
            hand(over="width")
        ),
        "you add up a row's tokens: the equation takes their mean": hand(over="sum"),
        "you forget the mask: padding is averaged too": loss_by_hand(*given[:4], torch.ones_like(mask), 0.0),
    }
    expect(call(f, lp, old, None, A, mask, beta=0.0), hand(), what, mistakes, "Look at one token first.", 1e-6)
    mistakes = {
        "with beta > 0 your loss does not change: beta k3 belongs to every token's loss": hand(),
        "the KL has the wrong sign: it is a price, the loss rises with it": hand(0.1, kl_sign=-1.0),
        "in the KL d is the wrong way round: d = log ref - log pi": hand(0.1, d_sign=-1),
    }
    expect(call(f, lp, old, ref, A, mask, beta=0.1), hand(0.1), f"{what}, beta 0.1", mistakes, tolerance=1e-6)
    big = [torch.where(mask, y, value) for y, value in ((lp, 1e4), (old, -1e4), (ref, 3e4))]
    if not torch.isfinite(call(f, *big, A, mask, beta=0.1)).all():
        raise Wrong(
            "log-probs that are masked made the loss inf or NaN, for 0 * inf is NaN: set what is masked to 0 before the "
            "exponential (masked_fill), not after it"
        )
    same = lp.clone().requires_grad_()
    loss = call(f, same, lp, None, A, mask, beta=0.0)
    grad = torch.autograd.grad(loss, same, allow_unused=True)[0] if loss.requires_grad else None
    if grad is None or grad.abs().max() == 0:
        raise Wrong("the loss has a value but no gradient: log pi must not be detached, it is what is trained")
    expect(grad, -A[:, None] * mask / mask.sum(1, keepdim=True) / 4, "the gradient at ratio 1, -A / (B n_i)", {})


def check_sampling(f) -> None:
    p = tensor([0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4])
    u, logits = tensor(0.05, 0.6, 0.99), 1.5 + p.log()
    found = call(f, logits, u, 1.0)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise Wrong("it should return two things: tokens (B,) and their log-probs (B,)")
    tokens = found[0]
    if any(not torch.equal(call(f, logits, u, 1.0)[0], tokens) for _ in range(8)):
        raise Wrong("the same uniform numbers give other tokens: the choice is to be a function of `uniform` alone")
    right = torch.tensor([0, 1, 2])
    mistakes = {
        "your token is one too high: it is the first whose running sum passes u": (right + 1).clamp(max=2),
        "your token is one too low: it is the first whose running sum passes u": (right - 1).clamp(min=0),
        "you take the likeliest token: `uniform` chooses": p.argmax(-1),
    }
    expect(tokens, right, "pi = .1 .2 .7 | .5 .25 .25 | .3 .3 .4 and u = 0.05 0.6 0.99", mistakes)
    right = p.gather(1, right[:, None])[:, 0]
    mistakes = {
        "you return probabilities: log-probs are asked for": right,
        "your log-probs are bare logits: log_softmax makes them those of a distribution": 1.5 + right.log(),
    }
    expect(found[1], right.log(), "the log-probs of these tokens", mistakes)
    cold = (p[:1] ** 2 / (p[:1] ** 2).sum()).log()[0]
    tokens, logprobs = call(f, logits[:1].expand(2, 3), tensor(0.05, 0.9), 0.5)
    hot = {
        "at temperature 0.5 the choice is that of temperature 1, or of 2: divide the logits by T": torch.tensor([0, 2])
    }
    expect(tokens, torch.tensor([1, 2]), "pi = .1 .2 .7 at T 0.5 is .02 .07 .91; u = 0.05 0.9", hot)
    untempered = p[0].log()[torch.tensor([1, 2])]
    hot = {"you sample at T 0.5 and return log-probs of T 1: the ratio of the update would be wrong": untempered}
    expect(logprobs, cold[torch.tensor([1, 2])], "the log-probs at T 0.5", hot)
    greedy, _ = call(f, logits, u, 0.0)
    expect(greedy, torch.tensor([2, 0, 2]), "temperature 0", {}, "It means the likeliest token; do not divide by 0.")
    never = torch.tensor([[-math.inf, 0.0, 0.0]])
    zero = {"u = 0 chose a token of probability 0: the running sum must be above u, not at it": torch.tensor([0])}
    expect(call(f, never, torch.zeros(1), 1.0)[0], torch.tensor([1]), "logits -inf 0 0, u = 0", zero)
    many = torch.zeros(64, 1000) + torch.linspace(0, 3, 64)[:, None] * torch.linspace(-1, 1, 1000)
    last = call(f, many, torch.full((64,), 1 - 2**-24), 1.0)[0]
    if last.max() >= 1000:
        raise Wrong("u just below 1 gave token V, which does not exist: sums of floats may end below 1. Clamp to V - 1")


# ---- robots by trial -------------------------------------------------------------------------------------------------


def gae_by_hand(rewards, values, following, dead, ends, gamma, lam) -> torch.Tensor:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l} up to where the episode ended: no recursion."""
    out = torch.zeros_like(rewards)
    for t, n in [(t, n) for t in range(len(rewards)) for n in range(rewards.shape[1])]:
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if dead[k, n] else gamma * following[k, n]
            out[t, n] += (gamma * lam) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
            if ends[k, n]:
                break
    return out


def check_gae(f) -> None:
    T, N, gamma, lam = 6, 3, 0.9, 0.8
    g = torch.Generator().manual_seed(0)
    rewards, values, following = (torch.randn(T, N, generator=g, dtype=torch.float64) for _ in range(3))
    none = torch.zeros(T, N, dtype=torch.bool)
    dead, cut = none.clone(), none.clone()
    dead[2, 0], cut[3, 1] = True, True  # the first environment dies, the second is cut, the third goes on
    done = dead | cut

    def hand(dead=dead, ends=done, values=values, following=following, gamma=gamma, lam=lam):
        return gae_by_hand(rewards, values, following, dead, ends, gamma, lam)

    shifted = torch.cat([values[1:], following[-1:]])
    one_step, late = hand(lam=0.0), torch.cat([done[:1] & False, done[:-1]])
    mistakes = {
        "a time limit is treated as death: the value of the state after the cut is dropped. Only where `terminations` is "
        "True is it 0; the cut state goes on being worth something": hand(dead=done),
        "a termination is treated as a time limit: after it nothing can be earned, its next value must not count": (
            hand(dead=none)
        ),
        "the sum runs on over the end of an episode: what follows a done belongs to the next one, so A_{t+1} drops out": (
            hand(ends=none)
        ),
        "the sum stops at terminations only and runs on over time limits: it must stop at every done": hand(ends=dead),
        "you take values[t + 1] as the next value: where an episode ended, that is the next one's start. "
        "`next_values` holds the state that really followed": hand(following=shifted),
        "no A_{t+1}: this is the one-step error delta. Go backwards and carry gamma lambda A_{t+1}": one_step,
        "lambda is missing where A_{t+1} is carried": hand(lam=1.0),
        "gamma is missing where A_{t+1} is carried: it is gamma lambda A_{t+1}": hand(lam=lam / gamma),
        "ends are one step late: done_t is of the step from s_t, not of the one before": hand(ends=late),
        "V(s_t) is missing: delta is reward and next value minus what was expected, V(s_t)": hand(values=values * 0),
    }
    found = call(f, rewards, values, following, dead, done, gamma, lam)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise Wrong("it should return two things: advantages (T, N) and returns (T, N)")
    hint = "The last step of each environment is only delta: look at it first, then go one step back."
    expect(found[0], hand(), "6 steps of 3 environments, one dies, one is cut", mistakes, hint)
    mistakes = {
        "your returns are the advantages: add V(s_t)": hand(),
        "your returns add V of the next state: it is V(s_t)": hand() + following,
    }
    expect(found[1], hand() + values, "the returns", mistakes)


def check_ppo_loss(f) -> None:
    w, A = tensor(1.1, 1.5, 0.5, 1.5), tensor(-1.0, 2.0, -1.0, -2.0)
    old, zero = tensor(-1.0, -2.0, -0.5, -1.5), torch.zeros(4, dtype=torch.float64)
    inside = w.clamp(0.8, 1.2)

    def policy(term):
        return -term.mean()

    pessimist = torch.minimum(w * A, inside * A)
    mistakes = {
        "the sign is the wrong way round: the loss falls where good actions get likelier": -policy(pessimist),
        "max in place of min: the clip is to take gain away, never loss": policy(torch.maximum(w * A, inside * A)),
        "the ratio is never clipped": policy(w * A),
        "you take the clipped ratio alone: a bad action that got too likely is then not pushed down": policy(
            inside * A
        ),
        "you add up: the equation takes the mean": -pessimist.sum(),
        "the ratio is upside down: w = exp(logprobs - old_logprobs)": (
            policy(torch.minimum(A / w, (1 / w).clamp(0.8, 1.2) * A))
        ),
    }
    found = call(f, old + w.log(), old, A, zero, zero, zero)
    expect(found, policy(pessimist), "ratios 1.1 1.5 0.5 1.5, advantages -1 2 -1 -2", mistakes)
    V, R, H = tensor(0.0, 2.0, 1.0, 0.0), tensor(1.0, 0.0, 1.0, 0.5), tensor(3.0, 5.0, 1.0, 1.0)
    square = ((V - R) ** 2).mean()
    mistakes = {
        "the 1/2 of the value loss is missing": 0.3 * square,
        "the value loss has no weight: vf_coef times it": 0.5 * square,
        "the value loss is missing": zero.sum(),
        "you add up the critic's errors: the equation takes their mean": 0.15 * square * 4,
    }
    expect(call(f, old, old, zero, H, V, R, vf_coef=0.3), 0.15 * square, "the value loss at c_v 0.3", mistakes)
    bonus = {
        "entropy is a bonus: it lowers the loss, yours raises it": 0.1 * H.mean(),
        "the entropy bonus is missing": zero.sum(),
    }
    expect(call(f, old, old, zero, H, zero, zero, ent_coef=0.1), -0.1 * H.mean(), "entropy at c_e 0.1", bonus)
    new = old.clone().requires_grad_()
    loss = call(f, new, old, A, zero, zero, zero)
    grad = torch.autograd.grad(loss, new, allow_unused=True)[0] if loss.requires_grad else None
    if grad is None or grad.abs().max() == 0:
        raise Wrong("the loss has a value but no gradient: logprobs must not be detached, they are what is trained")


# ---- flows -----------------------------------------------------------------------------------------------------------


class Field:
    """A velocity that is known, and remembers what it was asked: v = 0.5 x + t."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t):
        if not isinstance(t, torch.Tensor) or t.shape != x.shape[:1]:
            raise Wrong("velocity(x, t) wants a t for every sample: a tensor (B,)")
        self.asked.append((x.detach().clone(), t.detach().clone()))
        return 0.5 * x + t[:, None, None].to(x)


def check_flow_loss(f) -> None:
    g = torch.Generator().manual_seed(0)
    x_1, x_0 = (torch.randn(4, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t, mask = tensor(0.1, 0.4, 0.6, 0.95), torch.ones(4, 3, 2, dtype=torch.float64)
    mask[..., 1] = 0
    s = t[:, None, None]
    x_t, u, field = (1 - s) * x_0 + s * x_1, x_1 - x_0, Field()
    found = call(f, field, x_1, x_0, t, mask)
    if not field.asked:
        raise Wrong("velocity is never asked: the loss is about what it says at (x_t, t)")
    points = {
        "x_t is the wrong way round: t = 0 is noise and t = 1 data here": s * x_0 + (1 - s) * x_1,
        "velocity is asked at the data: it must be asked on the way, at x_t": x_1,
        "velocity is asked at the noise: it must be asked on the way, at x_t": x_0,
    }
    expect(field.asked[0][0], x_t, "the point at which velocity is asked", points)
    expect(field.asked[0][1], t, "the time at which velocity is asked", {"the time is the wrong way round": 1 - t})
    v = 0.5 * x_t + s

    def mean(error):
        return (error * mask).sum() / mask.sum()

    mistakes = {
        "the target is the wrong way round: the way leads from noise to data, u = x_1 - x_0": mean((v + u) ** 2),
        "the target is the data: this trains a denoiser. The velocity of the way is x_1 - x_0": mean((v - x_1) ** 2),
        "the target is the noise, as in DDPM. The velocity of the way is x_1 - x_0": mean((v - x_0) ** 2),
        "masked entries count: the mean is over entries whose mask is 1": ((v - u) ** 2).mean(),
        "you divide by all entries: divide by the sum of the mask": ((v - u) ** 2 * mask).mean(),
        "you add up: divide by the sum of the mask": ((v - u) ** 2 * mask).sum(),
        "this is the absolute error: it is squared": mean((v - u).abs()),
    }
    expect(found, mean((v - u) ** 2), "the loss of four samples", mistakes)


def check_euler(f) -> None:
    x_0, K = tensor([[1.0, -2.0]], [[0.5, 0.0]]), 4

    def walk(times, dt=1 / K, moving=True):
        x = x_0
        for t in times:
            x = x + dt * (0.5 * (x if moving else x_0) + t)
        return x

    field = Field()
    found = call(f, field, x_0, K)
    ks = [k / K for k in range(K)]
    mistakes = {
        "each step goes the whole way: divide the velocity by K": walk(ks, dt=1.0),
        "time is one step ahead: the velocity of step k is that at t = k / K": walk([t + 1 / K for t in ks]),
        "you go from t = 1 down to 0, as diffusion does. Here 0 is noise: go up from it": walk([1 - t for t in ks]),
        "you go backwards: x - v / K leads away from the data": walk(ks, dt=-1 / K),
        "every step asks velocity at the noise x_0: ask it at x_k, where the last step ended": walk(ks, moving=False),
        "one step is missing: k = 0 ... K - 1": walk(ks[:-1]),
        "one step too many: k = 0 ... K - 1": walk([*ks, 1.0]),
        "the last step is missing, and the others are too long: K steps of 1 / K": walk([0, 1 / 3, 2 / 3], dt=1 / 3),
        "time counts steps: t = k / K, not k": walk(range(K)),
        "time does not move: t = k / K": walk([0.0] * K),
    }
    expect(found, walk(ks), "K = 4 steps through v = 0.5 x + t", mistakes, "Print t and x in every step.")


def check_transition(f) -> None:
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    K, a, k = 4, 0.5, torch.arange(4)
    t = (k / K).double()[:, None, None]
    variance = a**2 * (1 - t) / t.clamp_min(1 / K)
    ode, back = x + v / K, variance / (2 * K * (1 - t)) * (x - t * v)
    found = call(f, v, x, k, K, a)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise Wrong("it should return two things: mean (B, H, D) and std (B, 1, 1)")
    mean, std = found
    if not torch.isfinite(std).all():
        raise Wrong("at k = 0 the std is not finite, for t = 0 is divided by: take 1 / K in its place")
    right = (variance / K).sqrt()
    spreads = {
        "std is sigma: in a step of length 1 / K noise grows by sigma sqrt(1 / K)": variance.sqrt(),
        "std is sigma / K: noise adds up as its variance does, so it is sigma sqrt(1 / K)": variance.sqrt() / K,
        "you return the variance: std is its square root": variance / K,
        "the noise grows towards the data: sigma^2 is a^2 (1 - t) / t, most of it at the noise": (
            (a**2 * t / (1 - t) / K).sqrt()
        ),
    }
    expect(std, right, "std of the steps k = 0 1 2 3 at K 4, a 0.5", spreads)
    means = {
        "noise is added and the mean left as it was: x then spreads wider than the flow has it. The score's term pulls it "
        "back: + sigma^2 / 2 score / K": ode,
        "the score has the wrong sign: it points to where x is likelier, score = -x_0^ / (1 - t)": ode + back,
        "the half is missing: sigma^2 / 2 times the score": ode - 2 * back,
        "the score's term is not divided by K": ode - back * K,
        "x_0^ is the noise that x came from, x - t v; you took x": ode - variance / (2 * K * (1 - t)) * x,
        "x_0^ is the noise that x came from, x - t v; you took the data, x + (1 - t) v": (
            ode - variance / (2 * K * (1 - t)) * (x + (1 - t) * v)
        ),
        "the score is divided by 1 - t: -x_0^ / (1 - t)": ode - variance / (2 * K) * (x - t * v),
    }
    expect(mean, ode - back, "mean of the steps k = 0 1 2 3", means)


def check_density(f) -> None:
    x, mean, std = tensor([[0.3, -1.0]], [[0.0, 2.0]]), tensor([[0.1, -0.5]], [[0.0, 1.0]]), tensor([[0.5]], [[2.0]])
    z = (x - mean) / std
    right = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    mistakes = {
        "-log s is missing: a wide normal is a low one": -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + 0 * std,
        "the constant -log(2 pi) / 2 is missing: it cancels in the ratio, but a density it is only with it": (
            -0.5 * z**2 - std.log()
        ),
        "divide by the std before you square": -0.5 * (x - mean) ** 2 / std - std.log() - 0.5 * math.log(2 * math.pi),
        "the half of the square is missing": -(z**2) - std.log() - 0.5 * math.log(2 * math.pi),
        "you return the density: its log is asked for": right.exp(),
        "you add up the entries: each has its own (which of them count is decided later)": right.sum((1, 2)),
    }
    expect(call(f, x, mean, std), right, "four entries under normals of std 0.5 and 2", mistakes)


@dataclass(frozen=True)
class Exercise:
    file: str
    checks: dict[str, Callable]  # function to fill in -> its check
    idea: str


EXERCISES = {
    "advantages": Exercise("grpo", {"group_advantages": check_advantages}, "compare a completion with its group"),
    "mask": Exercise("grpo", {"completion_mask": check_mask}, "which tokens are the answer"),
    "k3": Exercise("grpo", {"k3": check_k3, "k3_gradient": check_k3_gradient}, "the KL from one sample, its gradient"),
    "loss": Exercise("grpo", {"grpo_loss": check_loss}, "ratio, clip, KL, and how they are averaged"),
    "sampling": Exercise("grpo", {"sample_tokens": check_sampling}, "one uniform number, one token"),
    "gae": Exercise("ppo", {"gae": check_gae}, "advantages over time; a time limit is no death"),
    "ppo": Exercise("ppo", {"ppo_loss": check_ppo_loss}, "PPO's loss"),
    "flow": Exercise("flow", {"flow_matching_loss": check_flow_loss}, "the way from noise to data"),
    "euler": Exercise("flow", {"sample_actions": check_euler}, "walking it"),
    "sde": Exercise("flow", {"transition": check_transition, "log_density": check_density}, "a flow that explores"),
}


def filled_in(name: str) -> dict[str, Callable]:
    """What stands in the exercise's file."""
    file = EXERCISES[name].file
    try:
        return vars(import_module(f"exercises.{file}"))
    except SyntaxError as e:
        raise Wrong(
            f"exercises/{file}.py is no Python: {e.msg} in line {e.lineno}: `{(e.text or '').strip()}`"
        ) from None


def grade(name: str, functions: dict[str, Callable]) -> None:
    """Raises NotYet or Wrong unless every function of the exercise passes its check."""
    for function, check in EXERCISES[name].checks.items():
        try:
            check(functions[function])
        except Wrong as e:
            raise Wrong(f"{function}: {e}") from None
        except NotYet:
            raise NotYet(f"{name}: not yet filled in ({function} in exercises/{EXERCISES[name].file}.py)") from None
