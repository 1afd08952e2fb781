"""Recorded episodes as a script trains on them: all rows of several LeRobot data sets, normalised and in memory, the
statistics of the mixture, and the frames, from caches that are read through memory maps.

    sets = read_mixture(folders, config, "so100")
    data = Demonstrations(sets, config, make_metadata(sets, config, weights, tag), embodiment)
    data.open_frames(episodes, cache_dir, side)
    batch = data.batch(rows)

Dims: N rows in all, B of a batch, V cameras, H action steps and D dims of the model, h <= H steps of the robot.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.cli import fail
from common.parallel import World
from common.robot.data_configs import ChunkConfig, DataConfig, Relative, check_keys
from common.robot.frames import cache_frames
from common.robot.interface_n17 import relative, relative_statistics
from common.robot.lerobot import COLUMNS, STATISTICS, Episodes, read_episodes
from common.robot.policy import make_interface

NO_INSTRUCTION = "Perform the default behavior."
PROGRESS = "task_progress"  # an action that is not recorded: how far the episode is, 0 to 1

# ---- data sets and their statistics ----------------------------------------------------------------------------------


def read_mixture(folders: list[Path], config: DataConfig, name: str, say=print) -> list[Episodes]:
    """All data sets; their keys must mean the same. name: of the config, for messages."""
    sets = [read_episodes(folder, config.language, say, config.video) for folder in folders]
    for episodes in sets:
        check_keys(config, episodes.modality, str(episodes.path), name)
        if not episodes.modality["language"]:
            say(f"{episodes.path.name} has no annotations: every instruction is '{NO_INSTRUCTION}'")
        for kind in COLUMNS:
            for key in getattr(config, kind):
                first, this = (e.modality[kind].get(key) for e in (sets[0], episodes))
                if first and meaning(first) != meaning(this):
                    fail(f"{kind}.{key} differs between {sets[0].path} and {episodes.path}")
    return sets


def meaning(entry: dict) -> dict:
    """A key's entry of modality.json without its place in a column: what metadata.json says of it."""
    facts = {name: entry[name] for name in ("absolute", "rotation_type", "continuous")}
    return facts | {"shape": [entry["end"] - entry["start"]]}


def make_metadata(sets: list[Episodes], config: DataConfig, weights: np.ndarray, tag: str) -> dict:
    """The embodiment's entry of metadata.json: all keys of modality.json, statistics of sets drawn with `weights`."""
    statistics: dict = {"state": {}, "action": {}}
    extremes = isinstance(config, ChunkConfig)
    modalities: dict = {"video": {}, "state": {}, "action": {}}
    for kind in COLUMNS:
        for key, entry in sets[0].modality[kind].items():
            if all(key in episodes.modality[kind] for episodes in sets):  # keys of the config are: see check_keys
                parts = [key_statistics(episodes, kind, key) for episodes in sets]
                statistics[kind][key] = merge_statistics(parts, weights, extremes)
                modalities[kind][key] = meaning(entry)
    if PROGRESS in config.action:
        facts = {"absolute": True, "rotation_type": None, "continuous": True, "shape": [1]}
        modalities["action"][PROGRESS] = facts
        statistics["action"][PROGRESS] = dict(zip(STATISTICS, ([1.0], [0.0], [0.5], [0.3], [0.0], [1.0])))
    for key, how in config.relative.items():
        parts = [relative_to(episodes, key, how, config.horizon) for episodes in sets]
        statistics.setdefault("relative_action", {})[key] = merge_statistics(parts, weights, extremes)
    modalities["video"] = camera_facts(sets[0])
    return {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}


def camera_facts(episodes: Episodes) -> dict[str, dict]:
    """What metadata.json says of the cameras, as info.json has it."""
    found = {}
    for key, column in episodes.modality["video"].items():
        if feature := episodes.info["features"].get(column):
            shape = dict(zip(feature.get("names") or ("height", "width", "channel"), feature["shape"]))
            about = feature.get("video_info") or feature.get("info") or {}
            found[key] = {
                "resolution": [shape.get("width"), shape.get("height")],
                "channels": shape.get("channel", shape.get("channels", 3)),
                "fps": float(about.get("video.fps", episodes.info.get("fps", 0))),
            }
    return found


def check_units(sets: list[Episodes], config: DataConfig, metadata: dict, source: str) -> None:
    """The config's keys mean in the data sets what they meant to the checkpoint `source`."""
    for episodes in sets:
        for kind in COLUMNS:
            for key in [key for key in getattr(config, kind) if key != PROGRESS]:
                there, here = metadata["modalities"][kind][key], meaning(episodes.modality[kind][key])
                if wrong := [name for name in here if name in there and here[name] != there[name]]:
                    name, a, b = wrong[0], there[wrong[0]], here[wrong[0]]
                    fail(f"{kind}.{key} of {episodes.path} has {name} {b}, checkpoint '{source}' learnt it with {a}")


def key_statistics(episodes: Episodes, kind: str, key: str) -> dict[str, np.ndarray]:
    """(width,) arrays: the key's part of its column's statistics."""
    entry = episodes.modality[kind][key]
    return {name: x[entry["start"] : entry["end"]] for name, x in episodes.statistics[entry["column"]].items()}


def relative_to(episodes: Episodes, key: str, how: Relative, horizon: int) -> dict[str, np.ndarray]:
    """(h, width) arrays: statistics of a relative action, step by step, over all windows that are complete."""
    ends = zip(episodes.starts, episodes.starts[1:])
    rows = np.concatenate([np.arange(start, max(start, end - horizon + 1)) for start, end in ends])
    if not len(rows):
        fail(f"no episode of {episodes.path} has {horizon} rows, a whole chunk of actions: shorten delta_indices")
    entry, of = episodes.modality["action"][key], episodes.modality["state"][how.state]
    action = episodes.columns[entry["column"]][:, entry["start"] : entry["end"]]
    state = episodes.columns[of["column"]][rows, of["start"] : of["end"]]
    if state.shape[1] != action.shape[1]:
        fail(f"action '{key}' of {episodes.path} has {action.shape[1]} numbers, state '{how.state}' {state.shape[1]}")
    return relative_statistics(relative(action[rows + k][:, None], state, how.form)[:, 0] for k in range(horizon))


def merge_statistics(parts: list[dict], weights: np.ndarray, extremes: bool = False) -> dict[str, list]:
    """Statistics of a mixture drawn with `weights` from those of its parts, as lists.

    extremes: the lowest q01 and the highest q99 of the parts, as in N1.7, not their means.
    """
    if len(parts) == 1:
        return {name: parts[0][name].tolist() for name in STATISTICS}
    merged = {name: sum(w * p[name] for w, p in zip(weights, parts)) for name in ("mean", "q01", "q99")}
    # eq: E[x^2] = sum_k w_k (std_k^2 + mean_k^2)
    square = sum(w * (p["std"] ** 2 + p["mean"] ** 2) for w, p in zip(weights, parts))
    merged["std"] = np.sqrt(np.maximum(square - merged["mean"] ** 2, 0))
    picks = dict(max=np.max, min=np.min) | (dict(q01=np.min, q99=np.max) if extremes else {})
    merged |= {name: pick([p[name] for p in parts], axis=0) for name, pick in picks.items()}
    return {name: merged[name].tolist() for name in STATISTICS}


def raw_columns(episodes: Episodes, kind: str, config: DataConfig) -> dict[str, np.ndarray]:
    """(N, width) of each key of the config, as recorded."""
    raw = {}
    for key in getattr(config, kind):
        if key == PROGRESS:
            raw[key] = np.concatenate([np.arange(n) / n for n in np.diff(episodes.starts)])[:, None]
        else:
            entry = episodes.modality[kind][key]
            raw[key] = episodes.columns[entry["column"]][:, entry["start"] : entry["end"]]
    return raw


# ---- rows in memory --------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """Rows start … end - 1 of all data sets, one after the other."""

    part: int  # which data set
    position: int  # in it
    number: int  # episode_index
    start: int
    end: int


@dataclass
class Split:
    """What is trained on and what is held out: row numbers, and the episodes that they are of."""

    rows: np.ndarray
    val_rows: np.ndarray
    episodes: list[Episode]
    val_episodes: list[Episode]


class Demonstrations:
    """All rows of all data sets and the open frame caches; samples of them in the units of `interface`."""

    def __init__(self, sets: list[Episodes], config: DataConfig, metadata: dict, embodiment: int, about=None):
        """metadata: statistics and description of every key of the config; embodiment: row of the embodiment layers."""
        self.sets, self.config, self.metadata = sets, config, metadata
        self.interface = make_interface(config, metadata, embodiment, about)
        # of each set: the place of each row (N,) in its files, one a camera
        self.videos: list[tuple[np.ndarray, list[Path]]] = []
        self.instructions: list[str] = []
        self.episodes: list[Episode] = []
        self.text = np.concatenate([self.number_instructions(one) for one in sets])  # (N,) instruction's number
        offset = 0
        for n, episodes in enumerate(sets):
            starts = (episodes.starts + offset).tolist()
            for position, number_start_end in enumerate(zip(episodes.ids, starts, starts[1:])):
                self.episodes.append(Episode(n, position, *number_start_end))
            offset = starts[-1]
        lengths = [e.end - e.start for e in self.episodes]
        self.end = np.repeat([e.end for e in self.episodes], lengths)  # (N,) the row after its episode's last
        self.start = np.repeat([e.start for e in self.episodes], lengths)  # (N,) its episode's first row
        self.part = np.repeat([e.part for e in self.episodes], lengths)  # (N,) its data set
        self.raw: dict[str, dict[str, np.ndarray]] = {}  # "state" | "action" -> key -> (N, width) as recorded
        for kind in COLUMNS:
            parts = [raw_columns(episodes, kind, config) for episodes in sets]
            self.raw[kind] = {key: np.concatenate([part[key] for part in parts]) for key in getattr(config, kind)}
        self.raw_action = np.concatenate(list(self.raw["action"].values()), axis=-1)  # (N, recorded)
        self.dims, self.state_dims = self.interface.dims("action"), self.interface.dims("state")  # real ones
        if self.dims > (most := self.interface.chunk_shape[1]):
            fail(f"the data config has {self.dims} action dims, the model takes {most}")

    def number_instructions(self, episodes: Episodes) -> np.ndarray:
        """(N,) the number of each row's instruction in `self.instructions`."""
        column = episodes.modality["language"].get(self.config.language)
        if column is None:
            numbers, texts = np.zeros(int(episodes.starts[-1]), np.int64), {0: NO_INSTRUCTION}
        else:
            numbers, texts = episodes.columns[column][:, 0].astype(np.int64), episodes.tasks
        if unknown := set(np.unique(numbers).tolist()) - set(texts):
            fail(f"{episodes.path}: '{column}' holds task {min(unknown)}, which meta/tasks.jsonl lacks")
        for number in np.unique(numbers):
            if texts[number] not in self.instructions:
                self.instructions.append(texts[number])
        places = {text: place for place, text in enumerate(self.instructions)}
        return np.array([places[texts[number]] for number in numbers])

    def split(self, held_out: list[list[int]]) -> Split:
        """held_out: positions of the episodes not to train on, of each data set. Rows are those of samples."""
        parts: tuple[list[Episode], list[Episode]] = [], []
        short = self.interface.horizon - 1 if self.interface.complete else 0  # rows at an episode's end that begin none
        for episode in self.episodes:
            parts[episode.position in held_out[episode.part]].append(episode)
        none = [np.zeros(0, int)]
        rows, val_rows = (
            np.concatenate([np.arange(e.start, max(e.end - short, e.start)) for e in part] or none) for part in parts
        )
        if short and not len(rows):
            fail(f"no episode has {short + 1} rows, a whole chunk of actions: shorten delta_indices")
        return Split(rows, val_rows, *parts)

    def open_frames(self, use: list[Episode], cache_dir: Path, side: int, world: World | None = None) -> None:
        """Caches and opens the frames of these episodes; every camera of a data set has the same resolution."""
        if world and not world.main:
            world.gather([])  # once the first process is done, the cache is there
        self.videos = []
        for n, episodes in enumerate(self.sets):
            chosen = sorted(e for e in use if e.part == n)
            places = np.full(len(self.end), -1)
            rows = [np.zeros(0, int), *(np.arange(e.start, e.end) for e in chosen)]
            places[np.concatenate(rows)] = np.arange(sum(map(len, rows)))
            positions = [e.position for e in chosen]
            how = self.interface.reduce, self.interface.reduced
            paths = cache_frames(episodes, self.config.video, positions, cache_dir, side, *how)
            self.videos.append((places, paths))
        if world and world.main:
            world.gather([])

    def describe_frames(self, rows: np.ndarray, count: int = 64) -> None:
        """Notes what the policy sees: the size, and the mean colour of each camera over some of these rows."""
        about = self.interface.about
        if not about.image_mean:
            some = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
            now = [self.frames(row)[-len(self.config.video) :] for row in some]
            means = np.mean([frames.mean((1, 2)) for frames in now], axis=0)  # (V, 3)
            means = dict(zip(self.config.video, means.round(3).tolist()))
            self.interface.about = about.model_copy(update=dict(image_size=self.interface.image_size, image_mean=means))

    def __getstate__(self) -> dict:
        """What a worker process gets."""
        return self.__dict__ | {"sets": []}

    def frames(self, row: int) -> np.ndarray:
        """(V, height, width, 3) uint8 as cached; where the policy sees several times (T * V, …), the oldest first."""
        places, paths = self.videos[self.part[row]]
        rows = [max(row + step, self.start[row]) for step in self.config.video_steps]
        return np.stack([opened(path)[places[at]] for at in rows for path in paths])

    def state_at(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """(B, width) of each key as recorded."""
        return {key: x[rows] for key, x in self.raw["state"].items()}

    def actions(self, rows: np.ndarray) -> np.ndarray:
        """(B, H, D) in model units: the actions of each row and of those that follow it, zeros beyond `horizon`."""
        steps = rows[:, None] + np.arange(self.interface.horizon)  # (B, h)
        last = self.end[rows][:, None] - 1
        # eq: past the episode's end a^i is its last row
        raw = {key: x[np.minimum(steps, last)] for key, x in self.raw["action"].items()}
        return self.interface.encode(raw, self.state_at(rows), steps > last)

    def longest_prompt(self, rows: np.ndarray) -> int:
        ones = {(self.text[row], self.part[row]): row for row in rows}  # a row of each instruction and data set
        shapes = {pair: self.frames(row).shape if self.videos else () for pair, row in ones.items()}
        return max(self.interface.prompt_length(self.instructions[text], shapes[text, part]) for text, part in ones)

    def batch(self, rows: np.ndarray, length: int = 0, rngs: list | None = None) -> dict[str, torch.Tensor]:
        """Rows as a batch: what `Interface.batch` makes, action and action_mask (B, H, D).

        length: that prompts are padded to, at least. rngs: generators for crop and jitter, one a row; None: the centre.
        """
        images = self.interface.pictures([self.frames(row) for row in rows], rngs) if self.videos else None
        texts = [self.instructions[text] for text in self.text[rows]]
        batch = self.interface.batch(self.interface.state(self.state_at(rows)), texts, images, length)
        batch["action"] = torch.from_numpy(self.actions(rows))
        H, D = self.interface.chunk_shape
        mask = (torch.arange(H) < self.interface.horizon)[:, None] & (torch.arange(D) < self.dims)
        batch["action_mask"] = mask.repeat(len(rows), 1, 1)  # numbers of its own: a view could not be pinned
        return batch


@functools.cache
def opened(path: Path) -> np.ndarray:
    """A cache's frames (rows, height, width, 3) through a memory map; each process maps a file once."""
    return np.load(path, mmap_mode="r")


def prepared(samples: Dataset, plans: Iterator, workers: int, device: torch.device) -> Iterator[dict]:
    """samples[plan] of every plan, made by so many processes of one thread (0: by this one, when it is asked for)."""
    loader = dict(num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda")
    return iter(DataLoader(samples, sampler=plans, batch_size=None, **loader))
