"""Recorded episodes as a script trains on them: all rows of several LeRobot data sets, normalised and in memory, the
statistics of the mixture, and the frames, from caches that are read through memory maps.

    sets = read_mixture(folders, config, "so100")
    metadata = make_metadata(sets, config, weights, tag)            what metadata.json says of an embodiment
    data = Demonstrations(sets, config, metadata, embodiment)
    data.open_frames(episodes, cache_dir, side)
    batch = data.batch(rows)

Dims: N rows in all, B of a batch, V cameras, H = 16 action steps.
"""

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
from common.robot.lerobot import Episodes, cache_frames, read_episodes
from common.robot.policy import Interface
from common.robot.transforms import ACTION_DIM, HORIZON, encode, pad, statistics_of, transform_images

NO_INSTRUCTION = "Perform the default behavior."


# ---- data sets and their statistics ----------------------------------------------------------------------------------


def read_mixture(folders: list[Path], config: DataConfig, name: str, say=print) -> list[Episodes]:
    """All data sets; their keys must mean the same. name: of the config, for messages."""
    sets = [read_episodes(folder, config.language, say) for folder in folders]
    for episodes in sets:
        check_keys(config, episodes.modality, str(episodes.path), name)
        if not episodes.modality["language"]:
            say(f"{episodes.path.name} has no annotations: every instruction is '{NO_INSTRUCTION}'")
        for kind in ("state", "action"):
            for key in getattr(config, kind):
                if key in sets[0].modality[kind]:
                    if meaning(sets[0].modality[kind][key]) != meaning(episodes.modality[kind][key]):
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
    for kind in ("state", "action"):
        for key, entry in sets[0].modality[kind].items():
            if not all(key in episodes.modality[kind] for episodes in sets):
                continue  # no key of the config: those were checked
            parts = []
            for episodes in sets:
                e = episodes.modality[kind][key]
                stats = episodes.statistics[e["column"]]
                parts.append({name: value[e["start"] : e["end"]] for name, value in stats.items()})
            merged = merge_statistics(parts, weights)
            names = ("max", "min", "mean", "std", "q01", "q99")
            statistics[kind][key] = {name: merged[name].tolist() for name in names}
            modalities[kind][key] = meaning(entry)
    if "task_progress" in config.action:
        progress = {"max": 1.0, "min": 0.0, "mean": 0.5, "std": 0.3, "q01": 0.0, "q99": 1.0}
        statistics["action"]["task_progress"] = {name: [value] for name, value in progress.items()}
        facts = {"absolute": True, "rotation_type": None, "continuous": True, "shape": [1]}
        modalities["action"]["task_progress"] = facts
    for key, column in sets[0].modality["video"].items():
        feature = sets[0].info["features"].get(column)
        if feature:
            shape = dict(zip(feature.get("names") or ("height", "width", "channel"), feature["shape"]))
            about = feature.get("video_info") or feature.get("info") or {}
            modalities["video"][key] = {
                "resolution": [shape.get("width"), shape.get("height")],
                "channels": shape.get("channel", shape.get("channels", 3)),
                "fps": float(about.get("video.fps", sets[0].info.get("fps", 0))),
            }
    return {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}


def merge_statistics(parts: list[dict], weights: np.ndarray) -> dict:
    """Statistics of a mixture drawn with `weights` from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    mean = sum(w * p["mean"] for w, p in zip(weights, parts))
    # eq: E[x^2] = sum_k w_k (std_k^2 + mean_k^2)
    square = sum(w * (p["std"] ** 2 + p["mean"] ** 2) for w, p in zip(weights, parts))
    return {
        "max": np.max([p["max"] for p in parts], axis=0),
        "min": np.min([p["min"] for p in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(np.maximum(square - mean**2, 0)),
        "q01": sum(w * p["q01"] for w, p in zip(weights, parts)),
        "q99": sum(w * p["q99"] for w, p in zip(weights, parts)),
    }


def raw_columns(episodes: Episodes, kind: str, config: DataConfig) -> dict[str, np.ndarray]:
    """(N, width) of each key of the config, as recorded."""
    raw = {}
    for key in getattr(config, kind):
        if key == "task_progress":  # not recorded: how far the episode is
            lengths = np.diff(episodes.starts)
            raw[key] = np.concatenate([np.arange(n) / n for n in lengths])[:, None]
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

    def __init__(self, sets: list[Episodes], config: DataConfig, metadata: dict, embodiment: int):
        """metadata: statistics and description of every key of the config; embodiment: row of the embodiment layers."""
        self.sets, self.config, self.metadata = sets, config, metadata
        self.interface = Interface(config, metadata, embodiment)
        self.videos: list[list[tuple]] = []  # of each set, of each camera: file, place of each row in it, open map
        self.instructions: list[str] = []
        self.episodes: list[Episode] = []
        state, action, raw_action, end, text, part = [], [], [], [], [], []
        offset = 0
        for n, episodes in enumerate(sets):
            raw = {kind: raw_columns(episodes, kind, config) for kind in ("state", "action")}
            state.append(self.interface.state(raw["state"]))
            action.append(encode("action", raw["action"], config, metadata))
            raw_action.append(np.concatenate(list(raw["action"].values()), axis=-1))
            end.append(np.repeat(episodes.starts[1:], np.diff(episodes.starts)) + offset)
            text.append(self.number_instructions(episodes))
            part.append(np.full(len(text[-1]), n))
            bounds = (episodes.starts + offset).tolist()
            numbered = zip(episodes.ids, bounds, bounds[1:])
            self.episodes += [Episode(n, e, *number_start_end) for e, number_start_end in enumerate(numbered)]
            offset = bounds[-1]
        self.state = np.concatenate(state)  # (N, 64) float32
        self.raw_action = np.concatenate(raw_action)  # (N, recorded action dims) float64
        self.dims = action[0].shape[1]  # real dims among the 32
        if self.dims > ACTION_DIM:
            fail(f"the data config has {self.dims} action dims, the model takes {ACTION_DIM}")
        self.action = pad(np.concatenate(action), ACTION_DIM).astype(np.float32)  # (N, 32)
        # the row after its episode's last, the number of its instruction, its data set: (N,) each
        self.end, self.text, self.part = np.concatenate(end), np.concatenate(text), np.concatenate(part)
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
            rows = [np.arange(e.start, e.end) for e in chosen]
            places[np.concatenate(rows)] = np.arange(sum(map(len, rows)))
            positions = [e.position for e in chosen]
            paths = [cache_frames(episodes, video, positions, cache_dir, side) for video in self.config.video]
            shapes = {np.load(path, mmap_mode="r").shape[1:3] for path in paths}
            if len(shapes) > 1:
                fail(f"the cameras of {episodes.path} differ in resolution: {sorted(shapes)}; one crop is for all")
            self.videos.append([(path, places, None) for path in paths])
        if world and world.main:
            world.gather([])

    def __getstate__(self) -> dict:
        """What a worker process gets: it opens the files itself."""
        closed = [[(path, places, None) for path, places, _ in views] for views in self.videos]
        return self.__dict__ | {"videos": closed, "sets": []}

    def frames(self, row: int) -> np.ndarray:
        """(V, height, width, 3) uint8 as cached."""
        views = self.videos[self.part[row]]
        for v, (path, places, opened) in enumerate(views):
            if opened is None:  # each process maps the file once
                views[v] = (path, places, np.load(path, mmap_mode="r"))
        return np.stack([opened[places[row]] for _, places, opened in views])

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


def prepared(
    samples: Dataset, plans: Iterator, workers: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """samples[plan] of every plan, made by so many processes (0: by this one, when it is asked for)."""
    loader = dict(num_workers=workers, pin_memory=device.type == "cuda")
    if workers:
        loader |= dict(prefetch_factor=4, worker_init_fn=one_thread)
    return iter(DataLoader(samples, sampler=plans, batch_size=None, **loader))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
