"""The exercises: the scripts' functions pass, typical wrong answers are told what is wrong, what is right learns."""

import io
import json
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import grpo_arithmetic
import ppo_fetch
from exercises import checks, run, solutions
from exercises import grpo as grpo_file
from exercises import ppo as ppo_file
from exercises.checks import EXERCISES, NotYet, Wrong, filled_in, grade
from exercises.ladder import __main__ as ladder

FUNCTIONS = {function: name for name, exercise in EXERCISES.items() for function in exercise.checks}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_scripts_own_functions_pass(name):
    grade(name, vars(solutions))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_not_yet_filled_in_and_says_what_it_wants(name):
    functions = filled_in(name)
    with pytest.raises(NotYet, match=f"{name}: not yet filled in .*exercises/{EXERCISES[name].file}.py"):
        grade(name, functions)
    for function in EXERCISES[name].checks:
        text = functions[function].__doc__
        assert "eq:" in text and "->" in text and "(B" in text or "shape" in text or "(T, N)" in text, function


def groups_of(r, G):
    return r.view(-1, G)


def scaled(change):
    """Advantages of groups (P, G) changed by `change` before they are divided as they should be."""
    return lambda r, G: (change(groups_of(r, G)) / (groups_of(r, G).std(1, keepdim=True) + 1e-4)).flatten()


def centred(g):
    return g - g.mean(1, keepdim=True)


def divided(by):
    return lambda r, G: (centred(groups_of(r, G)) / by(groups_of(r, G))).flatten()


def down(g, d):
    return ((g - g.mean(d, keepdim=True)) / (g.std(d, keepdim=True) + 1e-4)).flatten()


def grpo(token=None, average=None, fill=True):
    """A GRPO loss with another loss of a token, another average."""

    def loss(lp, old, ref, A, mask, *, beta, epsilon=0.2):
        w = (lp - old).masked_fill(~mask, 0.0).exp() if fill else (lp - old).exp()
        A, inside = A[:, None], w.clamp(1 - epsilon, 1 + epsilon)
        each = -torch.minimum(w * A, inside * A) if token is None else token(w, inside, A)
        if beta:
            d = (ref - lp).masked_fill(~mask, 0.0) if fill else ref - lp
            each = each + beta * (d.exp() - d - 1)
        rows, n = (each * mask).sum(1), mask.sum(1)
        return (rows / n).mean() if average is None else average(rows, n, mask, each)

    return loss


def kl(change):
    """A GRPO loss with another penalty."""

    def loss(lp, old, ref, A, mask, *, beta, epsilon=0.2):
        plain = grpo()(lp, old, None, A, mask, beta=0)
        return plain + (beta * (change(ref - lp) * mask).sum(1) / mask.sum(1)).mean() if beta else plain

    return loss


def tokens(choose, scale=lambda logits, T: logits / T, score=None):
    def sample(logits, u, T):
        if T == 0:
            return logits.argmax(-1), logits.log_softmax(-1).amax(-1)
        p = scale(logits, T).softmax(-1)
        a = choose(p, u).clamp(0, p.shape[1] - 1)
        return a, (p.log() if score is None else score(logits)).gather(1, a[:, None])[:, 0]

    return sample


def cdf(p, u, low=False):
    return (p.cumsum(-1) < u[:, None]).sum(1) if low else (p.cumsum(-1) <= u[:, None]).sum(1)


def unclamped(logits, u, T):
    logp = (logits / T if T else logits).log_softmax(-1)
    a = cdf(logp.exp(), u) if T else logp.argmax(-1)
    return a, logp.gather(1, a.clamp(max=logp.shape[1] - 1)[:, None])[:, 0]


def gae(boot=lambda dead, done: dead, cut=lambda dead, done: done, carry=lambda g, l: g * l, plus=None, baseline=1):
    """`gae` with another idea of where the next value counts, where the sum stops, what is carried, what is returned."""

    def estimate(r, v, after, dead, done, gamma, lam):
        delta = r + gamma * after * ~boot(dead, done) - baseline * v
        A, running = torch.zeros_like(r), torch.zeros_like(r[0])
        for t in reversed(range(len(r))):
            running = A[t] = delta[t] + carry(gamma, lam) * running * ~cut(dead, done)[t]
        return A, A + (v if plus is None else plus(v, after))

    return estimate


def next_in_row(r, v, after, *rest):
    return gae()(r, v, torch.cat([v[1:], after[-1:]]), *rest)


def ppo(surrogate, critic=lambda e: 0.5 * (e**2).mean(), bonus=-1.0):
    def loss(lp, old, A, H, V, R, *, clip_coef=0.2, ent_coef=0.0, vf_coef=0.5):
        w = (lp - old).exp()
        gain = surrogate(w, w.clamp(1 - clip_coef, 1 + clip_coef), A)
        return -gain.mean() + vf_coef * critic(V - R) + bonus * ent_coef * H.mean()

    return loss


def pessimist(w, inside, A):
    return torch.minimum(w * A, inside * A)


def flow(at=lambda t, e, a: (1 - t) * e + t * a, target=lambda e, a: a - e, mean=lambda e, m: (e * m).sum() / m.sum()):
    def loss(velocity, a, e, t, m):
        s = t[:, None, None]
        return mean((velocity(at(s, e, a), t) - target(e, a)) ** 2, m)

    return loss


def euler(time=lambda k, K: k / K, step=lambda K: 1 / K, steps=lambda K: range(K), frozen=False):
    def sample(velocity, x_0, K):
        x = x_0
        for k in steps(K):
            x = x + velocity(x_0 if frozen else x, torch.full((len(x),), time(k, K))) * step(K)
        return x

    return sample


def sde(std=lambda s2, K: (s2 / K).sqrt(), score=lambda x, v, t: -(x - t * v) / (1 - t), half=0.5, floor=True):
    def step(v, x, k, K, a):
        t = (k / K).to(x)[:, None, None]
        s2 = a**2 * (1 - t) / (t.clamp_min(1 / K) if floor else t)
        return x + (v + half * s2 * score(x, v, t)) / K, std(s2, K)

    return step


def mask_of(change):
    """A mask from what is an end token (B, T) bool, and how many came before."""
    return lambda ids, ends: change(torch.isin(ids, torch.tensor(ends)), ids)


def before(is_end):
    return is_end.cumsum(1) - is_end.long()


def in_place(r, G):
    r -= r.mean()
    return r


def breaks(r, G):
    return r.view(-1, G + 100)


TYPICAL = [  # (function, what was filled in, part of the sentence)
    ("group_advantages", scaled(lambda g: g), "do not sum to 0: subtract the group's mean"),
    ("group_advantages", scaled(lambda g: g - g.sum(1, keepdim=True)), "you subtract its sum, it should be its mean"),
    ("group_advantages", divided(lambda g: g.std(1, keepdim=True)), "gives NaN, 0 / 0: add 1e-4 to the std"),
    ("group_advantages", divided(lambda g: g.std(1, keepdim=True) + 1e-8), "not the equation's: std + 1e-4"),
    ("group_advantages", divided(lambda g: g.std(1, keepdim=True, correction=0) + 1e-4), "take it over n - 1"),
    ("group_advantages", divided(lambda g: g.var(1, keepdim=True) + 1e-4), "divide by the variance"),
    ("group_advantages", divided(lambda g: 1.0), "do not divide by the std: this is Dr. GRPO"),
    ("group_advantages", divided(lambda g: g.std() + 1e-4), "your std the whole batch's"),
    ("group_advantages", lambda r, G: (r - r.mean()) / (r.std() + 1e-4), "you compare with the whole batch"),
    ("group_advantages", lambda r, G: down(r.view(G, -1), 0), "your groups are every second row"),
    ("group_advantages", lambda r, G: down(r.view(G, -1), 1), "your groups have P rows"),
    ("group_advantages", lambda r, G: -scaled(centred)(r, G), "the sign is the wrong way round"),
    (
        "group_advantages",
        lambda r, G: scaled(centred)(r, G).view(-1, G),
        "it should return shape (8,), yours is (2, 4)",
    ),
    (
        "group_advantages",
        lambda r, G: scaled(centred)(r, G).tolist(),
        "should return a tensor of shape (8,), not a list",
    ),
    ("group_advantages", lambda r, G: None, "it returns nothing"),
    ("group_advantages", in_place, "changes its arguments in place"),
    ("group_advantages", breaks, "it stops with RuntimeError"),
    ("group_advantages", lambda r, G: r * 7, "rewards 1 0 0 0 | 1 1 1 0 in groups of 4: should be 1.4997"),
    ("completion_mask", mask_of(lambda end, ids: end.cumsum(1) == 0), "one token too short"),
    ("completion_mask", mask_of(lambda end, ids: before(before(end) > 0) == 0), "one token too long"),
    ("completion_mask", lambda ids, ends: ids != ends[0], "you leave out end tokens wherever they are"),
    (
        "completion_mask",
        lambda ids, ends: mask_of(lambda e, _: before(e) == 0)(ids, ends[:1]),
        "the first of the list only",
    ),
    ("completion_mask", mask_of(lambda end, ids: (before(end) == 0) & end.any(1)[:, None]), "no tokens in your mask"),
    ("completion_mask", mask_of(lambda end, ids: before(end) > 0), "the wrong way round"),
    (
        "completion_mask",
        mask_of(lambda end, ids: (before(end) == 0).float()),
        "should return torch.bool, not torch.float32",
    ),
    ("k3", lambda lp, ref: (lp - ref).exp() - (lp - ref) - 1, "d is the wrong way round"),
    ("k3", lambda lp, ref: lp - ref, "this is k1"),
    ("k3", lambda lp, ref: (lp - ref) ** 2 / 2, "this is k2"),
    ("k3", lambda lp, ref: 1 + (ref - lp) - (ref - lp).exp(), "a distance is not negative"),
    ("k3", lambda lp, ref: (ref - lp).exp() - (ref - lp), "the 1 is missing"),
    ("k3", lambda lp, ref: (ref - lp).exp() + (ref - lp) - 1, "the sign of d"),
    ("k3", lambda lp, ref: (ref - lp).exp() - (ref - lp) - 1, "torch.expm1"),
    ("k3_gradient", lambda lp, ref: (ref - lp).exp() - 1, "so the sign turns"),
    ("k3_gradient", lambda lp, ref: lp - ref, "the gradient of d^2 / 2"),
    ("k3_gradient", lambda lp, ref: -(ref - lp).exp(), "its derivative by log policy is +1"),
    ("grpo_loss", grpo(lambda w, inside, A: torch.minimum(w * A, inside * A)), "the sign is the wrong way round"),
    ("grpo_loss", grpo(lambda w, inside, A: -torch.maximum(w * A, inside * A)), "max in place of min"),
    ("grpo_loss", grpo(lambda w, inside, A: -w * A), "never clipped"),
    ("grpo_loss", grpo(lambda w, inside, A: -inside * A), "the clipped ratio alone"),
    ("grpo_loss", grpo(average=lambda rows, n, m, each: rows.sum() / n.sum()), "that is DAPO"),
    ("grpo_loss", grpo(average=lambda rows, n, m, each: rows.mean()), "add up a row's tokens"),
    ("grpo_loss", grpo(average=lambda rows, n, m, each: rows.mean() / m.shape[1]), "divide by the width T"),
    ("grpo_loss", grpo(average=lambda rows, n, m, each: each.mean()), "you forget the mask"),
    ("grpo_loss", kl(lambda d: 0 * d), "your loss does not change"),
    ("grpo_loss", kl(lambda d: 1 + d - d.exp()), "the KL has the wrong sign"),
    ("grpo_loss", kl(lambda d: (-d).exp() + d - 1), "in the KL d is the wrong way round"),
    ("grpo_loss", grpo(fill=False), "0 * inf is NaN"),
    ("grpo_loss", lambda lp, *rest, **more: grpo()(lp.detach(), *rest, **more), "a value but no gradient"),
    ("sample_tokens", tokens(lambda p, u: cdf(p, u) + 1), "one too high"),
    ("sample_tokens", tokens(lambda p, u: torch.multinomial(p, 1)[:, 0]), "a function of `uniform` alone"),
    ("sample_tokens", tokens(lambda p, u: p.argmax(-1)), "you take the likeliest token"),
    ("sample_tokens", tokens(cdf, lambda logits, T: logits), "divide the logits by T"),
    ("sample_tokens", tokens(cdf, lambda logits, T: logits * T), "divide the logits by T"),
    ("sample_tokens", tokens(cdf, score=lambda logits: logits.log_softmax(-1)), "return log-probs of T 1"),
    ("sample_tokens", tokens(cdf, score=lambda logits: logits.softmax(-1)), "log-probs are asked for"),
    ("sample_tokens", tokens(cdf, score=lambda logits: logits), "bare logits"),
    ("sample_tokens", tokens(lambda p, u: cdf(p, u, low=True)), "must be above u, not at it"),
    ("sample_tokens", lambda l, u, T: tokens(cdf)(l, u, T or 1.0), "temperature 0"),
    ("sample_tokens", unclamped, "Clamp to V - 1"),
    ("gae", gae(boot=lambda dead, done: done), "a time limit is treated as death"),
    ("gae", gae(boot=lambda dead, done: dead & False), "a termination is treated as a time limit"),
    ("gae", gae(cut=lambda dead, done: done & False), "runs on over the end of an episode"),
    ("gae", gae(cut=lambda dead, done: dead), "stops at terminations only"),
    ("gae", gae(cut=lambda dead, done: torch.cat([done[:1] & False, done[:-1]])), "one step late"),
    ("gae", gae(carry=lambda g, l: 0.0), "this is the one-step error"),
    ("gae", gae(carry=lambda g, l: g), "lambda is missing"),
    ("gae", gae(carry=lambda g, l: l), "gamma is missing"),
    ("gae", gae(baseline=0), "V(s_t) is missing"),
    ("gae", gae(plus=lambda v, after: 0.0), "your returns are the advantages"),
    ("gae", gae(plus=lambda v, after: after), "add V of the next state"),
    ("gae", next_in_row, "you take values[t + 1]"),
    ("gae", lambda *args: gae()(*args)[0], "it should return two things"),
    ("ppo_loss", ppo(lambda w, inside, A: -pessimist(w, inside, A)), "the sign is the wrong way round"),
    ("ppo_loss", ppo(lambda w, inside, A: torch.maximum(w * A, inside * A)), "max in place of min"),
    ("ppo_loss", ppo(lambda w, inside, A: w * A), "never clipped"),
    ("ppo_loss", ppo(lambda w, inside, A: inside * A), "the clipped ratio alone"),
    ("ppo_loss", ppo(lambda w, inside, A: pessimist(1 / w, (1 / w).clamp(0.8, 1.2), A)), "upside down"),
    ("ppo_loss", ppo(lambda *x: pessimist(*x).sum()), "you add up: the equation takes the mean"),
    ("ppo_loss", ppo(pessimist, lambda e: (e**2).mean()), "the 1/2 of the value loss is missing"),
    ("ppo_loss", ppo(pessimist, lambda e: 0 * e.mean()), "the value loss is missing"),
    ("ppo_loss", ppo(pessimist, lambda e: 0.5 * (e**2).sum()), "you add up the critic's errors"),
    ("ppo_loss", ppo(pessimist, bonus=1.0), "entropy is a bonus"),
    ("ppo_loss", ppo(pessimist, bonus=0.0), "the entropy bonus is missing"),
    ("ppo_loss", lambda lp, *rest, **more: ppo(pessimist)(lp.detach(), *rest, **more), "a value but no gradient"),
    ("flow_matching_loss", flow(at=lambda t, e, a: t * e + (1 - t) * a), "x_t is the wrong way round"),
    ("flow_matching_loss", flow(at=lambda t, e, a: a), "asked at the data"),
    ("flow_matching_loss", flow(target=lambda e, a: e - a), "the target is the wrong way round"),
    ("flow_matching_loss", flow(target=lambda e, a: a), "the target is the data"),
    ("flow_matching_loss", flow(target=lambda e, a: e), "the target is the noise"),
    ("flow_matching_loss", flow(mean=lambda e, m: e.mean()), "masked entries count"),
    ("flow_matching_loss", flow(mean=lambda e, m: (e * m).mean()), "divide by all entries"),
    ("flow_matching_loss", flow(mean=lambda e, m: (e * m).sum()), "you add up"),
    ("flow_matching_loss", flow(mean=lambda e, m: (e.sqrt() * m).sum() / m.sum()), "it is squared"),
    ("flow_matching_loss", lambda velocity, a, e, t, m: velocity(a, t[0]), "a t for every sample"),
    ("flow_matching_loss", lambda velocity, a, e, t, m: (a - e).mean(), "velocity is never asked"),
    ("sample_actions", euler(step=lambda K: 1.0), "divide the velocity by K"),
    ("sample_actions", euler(time=lambda k, K: (k + 1) / K), "time is one step ahead"),
    ("sample_actions", euler(time=lambda k, K: 1 - k / K), "as diffusion does"),
    ("sample_actions", euler(time=lambda k, K: float(k)), "time counts steps"),
    ("sample_actions", euler(time=lambda k, K: 0.0), "time does not move"),
    ("sample_actions", euler(step=lambda K: -1 / K), "you go backwards"),
    ("sample_actions", euler(frozen=True), "at the noise x_0"),
    ("sample_actions", euler(steps=lambda K: range(K - 1)), "one step is missing"),
    ("sample_actions", euler(steps=lambda K: range(K + 1)), "one step too many"),
    ("transition", sde(floor=False), "take 1 / K in its place"),
    ("transition", sde(std=lambda s2, K: s2.sqrt()), "std is sigma: in a step"),
    ("transition", sde(std=lambda s2, K: s2.sqrt() / K), "std is sigma / K"),
    ("transition", sde(std=lambda s2, K: s2 / K), "you return the variance"),
    ("transition", sde(half=0.0), "the mean left as it was"),
    ("transition", sde(half=-0.5), "the score has the wrong sign"),
    ("transition", sde(half=1.0), "the half is missing"),
    ("transition", sde(score=lambda x, v, t: -x / (1 - t)), "you took x"),
    ("transition", sde(score=lambda x, v, t: -(x + (1 - t) * v) / (1 - t)), "you took the data"),
    ("transition", sde(score=lambda x, v, t: -(x - t * v)), "the score is divided by 1 - t"),
    ("log_density", lambda x, m, s: solutions.log_density(x, m, s) + s.log(), "-log s is missing"),
    ("log_density", lambda x, m, s: -0.5 * ((x - m) / s) ** 2 - s.log(), "the constant -log(2 pi) / 2"),
    ("log_density", lambda x, m, s: solutions.log_density(x, m, s).exp(), "its log is asked for"),
    ("log_density", lambda x, m, s: solutions.log_density(x, m, s).sum((1, 2)), "you add up the entries"),
]


@pytest.mark.parametrize("function, wrong, sentence", TYPICAL, ids=[f"{f}: {says}" for f, _, says in TYPICAL])
def test_a_typical_wrong_answer_is_told_what_is_wrong(function, wrong, sentence):
    with pytest.raises(Wrong) as told:
        grade(FUNCTIONS[function], vars(solutions) | {function: wrong})
    assert sentence in str(told.value) and str(told.value).startswith(f"{function}: ")
    assert FUNCTIONS.keys() == {f for f, _, _ in TYPICAL}


def learnt(toy, steps: int, **own) -> list[float]:
    """The numbers of the toy's last line."""
    *_, last = toy(SimpleNamespace(**vars(solutions) | own), steps)
    return [float(number) for number in re.findall(r"-?[0-9.]+(?= |$)", last)]


def test_the_toys_learn_and_what_is_wrong_shows_in_them():
    """GRPO on a table, PPO in a corridor, a flow in the plane, a flow that explores: each beside a classic mistake."""
    short = mask_of(lambda end, ids: end.cumsum(1) == 0)
    _, right, stopped = learnt(run.answers, 80)
    assert right > 0.9 and stopped > 0.9
    assert learnt(run.answers, 80, completion_mask=short)[2] < stopped - 0.1
    assert learnt(run.answers, 40, group_advantages=lambda r, G: -solutions.group_advantages(r, G))[1] < 0.2
    assert learnt(run.answers, 80, k3=lambda lp, ref: torch.expm1(ref - lp) - (ref - lp))[2] > 0.9
    assert learnt(run.corridor, 60)[2] > 8.5  # in truth 10
    assert learnt(run.corridor, 40, gae=gae(boot=lambda dead, done: done))[2] < 4  # a time limit as death
    _, _, far, share = learnt(run.plane, 200)
    assert far < 0.4 and 0.3 < share < 0.7
    _, reward, mean, _ = learnt(run.line, 120)
    assert mean == pytest.approx(2, abs=0.2) and reward > -1


def test_pytest_says_what_waits_and_what_is_wrong_without_a_traceback(monkeypatch):
    """A wrong answer, one that breaks, a right one, seven stubs; and the grading starts no workers."""
    filled = {"group_advantages": lambda r, G: r - r.view(-1, G).mean(1), "completion_mask": solutions.completion_mask}
    for name, function in filled.items():
        monkeypatch.setattr(grpo_file, name, function)
    monkeypatch.setattr(ppo_file, "gae", gae(boot=lambda dead, done: done))
    with redirect_stdout(io.StringIO()) as out:
        code = pytest.main(["-s", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(ROOT / "exercises")])
    said = out.getvalue()
    assert code == 1 and "2 failed, 1 passed, 7 skipped" in said and "Traceback" not in said
    assert "group_advantages: it stops with RuntimeError" in said and "gae: a time limit is treated as death" in said
    assert "sde: not yet filled in (transition in exercises/flow.py)" in said


def test_a_file_that_is_no_python_is_said_in_a_sentence(monkeypatch):
    def broken(name):
        compile("def gae(:", "a draft", "exec")

    monkeypatch.setattr(checks, "import_module", broken)
    with pytest.raises(Wrong, match=r"exercises/ppo.py is no Python: .* in line 1: `def gae\(:`"):
        filled_in("gae")


def test_a_run_wants_a_right_answer_unless_told_otherwise(monkeypatch, capsys):
    """Yours beside the script's; a wrong or missing one in one line and exit code 2."""
    monkeypatch.setitem(run.TOYS, "gae", lambda f: [str(f.gae is solutions.gae)])
    for wrong, flags, line in [
        (None, (), "gae: not yet filled in"),
        (gae(boot=lambda dead, done: done), (), "error: gae: a time limit is treated as death"),
        (solutions.gae, ("--scrpt",), "error: exercises.run NAME [--script] [--anyway]"),
    ]:
        if wrong:
            monkeypatch.setattr(ppo_file, "gae", wrong)
        with pytest.raises(SystemExit) as stop:
            run.main("gae", *flags)
        assert stop.value.code == 2 and line in capsys.readouterr().err
    monkeypatch.setattr(ppo_file, "gae", gae(boot=lambda dead, done: done))
    run.main("gae", "--anyway")
    monkeypatch.setattr(ppo_file, "gae", lambda *x: solutions.gae(*x))
    run.main("gae")
    assert capsys.readouterr().out.split() == ["yours:", "False", "the", "script's:", "True"] * 2


@pytest.mark.parametrize("name", ["advantages", "mask", "k3", "loss", "sampling", "gae", "ppo"])
def test_a_function_in_the_script_is_called_with_the_scripts_arguments(name, monkeypatch):
    """The swapped function is reached, and gives what the script's own gives."""
    grpo, ppo = grpo_arithmetic, ppo_fetch
    originals = {m: dict(vars(m)) for m in (grpo, ppo)}
    functions = {k: v for k, v in vars(solutions).items() if callable(v)}
    own = {"gae": originals[ppo]["gae"], "k3": lambda lp, ref: torch.expm1(ref - lp) - (ref - lp)}
    own |= {k: originals[grpo][k] for k in ("group_advantages", "completion_mask", "sample_tokens")}
    for module in (grpo, ppo):
        for attribute in ("group_advantages", "completion_mask", "grpo_loss", "sample_tokens", "gae", "ppo_loss"):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, getattr(module, attribute))
    own["grpo_loss"] = lambda *x, beta, epsilon: originals[grpo]["grpo_loss"](
        *x, beta=beta, epsilon=epsilon, loss_type="grpo", max_completion_length=3
    )[0]
    own["ppo_loss"] = lambda *x, **w: originals[ppo]["ppo_loss"](*x, **w)[0]
    script, _ = run.in_script(name, SimpleNamespace(**functions | own))
    lp, A, mask = -torch.rand(4, 3), torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4, 3, dtype=torch.bool)
    settings = dict(loss_type="grpo", beta=0.1, epsilon=0.2, epsilon_high=None, max_completion_length=3)
    settings |= dict(num_loss_tokens=torch.tensor(12.0), num_sequences=4)
    calls = {
        "advantages": ("group_advantages", (A, 2, "group"), {}),
        "mask": ("completion_mask", (torch.tensor([[1, 2, 3]]), [2]), {}),
        "k3": ("grpo_loss", (lp, lp, lp - 0.3, A, mask), settings),
        "loss": ("grpo_loss", (lp, lp - 0.1, lp - 0.3, A, mask), settings),
        "sampling": ("sample_tokens", (torch.randn(4, 9), torch.rand(4), 0.7, 5), {}),
        "gae": ("gae", (*torch.randn(3, 4, 2), *(torch.rand(2, 4, 2) < 0.3), 0.9, 0.8), {}),
        "ppo": ("ppo_loss", torch.randn(6, 5).unbind(), dict(clip_coef=0.2, ent_coef=0.1, vf_coef=0.5)),
    }
    attribute, args, options = calls[name]
    ours, theirs = getattr(script, attribute)(*args, **options), originals[script][attribute](*args, **options)
    assert getattr(script, attribute) is not originals[script][attribute] or name in ("mask", "gae")
    torch.testing.assert_close(ours, theirs)


# ---- the course ------------------------------------------------------------------------------------------------------

COURSE = (ROOT / "docs" / "course.md").read_text()
SITTINGS = re.split(r"^## \d+\. ", COURSE, flags=re.M)[1:]


def test_the_course_has_ten_sittings_with_reading_run_question_and_exercise():
    assert len(SITTINGS) == 10 and COURSE.count("```mermaid") == 5
    for sitting in SITTINGS:
        for part in ("**Read", "**Run", "**Question.**", "<details><summary>Answer</summary>", "**Exercise"):
            assert part in sitting, (part, sitting[:40])
    assert {name for name in EXERCISES if any(f"`{name}`" in s for s in SITTINGS)} == EXERCISES.keys()


def test_the_course_names_functions_and_fields_that_exist():
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", COURSE)
    pairs = [(path, name) for path, names in named for name in re.findall(r"`(\w+)`", names)]
    assert len(pairs) > 40
    for path, name in pairs:
        found = re.search(rf"^\s*(?:def |class )?{name}\b\s*[(:=]", (ROOT / path).read_text(), re.M)
        assert found, f"{path} has no {name}"
    for test in re.findall(r"`(test_\w+)` in `(tests/\w+\.py)`", COURSE):
        assert f"def {test[0]}(" in (ROOT / test[1]).read_text()


def test_reinforce_applies_with_git_apply_and_compares_with_nothing():
    text, plain = ((ROOT / "exercises/ladder/reinforce.diff").read_text(), (ROOT / "grpo_arithmetic.py").read_text())
    changed = [line[1:] for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) == 2 and plain.count(changed[0]) == 1
    rewards = torch.tensor([1.0, 1.0, -1.0, float("nan")])
    assert ladder.module_of("reinforce.diff").group_advantages(rewards, 2, "none").tolist() == [1, 1, -1, 0]
    for flags, diff in ladder.RUNGS.values():
        assert ladder.settings_of(flags).num_iterations == 2
        assert diff is None or f"exercises/ladder/{diff}" in COURSE
        assert f"`{flags}`" in COURSE or not flags


def test_the_ladders_table_is_that_of_its_curves_and_its_curves_come_again():
    rows = [json.loads(line) for line in (ladder.RESULTS / "ladder.jsonl").read_text().splitlines()]
    curves = {row["rung"]: row["reward"] for row in rows}
    assert ladder.table(curves) in COURSE and list(curves) == list(ladder.RUNGS)
    (again,) = ladder.on_the_table("RLOO", range(1))
    assert len(again) == 80 and again == pytest.approx(curves["RLOO"][0], abs=0.2)  # other kernels round differently
