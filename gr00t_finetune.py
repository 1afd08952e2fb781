"""GR00T N1.5: a flow-matching policy that turns camera images, joint state and an instruction into 16 actions.

    data        LeRobot v2 folders; sample = frame, state, instruction, the next H = 16 actions a, normalised to [-1, 1]
    noise       eps ~ N(0, I),  s ~ Beta(1.5, 1),  t = (0.999 - s) / 0.999,  x_t = (1 - t) eps + t a
    objective   minimise  mean over valid dims of |v(x_t, t, frame, state, instruction) - (a - eps)|^2
    policy      x_0 ~ N(0, I),  x <- x + v(x, k / K) / K  for k = 0 .. K - 1,  K = 4 (Euler)

Every line of the algorithm that is an equation carries it: grep for "eq:".

Against the reference: no flash-attn, no logits that nobody reads, frames are decoded once and never reopened, episodes
are held out and evaluated beside two baselines, --resume is bit-exact, a LoRA run saves a whole model.
Left out on purpose: frames of the past, proprioceptive noise and dropout (no published configuration uses them).

Dims: B samples, V cameras, S tokens, H = 16 action steps, D = 32 padded action dims, of which the robot has some.

    uv run python gr00t_finetune.py                              # tiny model, bundled Fetch demonstrations, a laptop CPU
    uv run python gr00t_finetune.py --model-path lite            # no images: closed loop on Fetch in minutes
    uv run python gr00t_finetune.py --model-path nvidia/GR00T-N1.5-3B --dataset-path DIR --data-config so100_dualcam
    uv run python gr00t_finetune.py --eval-only --model-path RUN_DIR/best --dataset-path DIR

Equations next to symbols, metrics and results: docs/gr00t_finetune.md.
"""

import hashlib
import importlib
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.lerobot import Episodes, bounds, cache_frames, find_folder, from_matrix, read_episodes, read_info, to_matrix
from common.log import Logger
from common.run import (
    StopSignal,
    World,
    close_world,
    create_run,
    fail,
    parse,
    read_config,
    seed_everything,
    setup_world,
    write_config,
)

SCRIPT = "gr00t_finetune"
ROOT = Path(__file__).resolve().parent
HORIZON, STATE_DIM, ACTION_DIM = 16, 64, 32  # of every published configuration; narrower robots are padded with zeros

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "gr00t_finetune"
    """name of the run"""
    seed: int = 42
    """seed of order, augmentation, noise, dropout and evaluation"""
    tags: tuple[str, ...] = ("gr00t", "flow-matching")
    """wandb tags"""
    output_dir: str = "runs"
    """parent of the run folder"""
    device: str = "auto"
    """cpu, cuda or auto"""
    torch_threads: int | None = None
    """CPU threads of torch; default: torch's own choice"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account"""
    resume: str | None = None
    """run folder (or one of its checkpoints) to continue, bit-exactly on a CPU, with its own settings"""
    eval_only: bool = False
    """evaluate --model-path (a run folder, a checkpoint) on the held-out episodes and stop"""
    save_steps: int = 1000
    """optimizer steps between checkpoints, 0: only at the end"""
    keep: int = 2
    """newest checkpoints to keep, besides the best"""

    # data
    dataset_path: tuple[str, ...] | None = None
    """LeRobot v2.0 / v2.1 folders or hub ids (user/name or user/name@revision); several make a mixture;
    default: the checkpoint's with --eval-only, assets/fetch_demos otherwise"""
    data_config: str | None = None
    """cameras, joints, normalisation: one of the table in section 2, auto (all of modality.json), or module:NAME;
    default: the checkpoint's with --eval-only, fetch for a Fetch robot, fourier_gr1_arms_only otherwise"""
    embodiment_tag: Literal["new_embodiment", "gr1", "oxe_droid", "agibot_genie1"] | None = None
    """whose rows of the embodiment layers to use: a pretrained robot's or the free ones of new_embodiment, the default"""
    val_episodes: int | None = None
    """episodes held out of each data set, evenly spaced; default: a tenth, at least 1"""
    max_samples: int | None = None
    """train on this many frames, drawn at random from all data sets; default: all"""
    balance_dataset_weights: bool = True
    """several data sets: draw them in proportion to their frames; off: equally often"""
    balance_trajectory_weights: bool = True
    """several data sets: draw episodes in proportion to their frames; off: equally often"""
    num_workers: int = 0
    """processes that prepare batches; 0: in the training process"""
    prefetch_factor: int = 4
    """batches that each worker prepares ahead"""
    cache_side: int = 256
    """frames larger than this are cached at SIDE x SIDE (16-fold less disk for 1080p); 0: always cache as recorded"""
    cache_dir: str | None = None
    """folder of the memory-mapped frame cache; default: <output-dir>/frame_cache"""
    prompt_form: Literal["plain", "bracketed"] = "plain"
    """bracketed: the instruction as ['…'], which the reference's inference writes by accident"""

    # model
    model_path: str = "tiny"
    """tiny, lite, a folder in the published layout, a run folder, or a hub id such as nvidia/GR00T-N1.5-3B"""
    tokenizer: str | None = None
    """folder or hub id of the tokenizer; default: bundled for tiny and lite, lerobot/eagle2hg-processor-groot-n1p5"""
    tune_llm: bool = False
    """train the language model"""
    tune_visual: bool = False
    """train the vision tower and its connector"""
    tune_projector: bool = True
    """train the embodiment layers: state encoder, action encoder, action decoder, position table"""
    tune_diffusion_model: bool = True
    """train the diffusion transformer; off, a 24 GB card has room for large batches"""
    lora_rank: int = 0
    """rank of the low-rank adapters, 8 to 64; 0: none, train the weights themselves"""
    lora_alpha: int = 16
    """adapters are scaled by alpha / rank"""
    lora_dropout: float = 0.1
    """dropout before the adapters"""
    lora_full_model: bool = False
    """adapters in the backbone too"""
    mask_padding: bool = False
    """keep pad tokens out of the action head's attention (the reference lets them in)"""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention kernel of the backbone"""

    # update
    max_steps: int | None = None
    """optimizer steps; default: by model size, 10,000 for the full one"""
    batch_size: int | None = None
    """samples of an optimizer step, over all processes; default: by model size, 32 for the full one"""
    gradient_accumulation_steps: int = 1
    """micro-batches that a batch is cut into; the result is that of the whole batch"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    learning_rate: float | None = None
    """AdamW step size at its peak; default: by model size, 1e-4 for the full one"""
    weight_decay: float = 1e-5
    """AdamW decay of matrices; biases and LayerNorms have none"""
    warmup_ratio: float = 0.05
    """share of the steps that raise the step size from 0; a half cosine lowers it to 0 afterwards"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """mixed precision; auto: bf16 on a GPU, off on a CPU"""
    augment: bool = True
    """random crop and colour jitter"""

    # evaluation
    log_every: int = 10
    """steps between lines of metrics"""
    eval_every: int | None = None
    """steps between measurements of the validation loss, 0: only at the end; default: a fifth of the run"""
    eval_batches: int = 8
    """validation batches, always the same frames and noise"""
    eval_trajs: int | None = None
    """held-out episodes of the open-loop evaluation; default: all"""
    eval_steps: int = 150
    """steps of each, at most"""
    denoising_steps: int = 4
    """Euler steps K of the policy"""
    denoising_sweep: tuple[int, ...] = (1, 2, 4, 8)
    """other numbers of Euler steps to measure at the end"""
    closed_loop: bool | None = None
    """let the policy act in the Fetch simulator; default: with the fetch data config"""
    closed_loop_episodes: int = 100
    """episodes of each task, always the same ones"""
    execute_steps: int = 8
    """actions taken of each predicted chunk of 16 before the next look"""


# What differs by model size where a flag is not given.
RECIPES = {
    "tiny": dict(max_steps=600, batch_size=32, learning_rate=1e-3),
    "lite": dict(max_steps=2000, batch_size=64, learning_rate=1e-3),
    "full": dict(max_steps=10_000, batch_size=32, learning_rate=1e-4),
}

# ---- 2. Data: which keys, and how they are normalised ----------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """What the model sees of a data set, in this order. Keys are those of meta/modality.json.

    state, action: key -> min_max | q99 | mean_std | binary | scale | sin_cos (state only) | None: as recorded.
    rotations: "state.<key>" or "action.<key>" -> rotation_6d, axis_angle, quaternion, matrix or euler_angles_rpy.
    Observations are those of the current row, actions those of the current and the following 15 rows.
    """

    video: tuple[str, ...]
    state: dict[str, str | None]
    action: dict[str, str | None]
    language: str
    rotations: dict[str, str] = field(default_factory=dict)


def modes(mode: str | None, *keys: str) -> dict[str, str | None]:
    return dict.fromkeys(keys, mode)


TASK = "human.action.task_description"
ARMS = ("left_arm", "right_arm", "left_hand", "right_hand")
SO100 = modes("min_max", "single_arm", "gripper")
GENIE = ("left_arm_joint_position", "right_arm_joint_position", "left_effector_position", "right_effector_position",
         "head_position", "waist_position")  # fmt: skip


def bimanual(view: str, hand: str, close: str, state_mode: str, action_mode: str) -> DataConfig:
    """Two Panda arms: end effectors as position and quaternion, the hand's keys differ."""
    state, action = {}, {}
    for side in ("right", "left"):
        state |= {f"{side}_arm_eef_pos": "min_max", f"{side}_arm_eef_quat": None, f"{side}_{hand}": state_mode}
        action |= {f"{side}_arm_eef_pos": None, f"{side}_arm_eef_rot": None, f"{side}_{close}": action_mode}
    quaternions = {f"state.{side}_arm_eef_quat": "rotation_6d" for side in ("right", "left")}
    return DataConfig(("right_wrist_view", "left_wrist_view", view), state, action, TASK, quaternions)


DATA_CONFIGS = {
    "fourier_gr1_arms_only": DataConfig(("ego_view",), modes("sin_cos", *ARMS), modes("min_max", *ARMS), TASK),
    "fourier_gr1_arms_waist": DataConfig(
        ("ego_view",), modes("sin_cos", *ARMS, "waist"), modes("min_max", *ARMS, "waist"), "human.coarse_action"
    ),
    "fourier_gr1_full_upper_body": DataConfig(
        ("front_view",), modes("min_max", *ARMS, "waist", "neck"), modes("min_max", *ARMS, "waist", "neck"), TASK
    ),
    "so100": DataConfig(("webcam",), SO100, SO100, "human.task_description"),
    "so100_dualcam": DataConfig(("front", "wrist"), SO100, SO100, "human.task_description"),
    "unitree_g1": DataConfig(
        ("rs_view",), modes("min_max", *ARMS), modes("min_max", *ARMS), "human.task_description"
    ),
    "unitree_g1_full_body": DataConfig(
        ("rs_view",),
        modes("min_max", "left_leg", "right_leg", "waist", *ARMS),
        modes("min_max", *ARMS),
        "human.task_description",
    ),
    "bimanual_panda_gripper": bimanual("front_view", "gripper_qpos", "gripper_close", "min_max", "binary"),
    "bimanual_panda_hand": bimanual("ego_view", "hand", "hand", "min_max", "min_max"),
    "single_panda_gripper": DataConfig(
        ("left_view", "right_view", "wrist_view"),
        modes("min_max", "end_effector_position_relative", "end_effector_rotation_relative", "gripper_qpos",
              "base_position", "base_rotation"),
        modes("min_max", "end_effector_position", "end_effector_rotation") | {"gripper_close": "binary"}
        | {"base_motion": "min_max", "control_mode": "binary"},
        TASK,
        {"state.end_effector_rotation_relative": "rotation_6d", "state.base_rotation": "rotation_6d"},
    ),
    "oxe_droid": DataConfig(
        ("exterior_image_1", "exterior_image_2", "wrist_image"),
        {"eef_position": "min_max", "eef_rotation": None, "gripper_position": "min_max"},
        {"eef_position_delta": None, "eef_rotation_delta": None, "gripper_position": "binary"},
        "language.language_instruction",
        {"state.eef_rotation": "rotation_6d", "action.eef_rotation_delta": "axis_angle"},
    ),
    "agibot_genie1": DataConfig(
        ("top_head", "hand_left", "hand_right"), modes("min_max", *GENIE), modes("min_max", *GENIE, "robot_velocity"),
        "language.action_text",
    ),
    "fetch": DataConfig(  # assets/fetch_demos
        ("front",),
        modes("min_max", "gripper_position", "gripper_velocity", "fingers", "finger_velocity", "object_relative",
              "object_rotation", "object_velocity", "object_angular_velocity", "goal", "goal_relative"),
        modes("min_max", "displacement", "gripper"),
        "human.task_description",
    ),
}  # fmt: skip


def find_data_config(name: str, modality: dict) -> DataConfig:
    """The table's entry, everything that modality.json names ("auto"), or an object of the reader's own module."""
    if name == "auto":
        if not modality["language"]:
            fail("--data-config auto: the data set has no annotation to take the instruction from")
        return DataConfig(
            tuple(modality["video"]),
            modes("min_max", *modality["state"]),
            modes("min_max", *modality["action"]),
            next(iter(modality["language"])),
        )
    if ":" in name:
        module, attribute = name.split(":", 1)
        sys.path.insert(0, os.getcwd())
        try:
            config = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            fail(f"--data-config {name}: {error}")
        if not isinstance(config, DataConfig):
            fail(f"--data-config {name}: must be a gr00t_finetune.DataConfig, not a {type(config).__name__}")
        return config
    if name not in DATA_CONFIGS:
        fail(f"--data-config {name} is unknown; there are {', '.join(DATA_CONFIGS)}, auto and module:NAME")
    return DATA_CONFIGS[name]


def check_keys(config: DataConfig, modality: dict, where: str, name: str) -> None:
    """Every camera, joint group and annotation of the config exists in the data set."""
    for kind in ("video", "state", "action"):
        if missing := [key for key in getattr(config, kind) if key not in modality[kind] and key != "task_progress"]:
            fail(
                f"--data-config {name} needs {kind} '{missing[0]}', but {where} has "
                f"{', '.join(modality[kind]) or 'none'}; --data-config auto takes what is there"
            )
    if modality["language"] and config.language not in modality["language"]:
        fail(
            f"--data-config {name} takes the instruction from annotation '{config.language}', but {where} has "
            f"{', '.join(modality['language'])}"
        )
    for key in config.rotations:
        kind, key = key.split(".", 1)
        if modality[kind][key]["rotation_type"] is None:
            fail(f"--data-config {name} converts the rotation {kind}.{key}: modality.json must give its rotation_type")
    for kind in ("state", "action"):
        for key, mode in getattr(config, kind).items():
            if key in modality[kind] and not modality[kind][key]["continuous"] and mode not in (None, "binary"):
                fail(f"{kind} '{key}' of {where} is not a float: it can be normalised as binary only, not {mode}")
            if mode not in (None, "min_max", "q99", "mean_std", "binary", "scale", "sin_cos"):
                fail(f"{kind} '{key}': unknown normalisation '{mode}'")
            if kind == "action" and mode in ("scale", "sin_cos"):
                fail(f"action '{key}': {mode} cannot be undone, so it is for states only")


# ---- Data: normalisation ---------------------------------------------------------------------------------------------


def normalize(x: np.ndarray, mode: str | None, stats: dict[str, np.ndarray]) -> np.ndarray:
    """Raw -> model units, (…, width) float64. `stats`: arrays (width,) named as in metadata.json."""
    s = {name: np.asarray(value, dtype=np.float32).astype(x.dtype) for name, value in stats.items()}
    if mode in ("min_max", "q99"):
        low, high = (s["min"], s["max"]) if mode == "min_max" else (s["q01"], s["q99"])
        varies = low != high
        # eq: y = 2 (x - low) / (high - low) - 1
        y = 2 * ((x - low) / np.where(varies, high - low, 1)) - 1
        if mode == "min_max":
            return np.where(varies, y, 0)
        return np.where(varies, y, x).clip(-1, 1)
    if mode == "mean_std":
        # eq: y = (x - mean) / std
        return np.where(s["std"] != 0, (x - s["mean"]) / np.where(s["std"] != 0, s["std"], 1), x)
    if mode == "scale":
        largest = np.maximum(np.abs(s["min"]), np.abs(s["max"]))
        return np.where(largest != 0, x / np.where(largest != 0, largest, 1), 0)
    if mode == "binary":
        return (x > 0.5).astype(x.dtype)
    if mode == "sin_cos":
        return np.concatenate([np.sin(x), np.cos(x)], axis=-1)
    return x


def unnormalize(y: np.ndarray, mode: str | None, stats: dict[str, np.ndarray]) -> np.ndarray:
    """Model units -> raw, the inverse of `normalize` without its clipping."""
    s = {name: np.asarray(value, dtype=np.float32).astype(y.dtype) for name, value in stats.items()}
    if mode in ("min_max", "q99"):
        low, high = (s["min"], s["max"]) if mode == "min_max" else (s["q01"], s["q99"])
        # eq: x = (y + 1) / 2 (high - low) + low
        return (y + 1) / 2 * (high - low) + low
    if mode == "mean_std":
        return y * s["std"] + s["mean"]
    if mode == "binary":
        return (y > 0.5).astype(y.dtype)
    return y


def rotation_of(kind: str, key: str, config: DataConfig, metadata: dict) -> tuple[str, str] | None:
    """(recorded form, model's form) of a key whose rotation is converted."""
    source, target = metadata["modalities"][kind][key]["rotation_type"], config.rotations.get(f"{kind}.{key}")
    return (source, target) if target and source != target else None


def statistics_of(kind: str, key: str, config: DataConfig, metadata: dict) -> dict:
    """Statistics of a key; a converted rotation has fixed bounds instead."""
    rotation = rotation_of(kind, key, config, metadata)
    if rotation is None:
        return metadata["statistics"][kind][key]
    bound, width = bounds(rotation[1])
    return {"min": [-bound] * width, "max": [bound] * width}


def encode(kind: str, raw: dict[str, np.ndarray], config: DataConfig, metadata: dict) -> np.ndarray:
    """Raw arrays (…, width) of each key -> (…, D) float64 in model units, in the config's order, not yet padded."""
    parts = []
    for key, mode in getattr(config, kind).items():
        x = np.asarray(raw[key], dtype=np.float64)
        if rotation := rotation_of(kind, key, config, metadata):
            x = from_matrix(to_matrix(x, rotation[0]), rotation[1])
        parts.append(normalize(x, mode, {} if mode == "sin_cos" else statistics_of(kind, key, config, metadata)))
    return np.concatenate(parts, axis=-1)


def decode_actions(actions: np.ndarray, config: DataConfig, metadata: dict) -> dict[str, np.ndarray]:
    """Model's actions (…, D) -> raw array (…, width) of each key; padded dims are dropped."""
    raw, start = {}, 0
    for key, mode in config.action.items():
        rotation = rotation_of("action", key, config, metadata)
        stats = statistics_of("action", key, config, metadata)
        width = len(stats["min"])  # in the model's form
        x = unnormalize(actions[..., start : start + width], mode, stats)
        raw[key] = from_matrix(to_matrix(x, rotation[1]), rotation[0]) if rotation else x
        start += width
    return raw


def pad(x: np.ndarray, width: int) -> np.ndarray:
    """(…, D) -> (…, width), zeros on the right."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def read_mixture(folders: list[Path], config: DataConfig, args: Args, say=print) -> list[Episodes]:
    """All data sets; their keys must mean the same."""
    sets = [read_episodes(folder, config.language, say) for folder in folders]
    for episodes in sets:
        check_keys(config, episodes.modality, str(episodes.path), args.data_config)
        if not episodes.modality["language"]:
            say(f"{episodes.path.name} has no annotations: every instruction is '{NO_INSTRUCTION}'")
        for kind in ("state", "action"):
            for key in getattr(config, kind):
                if key in sets[0].modality[kind]:
                    first, entry = sets[0].modality[kind][key], episodes.modality[kind][key]
                    if any(first[f] != entry[f] for f in ("absolute", "rotation_type", "continuous")) or (
                        first["end"] - first["start"] != entry["end"] - entry["start"]
                    ):
                        fail(f"{kind}.{key} differs between {sets[0].path} and {episodes.path}")
    return sets


def set_weights(sets: list[Episodes], balanced: bool) -> np.ndarray:
    """Probability of drawing from each data set."""
    sizes = np.array([e.starts[-1] for e in sets], dtype=np.float64)
    return sizes / sizes.sum() if balanced else np.full(len(sets), 1 / len(sets))


def make_metadata(sets: list[Episodes], config: DataConfig, weights: np.ndarray, tag: str) -> dict:
    """The embodiment's entry of experiment_cfg/metadata.json: all keys of modality.json, statistics of the mixture."""
    statistics: dict = {"state": {}, "action": {}}
    modalities: dict = {"video": {}, "state": {}, "action": {}}
    for kind in ("state", "action"):
        for key, entry in sets[0].modality[kind].items():
            parts = []
            for episodes in sets:
                e = episodes.modality[kind].get(key)
                if e is not None:
                    stats = episodes.statistics[e["column"]]
                    parts.append({name: value[e["start"] : e["end"]] for name, value in stats.items()})
            if len(parts) < len(sets):
                continue  # no key of the config: those were checked
            merged = merge_statistics(parts, weights)
            statistics[kind][key] = {
                name: merged[name].tolist() for name in ("max", "min", "mean", "std", "q01", "q99")
            }
            modalities[kind][key] = {
                "absolute": entry["absolute"], "rotation_type": entry["rotation_type"],
                "shape": [entry["end"] - entry["start"]], "continuous": entry["continuous"],
            }  # fmt: skip
    if "task_progress" in config.action:
        statistics["action"]["task_progress"] = {"max": [1.0], "min": [0.0], "mean": [0.5], "std": [0.3], "q01": [0.0],
                                                 "q99": [1.0]}  # fmt: skip
        modalities["action"]["task_progress"] = {
            "absolute": True, "rotation_type": None, "shape": [1], "continuous": True
        }  # fmt: skip
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


# ---- Data: images and prompts ----------------------------------------------------------------------------------------

CROP, BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.95, 0.3, 0.4, 0.5, 0.08
NO_INSTRUCTION = "Perform the default behavior."


def gray(x: torch.Tensor) -> torch.Tensor:
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def shift_hue(x: torch.Tensor, turn: float) -> torch.Tensor:
    """Rotates the hue of (V, 3, H, W) in [0, 1] by `turn` of a full circle."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = x.unbind(1)
    # eq: h = (g - b) / c | 2 + (b - r) / c | 4 + (r - g) / c by which of r, g, b is the largest, in sixths of a circle
    h = torch.where(high == r, g - b, torch.where(high == g, b - r, r - g)) / chroma.clamp_min(1e-12)
    h += torch.where(high == r, 0.0, torch.where(high == g, 2.0, 4.0))
    h += 6 * turn
    # eq: channel_n = max - c clip(min(k, 4 - k), 0, 1),  k = (n + h) mod 6,  n = 5, 3, 1
    channels = []
    for n in (5, 3, 1):
        k = (h + n).remainder_(6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def jitter(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of (V, 3, H, W) in [0, 1], in random order, one draw for all views."""
    factors = [rng.uniform(1 - s, 1 + s) for s in (BRIGHTNESS, CONTRAST, SATURATION)] + [rng.uniform(-HUE, HUE)]
    for n in rng.permutation(4):
        f = factors[n]
        if n == 0:
            x = (f * x).clamp_(0, 1)
        elif n == 1:
            x = torch.lerp(gray(x).mean((1, 2, 3), keepdim=True), x, f).clamp_(0, 1)
        elif n == 2:
            x = torch.lerp(gray(x), x, f).clamp_(0, 1)
        else:
            x = shift_hue(x, f)
    return x


def transform_images(frames: np.ndarray, size: int, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Frames of one sample (V, H, W, 3) uint8 -> (V, 3, size, size) uint8: crop, resize, with `rng` also jitter.

    With `rng` the crop is random, without it is the centre; one crop for all views.
    """
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    height, width = int(CROP * x.shape[2]), int(CROP * x.shape[3])
    if rng is None:
        top, left = round((x.shape[2] - height) / 2), round((x.shape[3] - width) / 2)
    else:
        top, left = rng.integers(x.shape[2] - height + 1), rng.integers(x.shape[3] - width + 1)
    x = x[:, :, top : top + height, left : left + width].float() / 255
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
    if rng is not None:
        x = jitter(x, rng)
    return (x * 255).to(torch.uint8)  # truncated


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], on the images' device."""
    # eq: p = (x - 127.5) / 127.5
    return (images.float() - 127.5) / 127.5


def prompt(instruction: str, views: int, image_tokens: int, form: str = "plain") -> str:
    """The chat text: all cameras, `image_tokens` placeholders each, then the instruction."""
    images = "".join(f"<image {i + 1}><img>{'<IMG_CONTEXT>' * image_tokens}</img>" for i in range(views))
    instruction = str([instruction]) if form == "bracketed" else instruction
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")
EAGLE_TOKENS = (*IMAGE_TOKENS, "<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>", "<interval>", "</interval>")


def load_tokenizer(source: str, image_token_id: int | None):
    """A Qwen tokenizer with the image tokens; `image_token_id` is what the model takes for a place of an image."""
    from transformers import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source)
    except Exception as error:  # offline, no such repository, no vocabulary in the folder
        reason = str(error).splitlines()[0]
        fail(
            f"no tokenizer in '{source}' ({reason}); the weights come without one: give --tokenizer a folder or hub id "
            "with the vocab.json and merges.txt of Qwen3 (lerobot/eagle2hg-processor-groot-n1p5, Qwen/Qwen3-1.7B)"
        )
    # a plain Qwen3 tokenizer lacks these: appended in this order they get the ids the model was trained with
    tokenizer.add_special_tokens({"additional_special_tokens": list(EAGLE_TOKENS)})
    found = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    if image_token_id is not None and found != image_token_id:
        fail(f"tokenizer '{source}' gives <IMG_CONTEXT> the id {found}, the model expects {image_token_id}")
    return tokenizer


# ---- Data: samples ---------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Which samples a batch is made of."""

    rows: np.ndarray  # (B,)
    draws: np.ndarray  # (B,) how many samples were drawn before each: seeds its augmentation, noise and time
    length: int  # S: prompts are padded to this
    stream: int = 0  # 0: training, 1: validation
    augment: bool = False


class Demonstrations(Dataset):
    """All rows of all data sets, normalised and in memory, and the open frame caches.

    `data[plan]` is a batch: images (B * V, 3, size, size) uint8 (the model takes their `pixel_values`), eagle_input_ids
    and eagle_attention_mask (B, S), state (B, 1, 64), action and action_mask (B, 16, 32), embodiment_id (1,), and the
    noise (B, 16, 32) and time t (B,) that belong to these draws.
    """

    def __init__(self, sets: list[Episodes], config: DataConfig, metadata: dict, embodiment: int, seed: int):
        self.config, self.metadata, self.embodiment, self.seed = config, metadata, embodiment, seed
        self.image_size, self.videos, self.beta = 0, [], (1.5, 1.0, 0.999)
        self.prompts: list[np.ndarray] = []  # token ids of each instruction
        self.pad_id = 0
        self.instructions: list[str] = []
        self.episodes: list[dict] = []
        state, action, raw_action, end, text, part = [], [], [], [], [], []
        offset = 0
        for n, episodes in enumerate(sets):
            raw = {kind: raw_columns(episodes, kind, config) for kind in ("state", "action")}
            state.append(encode("state", raw["state"], config, metadata))
            action.append(encode("action", raw["action"], config, metadata))
            raw_action.append(np.concatenate(list(raw["action"].values()), axis=-1))
            end.append(np.repeat(episodes.starts[1:], np.diff(episodes.starts)) + offset)
            text.append(self.number_instructions(episodes))
            part.append(np.full(len(text[-1]), n))
            self.episodes += [
                dict(set=n, position=e, episode=episodes.ids[e], start=int(start) + offset, end=int(stop) + offset)
                for e, (start, stop) in enumerate(zip(episodes.starts, episodes.starts[1:]))
            ]
            offset += int(episodes.starts[-1])
        self.state, self.action = np.concatenate(state), np.concatenate(action)  # (N, state dims), (N, action dims)
        self.raw_action = np.concatenate(raw_action)  # (N, recorded action dims)
        self.dims = self.action.shape[1]  # real dims among the 32
        if self.dims > ACTION_DIM:
            fail(f"the data config has {self.dims} action dims, the model takes {ACTION_DIM}")
        self.state = pad(self.state[:, :STATE_DIM], STATE_DIM).astype(np.float32)
        self.action = pad(self.action, ACTION_DIM).astype(np.float32)
        self.end, self.text, self.part = np.concatenate(end), np.concatenate(text), np.concatenate(part)
        # what a relative action (absolute: false) is past the episode's end: the code of 0
        zeros = {key: np.zeros(metadata["modalities"]["action"][key]["shape"]) for key in config.action}
        relative = [
            np.full(len(statistics_of("action", key, config, metadata)["min"]),
                    not metadata["modalities"]["action"][key]["absolute"])
            for key in config.action
        ]  # fmt: skip
        self.relative = pad(np.concatenate(relative), ACTION_DIM).astype(bool)
        with np.errstate(invalid="ignore"):
            self.still = pad(encode("action", zeros, config, metadata), ACTION_DIM).astype(np.float32)

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
        numbering = {number: self.instructions.index(texts[number]) for number in np.unique(numbers)}
        return np.array([numbering[number] for number in numbers])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"videos": [[(path, places, None) for path, places, _ in v] for v in self.videos]}

    def frames(self, row: int) -> np.ndarray:
        """(V, height, width, 3) uint8 as cached."""
        views = self.videos[self.part[row]]
        for v, (path, places, opened) in enumerate(views):
            if opened is None:  # each process maps the file once
                views[v] = (path, places, np.load(path, mmap_mode="r"))
        return np.stack([opened[places[row]] for _, places, opened in views])

    def rng(self, stream: int, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, draw])

    def actions(self, rows: np.ndarray) -> np.ndarray:
        """(B, 16, 32): the actions of each row and the 15 that follow it."""
        steps = rows[:, None] + np.arange(HORIZON)  # (B, H)
        last = self.end[rows][:, None] - 1
        # eq: past the episode's end a^i is its last row; a relative action is zero there
        actions = self.action[np.minimum(steps, last)]
        return np.where((steps > last)[..., None] & self.relative, self.still, actions)

    def __getitem__(self, plan: Plan) -> dict[str, torch.Tensor]:
        rows, B = plan.rows, len(plan.rows)
        rngs = [self.rng(plan.stream, int(draw)) for draw in plan.draws]
        alpha, beta, s_max = self.beta
        # eq: s ~ Beta(alpha, beta), t = (0.999 - s) / 0.999: small t, that is much noise, is drawn more often
        t = np.array([(s_max - rng.beta(alpha, beta)) / s_max for rng in rngs], dtype=np.float32)
        noise = np.stack([rng.standard_normal((HORIZON, ACTION_DIM), dtype=np.float32) for rng in rngs])
        batch = self.observation(
            [(self.frames(r), rng if plan.augment else None) for r, rng in zip(rows, rngs)] if self.videos else [],
            self.state[rows],
            self.text[rows],
            plan.length,
        )
        batch["action"] = torch.from_numpy(self.actions(rows))
        batch["action_mask"] = (torch.arange(ACTION_DIM) < self.dims).expand(B, HORIZON, ACTION_DIM)
        return batch | {"noise": torch.from_numpy(noise), "t": torch.from_numpy(t)}

    def observation(
        self, frames: list, state: np.ndarray, texts: np.ndarray, length: int = 0
    ) -> dict[str, torch.Tensor]:
        """What the policy sees. frames: B of (frames (V, h, w, 3), rng or None); state (B, 64); texts (B,) numbers."""
        prompts = [self.prompts[text] for text in texts]
        length = max(length, max(map(len, prompts)))
        ids = np.full((len(texts), length), self.pad_id)
        for row, tokens in zip(ids, prompts):
            row[length - len(tokens) :] = tokens  # padded on the left
        mask = np.arange(length) >= length - np.array([len(tokens) for tokens in prompts])[:, None]
        batch = {
            "eagle_input_ids": torch.from_numpy(ids),
            "eagle_attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "state": torch.from_numpy(np.ascontiguousarray(state))[:, None].float(),
            "embodiment_id": torch.tensor([self.embodiment]),
        }
        if frames:
            batch["images"] = torch.cat([transform_images(f, self.image_size, rng) for f, rng in frames])
        return batch


def validation_episodes(count: int, held_out: int | None) -> list[int]:
    """Positions of the episodes to hold out, evenly spaced, so that every stretch of the recording is represented."""
    held_out = max(count // 10, 1) if held_out is None else held_out
    held_out = 0 if count == 1 else held_out
    if held_out >= count:
        fail(f"--val-episodes {held_out} leaves nothing to train on: the data set has {count} episodes")
    return sorted({int((i + 0.5) * count / held_out) for i in range(held_out)})


class Order:
    """Which row each draw of the run takes: a function of the seed and the draw's number, so a run can go on anywhere.

    One data set: permutation after permutation. Several: data set by weight, episode, frame (uniform in proportion).
    """

    def __init__(self, data: Demonstrations, rows: np.ndarray, weights: np.ndarray, args: Args):
        self.seed, self.weights, self.by_frame = args.seed, weights, args.balance_trajectory_weights
        self.pools = [rows[data.part[rows] == n] for n in range(len(weights))]
        self.by_episode = [
            [pool[a:b] for a, b in zip(cuts, [*cuts[1:], len(pool)])]
            for pool in self.pools
            for cuts in [np.flatnonzero(np.r_[True, np.diff(data.end[pool]) != 0]).tolist() if len(pool) else []]
        ]
        self.permutation: tuple[int, np.ndarray] = (-1, rows)

    def row(self, draw: int) -> int:
        if len(self.pools) == 1:
            epoch, i = divmod(draw, len(self.pools[0]))
            if self.permutation[0] != epoch:
                self.permutation = (epoch, np.random.default_rng(self.seed + epoch).permutation(self.pools[0]))
            return int(self.permutation[1][i])
        rng = np.random.default_rng(list(hashlib.sha256(f"{self.seed}/{draw}".encode()).digest()))
        n = rng.choice(len(self.weights), p=self.weights)
        pool = self.pools[n] if self.by_frame else self.by_episode[n][rng.integers(len(self.by_episode[n]))]
        return int(pool[rng.integers(len(pool))])


def plans(order: Order, data: Demonstrations, args: Args, world: World, first_step: int):
    """The micro-batches of this process, step by step. The batch of a step does not depend on how it is cut."""
    for step in range(first_step, args.max_steps + 1):
        draws = np.arange((step - 1) * args.batch_size, step * args.batch_size)
        rows = np.array([order.row(int(draw)) for draw in draws])
        length = max(len(data.prompts[text]) for text in data.text[rows])
        parts = np.array_split(np.arange(args.batch_size), world.size * args.gradient_accumulation_steps)
        for m in range(args.gradient_accumulation_steps):
            part = parts[world.rank * args.gradient_accumulation_steps + m]
            yield Plan(rows[part], draws[part], length, augment=args.augment)


def attach_frames(data: Demonstrations, sets: list[Episodes], use: list[list[int]], args: Args, size: int) -> None:
    """Caches and opens the frames of the episodes in use; every camera of a data set has the same resolution."""
    cache_dir = Path(args.cache_dir or Path(args.output_dir) / "frame_cache")
    data.image_size, data.videos, offset = size, [], 0
    for episodes, positions in zip(sets, use):
        places = np.full(len(data.end), -1)
        rows = [np.arange(episodes.starts[e], episodes.starts[e + 1]) + offset for e in positions]
        places[np.concatenate(rows)] = np.arange(sum(map(len, rows)))
        paths = [cache_frames(episodes, video, positions, cache_dir, args.cache_side) for video in data.config.video]
        shapes = {np.load(path, mmap_mode="r").shape[1:3] for path in paths}
        if len(shapes) > 1:
            fail(
                f"the cameras of {episodes.path} differ in resolution: {sorted(shapes)}; the model wants one crop for all"
            )
        data.videos.append([(path, places, None) for path in paths])
        offset += int(episodes.starts[-1])


def attach_prompts(data: Demonstrations, tokenizer, image_tokens: int, form: str) -> None:
    views = len(data.config.video)
    texts = [prompt(text, views, image_tokens, form) for text in data.instructions]
    data.prompts = [np.array(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    data.pad_id = tokenizer.pad_token_id
