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
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import fail

ROOT = Path(__file__).resolve().parents[2]

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


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        fail(f"{path} is missing: {path.parent.parent} is not a LeRobot v2 data set")
    except ValueError as error:
        fail(f"{path} is not JSON: {error}")


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        fail(f"{path} is missing: {path.parent.parent} is not a LeRobot v2 data set")
    except ValueError as error:
        fail(f"{path} is not JSON lines: {error}")


def find_folder(name: str) -> Path:
    """A folder as it is; a hub id is downloaded."""
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return folder.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        fail(f"--dataset-path {name}: no such folder; assets/fetch_demos is bundled")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision or None))
    except Exception as error:  # offline, no such repository, no such revision, no permission
        reason = str(error).splitlines()[0]
        fail(f"--dataset-path {name}: no such folder, and no data set of the hub ({reason}); assets/fetch_demos works")


def propose_modality(info: dict) -> dict:
    """A modality.json from the names of the joints: grippers apart from arms, left apart from right."""
    proposal: dict = {"state": {}, "action": {}, "video": {}, "annotation": {}}
    for kind, column in (("state", "observation.state"), ("action", "action")):
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
    if (path / "meta/modality.json").exists():
        raw = read_json(path / "meta/modality.json")
    else:
        raw = propose_modality(info)
        say(f"{path.name} has no meta/modality.json; going on with this one (save it there to change it):")
        say(json.dumps(raw))
    modality: dict = {"state": {}, "action": {}, "video": {}, "language": {}}
    for kind, column in (("state", "observation.state"), ("action", "action")):
        for key, entry in raw.get(kind, {}).items():
            if not isinstance(entry, dict) or not 0 <= entry.get("start", -1) < entry.get("end", -1):
                fail(f"modality.json of {path}: {kind}.{key} needs start < end")
            modality[kind][key] = {
                "column": entry.get("original_key", column),
                "start": entry["start"],
                "end": entry["end"],
                "absolute": entry.get("absolute", True),
                "rotation_type": entry.get("rotation_type"),
                "continuous": "float" in entry.get("dtype", "float64"),
            }
            column_name = modality[kind][key]["column"]
            if column_name not in info["features"]:
                fail(f"modality.json of {path}: {kind}.{key} is in column '{column_name}', which info.json lacks")
            width = math.prod(info["features"][column_name]["shape"])
            if entry["end"] > width:
                fail(f"modality.json of {path}: {kind}.{key} ends at {entry['end']}, '{column_name}' is {width} wide")
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
    return {"max": rows.max(0), "min": rows.min(0), "mean": rows.mean(0), "std": rows.std(0), "q01": q01, "q99": q99}


def read_statistics(path: Path, columns: dict[str, np.ndarray], compute: bool = False) -> dict:
    """meta/stats.json where it has all six numbers of every column used; computed from the rows otherwise."""
    file = path / "meta/stats.json"
    stored = json.loads(file.read_text()) if file.exists() and not compute else {}
    wanted = {"max", "min", "mean", "std", "q01", "q99"}
    if all(wanted <= set(stored.get(name, {})) for name in columns):
        return {
            name: {k: np.asarray(stored[name][k], dtype=np.float64).reshape(-1) for k in sorted(wanted)}
            for name in columns
        }
    return {name: column_statistics(rows) for name, rows in columns.items()}


def read_info(path: Path) -> dict:
    """meta/info.json of a data set this script can read."""
    if not (path / "meta/info.json").exists():
        fail(f"{path} has no meta/info.json: not a LeRobot data set")
    info = read_json(path / "meta/info.json")
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
    listed = read_lines(path / "meta/episodes.jsonl")
    ids = [int(e["episode_index"]) for e in listed]
    if not ids:
        fail(f"{path}/meta/episodes.jsonl lists no episode")
    tasks = {int(t["task_index"]): t["task"] for t in read_lines(path / "meta/tasks.jsonl")}
    vectors = {entry["column"] for kind in ("state", "action") for entry in modality[kind].values()}
    annotations = {modality["language"][language]} if language in modality["language"] else set()
    names = sorted(vectors | annotations)
    with ThreadPoolExecutor(8) as pool:
        files = [path / info["data_path"].format(episode_chunk=i // info["chunks_size"], episode_index=i) for i in ids]
        parts = list(pool.map(lambda file: read_columns(file, names), files))
    lengths = [len(part[names[0]]) for part in parts]
    for episode, length in zip(listed, lengths):
        if episode["length"] != length:
            fail(
                f"{path}: episode {episode['episode_index']} has {length} rows, meta/episodes.jsonl says "
                f"{episode['length']}"
            )
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
                pixels = frame.to_ndarray(format="rgb24")
                if side and max(pixels.shape[:2]) > side:
                    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
                    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
                    pixels = x[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
                frames.append(pixels)
    except FileNotFoundError:
        fail(f"{file} is missing")
    except av.FFmpegError as error:
        fail(f"{file} cannot be decoded: {error}")
    if len(frames) != rows:
        fail(f"{file} has {len(frames)} frames for an episode of {rows} rows")
    return np.stack(frames)


def cache_frames(episodes: Episodes, video: str, use: list[int], cache_dir: Path, side: int) -> Path:
    """Decodes one camera of the episodes at positions `use` into one .npy file, unless it is there; returns its path.

    The file is read through a memory map: what fits stays in the page cache, shared by workers and processes.
    """
    info, column = episodes.info, episodes.modality["video"][video]
    if "video_path" not in info or info["video_path"] is None:
        fail(f"{episodes.path.name} has no videos (images inside parquet files are not supported)")
    files = [
        episodes.path
        / info["video_path"].format(episode_chunk=i // info["chunks_size"], episode_index=i, video_key=column)
        for i in (episodes.ids[e] for e in use)
    ]
    for file in files:
        if not file.exists():
            fail(f"{file} is missing (video '{video}')")
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([side, facts]).encode()).hexdigest()[:16]
    target = cache_dir / f"{episodes.path.name}-{video}-{digest}.npy"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lengths = [int(episodes.starts[e + 1] - episodes.starts[e]) for e in use]
    offsets = np.r_[0, np.cumsum(lengths)]
    first = decode(files[0], lengths[0], side)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    shape = (int(offsets[-1]), *first.shape[1:])
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
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
