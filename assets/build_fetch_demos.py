"""Builds assets/fetch_demos: demonstrations of the Fetch robot, recorded as a LeRobot v2.1 data set.

A scripted expert plays three tasks of gymnasium-robotics. It is a proportional controller: every action is a function
of the present observation alone, so a policy that sees `observation.state` and the instruction can imitate it.

  FetchReach-v4         reach the target                           straight to the goal
  FetchPush-v4          push the block to the target               above the block's far side, down, push along the line
  FetchPickAndPlace-v4  pick up the block and move it to the target  above the block, down, close, straight to the goal

What is executed is what is recorded: expert plus a little Gaussian noise, float32. Only episodes that succeed within
gymnasium's 50 steps are kept, each cut `--tail` steps after its success. Pictures are drawn afterwards, from recorded
simulator states in an environment of their own: drawing recomputes the dynamics and would change PickAndPlace.

    uv run python assets/build_fetch_demos.py                                 # rewrites assets/fetch_demos, 2 minutes
    uv run python assets/build_fetch_demos.py --episodes 2000 --no-video --out data/fetch    # many more, states only

Dims: N environments, T steps, D = 28 state numbers, 4 action numbers.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mujoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common.cli import fail, parse  # noqa: E402
from common.robot.fetch import GOAL_RADIUS, FetchVec, goal_distance  # noqa: E402
from common.robot.fetch_robot import ACTION, INSTRUCTIONS, STATE, Camera, slices, state_vector  # noqa: E402


@dataclass
class Args:
    out: str = str(HERE / "fetch_demos")
    """folder to write the data set to; a data set that is already there is replaced"""
    tasks: tuple[str, ...] = ("FetchReach-v4", "FetchPush-v4", "FetchPickAndPlace-v4")
    """environments to record, in turns"""
    episodes: int = 40  # successful episodes per task
    seed: int = 0
    """recorded episodes start from environment seeds 1,000,000 * (seed + 1) and up, the next task's 100,000 higher"""
    noise: float = 0.05  # standard deviation of the noise on the displacement part of an action (1 = 5 cm), 0 to 0.2
    tail: int = 16  # steps kept after the success, the goal being held, 1 to 50
    video: bool = True  # record the front camera (needs EGL or OSMesa); most of the time a recording takes
    size: int = 96  # height and width of the video in pixels, even
    verify: int = 200  # fresh episodes per task, environment seeds 0 and up, that measure the expert's success rate


# ---- 1. Format: what a row holds --------------------------------------------------------------------------------------

FPS = 25  # a step is 20 * 2 ms
STEPS = 50  # of an episode
CAMERA = "observation.images.front"
CHUNK = 1000  # episodes in a folder


def names(parts: dict[str, int]) -> list[str]:
    return [f"{name}.{i}" for name, size in parts.items() for i in range(size)]


# ---- 2. Experts: observation -> action, no memory ---------------------------------------------------------------------

GAIN = 10.0  # action per metre: a full action moves the gripper 3.3 cm, so each step takes away a third of the error


def reach(obs: dict[str, np.ndarray]) -> np.ndarray:
    """(N, 4): straight to the goal."""
    return act(GAIN * (obs["desired_goal"] - obs["achieved_goal"]), -1.0)


def push(obs: dict[str, np.ndarray]) -> np.ndarray:
    """(N, 4): get behind the block on the line to its goal, coming from above, and push along that line."""
    gripper, block, goal = obs["observation"][:, :3], obs["achieved_goal"], obs["desired_goal"]
    to_goal = (goal - block)[:, :2]
    distance = norm(to_goal)
    u = to_goal / np.maximum(distance, 1e-6)  # direction of the push, in the plane of the table
    behind = block[:, :2] - 0.075 * u - gripper[:, :2]  # to the point where a push starts
    relative = gripper[:, :2] - block[:, :2]
    along = (relative * u).sum(1, keepdims=True)  # < 0: the gripper is behind the block
    aside = relative - along * u
    height = gripper[:, 2:]
    low, high = 0.425 - height, 0.5 - height  # to the block's middle, to well above it

    pushing = (-0.12 < along) & (along < -0.02) & (norm(aside) < -0.5 * along) & (height < 0.455)
    above = norm(behind) < 0.02
    speed = np.clip(8.0 * distance + 0.1, 0.0, 0.7)
    go_push = np.concatenate([speed * u - 20.0 * aside, GAIN * low], axis=1)  # back onto the line, so the block turns
    go_down = np.concatenate([GAIN * behind, GAIN * low], axis=1)
    go_over = np.concatenate([GAIN * behind * (height > 0.475), GAIN * high], axis=1)  # sideways only above the block
    v = np.where(pushing, go_push, np.where(above, go_down, go_over))
    there = (distance < 0.012) | (~pushing & (distance < 0.03))  # not worth another approach
    return act(np.where(there, 0.0, v), -1.0)


def pick_and_place(obs: dict[str, np.ndarray]) -> np.ndarray:
    """(N, 4): above the block, down, close the fingers (they stop at its 5 cm), carry it to the goal."""
    gripper, block, goal = obs["observation"][:, :3], obs["achieved_goal"], obs["desired_goal"]
    opening = obs["observation"][:, 9:11].sum(1, keepdims=True)  # 0 to 0.1
    relative = block - gripper
    above = norm(relative[:, :2]) < 0.015
    around = above & (np.abs(relative[:, 2:]) < 0.012)  # the fingers are around the block
    held = around & (opening < 0.055)
    go_over = relative + [0.0, 0.0, 0.08]
    v = np.where(held, goal - block, np.where(above, relative, go_over))
    return act(GAIN * v, np.where(around, -1.0, 1.0))


def norm(v: np.ndarray) -> np.ndarray:
    return np.linalg.norm(v, axis=1, keepdims=True)


def act(displacement: np.ndarray, gripper: np.ndarray | float) -> np.ndarray:
    """(N, 3) and (N, 1) or a number -> (N, 4), inside the action space."""
    gripper = np.broadcast_to(gripper, (len(displacement), 1))
    return np.concatenate([displacement, gripper], axis=1).clip(-1.0, 1.0)


EXPERTS = {"FetchReach-v4": reach, "FetchPush-v4": push, "FetchPickAndPlace-v4": pick_and_place}


# ---- 3. Rollout -------------------------------------------------------------------------------------------------------


def rollout(env_id: str, seeds: list[int], noise: float, vec: FetchVec | None = None) -> list[dict]:
    """Plays the expert for 50 steps from each environment seed (a batch of them at once).

    Returns one dictionary per seed: seed, state (T, 28), action (T, 4), distance (T,) to the goal after the step,
    physics (T, P) simulator states before it, goal (3,), solved = steps until the goal is reached for good or None.
    An episode depends on its own seed only, not on the others of its batch.
    """
    n, own = len(seeds), vec is None
    vec = vec or FetchVec(env_id, n, num_threads=1, max_episode_steps=STEPS + 1)
    draws = [np.random.default_rng([seed, list(INSTRUCTIONS).index(env_id)]).normal(size=(STEPS, 3)) for seed in seeds]
    jitter = noise * np.stack(draws, axis=1)  # (T, N, 3)
    obs, _ = vec.reset(seed=list(seeds))
    goals, rows = obs["desired_goal"], []
    for t in range(STEPS):
        state, physics = state_vector(obs), vec.get_state()[0]["physics"]
        action = EXPERTS[env_id](obs)
        action[:, :3] += jitter[t]
        action = action.clip(-1.0, 1.0).astype(np.float32)  # these bits are executed and recorded
        obs, *_ = vec.step(action)
        rows.append((state, action, goal_distance(obs), physics))
    if own:
        vec.close()
    state, action, distance, physics = (np.stack(column, axis=1) for column in zip(*rows))  # (N, T, ...)
    episodes = []
    for i in range(n):
        missed = np.flatnonzero(distance[i] >= GOAL_RADIUS)
        solved = int(missed[-1]) + 1 if len(missed) else 0
        episodes.append(
            {
                "seed": seeds[i],
                "goal": goals[i],
                "solved": solved if solved < STEPS else None,
                "state": state[i],
                "action": action[i],
                "distance": distance[i],
                "physics": physics[i],
            }
        )
    return episodes


def demonstrations(env_id: str, first_seed: int, noise: float, tail: int, batch: int) -> Iterator[dict]:
    """Successful episodes, each cut `tail` steps after the goal was reached for good, without end."""
    vec = FetchVec(env_id, batch, num_threads=1, max_episode_steps=STEPS + 1)
    found, last_try = False, first_seed + 200
    while found or first_seed < last_try:
        for episode in rollout(env_id, list(range(first_seed, first_seed + batch)), noise, vec):
            if episode["solved"] is not None:
                length = min(episode["solved"] + tail, STEPS)
                cut = {key: episode[key][:length] for key in ("state", "action", "distance", "physics")}
                yield episode | cut | {"env_id": env_id}
                found = True
        first_seed += batch
    fail(f"200 episodes of {env_id} and not one ends at the goal; is --noise {noise:g} too much? 0.05 is fine")


# ---- 4. Files ---------------------------------------------------------------------------------------------------------


def columns(episode: dict, episode_index: int, first_index: int, task_index: int) -> dict[str, np.ndarray]:
    """The parquet columns of an episode; `next.…` is what the row's action led to."""
    n = len(episode["action"])
    reached = episode["distance"] < GOAL_RADIUS
    frame = np.arange(n)
    return {
        "observation.state": episode["state"],
        "action": episode["action"],
        "timestamp": (frame / FPS).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(n, episode_index),
        "index": first_index + frame,
        "task_index": np.full(n, task_index),
        "next.reward": reached.astype(np.float32) - 1,  # the sparse reward: -1 away from the goal, 0 at it
        "next.success": reached,
        "next.done": frame == n - 1,
    }


def table(data: dict[str, np.ndarray]) -> pa.Table:
    """Vectors become fixed-size lists, as LeRobot's own recorder writes them."""
    arrays = {
        name: pa.array(x) if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
        for name, x in data.items()
    }
    return pa.table(arrays)


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 -> H.264; one thread, so that the bytes depend on the pictures alone."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "24", "preset": "slow", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 10, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def summary(x: np.ndarray) -> dict[str, list]:
    """min, max, mean, std over rows; a scalar column is a vector of one."""
    x = x.reshape(len(x), -1).astype(np.float64)
    out = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    return {name: value.astype(np.float32).tolist() for name, value in out.items()}


def episode_stats(data: dict[str, np.ndarray], frames: np.ndarray | None) -> dict[str, dict]:
    """LeRobot v2.1: per column; pictures per channel, scaled to 0..1, shaped (3, 1, 1)."""
    stats = {name: summary(x) | {"count": [len(x)]} for name, x in data.items()}
    if frames is not None:
        image = summary(frames.reshape(-1, 3) / 255.0)
        stats[CAMERA] = {name: [[[c]] for c in value] for name, value in image.items()} | {"count": [len(frames)]}
    return stats


def data_set_stats(rows: dict[str, list[np.ndarray]]) -> dict[str, dict]:
    """GR00T's stats.json: over all rows, with the 1 % and 99 % quantiles."""
    stats = {}
    for name, parts in rows.items():
        x = np.concatenate(parts)
        q01, q99 = np.quantile(x.reshape(len(x), -1).astype(np.float32), [0.01, 0.99], axis=0)
        quantiles = {"q01": q01.astype(np.float32).tolist(), "q99": q99.astype(np.float32).tolist()}
        stats[name] = summary(x) | quantiles
    return stats


def features(args: Args) -> dict[str, dict]:
    vector = {"observation.state": STATE, "action": ACTION}
    out = {
        name: {"dtype": "float32", "shape": [sum(parts.values())], "names": names(parts)}
        for name, parts in vector.items()
    }
    scalars = {
        "timestamp": "float32",
        "frame_index": "int64",
        "episode_index": "int64",
        "index": "int64",
        "task_index": "int64",
        "next.reward": "float32",
        "next.success": "bool",
        "next.done": "bool",
    }
    out |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}
    if args.video:
        info = {
            "video.fps": FPS,
            "video.height": args.size,
            "video.width": args.size,
            "video.channels": 3,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "has_audio": False,
        }
        shape = {"shape": [args.size, args.size, 3], "names": ["height", "width", "channels"]}
        out[CAMERA] = {"dtype": "video", **shape, "info": info}
    return out


def write_meta(root: Path, args: Args, episodes: list[dict], stats: list[dict], rows: dict) -> None:
    meta = root / "meta"
    meta.mkdir()
    frames = sum(line["length"] for line in episodes)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "fetch",
        "total_episodes": len(episodes),
        "total_frames": frames,
        "total_tasks": len(args.tasks),
        "total_videos": len(episodes) * args.video,
        "total_chunks": -(-len(episodes) // CHUNK),
        "chunks_size": CHUNK,
        "fps": FPS,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features(args),
        "recorded_with": {"mujoco": mujoco.__version__, "noise": args.noise, "tail": args.tail, "seed": args.seed},
    }
    modality = {
        "state": slices(STATE),
        "action": slices(ACTION),
        "video": {"front": {"original_key": CAMERA}} if args.video else {},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    tasks = [{"task_index": i, "task": INSTRUCTIONS[env_id]} for i, env_id in enumerate(args.tasks)]
    (meta / "info.json").write_text(json.dumps(info, indent=4) + "\n")
    (meta / "modality.json").write_text(json.dumps(modality, indent=4) + "\n")
    (meta / "stats.json").write_text(json.dumps(data_set_stats(rows), indent=1) + "\n")
    for name, lines in {"tasks": tasks, "episodes": episodes, "episodes_stats": stats}.items():
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_card(root: Path, args: Args, episodes: list[dict], success: dict[str, tuple[int, int]]) -> None:
    """README.md: what is in here, in numbers."""
    lines = []
    for env_id in args.tasks:
        lengths = [line["length"] for line in episodes if line["env_id"] == env_id]
        won, of = success[env_id]
        rate = f"{won} of {of} ({100 * won / of:.1f} %)" if of else "not measured"
        lines.append(
            f"| {env_id} | {INSTRUCTIONS[env_id]} | {len(lengths)} | {sum(lengths)} | {np.mean(lengths):.1f} | {rate} |"
        )
    total = sum(line["length"] for line in episodes)
    flags = " ".join(
        f"--{'' if value is not False else 'no-'}{key}" + ("" if isinstance(value, bool) else f" {value}")
        for key, value in asdict(args).items()
        if key not in ("out", "tasks") and value != getattr(Args, key)
    )
    if args.tasks != Args.tasks:
        flags += " --tasks " + " ".join(args.tasks)
    layout = [
        f"| {column} | {name} | {at['start']}:{at['end']} |"
        for column, parts in (("observation.state", STATE), ("action", ACTION))
        for name, at in slices(parts).items()
    ]
    picture = (
        f"One camera, `{CAMERA}` ({args.size}x{args.size}, H.264): the target is the red ball." if args.video else ""
    )
    text = f"""# Fetch demonstrations

{len(episodes)} episodes, {total} frames at {FPS} Hz, of a scripted expert on the Fetch tasks of gymnasium-robotics, in the
layout of LeRobot v2.1 with GR00T's `modality.json` and `stats.json`.
{picture}

| environment | instruction | episodes | frames | frames per episode | expert's success on fresh seeds |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Made with MuJoCo {mujoco.__version__} by

    {" ".join(f"uv run python assets/build_fetch_demos.py {flags}".split())}

which writes the same parquet files every time (the videos differ in a few pixels, as the renderer does from run to run);
its docstring tells what the expert does. Noise of standard deviation
{args.noise:g} is added to the displacements before they are executed and recorded. Only successful episodes are kept:
the goal is reached within {STEPS} steps and not left again. Each ends {args.tail} steps after that, or at step {STEPS}.
Tasks take turns, so any run of neighbouring episodes holds all of them.

| column | part (`modality.json`) | slice |
|---|---|---|
{chr(10).join(layout)}

Metres, metres per step, radians. `object_…` is 0 in Reach, which has no block; `goal_relative` is the goal minus the
gripper (Reach) or the block. Actions are in [-1, 1]: displacements of 5 cm, and the gripper, -1 to close and 1 to open
(only PickAndPlace obeys it). `next.reward`, `next.success` and `next.done` are what the row's action led to.
`meta/episodes.jsonl` has each episode's environment and seed: resetting it with that seed and executing the recorded
actions gives the recorded states. Seeds below 1,000,000 are not in here, so evaluation can use them.

Licence: that of the repository.
"""
    (root / "README.md").write_text(text)


# ---- 5. Main ----------------------------------------------------------------------------------------------------------


def verify(env_id: str, n: int, noise: float, first_seed: int = 0, batch: int = 50) -> tuple[int, list[int]]:
    """Plays n fresh episodes: how many end at the goal after 50 steps, and the steps each of those took."""
    steps = []
    for start in range(first_seed, first_seed + n, batch):
        seeds = list(range(start, min(start + batch, first_seed + n)))
        steps += [e["solved"] for e in rollout(env_id, seeds, noise) if e["solved"] is not None]
    return len(steps), steps


def main(args: Args) -> None:
    out = Path(args.out)
    if unknown := [task for task in args.tasks if task not in EXPERTS]:
        fail(f"no expert for {', '.join(unknown)}; there are {', '.join(EXPERTS)}")
    if args.episodes < 1 or not args.tasks or len(set(args.tasks)) < len(args.tasks):
        fail("nothing to record, or a task twice: --episodes is at least 1, --tasks a list of different environments")
    if args.noise < 0 or args.verify < 0:
        fail(f"--noise {args.noise:g}, --verify {args.verify}: neither can be below 0")
    if args.size < 16 or args.size % 2:
        fail(f"--size {args.size}: H.264 needs an even number of pixels, 16 or more")
    if not 1 <= args.tail <= STEPS:
        fail(f"--tail {args.tail}: an episode has {STEPS} steps; give 1 to {STEPS}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "meta" / "info.json").is_file():
        fail(f"'{out}' exists and is no data set; give --out a new folder")

    success = {}
    for env_id in args.tasks:
        won, steps = verify(env_id, args.verify, args.noise)
        success[env_id] = won, args.verify
        if won:
            took = f"reached for good after {np.median(steps):.0f} steps (median), {max(steps)} at most"
            print(
                f"{env_id}: the expert ends {won} of {args.verify} episodes at the goal ({won / args.verify:.1%}), {took}"
            )

    work = out.with_name(out.name + ".partial")  # a finished data set takes the old one's place at the end
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    first_seed = 1_000_000 * (args.seed + 1)
    batch = min(args.episodes, 50)
    sources = []
    for env_id in args.tasks:  # no two tasks share a scene: Push and PickAndPlace place a seed's block and goal alike
        task_seed = first_seed + 100_000 * list(INSTRUCTIONS).index(env_id)
        sources.append(demonstrations(env_id, task_seed, args.noise, args.tail, batch))
    cameras = [Camera(env_id, args.size) for env_id in args.tasks] if args.video else []
    episodes, stats, rows, index = [], [], {}, 0
    for number in tqdm(range(args.episodes * len(args.tasks)), desc="episodes", disable=not sys.stderr.isatty()):
        task = number % len(args.tasks)
        episode, folder = next(sources[task]), f"chunk-{number // CHUNK:03d}"
        data = columns(episode, number, index, task)
        frames = None
        if args.video:
            frames = np.stack([cameras[task].draw(physics, episode["goal"]) for physics in episode["physics"]])
            (work / "videos" / folder / CAMERA).mkdir(parents=True, exist_ok=True)
            write_video(work / "videos" / folder / CAMERA / f"episode_{number:06d}.mp4", frames)
        (work / "data" / folder).mkdir(parents=True, exist_ok=True)
        path = work / "data" / folder / f"episode_{number:06d}.parquet"
        pq.write_table(table(data), path, compression="zstd", use_dictionary=False, write_statistics=False)
        length, env_id = len(data["action"]), episode["env_id"]
        line = {"episode_index": number, "tasks": [INSTRUCTIONS[env_id]], "length": length}
        episodes.append(line | {"env_id": env_id, "seed": episode["seed"]})
        stats.append({"episode_index": number, "stats": episode_stats(data, frames)})
        for name, x in data.items():
            rows.setdefault(name, []).append(x)
        index += length
    for camera in cameras:
        camera.close()
    write_meta(work, args, episodes, stats, rows)
    write_card(work, args, episodes, success)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(episodes)} episodes, {index} frames, {size / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main(parse(Args, __doc__))
