"""How fast the Fetch environments step: physics alone, FetchVec, gymnasium one after the other, gymnasium in processes.

    uv run python benchmarks/fetch_speed.py                  # env steps a second, median of alternating rounds
    uv run python benchmarks/fetch_speed.py --soak 1000000   # memory over a million steps
    uv run python benchmarks/fetch_speed.py --scaling        # FetchVec by processes x threads, one JSON line per row

An env step is 20 steps of the simulator. "mj_step alone" moves the gripper by the same random actions on the same
number of threads, and does nothing else: no fingers put back, no observation, no reward, no reset.
With --scaling every process steps its share of the environments on its own threads, as under torchrun, and they meet
only at the start and at the end of a round: one process shows where the GIL binds, several whether more of them help.
"""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.parallel import cores
from common.robot.fetch import HOLD, TASKS, FetchVec, import_robotics


@dataclass
class Args:
    num_envs: int = 32  # environments
    threads: int = cores()  # threads of FetchVec and of the physics loop
    steps: int = 50  # steps of every environment in a round
    rounds: int = 5  # rounds, each of which times every contender once
    tasks: tuple[str, ...] = TASKS  # tasks to time
    soak: int = 0  # instead: run so many env steps and watch the memory
    scaling: bool = False  # instead: FetchVec on 1, 2, 4, … threads and processes x threads, up to --threads in all


def physics_only(task: str, num_envs: int, threads: int):
    """A function that steps num_envs simulator states `steps` times on `threads` threads."""
    env = FetchVec(f"{task}-v4", num_envs, 1)
    env.reset(seed=0)
    model, rng = env._model, np.random.default_rng(0)

    def work(indices, actions):
        for displacement in actions:
            for i in indices:
                mocap_pos, mocap_quat, xpos, xquat, *_ = env._views[i]
                np.add(xpos, displacement[i], out=mocap_pos)
                np.add(xquat, HOLD, out=mocap_quat)
                mujoco.mj_step(model, env._data[i], 20)

    def run(steps: int) -> None:
        env.reset()
        actions = rng.uniform(-0.05, 0.05, (steps, num_envs, 3))
        parts = [range(k, num_envs, threads) for k in range(threads)]
        workers = [threading.Thread(target=work, args=(part, actions)) for part in parts]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]

    return run


def stepping(envs, num_envs: int):
    rng = np.random.default_rng(0)
    envs.reset(seed=0)

    def run(steps: int) -> None:
        for actions in rng.uniform(-1, 1, (steps, num_envs, 4)).astype(np.float32):
            envs.step(actions)

    return run


def soak(args: Args) -> None:
    envs = FetchVec("FetchPickAndPlace-v4", args.num_envs, args.threads)
    run, start = stepping(envs, args.num_envs), time.time()
    for part in range(10):
        run(max(args.soak // args.num_envs // 10, 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        now = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        seconds = time.time() - start
        print(f"{(part + 1) * args.soak // 10:>9,} steps  {seconds:6.0f} s  {now:.1f} MB now, {peak:.1f} MB at most")


def stepper(task: str, num_envs: int, threads: int, steps: int, rounds: int, barrier) -> None:
    """A process of --scaling."""
    run = stepping(FetchVec(f"{task}-v4", num_envs, threads), num_envs)
    run(5)
    for _ in range(rounds):
        barrier.wait()
        run(steps)
        barrier.wait()


def scaling(args: Args) -> None:
    """Env steps a second of `processes` x `threads`, the environments divided among the processes."""
    context = multiprocessing.get_context("fork")  # before there are any threads; nothing is imported anew
    powers = [1 << k for k in range(args.threads.bit_length()) if 1 << k <= args.threads]
    for task in args.tasks:
        alone = None
        for processes, threads in [(p, t) for p in powers for t in powers if p * t <= args.threads]:
            barrier = context.Barrier(processes + 1)
            share = args.num_envs // processes
            workers = [
                context.Process(target=stepper, args=(task, share, threads, args.steps, args.rounds, barrier))
                for _ in range(processes)
            ]
            [worker.start() for worker in workers]
            rates = []
            for _ in range(args.rounds):
                barrier.wait()
                start = time.perf_counter()
                barrier.wait()
                rates.append(args.steps * share * processes / (time.perf_counter() - start))
            [worker.join() for worker in workers]
            rate = statistics.median(rates)
            alone = alone or rate
            row = {
                "part": "FetchVec",
                "task": task,
                "num_envs": args.num_envs,
                "processes": processes,
                "threads": threads,
            }
            row |= {"steps_per_s": round(rate), "times_one_thread": round(rate / alone, 2)}
            print(json.dumps(row), flush=True)


def main(args: Args) -> None:
    if args.soak:
        return soak(args)
    if args.scaling:
        return scaling(args)
    import_robotics()
    kwargs = {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    print(
        f"{args.num_envs} environments, {args.threads} threads, MuJoCo {mujoco.__version__}; env steps a second (median)"
    )
    for task in args.tasks:
        async_envs = gym.make_vec(f"{task}-v4", args.num_envs, vectorization_mode="async", **kwargs)
        contenders = {
            "mj_step alone": physics_only(task, args.num_envs, args.threads),
            "FetchVec": stepping(FetchVec(f"{task}-v4", args.num_envs, args.threads), args.num_envs),
            "gymnasium sync": stepping(
                gym.make_vec(f"{task}-v4", args.num_envs, vectorization_mode="sync", **kwargs), args.num_envs
            ),
            "gymnasium async": stepping(async_envs, args.num_envs),
            "mj_step alone, 1 thread": physics_only(task, args.num_envs, 1),
            "FetchVec, 1 thread": stepping(FetchVec(f"{task}-v4", args.num_envs, 1), args.num_envs),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds + 1):
            for name, run in contenders.items():
                start = time.perf_counter()
                run(args.steps)
                rates[name].append(args.steps * args.num_envs / (time.perf_counter() - start))
        async_envs.close()
        rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
        print(task)
        for name, values in rates.items():
            cores = 1 if name.endswith(("1 thread", " sync")) else args.threads
            median = statistics.median(values)
            print(
                f"  {name:24s} {median:7.0f}   {median / cores:6.0f} per core   {min(values):.0f} to {max(values):.0f}"
            )

        def ratio(a: str, b: str, rates=rates) -> float:
            return statistics.median(x / y for x, y in zip(rates[a], rates[b]))

        print(
            f"  FetchVec / mj_step alone {ratio('FetchVec', 'mj_step alone'):.2f}, "
            f"1 thread {ratio('FetchVec, 1 thread', 'mj_step alone, 1 thread'):.2f}; "
            f"FetchVec / sync {ratio('FetchVec', 'gymnasium sync'):.2f}x, "
            f"/ async {ratio('FetchVec', 'gymnasium async'):.2f}x"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
