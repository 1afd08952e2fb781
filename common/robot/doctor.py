"""What a trained policy is about to see against what it was trained on: "it trains well, and the robot does nothing".

    uv run python -m common.robot.doctor RUN_DIR --dataset-path DIR
    uv run python -m common.robot.doctor RUN_DIR --observation FILE      .npz or .json, in the keys of Policy.get_action

Prints a table, a line a check. Exit code 0: nothing is wrong, 1: something is, 2: the question was.
A finding is a difference from the training that changes what the policy sees or does, not a difference as such.
"""

import contextlib
import difflib
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from common.cli import Name, Text, fail, parse
from common.files import Object, read_json
from common.robot.demonstrations import camera_facts, meaning
from common.robot.frames import cache_frames
from common.robot.lerobot import Episodes, find_folder, read_episodes
from common.robot.policy import About, Interface, read_stored

LIMIT = 6.0  # standard deviations from the training's mean that are too many
COLOUR = 40.0  # grey levels of a camera's mean that are too many
KINDS = ("state", "action")


@dataclass
class Args:
    # doctor
    run_dir: tyro.conf.Positional[str] = ""  # run folder, checkpoint or hub id
    dataset_path: Text | None = None  # LeRobot folder or hub id to compare with the training
    observation: Text | None = None  # .npz or .json: one observation, as the policy would get it
    data_config: Text | None = None  # of an older folder that does not say it
    embodiment_tag: Name | None = None  # default: the checkpoint's


class Finding(NamedTuple):
    where: str
    check: str
    fault: str = ""  # nothing: as in training


# ---- numbers ---------------------------------------------------------------------------------------------------------


def numbers(where: str, x: np.ndarray, stats: dict, live: bool = False) -> Iterator[Finding]:
    """x (N, width) raw rows of a key against its statistics; live: a single row, of which less can be told."""
    low, high, mean, std = (np.array(stats[name], np.float64) for name in ("min", "max", "mean", "std"))
    inside = (x >= low) & (x <= high)
    z = np.where(inside, 0, np.abs(x - mean) / np.maximum(std, 1e-3 * np.maximum(np.abs(mean), 1e-3)))
    # a recording may have outliers that the training had not: one in a hundred rows is let pass
    share, largest = (z > LIMIT).mean(0), z.max(0)
    off = [f"dim {i}: {z:.3g} deviations, {s:.0%} of rows" for i, (z, s) in enumerate(zip(largest, share)) if s > 0.01]
    yield Finding(where, f"within {LIMIT:g} deviations", "; ".join(off[:3]))
    theirs, ours = np.maximum(np.abs(low), np.abs(high)).max(), np.abs(x).max()
    ratio, bound = ours / max(theirs, 1e-9), np.degrees(1)
    degrees = ratio > bound / 4 and theirs <= 2 * np.pi + 0.1 and ours <= 400 and bool(off)
    radians = not live and 1 / (4 * bound) < ratio < 4 / bound and theirs > 4 * np.pi and ours <= 2 * np.pi + 0.1
    unit = f"up to {ours:.3g}, the training up to {theirs:.3g}: " if degrees or radians else ""
    yield Finding(where, "radians or degrees", unit and unit + ("degrees here?" if degrees else "radians here?"))
    if "gripper" in where and x.shape[1] <= 2:
        yield Finding(where, "gripper convention", gripper(x, low, high, mean, live))


def gripper(x: np.ndarray, low: np.ndarray, high: np.ndarray, mean: np.ndarray, live: bool) -> str:
    """Open where the training had closed, or another range."""
    span, middle, here = np.maximum(high - low, 1e-6), (low + high) / 2, x.mean(0)
    mirrored = (np.abs(mean - middle) > 0.1 * span) & (np.abs(here - mean) > 4 * np.abs(low + high - here - mean))
    if not live and mirrored.any():
        return "its mean is the mirror of the training's: open and closed are exchanged?"
    beyond = (x < low - 0.5 * span) | (x > high + 0.5 * span)
    half = not live and (np.ptp(x, axis=0) < 0.6 * span).any()
    ranges = f"from {x.min():.3g} to {x.max():.3g}, the training from {low.min():.3g} to {high.max():.3g}"
    return ranges if half or beyond.any() else ""


def exchanged(parts: dict[str, np.ndarray], statistics: dict) -> Iterator[Finding]:
    """Keys of equal width whose rows fit each other's statistics far better than their own."""

    def distance(x: np.ndarray, key: str) -> float:
        stats = {name: np.array(statistics[key][name], np.float64) for name in ("mean", "std")}
        own = np.abs(x.mean(0) - stats["mean"]) / (stats["std"] + 1e-6)
        spread = np.abs(np.log((x.std(0) + 1e-6) / (stats["std"] + 1e-6))) if len(x) > 1 else 0
        return float((own + spread).mean())

    keys = list(parts)
    for n, a in enumerate(keys):
        for b in [b for b in keys[n + 1 :] if parts[a].shape[1] == parts[b].shape[1]]:
            own = distance(parts[a], a) + distance(parts[b], b)
            if own > 2 and own > 4 * (distance(parts[a], b) + distance(parts[b], a)):
                yield Finding(f"{a}, {b}", "swapped", "each fits the other's statistics: exchanged?")


def moving(where: str, x: np.ndarray, stats: dict) -> Finding:
    """Actions that stand still or are cut off where the training's are not. x (N, width)."""
    low, high, q01, q99 = (np.array(stats[name]) for name in ("min", "max", "q01", "q99"))
    faults = []
    for i in range(x.shape[1]):
        ends = np.mean([(x[:, i] == x[:, i].min()), (x[:, i] == x[:, i].max())], axis=1)
        free = low[i] < q01[i] and q99[i] < high[i]  # in training less than 1 % of the rows were at the ends
        if np.ptp(x[:, i]) == 0 and high[i] > low[i]:
            faults.append(f"dim {i} is always {x[0, i]:.4g}, the training from {low[i]:.4g} to {high[i]:.4g}")
        elif free and ends.max() > 0.25:
            faults.append(f"dim {i} is clipped: {ends.max():.0%} of the rows are at one end")
    return Finding(where, "moves freely", "; ".join(faults[:3]))


# ---- pictures and keys -----------------------------------------------------------------------------------------------


def picture(where: str, mean: np.ndarray, size: tuple[int, int], described: dict, about: About) -> Iterator[Finding]:
    """mean (3,): of R, G, B; size: (height, width); described: the camera in metadata.json."""
    width, height = described.get("resolution") or (None, None)
    trained = about.image_mean.get(where.partition(".")[2])
    fault = ""
    if width and height and abs(np.log(size[1] / size[0] * height / width)) > 0.02:
        fault = f"{size[1]} x {size[0]}, trained on {width} x {height}: other proportions, everything is squeezed"
    yield Finding(where, "size", fault)
    if trained is not None:
        own, turned = np.abs(mean - trained).max(), np.abs(mean[::-1] - trained).max()
        said = f"mean R G B {np.round(mean).astype(int).tolist()}, trained on {np.round(trained).astype(int).tolist()}"
        yield Finding(where, "channel order", f"{said}: BGR?" if own > 10 and own > 2 * turned else "")
        yield Finding(where, "image mean", said if own > COLOUR else "")


def keys(kind: str, wanted: list[str], there: list[str]) -> Iterator[Finding]:
    for key in [key for key in wanted if key not in there]:
        near = difflib.get_close_matches(key, [name for name in there if name not in wanted], 1, 0.5)
        hint = f"renamed to '{near[0]}'?" if near else f"there are {', '.join(there) or 'none'}"
        yield Finding(f"{kind}.{key}", "key", f"is not there; {hint}")


# ---- a data set, an observation --------------------------------------------------------------------------------------


def of_dataset(path: Path, interface: Interface) -> Iterator[Finding]:
    config, metadata, about, said = interface.config, interface.metadata, interface.about, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            episodes = read_episodes(path, None, lambda text: None)
    except SystemExit:
        line = said.getvalue().strip().removeprefix("error: ")
        if "is not of this data" not in line:
            fail(line)
        yield Finding("meta/stats.json", "stale", line)
        return
    yield Finding("meta/stats.json", "stale")
    modality = episodes.modality
    for kind in ("video", *KINDS):
        yield from keys(kind, [key for key in getattr(config, kind) if key != "task_progress"], list(modality[kind]))
    if modality["language"]:
        yield from keys("annotation", [config.language], list(modality["language"]))
    for kind in KINDS:
        parts = {}
        for key in [key for key in getattr(config, kind) if key in modality[kind]]:
            entry, stats = modality[kind][key], metadata["statistics"][kind][key]
            trained, here = metadata["modalities"][kind][key], meaning(entry)
            wrong = [name for name in here if name in trained and here[name] != trained[name]]
            other = [f"{name} {here[name]}, trained on {trained[name]}" for name in wrong]
            yield Finding(f"{kind}.{key}", "meaning", "; ".join(other))
            if here["shape"] == trained["shape"]:
                parts[key] = episodes.columns[entry["column"]][:, entry["start"] : entry["end"]]
                yield from numbers(f"{kind}.{key}", parts[key], stats)
                if kind == "action":
                    yield moving(f"{kind}.{key}", parts[key], stats)
        yield from exchanged(parts, metadata["statistics"][kind])
    fps = episodes.info.get("fps")
    if about.fps and fps:
        fault = f"{fps:g} a second, trained on {about.fps:g}" if abs(np.log(fps / about.fps)) > 0.05 else ""
        yield Finding("info.json", "frame rate", fault)
    yield from of_videos(episodes, interface, [key for key in config.video if key in modality["video"]])


def of_videos(episodes: Episodes, interface: Interface, cameras: list[str]) -> Iterator[Finding]:
    """The pictures of the first and the last episode."""
    described, here = interface.metadata["modalities"].get("video", {}), camera_facts(episodes)
    with tempfile.TemporaryDirectory() as folder:
        ends = sorted({0, len(episodes.ids) - 1})
        how = interface.about.cache_side, interface.reduce, interface.reduced
        paths = cache_frames(episodes, cameras, ends, Path(folder), *how) if cameras else []
        for camera, path in zip(cameras, paths):
            frames = np.load(path, mmap_mode="r")
            mean = frames[np.linspace(0, len(frames) - 1, min(len(frames), 64)).astype(int)].mean((0, 1, 2))
            width, height = here[camera]["resolution"]
            yield from picture(f"video.{camera}", mean, (height, width), described.get(camera, {}), interface.about)


def of_observation(seen: dict, interface: Interface) -> Iterator[Finding]:
    described, config = interface.metadata["modalities"].get("video", {}), interface.config
    seen = interface.flat(seen)
    there = {kind: [key.partition(".")[2] for key in seen if key.startswith(f"{kind}.")] for kind in ("video", "state")}
    missing = [found for kind in there for found in keys(kind, list(getattr(config, kind)), there[kind])]
    yield from missing
    try:
        frames, state, *_ = interface.read(seen)
    except ValueError as error:
        yield Finding("observation", "can be read", "" if missing else str(error))
        return
    for key, x in state.items():
        yield from numbers(f"state.{key}", x, interface.metadata["statistics"]["state"][key], live=len(x) < 30)
    yield from exchanged(state, interface.metadata["statistics"]["state"])
    for camera, x in zip(config.video, frames):
        mean, size = x.mean((0, 1, 2)), x.shape[1:3]
        yield from picture(f"video.{camera}", mean, size, described.get(camera, {}), interface.about)


def read_observation(file: Path) -> dict:
    if file.suffix == ".json":
        seen = read_json(file, Object, "an observation has the keys of Policy.get_action")
        return {key: np.array(x, np.uint8) if key.startswith("video.") else x for key, x in seen.items()}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: x.tolist() if x.dtype.kind == "U" else x for key, x in arrays.items()}
    except (OSError, ValueError) as error:
        fail(f"'{file}' cannot be read ({error}): an .npz or .json file with the keys of Policy.get_action")


def main(args: Args) -> None:
    if not args.run_dir or (args.dataset_path is None) == (args.observation is None):
        fail("give a run folder, and one of --dataset-path and --observation to compare its training with")
    stored = read_stored(args.run_dir)
    interface = stored.interface(stored.acts(args.data_config, args.embodiment_tag))
    if args.observation:
        found = list(of_observation(read_observation(Path(args.observation)), interface))
    else:
        found = list(of_dataset(find_folder(args.dataset_path), interface))
    width = max(len(finding.where) for finding in found)
    for where, check, fault in sorted(found, key=lambda finding: not finding.fault):
        print(f"{'WRONG' if fault else 'ok':5}  {where:{width}}  {check:20}  {fault}".rstrip())
    wrong = sum(bool(finding.fault) for finding in found)
    print(f"{wrong} of {len(found)} checks differ from the training of {stored.folder}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(parse(Args, __doc__))
