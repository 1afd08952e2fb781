"""Reading LeRobot v2.0 / v2.1 data sets: meta files, parquet columns, videos. Files in, arrays out.

    info = read_info(folder)                       meta/info.json, other versions refused
    episodes = read_episodes(folder, language)     every row's state, action and annotation columns, in memory
    path = cache_frames(episodes, "front", …)      one camera, decoded once into a memory-mapped file

Nothing here moves a learning curve: what is done with the arrays is in the scripts.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import fail
from common.robot import files
from common.robot.files import read_json, read_lines
from common.robot.transforms import shrink

HINT = "without it this is not a LeRobot data set"
STATISTICS = ("max", "min", "mean", "std", "q01", "q99")  # of each key, in stats.json and metadata.json
COLUMNS = {"state": "observation.state", "action": "action"}  # where a key is unless modality.json says otherwise

# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass
class Episodes:
    """Some episodes of one LeRobot data set, one after the other: N rows in all."""

    path: Path
    info: dict
    modality: dict  # "state" | "action" | "video" | "language" -> key -> where it is and what it is
    ids: list[int]  # episode_index
    starts: np.ndarray  # (episodes + 1,) first row of each, and N
    columns: dict[str, np.ndarray]  # name -> (N, width) float64
    statistics: dict[str, dict[str, np.ndarray]]  # column -> min, max, mean, std, q01, q99 over *all* episodes
    tasks: dict[int, str]


def find_folder(name: str) -> Path:
    """A data set's folder as it is, or the local copy of a hub id (user/name or user/name@revision)."""
    return files.find_folder(
        name, "dataset", "--dataset-path takes a folder or a hub id; assets/fetch_demos is bundled"
    )


def episode_file(path: Path, info: dict, kind: str, number: int, **names: str) -> Path:
    """Where info.json says that an episode's data (kind data_path) or video (video_path) is."""
    return path / info[kind].format(episode_chunk=number // info["chunks_size"], episode_index=number, **names)


def propose_modality(info: dict) -> dict:
    """A modality.json from the names of the joints: grippers apart from arms, left apart from right."""
    proposal: dict = {"state": {}, "action": {}, "video": {}, "annotation": {}}
    for kind, column in COLUMNS.items():
        if column not in info["features"]:
            fail(f"info.json has no '{column}': write a meta/modality.json that says where {kind} is")
        feature = info["features"][column]
        names = feature.get("names")
        names = sum(names.values(), []) if isinstance(names, dict) else names
        names = names if names and len(names) == feature["shape"][0] else ["arm"] * feature["shape"][0]
        for i, name in enumerate(map(str, names)):
            side = next((side for side in ("left", "right") if side in name.lower()), None)
            part = "gripper" if "gripper" in name.lower() else "arm"
            key = f"{side}_{part}" if side else {"arm": "single_arm"}.get(part, part)
            if key in proposal[kind] and proposal[kind][key]["end"] != i:
                key = f"{key}_{i}"
            proposal[kind].setdefault(key, {"start": i})["end"] = i + 1
    for name, feature in info["features"].items():
        if feature["dtype"] == "video":
            proposal["video"][name.removeprefix("observation.images.")] = {"original_key": name}
        elif name.startswith("annotation."):
            proposal["annotation"][name.removeprefix("annotation.")] = {}
    if "task_index" in info["features"]:
        proposal["annotation"].setdefault("human.task_description", {"original_key": "task_index"})
    return proposal


def read_modality(path: Path, info: dict, say=print) -> dict:
    """meta/modality.json, or a printed proposal, with every default filled in."""
    raw = read_json(path / "meta/modality.json", HINT, optional=True)
    if not raw:
        raw = propose_modality(info)
        say(f"{path.name} has no meta/modality.json; going on with this one (save it there to change it):")
        say(json.dumps(raw))
    modality: dict = {"state": {}, "action": {}, "video": {}, "language": {}}
    for kind in COLUMNS:
        for key, entry in raw.get(kind, {}).items():
            where = f"modality.json of {path}: {kind}.{key}"
            if not isinstance(entry, dict) or not 0 <= entry.get("start", -1) < entry.get("end", -1):
                fail(f"{where} needs start < end")
            column = entry.get("original_key", COLUMNS[kind])
            if column not in info["features"]:
                fail(f"{where} is in column '{column}', which info.json lacks")
            if entry["end"] > (width := math.prod(info["features"][column]["shape"])):
                fail(f"{where} ends at {entry['end']}, '{column}' is {width} wide")
            modality[kind][key] = {
                "column": column,
                "start": entry["start"],
                "end": entry["end"],
                "absolute": entry.get("absolute", True),
                "rotation_type": entry.get("rotation_type"),
                "continuous": "float" in entry.get("dtype", "float64"),
            }
    for key, entry in raw.get("video", {}).items():
        modality["video"][key] = entry.get("original_key", key)
    for key, entry in raw.get("annotation", {}).items():
        modality["language"][key] = entry.get("original_key", f"annotation.{key}")
    return modality


def read_columns(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of a parquet file, each (rows, width) float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=names)
    except FileNotFoundError:
        fail(f"{file} is missing; meta/episodes.jsonl lists its episode")
    except (OSError, pa.ArrowException) as error:
        fail(f"{file} cannot be read: {error}")
    columns = {}
    for name in names:
        if name not in table.column_names:
            fail(f"{file} has no column '{name}'; it has {', '.join(pq.read_schema(file).names)}")
        column = table[name].combine_chunks()
        flat = column.flatten() if pa.types.is_nested(column.type) else column
        columns[name] = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
    return columns


def column_statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Per dim of (N, width): float32 rows, quantiles in float64, which is what GR00T's stats.json files hold."""
    rows = rows.astype(np.float32)
    q01, q99 = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0)
    return dict(zip(STATISTICS, (rows.max(0), rows.min(0), rows.mean(0), rows.std(0), q01, q99)))


def read_statistics(path: Path, columns: dict[str, np.ndarray]) -> dict:
    """meta/stats.json where it has all six numbers of every column used; computed from the rows otherwise."""
    stored = read_json(path / "meta/stats.json", HINT, optional=True)
    if not all(set(STATISTICS) <= set(stored.get(name, {})) for name in columns):
        return {name: column_statistics(rows) for name, rows in columns.items()}
    return {name: {k: np.array(stored[name][k], np.float64).reshape(-1) for k in STATISTICS} for name in columns}


def read_info(path: Path) -> dict:
    """meta/info.json of a data set this script can read."""
    info = read_json(path / "meta/info.json", HINT)
    version = str(info.get("codebase_version", ""))
    if not version.startswith("v2"):
        fail(
            f"{path.name} is LeRobot {version or 'of an unknown version'}; this script reads v2.0 and v2.1. Many hub "
            "data sets keep the old version under a tag: --dataset-path user/name@v2.1"
        )
    if missing := {"features", "data_path", "chunks_size"} - set(info):
        fail(f"{path}/meta/info.json lacks {sorted(missing)}")
    return info


def read_episodes(path: Path, language: str | None = None, say=print) -> Episodes:
    """All episodes of a data set: every row's state, action and annotation columns, in memory; no frames yet."""
    info = read_info(path)
    modality = read_modality(path, info, say)
    listed = read_lines(path / "meta/episodes.jsonl", HINT)
    ids = [int(e["episode_index"]) for e in listed]
    if not ids:
        fail(f"{path}/meta/episodes.jsonl lists no episode")
    tasks = {int(t["task_index"]): t["task"] for t in read_lines(path / "meta/tasks.jsonl", HINT)}
    vectors = {entry["column"] for kind in COLUMNS for entry in modality[kind].values()}
    annotations = {modality["language"][language]} if language in modality["language"] else set()
    names = sorted(vectors | annotations)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: read_columns(episode_file(path, info, "data_path", i), names), ids))
    lengths = [len(part[names[0]]) for part in parts]
    for i, episode, length in zip(ids, listed, lengths):
        if episode["length"] != length:
            fail(f"{path}: episode {i} has {length} rows, meta/episodes.jsonl says {episode['length']}")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    for name in vectors:
        if not np.isfinite(columns[name]).all():
            fail(f"{path}: column '{name}' holds numbers that are not finite")
    statistics = read_statistics(path, {name: columns[name] for name in vectors})
    return Episodes(path, info, modality, ids, np.r_[0, np.cumsum(lengths)], columns, statistics, tasks)


# ---- frames, decoded once --------------------------------------------------------------------------------------------


def decode(file: Path, rows: int, side: int) -> np.ndarray:
    """All frames of a video, (rows, height, width, 3) uint8; larger than `side`: reduced to (rows, side, side, 3).

    Row i of an episode shows frame i.
    """
    import av

    frames = []
    try:
        with av.open(str(file)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                frames.append(shrink(frame.to_ndarray(format="rgb24"), side))
    except av.FFmpegError as error:
        fail(f"{file} cannot be decoded: {error}")
    if len(frames) != rows:
        fail(f"{file} has {len(frames)} frames for an episode of {rows} rows")
    return np.stack(frames)


def cache_frames(episodes: Episodes, video: str, use: list[int], cache_dir: Path, side: int) -> Path:
    """Decodes one camera of the episodes at positions `use` into one .npy file, unless it is there; returns its path.

    The file is read through a memory map: what fits stays in the page cache, shared by workers and processes.
    """
    path, info, column = episodes.path, episodes.info, episodes.modality["video"][video]
    if info.get("video_path") is None:
        fail(f"{path.name} has no videos (images inside parquet files are not supported)")
    files = [episode_file(path, info, "video_path", episodes.ids[e], video_key=column) for e in use]
    if missing := [file for file in files if not file.exists()]:
        fail(f"{missing[0]} is missing (video '{video}')")
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([side, facts]).encode()).hexdigest()[:16]
    target = cache_dir / f"{path.name}-{video}-{digest}.npy"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.diff(episodes.starts)[use]
    offsets = np.r_[0, np.cumsum(lengths)]
    first = decode(files[0], lengths[0], side)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    shape = (int(offsets[-1]), *first.shape[1:])
    try:
        out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        out[: lengths[0]] = first

        def fill(n: int) -> None:
            frames = decode(files[n], lengths[n], side)
            if frames.shape[1:] != first.shape[1:]:
                fail(f"{files[n]} is {frames.shape[1:3]}, the first episode is {first.shape[1:3]}")
            out[offsets[n] : offsets[n + 1]] = frames

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(fill, range(1, len(files))))
        out.flush()
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)  # a broken video leaves nothing behind
    return target
