"""PPO's update and its acting on a device: steps per second by width, precision and compilation.

    uv run python benchmarks/gpu_ppo.py                           # GPU
    uv run python benchmarks/gpu_ppo.py --device cpu --reduced    # does all of it run
    uv run python benchmarks/gpu_ppo.py --device cpu --num-envs 64 --amp off bf16

One JSON line per row. The update is ppo_fetch.py's own function on a synthetic batch of FetchPush's shapes, all epochs
taken (no KL limit). "act_ms" is what a rollout waits for: observations of all environments from numpy to the device,
policy, sample, actions back.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_fetch as p
from common.cli import parse
from common.parallel import World, join_world

OBS_DIM, ACTION_DIM = 37, 4  # FetchPush, --observation-mode delta


@dataclass
class Args:
    device: str = "cuda"  # cuda or cpu
    reduced: bool = False  # 64 environments, one epoch, width 64, one compiled row
    widths: tuple[int, ...] = (1024, 4096, 8192)  # of the hidden layers
    amp: tuple[str, ...] = ("off", "bf16", "fp16")  # precisions
    num_envs: int = 8192  # environments; a batch has 25 steps of each, a minibatch an eighth of that
    compiled: bool = True  # time --compile too, but for fp16
    epochs: int | None = None  # passes over the batch in an update; default: the script's
    rounds: int = 3  # updates that are timed, after one that is not


def synthetic(agent: p.Agent, args: p.Args, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as `rollout` and `gae` leave it, (T, N, …): actions of the agent itself, random rewards."""
    T, N = args.num_steps, args.num_envs
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(T, N, *shape, generator=generator).to(device)  # noqa: E731
    obs = draw(OBS_DIM)
    with torch.no_grad():
        policy = agent.policy(obs.flatten(0, 1))
        actions = p.sample(agent, policy, draw(ACTION_DIM).flatten(0, 1))
        logprobs = p.logprobs_entropy(agent, policy, actions)[0]
        values = agent.value(obs.flatten(0, 1))
    batch = {"obs": obs, "actions": actions.view(T, N, -1), "logprobs": logprobs.view(T, N), "rewards": draw()}
    batch |= {"values": values.view(T, N), "advantages": draw(), "valid": torch.ones(T, N, dtype=torch.bool).to(device)}
    return batch | {"returns": batch["values"] + batch["advantages"]}


def measure(width: int, amp: str, compiled: bool, flags: Args, world: World) -> None:
    device = world.device
    args = p.resolve(p.Args(env_id="FetchPush-v4", hidden=width, amp=amp, num_envs=flags.num_envs, target_kl=0.0))
    args = replace(args, compile=compiled)
    args = replace(args, update_epochs=1 if flags.reduced else flags.epochs or args.update_epochs)
    torch.manual_seed(0)
    agent = p.Agent(OBS_DIM, gym.spaces.Box(-1, 1, (ACTION_DIM,)), args).to(device)
    if compiled:
        torch.compiler.reset()
        agent.policy = torch.compile(agent.policy)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    batch, generator = synthetic(agent, args, device), torch.Generator().manual_seed(0)
    act, x = p.mean_actions(agent, device), np.zeros((flags.num_envs, OBS_DIM), np.float32)

    def timed(function, rounds: int) -> float:
        function()  # compiles, allocates
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        for _ in range(rounds):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / rounds

    loss_of = torch.compile(p.minibatch_loss) if compiled else p.minibatch_loss
    update_s = timed(lambda: p.update(agent, loss_of, optimizer, scaler, batch, args, generator, world), flags.rounds)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    act_s = timed(lambda: act(x), 20)
    steps, rows = args.update_epochs * args.num_minibatches, args.num_envs * args.num_steps
    values = {"width": width, "amp": amp, "compiled": compiled, "minibatch": rows // args.num_minibatches}
    rates = {"update_steps_per_s": steps / update_s, "samples_per_s": args.update_epochs * rows / update_s}
    rates |= {"act_ms": 1e3 * act_s} | ({"peak_gb": peak} if peak is not None else {})
    print(json.dumps({"part": "ppo"} | values | {k: float(f"{v:.4g}") for k, v in rates.items()}), flush=True)


def main(flags: Args) -> None:
    world = join_world(flags.device)
    torch.set_num_threads(1)  # ppo_fetch.py's defaults: one thread of torch, deterministic kernels
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if flags.reduced:
        flags = replace(flags, num_envs=64, widths=(64,), rounds=1)
    for width in flags.widths:
        for amp in flags.amp:
            if amp == "fp16" and world.device.type == "cpu":
                continue  # a GPU's format; on a CPU bf16 is the one with hardware
            for compiled in (False, True) if flags.compiled and amp != "fp16" else (False,):
                if not (compiled and flags.reduced and (width, amp) != (flags.widths[0], "off")):
                    measure(width, amp, compiled, flags, world)


if __name__ == "__main__":
    main(parse(Args, __doc__))
