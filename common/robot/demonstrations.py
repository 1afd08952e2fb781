"""Recorded episodes as a script trains on them: all rows of several LeRobot data sets, normalised and in memory, the
statistics of the mixture, and the frames, from caches that are read through memory maps.

    sets = read_mixture(folders, config, "so100")
    data = Demonstrations(sets, config, make_metadata(sets, config, weights, tag), embodiment)
    data.open_frames(episodes, cache_dir, side)
    batch = data.batch(rows)

Dims: N rows in all, B of a batch, V cameras, H = 16 action steps.
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
from common.robot.data_configs import DataConfig, check_keys
from common.robot.frames import cache_frames
from common.robot.lerobot import COLUMNS, STATISTICS, Episodes, read_episodes
from common.robot.policy import Interface
from common.robot.transforms import ACTION_DIM, HORIZON, encode, pad, statistics_of, transform_images

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
    modalities: dict = {"video": {}, "state": {}, "action": {}}
    for kind in COLUMNS:
        for key, entry in sets[0].modality[kind].items():
            if all(key in episodes.modality[kind] for episodes in sets):  # keys of the config are: see check_keys
                merged = merge_statistics([key_statistics(episodes, kind, key) for episodes in sets], weights)
                statistics[kind][key] = {name: merged[name].tolist() for name in STATISTICS}
                modalities[kind][key] = meaning(entry)
    if PROGRESS in config.action:
        facts = {"absolute": True, "rotation_type": None, "continuous": True, "shape": [1]}
        modalities["action"][PROGRESS] = facts
        statistics["action"][PROGRESS] = dict(zip(STATISTICS, ([1.0], [0.0], [0.5], [0.3], [0.0], [1.0])))
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
                if wrong := [name for name in here if here[name] != there[name]]:
                    name, a, b = wrong[0], there[wrong[0]], here[wrong[0]]
                    fail(f"{kind}.{key} of {episodes.path} has {name} {b}, checkpoint '{source}' learnt it with {a}")


def key_statistics(episodes: Episodes, kind: str, key: str) -> dict[str, np.ndarray]:
    """(width,) arrays: the key's part of its column's statistics."""
    entry = episodes.modality[kind][key]
    return {name: x[entry["start"] : entry["end"]] for name, x in episodes.statistics[entry["column"]].items()}


def merge_statistics(parts: list[dict], weights: np.ndarray) -> dict:
    """Statistics of a mixture drawn with `weights` from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    merged = {name: sum(w * p[name] for w, p in zip(weights, parts)) for name in ("mean", "q01", "q99")}
    # eq: E[x^2] = sum_k w_k (std_k^2 + mean_k^2)
    square = sum(w * (p["std"] ** 2 + p["mean"] ** 2) for w, p in zip(weights, parts))
    merged["std"] = np.sqrt(np.maximum(square - merged["mean"] ** 2, 0))
    return merged | {name: pick([p[name] for p in parts], axis=0) for name, pick in (("max", np.max), ("min", np.min))}


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
    """All rows of all data sets, normalised, and the open frame caches."""

    def __init__(self, sets: list[Episodes], config: DataConfig, metadata: dict, embodiment: int, about=None):
        """metadata: statistics and description of every key of the config; embodiment: row of the embodiment layers."""
        self.sets, self.config, self.metadata = sets, config, metadata
        self.interface = Interface(config, metadata, embodiment, about)
        self.videos: list[
            tuple[np.ndarray, list[Path]]
        ] = []  # of each set: place of each row in its files, one a camera
        self.instructions: list[str] = []
        self.episodes: list[Episode] = []
        self.text = np.concatenate(
            [self.number_instructions(episodes) for episodes in sets]
        )  # (N,) instruction's number
        offset = 0
        for n, episodes in enumerate(sets):
            starts = (episodes.starts + offset).tolist()
            for position, number_start_end in enumerate(zip(episodes.ids, starts, starts[1:])):
                self.episodes.append(Episode(n, position, *number_start_end))
            offset = starts[-1]
        lengths = [e.end - e.start for e in self.episodes]
        self.end = np.repeat([e.end for e in self.episodes], lengths)  # (N,) the row after its episode's last
        self.part = np.repeat([e.part for e in self.episodes], lengths)  # (N,) its data set
        raw = [raw_columns(episodes, "action", config) for episodes in sets]
        self.raw_action = np.concatenate(
            [np.concatenate(list(keys.values()), axis=-1) for keys in raw]
        )  # (N, recorded)
        action = np.concatenate([encode("action", keys, config, metadata) for keys in raw])  # (N, dims) float64
        self.dims = action.shape[1]  # real dims among the 32
        if self.dims > ACTION_DIM:
            fail(f"the data config has {self.dims} action dims, the model takes {ACTION_DIM}")
        self.action = pad(action, ACTION_DIM).astype(np.float32)  # (N, 32)
        states = [self.interface.state(raw_columns(episodes, "state", config)) for episodes in sets]
        self.state = np.concatenate(states)  # (N, 64) float32
        one = {key: x[:1] for key, x in raw_columns(sets[0], "state", config).items()}
        self.state_dims = encode("state", one, config, metadata).shape[1]  # the model takes the first 64
        # what a relative action (absolute: false) is past the episode's end: the code of 0
        zeros = {key: np.zeros(metadata["modalities"]["action"][key]["shape"]) for key in config.action}
        with np.errstate(invalid="ignore"):
            self.still = pad(encode("action", zeros, config, metadata), ACTION_DIM).astype(np.float32)
        relative = []
        for key in config.action:
            width = len(statistics_of("action", key, config, metadata)["min"])
            relative += width * [not metadata["modalities"]["action"][key]["absolute"]]
        self.relative = pad(np.array(relative), ACTION_DIM)

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
        """held_out: positions of the episodes not to train on, of each data set."""
        parts: tuple[list[Episode], list[Episode]] = [], []
        for episode in self.episodes:
            parts[episode.position in held_out[episode.part]].append(episode)
        none = [np.zeros(0, int)]
        rows, val_rows = (np.concatenate([np.arange(e.start, e.end) for e in part] or none) for part in parts)
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
            paths = cache_frames(episodes, self.config.video, positions, cache_dir, side)
            self.videos.append((places, paths))
        if world and world.main:
            world.gather([])

    def describe_frames(self, rows: np.ndarray, count: int = 64) -> None:
        """Notes what the policy sees: the size, and the mean colour of each camera over some of these rows."""
        about = self.interface.about
        if not about.image_mean:
            some = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
            means = np.mean([self.frames(row).mean((1, 2)) for row in some], axis=0)  # (V, 3)
            means = dict(zip(self.config.video, means.round(3).tolist()))
            self.interface.about = about.model_copy(update=dict(image_size=self.interface.image_size, image_mean=means))

    def __getstate__(self) -> dict:
        """What a worker process gets."""
        return self.__dict__ | {"sets": []}

    def frames(self, row: int) -> np.ndarray:
        """(V, height, width, 3) uint8 as cached."""
        places, paths = self.videos[self.part[row]]
        return np.stack([opened(path)[places[row]] for path in paths])

    def actions(self, rows: np.ndarray) -> np.ndarray:
        """(B, 16, 32): the actions of each row and the 15 that follow it."""
        steps = rows[:, None] + np.arange(HORIZON)  # (B, H)
        last = self.end[rows][:, None] - 1
        # eq: past the episode's end a^i is its last row; a relative action is zero there
        actions = self.action[np.minimum(steps, last)]
        return np.where((steps > last)[..., None] & self.relative, self.still, actions)

    def longest_prompt(self, rows: np.ndarray) -> int:
        return max(len(self.interface.prompts[self.instructions[text]]) for text in np.unique(self.text[rows]))

    def batch(self, rows: np.ndarray, length: int = 0, rngs: list | None = None) -> dict[str, torch.Tensor]:
        """Rows as a batch: what `Interface.batch` makes, action and action_mask (B, 16, 32).

        length: that prompts are padded to, at least. rngs: generators for crop and jitter, one a row; None: the centre.
        """
        images = None
        if self.videos:
            size, rngs = self.interface.image_size, rngs or [None] * len(rows)
            images = torch.cat([transform_images(self.frames(row), size, rng) for row, rng in zip(rows, rngs)])
        texts = [self.instructions[text] for text in self.text[rows]]
        batch = self.interface.batch(self.state[rows], texts, images, length)
        batch["action"] = torch.from_numpy(self.actions(rows))
        batch["action_mask"] = (torch.arange(ACTION_DIM) < self.dims).expand(len(rows), HORIZON, ACTION_DIM)
        return batch


@functools.cache
def opened(path: Path) -> np.ndarray:
    """A cache's frames (rows, height, width, 3) through a memory map; each process maps a file once."""
    return np.load(path, mmap_mode="r")


def prepared(samples: Dataset, plans: Iterator, workers: int, device: torch.device) -> Iterator[dict]:
    """samples[plan] of every plan, made by so many processes of one thread (0: by this one, when it is asked for)."""
    loader = dict(num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda")
    return iter(DataLoader(samples, sampler=plans, batch_size=None, **loader))
