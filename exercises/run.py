"""Your function in a run that learns, beside the script's own in its place.

    uv run python -m exercises.run                 # the exercises, and how yours stand
    uv run python -m exercises.run gae             # a toy: seconds
    uv run python -m exercises.run gae --script    # the script itself: half a minute
    uv run python -m exercises.run gae --anyway    # also where it is still wrong: what does that cost?

The toys are the algorithms without what makes them large: GRPO on a table of logits, PPO in a corridor of six cells, a
flow in the plane, a flow on a line that looks for a reward.
"""

import math
import sys
from importlib import import_module
from types import SimpleNamespace

import torch

from common.cli import fail, parse
from exercises import solutions
from exercises.checks import EXERCISES, NotYet, Wrong, filled_in, grade


def answers(f, steps: int = 80, seed: int = 0, iterations: int = 1, shift=0.0, curve: list | None = None):
    """GRPO on a table of logits: prompt p wants the token p, and then the end. Yields a line of what it has learnt.

    f: the functions of the exercise. f.k3 is used where it is not the script's, which stands inside its `grpo_loss`.
    shift: added to every reward, which changes no preference. curve: takes the mean reward (0 to 2) of every step.
    """
    P, G, T, V, end, beta = 4, 16, 3, 6, 5, 0.02
    table = torch.zeros(P, T, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.arange(P).repeat_interleave(G)  # (B,)
    for step in range(1, steps + 1):
        with torch.no_grad():
            logits = table.repeat_interleave(G, 0)  # (B, T, V)
            draws = torch.rand(P * G, T, generator=generator)
            ids = torch.stack([f.sample_tokens(logits[:, t], draws[:, t], 1.0)[0] for t in range(T)], 1)  # (B, T)
            mask = f.completion_mask(ids, [end])
            right = ids[:, 0] == wanted
            stopped = right & (ids[:, 1] == end)
            rewards = right.float() + stopped.float()
            advantages = f.group_advantages(rewards + shift, G)
            old = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            reference = torch.full_like(old, -math.log(V))
        for _ in range(iterations):
            logprobs = table.repeat_interleave(G, 0).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            own = f.k3 is not solutions.k3
            loss = f.grpo_loss(logprobs, old, reference, advantages, mask, beta=0.0 if own else beta)
            if own:
                loss = loss + beta * ((f.k3(logprobs, reference) * mask).sum(1) / mask.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if curve is not None:
            curve.append(round(rewards.mean().item(), 4))
        if step % (steps // 4) == 0:
            yield f"step {step:3d}   right {right.float().mean():.2f}   right and stopped {stopped.float().mean():.2f}"


def corridor(f, steps: int = 100):
    """PPO on six cells. Cell 0 is a pit: the end. In cell 5 every step earns 1; all is cut after 10 steps."""
    N, T, gamma, limit = 32, 20, 0.9, 10
    policy, value = torch.zeros(6, 2, requires_grad=True), torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([policy, value], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    cell, age = torch.full((N,), 2), torch.arange(N) % limit
    for step in range(1, steps + 1):
        rows = []
        for _ in range(T):
            with torch.no_grad():
                action = torch.multinomial(policy[cell].softmax(-1), 1, generator=generator)[:, 0]
            after, age = (cell + 2 * action - 1).clamp(0, 5), age + 1
            dead = after == 0
            done = dead | (age >= limit)
            rows.append((cell, action, (after == 5).float(), after, dead, done))
            cell, age = torch.where(done, 2, after), torch.where(done, 0, age)
        cells, actions, rewards, afters, deads, dones = map(torch.stack, zip(*rows))  # (T, N)
        with torch.no_grad():
            ends = deads, dones, gamma, 0.95
            advantages, returns = f.gae(rewards, value[cells], value[afters], *ends)
            old = policy[cells].log_softmax(-1).gather(-1, actions[..., None]).flatten()
        weights = (advantages.flatten() - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(4):
            logp = policy[cells].log_softmax(-1)
            new, entropy = logp.gather(-1, actions[..., None]).flatten(), -(logp.exp() * logp).sum(-1).flatten()
            loss = f.ppo_loss(new, old, weights, entropy, value[cells].flatten(), returns.flatten(), ent_coef=0.001)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % (steps // 4) == 0:
            yield f"step {step:3d}   reward of a step {rewards.mean():.2f}   V(cell 5) {value[5]:.2f} (in truth 10.00)"


def plane(f, steps: int = 400):
    """A flow from a normal to two points of the plane, learnt by a small network and walked in 8 steps."""
    torch.manual_seed(0)
    points = torch.tensor([[1.0, 0.5], [-1.0, -0.5]])
    net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU())
    net.append(torch.nn.Linear(64, 2))

    def velocity(x, t):
        return net(torch.cat([x, t[:, None, None].expand(*x.shape[:2], 1).to(x)], -1))

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        x_1 = points[torch.randint(2, (256,))][:, None] + 0.05 * torch.randn(256, 1, 2)
        loss = f.flow_matching_loss(velocity, x_1, torch.randn_like(x_1), torch.rand(256), torch.ones_like(x_1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            with torch.no_grad():
                x = f.sample_actions(velocity, torch.randn(512, 1, 2), 8)
            far = torch.cdist(x[:, 0], points).min(1)
            share = (far.indices == 0).float().mean()
            where = f"from the nearer point {far.values.mean():.2f}   at the first {share:.2f}"
            yield f"step {step:3d}   loss {loss:.2f}   {where}"


def line(f, steps: int = 120):
    """A flow to N(0, 0.5^2) whose velocity may be shifted in each step: where does a reward at 2 lead it?"""
    K, goal, spread = 4, 2.0, 0.5
    shift = torch.zeros(K, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def velocity(x, k: int):
        t = k / K
        return (t * spread**2 - (1 - t)) * x / ((1 - t) ** 2 + t**2 * spread**2) + shift[k]

    for step in range(1, steps + 1):
        x = torch.randn(256, 1, 1, generator=generator)
        density = 0.0
        for k in range(K):
            mean, std = f.transition(velocity(x, k), x, torch.full((256,), k), K, 0.8)
            x = (mean + std * torch.randn(x.shape, generator=generator)).detach()
            density = density + f.log_density(x, mean, std).sum((1, 2))
        reward = -((x - goal) ** 2)[:, 0, 0]
        loss = -(density * (reward - reward.mean()) / (reward.std() + 1e-8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            with torch.no_grad():
                x = torch.randn(4096, 1, 1, generator=generator)
                for k in range(K):
                    x = x + velocity(x, k) / K
            where = f"actions without noise {x.mean():5.2f} +- {x.std():.2f} (goal 2)"
            yield f"step {step:3d}   reward {reward.mean():6.2f}   {where}"


TOYS = {name: answers for name in ("advantages", "mask", "k3", "loss", "sampling")}
TOYS |= {"gae": corridor, "ppo": corridor, "flow": plane, "euler": plane, "sde": line}
SHORT = "--fresh --n-samples 16 --epochs 40 --eval-every 0 --eval-samples 4 --save-every 0 --exp-name exercise".split()


def in_script(name: str, f) -> tuple[object, list[str]]:
    """The script with the exercise's function in it, under the script's signature; and its flags."""
    script = import_module("ppo_fetch" if name in ("gae", "ppo") else "grpo_arithmetic")
    loss_of = script.ppo_loss if name == "ppo" else getattr(script, "grpo_loss", None)

    def grpo_loss(*given, beta, epsilon, **settings):
        _, metrics = loss_of(*given, beta=beta, epsilon=epsilon, **settings)
        if name == "loss":
            return f.grpo_loss(*given, beta=beta, epsilon=epsilon), metrics
        rest, _ = loss_of(*given, beta=0.0, epsilon=epsilon, **settings)
        kl = torch.where(given[4], f.k3(given[0], given[2]), 0.0)
        return rest + beta * (kl.sum(1) / given[4].sum(1)).mean(), metrics

    changes = {
        "advantages": {"group_advantages": lambda rewards, G, *_: f.group_advantages(rewards, G)},
        "mask": {"completion_mask": f.completion_mask},
        "k3": {"grpo_loss": grpo_loss},
        "loss": {"grpo_loss": grpo_loss},
        "sampling": {"sample_tokens": lambda logits, u, T, V=None: f.sample_tokens(logits[:, :V], u, T)},
        "gae": {"gae": f.gae},
        "ppo": {"ppo_loss": lambda *x, **w: (f.ppo_loss(*x, **w), loss_of(*x, **w)[1])},
    }
    if name not in changes:
        fail(f"{name} has no --script: the toy is its run")
    for attribute, function in changes[name].items():
        setattr(script, attribute, function)
    return script, [] if name in ("gae", "ppo") else SHORT


def state_of(name: str) -> str:
    """What is to be said of the exercise: nothing where it passes."""
    try:
        grade(name, filled_in(name))
    except (NotYet, Wrong) as e:
        return str(e)
    return ""


def main(name: str, *flags: str) -> None:
    if name not in EXERCISES or set(flags) - {"--script", "--anyway"}:
        fail(f"exercises.run NAME [--script] [--anyway], NAME one of {', '.join(EXERCISES)}")
    said = state_of(name)
    if said and ("--anyway" not in flags or "not yet filled in" in said):
        fail(said)
    theirs = SimpleNamespace(**vars(solutions))
    own = {function: filled_in(name)[function] for function in EXERCISES[name].checks}
    yours = SimpleNamespace(**vars(theirs) | own)
    if "--script" in flags:
        script, argv = in_script(name, yours)
        sys.argv = [script.__file__, *argv]
        script.main(parse(script.Args, script.__doc__))
    for whose, functions in (("yours", yours), ("the script's", theirs)):
        print(f"{whose}:")
        for learnt in TOYS[name](functions):
            print("  " + learnt, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        for name, exercise in EXERCISES.items():
            print(f"{name:11s} {exercise.idea:45s} {state_of(name).removeprefix(name + ': ') or 'right'}")
