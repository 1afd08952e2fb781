"""Reading LeRobot data sets, v2.0, v2.1 and v3.0: meta files and parquet columns. Files in, arrays out.

    info = read_info(folder)                       meta/info.json, other versions refused
    episodes = read_episodes(folder, language)     every row's state, action and annotation columns, in memory

v2 has a file an episode, v3.0 many episodes in a file. `read_index` tells where each lies; nothing behind it knows the
version. Frames are in frames.py. What a folder says is data: types are checked, paths stay inside, and what does not
fit ends in one line. Fields that nobody reads here are left alone: every release of lerobot adds some.

Nothing here moves a learning curve: what is done with the arrays is in the scripts.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, NotRequired

import numpy as np
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from common.cli import Count, Natural, NonNegative, Positive, Refused, Text, fail, in_words
from common.files import Object, read_json
from common.robot import files
from common.robot.files import read_lines

DELETE = "delete it to have it computed from the rows"
HINT = "without it this is not a LeRobot data set"
STATISTICS = ("max", "min", "mean", "std", "q01", "q99")  # of each key, in stats.json and metadata.json
COLUMNS = {"state": "observation.state", "action": "action"}  # where a key is unless modality.json says otherwise

# ---- what the meta files say -----------------------------------------------------------------------------------------

ROTATION = r"^(quaternion|axis_angle|rotation_6d|matrix|euler_angles_(rpy|ryp|pry|pyr|yrp|ypr))$"


def schema(**fields: Any):
    """The type of an object with these fields, and others that are not looked at."""
    found = TypedDict("Object", fields)
    found.__pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)
    return found


Maybe = NotRequired[Object | None]
Feature = schema(dtype=Text, shape=list[Natural], names=NotRequired[Any], info=Maybe, video_info=Maybe)
Info = schema(
    **dict(codebase_version=Text, features=dict[Text, Feature], data_path=Text, chunks_size=Count),
    **dict(video_path=NotRequired[Text | None], fps=NotRequired[Positive], robot_type=NotRequired[str | None]),
    discarded_episode_indices=NotRequired[list[Natural] | None],
)
Listed, Task = schema(episode_index=Natural, length=Count), schema(task_index=Natural, task=str)
Part = schema(  # a key of modality.json: some numbers of a column
    **dict(start=Natural, end=Count, original_key=NotRequired[Text], absolute=NotRequired[bool]),
    rotation_type=NotRequired[Annotated[str, StringConstraints(pattern=ROTATION)] | None],
    dtype=NotRequired[Text],
)
Parts, Names = dict[Text, Part], NotRequired[dict[Text, schema(original_key=NotRequired[Text])]]
Modality = schema(state=Parts, action=Parts, video=Names, annotation=Names)


class Clip(NamedTuple):
    """Frames of a camera: of a video from `start` to `end` in seconds, or rows start … end - 1 of a parquet file."""

    file: Path
    start: float
    end: float


class Recorded(NamedTuple):
    """Where an episode is."""

    number: int  # episode_index
    length: int  # rows
    data: Path
    clips: dict[str, Clip]  # column of a camera -> its frames


@dataclass
class Episodes:
    """Some episodes of one LeRobot data set, one after the other: N rows in all."""

    path: Path
    info: dict
    modality: dict  # "state" | "action" | "video" | "language" -> key -> where it is and what it is
    recorded: list[Recorded]
    starts: np.ndarray  # (episodes + 1,) first row of each, and N
    columns: dict[str, np.ndarray]  # name -> (N, width) float64
    statistics: dict[str, dict[str, np.ndarray]]  # column -> min, max, mean, std, q01, q99 over *all* episodes
    tasks: dict[int, str]

    @property
    def ids(self) -> list[int]:
        return [episode.number for episode in self.recorded]


def find_folder(name: str) -> Path:
    """A data set's folder as it is, or the local copy of a hub id (user/name or user/name@revision)."""
    return files.find_folder(
        name, "dataset", "--dataset-path takes a folder or a hub id; assets/fetch_demos is bundled"
    )


def merged_files(info: dict) -> bool:
    """v3.0: several episodes in a file."""
    return info["codebase_version"].startswith("v3")


def read_info(path: Path) -> dict:
    """meta/info.json of a data set that is read here."""
    info = read_json(path / "meta/info.json", Info, HINT)
    if not re.match(r"v[23]\.\d", info["codebase_version"]):
        fail(
            f"{path.name} is LeRobot {info['codebase_version']}; v2.0, v2.1 and v3.0 are read. Hub data sets keep "
            "others under a tag: --dataset-path user/name@v2.1"
        )
    return info


FIELD = re.compile(r"\{(\w+)(?::0(\d)d)?\}")


def placed(path: Path, pattern: str, **fields: int | str) -> Path:
    """Where a file pattern of info.json points, always inside the folder.

    str.format would follow attributes ({video_key.__class__}) and pad to any width: only {name} and {name:03d} are
    known. Links are followed where they lead: a hub's snapshot is made of them.
    """

    def fill(field: re.Match) -> str:
        name, width = field.groups()
        return str(fields[name]).zfill(int(width or 0)) if name in fields else field[0]

    relative = FIELD.sub(fill, pattern)
    inside = not PurePosixPath(relative).is_absolute() and ".." not in PurePosixPath(relative).parts
    if not inside or not relative.isprintable() or re.search(r"[{}]", relative):
        first = next(iter(fields))
        fail(
            f"{path}/meta/info.json: the file pattern '{pattern}' must stay inside the folder and use the fields "
            f"{', '.join(fields)} only, as {{{first}}} or {{{first}:03d}}"
        )
    return path / relative


def joint_names(feature: dict) -> list[str]:
    """One name a number. In the file: a list, lists by group, or (teleoperation) name -> place; nothing: all "arm"."""
    names, width = feature.get("names"), math.prod(feature["shape"])
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        names = sorted(names, key=names.get)
    elif isinstance(names, dict) and all(isinstance(group, list) for group in names.values()):
        names = list(chain(*names.values()))
    return list(map(str, names)) if isinstance(names, list) and len(names) == width else ["arm"] * width


def has_depth(feature: dict) -> bool:
    """Whether a camera records distances, or anything else but three colours."""
    about, shape = feature.get("info") or feature.get("video_info") or {}, feature["shape"]
    return bool(about.get("video.is_depth_map") or about.get("is_depth_map")) or len(shape) < 3 or 1 in shape


def propose_modality(info: dict) -> dict:
    """A modality.json from the names of the joints: grippers apart from arms, left apart from right.

    Where all are called key.0, key.1, … those keys are taken.
    """
    proposal: dict = {"state": {}, "action": {}, "video": {}, "annotation": {}}
    for kind, column in COLUMNS.items():
        if column not in info["features"]:
            fail(f"info.json has no '{column}': write a meta/modality.json that says where {kind} is")
        names = joint_names(info["features"][column])
        numbered = [re.fullmatch(r"(.+)\.\d+", name) for name in names]
        for i, name in enumerate(names):
            side = next((side for side in ("left", "right") if side in name.lower()), None)
            part = "gripper" if "gripper" in name.lower() else "arm"
            key = f"{side}_{part}" if side else {"arm": "single_arm"}.get(part, part)
            key = numbered[i][1] if all(numbered) else key
            if key in proposal[kind] and proposal[kind][key]["end"] != i:
                key = f"{key}_{i}"
            proposal[kind].setdefault(key, {"start": i})["end"] = i + 1
    for name, feature in info["features"].items():
        if feature["dtype"] in ("video", "image") and not has_depth(feature):
            proposal["video"][name.removeprefix("observation.images.")] = {"original_key": name}
        elif name.startswith("annotation."):
            proposal["annotation"][name.removeprefix("annotation.")] = {}
    if "task_index" in info["features"]:
        proposal["annotation"].setdefault("human.task_description", {"original_key": "task_index"})
    return proposal


def read_modality(path: Path, info: dict, say=print) -> dict:
    """meta/modality.json, or a printed proposal, with every default filled in."""
    raw = read_json(path / "meta/modality.json", Modality, "delete it to have one proposed", optional=True)
    if not raw:
        raw = propose_modality(info)
        say(f"{path.name} has no meta/modality.json; going on with this one (save it there to change it):")
        say(json.dumps(raw))
    modality: dict = {"state": {}, "action": {}, "video": {}, "language": {}}
    for kind in COLUMNS:
        for key, entry in raw.get(kind, {}).items():
            where = f"modality.json of {path}: {kind}.{key}"
            if entry["start"] >= entry["end"]:
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


# ---- which episode lies where ----------------------------------------------------------------------------------------


def read_table(file: Path, names: list[str] | None = None):
    """These columns of a parquet file, or all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(file).names
        for name in names or []:
            if name not in there:
                fail(f"{file} has no column '{name}'; it has {', '.join(there)}")
        return pq.read_table(file, columns=names)
    except (OSError, pa.ArrowException) as error:
        fail(f"{file} cannot be read: {error}")


def read_rows(file: Path, fields: dict[str, Any]) -> list[dict]:
    """Rows of a parquet file of meta/, columns of these types."""
    try:
        return TypeAdapter(list[schema(**fields)]).validate_python(read_table(file, list(fields)).to_pylist())
    except ValidationError as error:
        fail(f"{file}: {in_words(error)}; {HINT}")


def read_index(path: Path, info: dict, say: Callable[[str], None] = print) -> list[Recorded]:
    """All episodes of a data set but the discarded ones: files, and in v3.0 places in the cameras' files."""
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    cameras, found = cameras if info.get("video_path") else [], []
    if merged_files(info):
        fields, parts = {"episode_index": Natural, "length": Count}, ["data", *(f"videos/{name}" for name in cameras)]
        fields |= {f"{part}/{n}": Natural for part in parts for n in ("chunk_index", "file_index")}
        fields |= {f"{part}/{n}": NonNegative for part in parts[1:] for n in ("from_timestamp", "to_timestamp")}
        for row in chain(*(read_rows(file, fields) for file in sorted(path.glob("meta/episodes/*/*.parquet")))):
            places = {part: {n: row[f"{part}/{n}"] for n in ("chunk_index", "file_index")} for part in parts}
            clips = {}
            for name in cameras:
                file = placed(path, info["video_path"], **places[f"videos/{name}"], video_key=name)
                clips[name] = Clip(file, *(row[f"videos/{name}/{end}"] for end in ("from_timestamp", "to_timestamp")))
            data = placed(path, info["data_path"], **places["data"])
            found.append(Recorded(row["episode_index"], row["length"], data, clips))
    else:
        for row in read_lines(path / "meta/episodes.jsonl", Listed, HINT):
            number = row["episode_index"]
            at = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
            whole = {name: placed(path, info["video_path"], video_key=name, **at) for name in cameras}
            clips = {name: Clip(file, -math.inf, math.inf) for name, file in whole.items()}
            found.append(Recorded(number, row["length"], placed(path, info["data_path"], **at), clips))
    if len({episode.number for episode in found}) < len(found):
        fail(f"{path}: meta/episodes lists an episode_index twice")
    discarded = set(info.get("discarded_episode_indices") or [])
    kept = [episode for episode in found if episode.number not in discarded]
    if len(kept) < len(found):
        say(f"{path.name}: {len(found) - len(kept)} of {len(found)} episodes are marked as discarded and left out")
    if not kept:
        fail(f"{path}: meta/episodes lists no episode")
    return kept


def read_tasks(path: Path, info: dict) -> dict[int, str]:
    """task_index -> instruction. v3.0: the text is the index of a pandas frame, whatever it is called."""
    if not merged_files(info):
        return {row["task_index"]: row["task"] for row in read_lines(path / "meta/tasks.jsonl", Task, HINT)}
    file = path / "meta/tasks.parquet"
    schema = read_table(file).schema
    named = [n for n in schema.names if n in ("task", *(schema.pandas_metadata or {}).get("index_columns", []))]
    text = (named or ["task"])[0]
    return {row["task_index"]: row[text] for row in read_rows(file, {"task_index": Natural, text: str})}


# ---- rows ------------------------------------------------------------------------------------------------------------


def in_threads(function: Callable, items: Sequence, threads: int = 8) -> list:
    """[function(item) for item in items]; what threads refuse, however many, ends the program in one line."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(function, items))
        except Refused as refusal:
            pool.shutdown(cancel_futures=True)
            fail(str(refusal))


def read_columns(file: Path, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Columns of a parquet file, each (rows, its width) float64: numbers or vectors, none missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table, columns = read_table(file, list(widths)), {}
    for name, width in widths.items():
        column = table[name].combine_chunks()
        flat, lengths = getattr(column, "storage", column), [1]
        if pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
            lengths = pc.unique(pc.list_value_length(flat)).to_pylist()
            flat = flat.flatten()
        if column.null_count or flat.null_count:
            fail(f"{file}: column '{name}' has rows without a value")
        if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
            fail(f"{file}: column '{name}' holds {column.type}, not numbers or vectors of them")
        if wrong := [length for length in lengths if length != width]:
            fail(f"{file}: column '{name}' has rows of {wrong[0]} numbers, meta/info.json says {width}")
        columns[name] = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), width)
        if not np.isfinite(columns[name]).all():
            fail(f"{file}: column '{name}' holds numbers that are not finite")
    return columns


def column_statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Per dim of (N, width): float32 rows, quantiles in float64, which is what GR00T's stats.json files hold."""
    rows = rows.astype(np.float32)
    q01, q99 = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0)
    return dict(zip(STATISTICS, (rows.max(0), rows.min(0), rows.mean(0), rows.std(0), q01, q99)))


def read_statistics(path: Path, info: dict, columns: dict[str, np.ndarray]) -> dict:
    """meta/stats.json where it has all six numbers of every column used; computed from the rows otherwise.

    Computed for v3.0 too, whose quantiles are averages over episodes, and where episodes were left out.
    """
    stored = {}
    if not merged_files(info) and not info.get("discarded_episode_indices"):
        stored = read_json(path / "meta/stats.json", dict[str, Object], DELETE, optional=True) or {}
    if not all(set(STATISTICS) <= set(stored.get(name, {})) for name in columns):
        return {name: column_statistics(rows) for name, rows in columns.items()}
    return {name: checked_statistics(path / "meta/stats.json", name, stored[name], columns[name]) for name in columns}


def checked_statistics(file: Path, name: str, stored: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
    """A column's entry of stats.json, which must fit its rows (N, width): they lie between its min and its max."""
    try:
        found = {key: np.array(stored[key], np.float64).reshape(-1) for key in STATISTICS}
    except (TypeError, ValueError):
        fail(f"'{file}': {name} must be lists of numbers; {DELETE}")
    if any(x.shape != rows.shape[1:] or not np.isfinite(x).all() for x in found.values()):
        fail(f"'{file}': {name} needs {rows.shape[1]} finite numbers in each of {', '.join(STATISTICS)}; {DELETE}")
    low, high = rows.min(0), rows.max(0)
    slack = 1e-3 * (found["max"] - found["min"]) + 1e-6 * np.abs(rows).max(0)
    if outside := np.flatnonzero((low < found["min"] - slack) | (high > found["max"] + slack)).tolist():
        i = outside[0]
        fail(
            f"'{file}' is not of this data: {name}[{i}] lies in {low[i]:g} … {high[i]:g}, it says "
            f"{found['min'][i]:g} … {found['max'][i]:g}; {DELETE}"
        )
    return found


def check_cameras(path: Path, info: dict, modality: dict, recorded: list[Recorded], videos: Iterable[str]) -> None:
    """Cameras in colour, all of whose files are there."""
    for video in videos:
        if (column := modality["video"].get(video)) is None:
            continue  # check_keys says which there are
        feature, where = info["features"].get(column), f"{path.name}: camera '{video}'"
        if feature is None or feature["dtype"] not in ("video", "image"):
            fail(f"{where} is in '{column}', which is {'no camera' if feature else 'missing'} in meta/info.json")
        if has_depth(feature):
            fail(f"{where} has no three colours ({feature['shape']}): depth is not trained on; leave it out")
        if feature["dtype"] == "video":
            if not info.get("video_path"):
                fail(f"{where} is a video, but meta/info.json has no video_path")
            check_files([episode.clips[column].file for episode in recorded], f"video '{video}'")


def check_files(paths: Iterable[Path], what: str) -> None:
    unique = dict.fromkeys(paths)
    if missing := [path for path in unique if not path.is_file()]:
        fail(f"{missing[0]} is missing ({what}; {len(missing)} of {len(unique)} files are)")


def read_episodes(path: Path, language: str | None = None, say=print, videos: Iterable[str] = ()) -> Episodes:
    """All episodes of a data set: every row's state, action and annotation columns, in memory; no frames yet.

    language: the annotation with the instructions, videos: the cameras that will be asked for, as in modality.json.
    """
    info = read_info(path)
    modality = read_modality(path, info, say)
    recorded, tasks = read_index(path, info, say), read_tasks(path, info)
    check_files([episode.data for episode in recorded], "rows")
    check_cameras(path, info, modality, recorded, videos)
    vectors = {entry["column"] for kind in COLUMNS for entry in modality[kind].values()}
    names = sorted(vectors | ({modality["language"][language]} if language in modality["language"] else set()))
    widths = {name: math.prod(info["features"][name]["shape"]) if name in vectors else 1 for name in names}
    widths |= {"episode_index": 1} if merged_files(info) else {}
    data = list(dict.fromkeys(episode.data for episode in recorded))
    tables = dict(zip(data, in_threads(lambda file: read_columns(file, widths), data)))
    images, parts = [name for name, f in info["features"].items() if f["dtype"] == "image"], []
    for n, episode in enumerate(recorded):
        table, first = tables[episode.data], 0
        rows = len(table[names[0]])
        if merged_files(info):
            own = np.flatnonzero(table["episode_index"] == episode.number)
            first, rows = (own[0], len(own)) if len(own) else (0, 0)
            if rows and own[-1] - first >= rows:
                fail(f"{episode.data}: the rows of episode {episode.number} do not follow each other")
        if rows != episode.length:
            fail(f"{path}: episode {episode.number} has {rows} rows, meta/episodes says {episode.length}")
        parts.append({name: table[name][first : first + rows] for name in names})
        in_table = {name: Clip(episode.data, int(first), int(first) + rows) for name in images}
        recorded[n] = episode._replace(clips=episode.clips | in_table)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    statistics = read_statistics(path, info, {name: columns[name] for name in sorted(vectors)})
    starts = np.r_[0, np.cumsum([episode.length for episode in recorded])]
    return Episodes(path, info, modality, recorded, starts, columns, statistics, tasks)
