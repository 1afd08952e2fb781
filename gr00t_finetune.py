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
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset

from common import plot
from common.checkpoint import atomic_folder, find_checkpoint, gathered, link, load_state, prune, save_state
from common.log import Logger
from common.robot.data_configs import DataConfig, check_keys, find_data_config
from common.robot.fetch import FetchVec
from common.robot.gr00t_n15 import EMBODIMENTS, GR00T, EagleBackbone, GR00TConfig, group_of
from common.robot.lerobot import Episodes, cache_frames, find_folder, read_episodes, read_info, read_modality
from common.robot.transforms import bounds, from_matrix, to_matrix
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
    """cameras, joints, normalisation: one of common/robot/data_configs.py, auto (all of modality.json), or module:NAME;
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
    """frames larger than this are cached at SIDE x SIDE (30 times less disk for 1080p); 0: always cache as recorded"""
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
    """train the language model (lite: its table of instruction tokens); of a fresh tiny or lite model always"""
    tune_visual: bool = False
    """train the vision tower and its connector; of a fresh tiny model always"""
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
    lora_targets: Literal["qkv", "qkvo"] = "qkv"
    """projections of each attention that get adapters"""
    mask_padding: bool = False
    """keep pad tokens out of the action head's attention (the reference lets them in)"""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention kernel of the backbone"""

    # update
    max_steps: int | None = None
    """optimizer steps; default: by model size, 10,000 for the full one"""
    batch_size: int | None = None
    """samples of an optimizer step, over all processes; default: by model size, 32 for the full one"""
    noises_per_sample: int | None = None
    """noises and times of the flow drawn for each sample, 1 to 8: the backbone runs once for all; default: by model size,
    1 for the full one as in the reference"""
    gradient_accumulation_steps: int = 1
    """micro-batches that a batch is cut into; the result is that of the whole batch"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    learning_rate: float | None = None
    """AdamW step size at its peak; default: by model size, 1e-4 for the full one"""
    adam_betas: tuple[float, float] | None = None
    """AdamW's memory of gradients and of their squares; default: by model size, 0.95 0.999 for the full one"""
    weight_decay: float = 1e-5
    """AdamW decay of matrices; biases and LayerNorms have none"""
    warmup_ratio: float = 0.05
    """share of the steps that raise the step size from 0; a half cosine lowers it to 0 afterwards"""
    max_grad_norm: float | None = None
    """gradient clipping; default: by model size, 1 for the full one"""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """mixed precision; auto: bf16 on a GPU, off on a CPU"""
    augment: bool = True
    """random crop and colour jitter"""

    # speed: neither changes what is computed, but for rounding and dropout's random stream; neither has run on a GPU yet
    compile: bool = False
    """torch.compile the action head, for training and sampling; the first steps take minutes at full size"""
    fsdp: bool = False
    """several processes share one copy of weights, gradients and AdamW moments (FSDP) instead of a copy each"""

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
    eval_figures: int = 3
    """episodes drawn, prediction against recording"""
    denoising_steps: int = 4
    """Euler steps K of the policy"""
    denoising_sweep: tuple[int, ...] = (1, 2, 4, 8)
    """other numbers of Euler steps to measure at the end"""
    closed_loop: bool = True
    """let the policy act in the Fetch simulator, where the data is of it"""
    closed_loop_episodes: int = 100
    """episodes of each task, always the same ones"""
    execute_steps: int = 8
    """actions taken of each predicted chunk of 16 before the next look"""


# What differs by model size where a flag is not given.
SHORT = dict(adam_betas=(0.9, 0.95), max_grad_norm=10.0)  # minutes of training: large steps, short memory
RECIPES = {
    "tiny": SHORT | dict(max_steps=1800, batch_size=16, noises_per_sample=4, learning_rate=5e-3),
    "lite": SHORT | dict(max_steps=2000, batch_size=64, noises_per_sample=1, learning_rate=6e-3),
    "full": dict(max_steps=10_000, batch_size=32, noises_per_sample=1, learning_rate=1e-4, adam_betas=(0.95, 0.999),
                 max_grad_norm=1.0),
}  # fmt: skip

# ---- 2. Data: normalisation -------------------------------------------------------------------------------------------


def normalize(x: np.ndarray, mode: str | None, stats: dict[str, np.ndarray]) -> np.ndarray:
    """Raw -> model units, (…, width) float64. `stats`: arrays (width,) named as in metadata.json."""
    s = {name: np.asarray(value, dtype=np.float64).astype(x.dtype) for name, value in stats.items()}
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
    s = {name: np.asarray(value, dtype=np.float64).astype(y.dtype) for name, value in stats.items()}
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
        if len(tokenizer) < 256:  # nothing found makes an empty one
            raise ValueError("it has no vocabulary, or the hub cannot be reached")
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
    noises: int = 1  # R: noises and times of each sample


class Demonstrations(Dataset):
    """All rows of all data sets, normalised and in memory, and the open frame caches.

    `data[plan]` is a batch: images (B * V, 3, size, size) uint8 (the model takes their `pixel_values`), eagle_input_ids
    and eagle_attention_mask (B, S), state (B, 1, 64), action and action_mask (B, 16, 32), embodiment_id (1,), and the
    noises (B * R, 16, 32) and times t (B * R,) that belong to these draws, R = `plan.noises` in a row for each.
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
        t = np.concatenate([(s_max - rng.beta(alpha, beta, plan.noises)) / s_max for rng in rngs]).astype(np.float32)
        shape = (plan.noises, HORIZON, ACTION_DIM)
        noise = np.concatenate([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
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
    held_out = min(max(count // 10, 1), count - 1) if held_out is None else held_out
    if held_out >= count:
        fail(f"--val-episodes {held_out} leaves nothing to train on: the data set has {count} episodes")
    return sorted({int((i + 0.5) * count / held_out) for i in range(held_out)})


def rows_of(episodes: list[dict]) -> np.ndarray:
    return np.concatenate([np.arange(e["start"], e["end"]) for e in episodes] or [np.zeros(0, int)])


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
            yield Plan(rows[part], draws[part], length, augment=args.augment, noises=args.noises_per_sample)


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
    # a model without cameras (lite) reads the bare instruction
    texts = [prompt(text, views, image_tokens, form) if views else text for text in data.instructions]
    data.prompts = [np.array(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    data.pad_id = tokenizer.pad_token_id


# ---- 3. Model --------------------------------------------------------------------------------------------------------


def resolve_model_path(path: str) -> str:
    """A run folder stands for its best checkpoint, or its last."""
    folder = Path(path)
    for name in ("best", "last"):
        if (folder / "checkpoints").is_dir() and (folder / name).exists():
            return str((folder / name).resolve())
    return path


def load_model(args: Args, device: torch.device) -> GR00T:
    """Fresh (tiny, lite) or from files. What is frozen is stored in bf16 where autocast computes in bf16 anyway."""
    if args.model_path in FRESH:
        torch.manual_seed(args.seed)
        model = GR00T(FRESH[args.model_path](mask_padding=args.mask_padding), args.attn_implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # 0.02 suits rows of 2,500 numbers; at toy width it would all but silence state and positions
                if name.endswith(".W"):
                    parameter.mul_(1 / (0.02 * math.sqrt(parameter.shape[1])))
                elif name.endswith(("position_embedding.weight", "future_tokens.weight")):
                    parameter.mul_(0.5 / 0.02)
        return model.to(device)
    folder = resolve_model_path(args.model_path)
    tuned = args.tune_llm or args.tune_visual
    return GR00T.from_pretrained(
        folder,
        device=device,
        backbone_dtype=torch.bfloat16 if args.amp == "bf16" and not tuned else torch.float32,
        mask_padding=args.mask_padding or None,
        attn_implementation=args.attn_implementation,
    )


FRESH = {"tiny": partial(GR00TConfig.tiny, patch_size=16), "lite": GR00TConfig.lite}  # 16 tokens a picture


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained matrix of low rank."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, nn.Dropout(dropout)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))  # starts as the layer it adapts
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # eq: y = W x + b + (alpha / r) B A x   [LoRA, arXiv 2106.09685]
        low = F.linear(self.dropout(x).to(self.A.dtype), self.A)
        return self.linear(x) + self.scale * F.linear(low, self.B)

    def merged_weight(self) -> torch.Tensor:
        # eq: W' = W + (alpha / r) B A
        return (self.linear.weight.float() + self.scale * (self.B @ self.A)).to(self.linear.weight.dtype)


def add_lora(model: GR00T, args: Args) -> dict[str, LoRALinear]:
    """Puts adapters on the attention projections; trained are they and, as ever, the embodiment layers.

    The reference freezes the embodiment layers too, which leaves a new robot with layers that were never trained.
    """
    ends = ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
    ends += ("out_proj", "o_proj", "to_out.0") if args.lora_targets == "qkvo" else ()
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(ends)
        and (args.lora_full_model or name.startswith("action_head."))
    ]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.tune_projector and group_of(name) == "tune_projector")
    adapters = {}
    for name in chosen:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        adapters[name] = LoRALinear(linear, args.lora_rank, args.lora_alpha, args.lora_dropout).train(linear.training)
        setattr(model.get_submodule(parent), child, adapters[name])
    return adapters


@contextmanager
def merged(model: GR00T, adapters: dict[str, LoRALinear]):
    """Inside, the model is the plain one with the adapters added to its weights; outside, it is what it was."""
    kept = {}
    for name, adapter in adapters.items():
        parent, _, child = name.rpartition(".")
        kept[name] = adapter.linear.weight.data
        adapter.linear.weight.data = adapter.merged_weight().detach()
        setattr(model.get_submodule(parent), child, adapter.linear)
    try:
        yield
    finally:
        for name, adapter in adapters.items():
            parent, _, child = name.rpartition(".")
            adapter.linear.weight.data = kept[name]
            setattr(model.get_submodule(parent), child, adapter)


def compile_head(model: GR00T, mode: str | None = None) -> None:
    """torch.compile the action head. `mode` is what torch.compile does for the velocity, which runs K times a sample.

    "reduce-overhead" replays CUDA graphs; its outputs must be used up before the next call, as `sample_actions` does.
    """
    head = model.action_head
    head.process_backbone = torch.compile(head.process_backbone)  # its output is read in all K calls: never a graph's
    head.velocity = torch.compile(head.velocity, mode=mode)


def shard(model: GR00T, world: World) -> None:
    """FSDP: each process keeps its slice of every weight; a block is gathered while it runs, in the dtype it is stored in.

    From then on a forward or backward pass is one of all processes. Source: torch.distributed.fsdp.fully_shard.
    """
    head, backbone = model.action_head, model.backbone
    units = [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]
    units += [head.state_encoder, head.action_encoder, head.action_decoder]  # with the rows of all 32 embodiments
    if isinstance(backbone, EagleBackbone):
        units += [*backbone.vision.encoder.layers, *backbone.text.layers]
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*units, backbone, model]:  # what is left of the last two is small but for the token embedding
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a process has a part of the batch's loss: gradients add up
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo knows too
    for method in ("vl_features", "velocity"):
        register_fsdp_forward_method(model, method)


def set_training(model: GR00T, adapters: dict[str, LoRALinear]) -> None:
    """Training mode: frozen parts stay in evaluation mode, adapters drop out wherever they are."""
    model.train()
    for adapter in adapters.values():
        adapter.dropout.train()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters, decayed and not: no decay for LayerNorms and for names with "bias" in them.

    The embodiment layers' biases are called `b` and RMSNorms are no LayerNorms, so both decay, as in the reference.
    """
    norms = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for k in ("weight", "bias")}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in norms and "bias" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def sample_time(config: GR00TConfig, count: int, device: torch.device) -> torch.Tensor:
    """(B,) times of the flow: 0 is noise, 1 is data."""
    beta = torch.distributions.Beta(config.noise_beta_alpha, config.noise_beta_beta)
    s = beta.sample((count,)).to(device)
    # eq: t = (0.999 - s) / 0.999,  s ~ Beta(1.5, 1): density falls with t, mean 0.4
    return (config.noise_s - s) / config.noise_s


def velocity_error(
    model: GR00T, batch: dict[str, torch.Tensor], noise: torch.Tensor | None = None, t: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error (B * R, H, D) of the predicted velocity, which entries count, the times t (B * R,) it belongs to."""
    R = 1 if noise is None else len(noise) // len(batch["action"])
    x_1, state, valid = (batch[key].repeat_interleave(R, 0) for key in ("action", "state", "action_mask"))
    x_1 = x_1.float()  # (B R, H, D)
    x_0 = torch.randn_like(x_1) if noise is None else noise
    t = sample_time(model.config, len(x_1), x_1.device) if t is None else t
    tau = t[:, None, None]
    # eq: x_t = (1 - t) x_0 + t x_1   [flow matching, arXiv 2210.02747]
    x_t = (1 - tau) * x_0 + tau * x_1
    # eq: u = dx_t / dt = x_1 - x_0
    v_target = x_1 - x_0
    features, mask = model.vl_features(batch)  # (B, S, W), once for all R noises of a sample: it sees none of them
    v_pred = model.velocity(features, mask, state, x_t, t, batch["embodiment_id"])  # (B R, H, D)
    return (v_pred.float() - v_target) ** 2, valid, t


def masked_mean(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the valid entries of the whole batch; steps past an episode's end are valid, padded dims are not."""
    # eq: L = sum m |v - u|^2 / sum m
    return (error * mask).sum() / mask.sum()


def flow_matching_loss(
    model: GR00T, batch: dict[str, torch.Tensor], noise: torch.Tensor | None = None, t: torch.Tensor | None = None
) -> torch.Tensor:
    """Flow-matching loss of a batch of demonstrations, a scalar in float32.

    Args:
        batch: as `GR00T` takes it, with action and action_mask (B, H, D).
        noise: x_0 (B * R, H, D), R in a row for each sample; drawn from N(0, I) with R = 1 when None.
        t: (B * R,) at most 1; drawn (see `sample_time`) when None.
    """
    error, valid, _ = velocity_error(model, batch, noise, t)
    return masked_mean(error, valid)


@torch.no_grad()
def sample_actions(
    model: GR00T, batch: dict[str, torch.Tensor], noise: torch.Tensor | None = None, num_steps: int = 4
) -> torch.Tensor:
    """Actions (B, H, D) in normalised units, float32: Euler's method from noise (t = 0) to data (t = 1).

    Args:
        batch: observations, as `GR00T` takes them.
        noise: x_0 (B, H, D); drawn from N(0, I) when None.
        num_steps: K, evaluations of the velocity.
    """
    config, state = model.config, batch["state"]
    if noise is None:
        noise = torch.randn(len(state), config.action_horizon, config.action_dim, device=state.device)
    features, mask = model.vl_features(batch)  # once: they do not depend on t
    x = noise.float()
    for k in range(num_steps):
        t = torch.full((len(x),), k / num_steps, dtype=torch.float64, device=x.device)
        # eq: x_{k+1} = x_k + v(x_k, k / K) / K
        x = x + model.velocity(features, mask, state, x, t, batch["embodiment_id"]).float() / num_steps
    return x


def learning_rate(step: int, args: Args) -> float:
    """Step size of optimizer step 1, 2, …: from 0 up in a line, then down to 0 along half a cosine."""
    k, warmup = step - 1, math.ceil(args.warmup_ratio * args.max_steps)
    if k < warmup:
        # eq: lr_k = lr k / W
        return args.learning_rate * k / warmup
    # eq: lr_k = lr (1 + cos(pi (k - W) / (T - W))) / 2
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (k - warmup) / max(args.max_steps - warmup, 1)))


TIME_BINS = 4


class Tally:
    """Sums of squared errors since the last line of metrics: in all, by time of the flow, by action dim."""

    def __init__(self, device: torch.device):
        self.bins = torch.zeros(2, TIME_BINS, device=device)  # sum, count
        self.dims = torch.zeros(2, ACTION_DIM, device=device)

    @torch.no_grad()
    def add(self, error: torch.Tensor, mask: torch.Tensor, t: torch.Tensor) -> None:
        error, mask = error.float() * mask, mask.float()
        bins = (t.float() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        self.bins[0].index_add_(0, bins, error.sum((1, 2)))
        self.bins[1].index_add_(0, bins, mask.sum((1, 2)))
        self.dims += torch.stack([error.sum((0, 1)), mask.sum((0, 1))])

    def metrics(self, prefix: str, names: list[str], world: World | None = None) -> dict[str, float]:
        if world:
            world.all_sum([self.bins, self.dims])
        bins, dims = self.bins.tolist(), self.dims.tolist()
        found = {f"{prefix}/loss": sum(bins[0]) / max(sum(bins[1]), 1)}
        for i in range(TIME_BINS):
            name = f"{prefix}/loss_t/{i / TIME_BINS:.2f}-{(i + 1) / TIME_BINS:.2f}"
            found[name] = bins[0][i] / bins[1][i] if bins[1][i] else math.nan
        for i, name in enumerate(names):
            found[f"{prefix}/loss_dim/{name}"] = dims[0][i] / max(dims[1][i], 1)
        self.bins.zero_()
        self.dims.zero_()
        return found


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "images" in batch:
        batch["eagle_pixel_values"] = pixel_values(batch.pop("images"))
    return batch


def sum_gradients(world: World, parameters: list[nn.Parameter], bucket: int = 25_000_000) -> None:
    """Adds up all processes' gradients, some 100 MB at a time."""
    grads, size = [], 0
    for parameter in parameters:
        if parameter.grad is None:  # a process may not have needed it, another may have
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
        size += parameter.numel()
        if size > bucket:
            world.all_sum(grads)
            grads, size = [], 0
    world.all_sum(grads)


# ---- 5. Evaluate: open loop ------------------------------------------------------------------------------------------


def autocast(args: Args, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


@torch.no_grad()
def validate(model: GR00T, data: Demonstrations, rows: np.ndarray, args: Args, device: torch.device) -> dict:
    """Loss and error of the sampled actions on held-out frames: evenly spaced ones, the same noise and times every time.

    The loss is not what a policy is for: most of it is the last stretch of the flow, which the samples hardly feel.
    """
    model.eval()
    count = min(len(rows), args.eval_batches * args.batch_size)
    chosen = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    tally = Tally(device)
    for start in range(0, count, args.batch_size):
        part = chosen[start : start + args.batch_size]
        batch = to_device(data[Plan(part, np.arange(start, start + len(part)), 0, stream=1)], device)
        with autocast(args, device):
            error, valid, t = velocity_error(model, batch, batch["noise"], batch["t"])
        tally.add(error, valid, t)
    error = predict_chunks(model, data, chosen, args, device, args.denoising_steps) - data.actions(chosen)
    return tally.metrics("val", action_names(data)) | {"val/mse": float(np.mean(error[..., : data.dims] ** 2))}


def action_names(data: Demonstrations) -> list[str]:
    """One name per real dim of the model's actions."""
    names = []
    for key in data.config.action:
        width = len(statistics_of("action", key, data.config, data.metadata)["min"])
        names += [key] if width == 1 else [f"{key}.{i}" for i in range(width)]
    return names


@torch.no_grad()
def predict_chunks(
    model: GR00T, data: Demonstrations, rows: np.ndarray, args: Args, device: torch.device, num_steps: int
) -> np.ndarray:
    """The policy's 16 actions (B, 16, 32) at each row, in model units; noise depends on seed and row alone."""
    model.eval()
    chunks = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        batch = to_device(data[Plan(part, part, 0, stream=2)], device)
        with autocast(args, device):
            chunks.append(sample_actions(model, batch, batch["noise"], num_steps).cpu().numpy())
    return np.concatenate(chunks)


def open_loop(
    model: GR00T, data: Demonstrations, episodes: list[dict], mean_action: np.ndarray, args: Args,
    device: torch.device, num_steps: int,
) -> list[dict]:  # fmt: skip
    """Replays recorded episodes: every 16 rows the policy predicts the 16 actions that follow, from the recording.

    Returns one dict per episode: recorded, predicted, hold, mean (T, D) in raw units (T rows of the episode, at most
    --eval-steps), and normalized (T, 2, D): prediction and recording in model units.
    """
    starts = [
        (e, row) for e in episodes for row in range(e["start"], min(e["end"], e["start"] + args.eval_steps), HORIZON)
    ]
    chunks = predict_chunks(model, data, np.array([row for _, row in starts]), args, device, num_steps)
    truth = data.actions(np.array([row for _, row in starts]))
    raw = np.concatenate(
        list(decode_actions(chunks[..., : data.dims].astype(np.float64), data.config, data.metadata).values()), axis=-1
    )
    results = []
    for episode in episodes:
        mine = [i for i, (e, _) in enumerate(starts) if e is episode]
        length = min(episode["end"] - episode["start"], args.eval_steps)
        recorded = data.raw_action[episode["start"] : episode["start"] + length]
        # the action before each chunk; before the first there is none yet
        held = [data.raw_action[starts[i][1] - 1] if n else mean_action for n, i in enumerate(mine)]
        results.append(
            episode
            | {
                "instruction": data.instructions[data.text[episode["start"]]],
                "recorded": recorded,
                "predicted": np.concatenate(raw[mine])[:length],
                "hold": np.repeat(held, HORIZON, axis=0)[:length],
                "mean": np.broadcast_to(mean_action, recorded.shape),
                "normalized": np.stack(
                    [np.concatenate(x[mine])[:length, : data.dims] for x in (chunks, truth)], axis=1
                ),
            }
        )
    return results


def open_loop_metrics(results: list[dict], prefix: str) -> dict[str, float]:
    """Means over episodes, with a 95 % interval of the error and the errors of the two baselines."""
    mse = np.array([np.mean((r["predicted"] - r["recorded"]) ** 2) for r in results])
    half = 1.96 * mse.std(ddof=1) / math.sqrt(len(mse)) if len(mse) > 1 else math.nan
    metrics = {
        f"{prefix}/mse": mse.mean(),
        f"{prefix}/mse_low": mse.mean() - half,
        f"{prefix}/mse_high": mse.mean() + half,
        f"{prefix}/mse_normalized": np.mean([np.mean(np.diff(r["normalized"], axis=1) ** 2) for r in results]),
        f"{prefix}/mse_hold_last": np.mean([np.mean((r["hold"] - r["recorded"]) ** 2) for r in results]),
        f"{prefix}/mse_mean_action": np.mean([np.mean((r["mean"] - r["recorded"]) ** 2) for r in results]),
        f"{prefix}/max_error": np.mean([np.abs(r["predicted"] - r["recorded"]).max() for r in results]),
        # eq: smoothness = mean |a^_{i+1} - a^_i|^2: how much successive predictions jump
        f"{prefix}/smoothness": np.mean([np.mean(np.diff(r["predicted"], axis=0) ** 2) for r in results]),
        f"{prefix}/num_trajectories": len(results),
    }
    return {name: float(value) for name, value in metrics.items()}


def raw_names(data: Demonstrations) -> list[str]:
    """One name per recorded action dim."""
    names = []
    for key in data.config.action:
        width = data.metadata["modalities"]["action"][key]["shape"][0]
        names += [key] if width == 1 else [f"{key}.{i}" for i in range(width)]
    return names


def open_loop_tables(logger: Logger, step: int, data: Demonstrations, results: list[dict]) -> None:
    error = [(r["predicted"] - r["recorded"]) ** 2 for r in results]
    rows = [
        {
            "episode": r["episode"], "instruction": r["instruction"], "steps": len(r["recorded"]),
            "mse": float(e.mean()), "mse_hold_last": float(np.mean((r["hold"] - r["recorded"]) ** 2)),
            "mse_mean_action": float(np.mean((r["mean"] - r["recorded"]) ** 2)),
            "max_error": float(np.sqrt(e.max())), "smoothness": float(np.mean(np.diff(r["predicted"], axis=0) ** 2)),
        }
        for r, e in zip(results, error)
    ]  # fmt: skip
    logger.table("trajectory_results", step, rows)
    joints = [
        {"joint": name, "mse": float(np.mean([e[:, i].mean() for e in error]))}
        for i, name in enumerate(raw_names(data))
    ]
    logger.table("per_joint_mse", step, joints)


def draw_open_loop(result: dict, names: list[str], path: Path) -> Path:
    """One panel per joint: recording, prediction, and a dot wherever the policy looked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    height = 1.9 * lines + 0.6
    fig, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, height), squeeze=False, sharex=True)
    for i, (ax, name) in enumerate(zip(axes.flat, names)):
        ax.plot(result["recorded"][:, i], color="0.3", linewidth=1.2, label="recorded")
        ax.plot(result["predicted"][:, i], color="C1", linewidth=1.2, label="predicted")
        looks = np.arange(0, len(result["predicted"]), HORIZON)
        ax.plot(looks, result["predicted"][looks, i], "o", color="C3", markersize=3)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    axes.flat[0].legend(fontsize=7)
    mse = np.mean((result["predicted"] - result["recorded"]) ** 2)
    fig.suptitle(f"episode {result['episode']}: {result['instruction']}; MSE {mse:.4g}", fontsize=9, y=1 - 0.1 / height)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.25 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


# ---- 6. Evaluate: closed loop on Fetch -------------------------------------------------------------------------------


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson score)."""
    z, p = 1.96, correct / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)


@torch.no_grad()
def closed_loop(model: GR00T, data: Demonstrations, env_id: str, args: Args, device: torch.device) -> dict[str, float]:
    """The policy plays `--closed-loop-episodes` episodes of 50 steps, seeds 0 and up, which no demonstration has.

    Success is that of the last step; `once` counts episodes that were at the goal after any step.
    """
    from common.robot.fetch_robot import INSTRUCTIONS, STATE, Camera, slices, state_vector

    model.eval()
    n, text = args.closed_loop_episodes, data.instructions.index(INSTRUCTIONS[env_id])
    envs = FetchVec(env_id, n)
    size = data.metadata["modalities"]["video"][data.config.video[0]]["resolution"][0] if data.config.video else 0
    camera = Camera(env_id, size) if size else None
    obs, _ = envs.reset(seed=0)
    once, final = np.zeros(n, bool), np.zeros(n, bool)
    for step in range(envs.max_episode_steps):
        if step % args.execute_steps == 0:
            vector = state_vector(obs).astype(np.float64)  # (N, 28)
            raw = {key: vector[:, at["start"] : at["end"]] for key, at in slices(STATE).items()}
            state = pad(encode("state", raw, data.config, data.metadata), STATE_DIM)
            frames = []
            if camera:
                arrays = envs.get_state()[0]
                frames = [(camera.draw(p, g)[None], None) for p, g in zip(arrays["physics"], arrays["goal"])]
            chunks = []
            for start in range(0, n, args.batch_size):
                part = slice(start, start + args.batch_size)
                batch = to_device(data.observation(frames[part], state[part], np.full(len(state[part]), text)), device)
                rngs = [data.rng(3, step * n + i) for i in range(n)[part]]
                noise = [rng.standard_normal((HORIZON, ACTION_DIM), dtype=np.float32) for rng in rngs]
                with autocast(args, device):
                    noise = torch.from_numpy(np.stack(noise)).to(device)
                    chunks.append(sample_actions(model, batch, noise, args.denoising_steps).cpu().numpy())
            actions = np.concatenate(chunks)[..., : data.dims].astype(np.float64)
            actions = np.concatenate(list(decode_actions(actions, data.config, data.metadata).values()), axis=-1)
        obs, _, _, dones, infos = envs.step(actions[:, step % args.execute_steps].astype(np.float32))
        final = infos["final_info"]["is_success"].astype(bool) if dones.all() else infos["is_success"].astype(bool)
        once |= final
    envs.close()
    if camera:
        camera.close()
    low, high = wilson(final.sum(), n)
    task = env_id.removesuffix("-v4")
    return {
        f"closed_loop/{task}/success_rate": float(final.mean()),
        f"closed_loop/{task}/success_rate_low": float(low),
        f"closed_loop/{task}/success_rate_high": float(high),
        f"closed_loop/{task}/success_once": float(once.mean()),
    }


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


def saved_args(path: str) -> dict:
    """The settings of the run that made a checkpoint; empty for checkpoints of other programs."""
    try:
        return json.loads((Path(resolve_model_path(path)) / "trainer.json").read_text()).get("args", {})
    except (OSError, ValueError):
        return {}


def resolve(args: Args) -> Args:
    """Fills in what depends on the model and, in an evaluation, on the checkpoint."""
    old = saved_args(args.model_path) if args.eval_only else {}
    for name in ("dataset_path", "data_config", "embodiment_tag", "val_episodes", "batch_size"):
        if getattr(args, name) is None and old.get(name) is not None:
            args = replace(args, **{name: tuple(old[name]) if isinstance(old[name], list) else old[name]})
    args = replace(
        args,
        dataset_path=args.dataset_path or (str(ROOT / "assets" / "fetch_demos"),),
        embodiment_tag=args.embodiment_tag or "new_embodiment",
        tune_llm=args.tune_llm or args.model_path in FRESH,  # nothing random stays as it is
        tune_visual=args.tune_visual or args.model_path in FRESH,
        amp="bf16" if args.amp == "auto" and torch.cuda.is_available() and args.device != "cpu" else args.amp,
    )
    args = replace(args, amp="off" if args.amp == "auto" else args.amp)
    recipe = RECIPES[args.model_path if args.model_path in RECIPES else "full"]
    args = replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})
    return replace(args, eval_every=args.max_steps // 5 if args.eval_every is None else args.eval_every)


def check(args: Args, world: World) -> None:
    """What can be wrong with the flags alone."""
    names = ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_batches", "eval_steps", "log_every",
             "denoising_steps", "closed_loop_episodes", "noises_per_sample")  # fmt: skip
    for name in (*names, "prefetch_factor", "lora_alpha"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lora_rank", "num_workers", "save_steps", "eval_every", "weight_decay", "cache_side", "eval_figures"):
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if min(args.denoising_sweep, default=1) < 1:
        fail("--denoising-sweep: numbers of Euler steps are at least 1")
    if not 1 <= args.execute_steps <= HORIZON:
        fail(f"--execute-steps {args.execute_steps}: a predicted chunk has {HORIZON} actions; give 1 to {HORIZON}")
    parts = world.size * args.gradient_accumulation_steps
    if args.batch_size % parts:
        fail(
            f"--batch-size {args.batch_size} does not divide into {world.size} process(es) x "
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps}; "
            f"try --batch-size {max(args.batch_size // parts, 1) * parts}"
        )
    if args.learning_rate <= 0 or not 0 <= args.warmup_ratio < 1 or not 0 <= args.lora_dropout < 1:
        fail("--learning-rate must be positive, --warmup-ratio and --lora-dropout lie in [0, 1)")
    if args.max_samples is not None and args.max_samples < 1:
        fail(f"--max-samples {args.max_samples}: must be at least 1")
    if args.val_episodes is not None and args.val_episodes < 0:
        fail(f"--val-episodes {args.val_episodes}: must not be negative")
    if args.lora_rank and args.model_path in FRESH:
        fail(f"--lora-rank adapts a trained model; {args.model_path} is a fresh one: give --model-path a checkpoint")
    if args.lora_rank and (args.tune_llm or args.tune_visual or not args.tune_diffusion_model):
        fail("--lora-rank trains adapters and embodiment layers only: drop --tune-llm, --tune-visual and "
             "--no-tune-diffusion-model; --lora-full-model puts adapters into the backbone too")  # fmt: skip
    if not 0 <= min(args.adam_betas) <= max(args.adam_betas) < 1:
        fail(f"--adam-betas {args.adam_betas[0]:g} {args.adam_betas[1]:g}: both lie in [0, 1)")
    if args.fsdp and (args.lora_rank or args.compile):
        fail("--fsdp goes with neither --lora-rank, whose adapters are small, nor --compile: drop one of them")
    if args.fsdp and world.size == 1:
        fail("--fsdp shares the weights among processes: start several with uv run torchrun --nproc-per-node N")
    if args.eval_only and args.model_path in FRESH:
        fail("--eval-only measures a trained model: give --model-path a run folder or a checkpoint")


def read_metadata(path: str) -> dict:
    """experiment_cfg/metadata.json of a checkpoint: statistics by embodiment tag; empty where there is none."""
    if path in FRESH:
        return {}
    folder = Path(resolve_model_path(path))
    if not folder.is_dir():
        from common.robot.gr00t_n15 import resolve as resolve_repository

        folder = resolve_repository(path)
    file = folder / "experiment_cfg" / "metadata.json"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        fail(f"{file} is not JSON: {error}")


def statistics_for(metadata: dict, config: DataConfig, tag: str, where: str) -> dict:
    """The embodiment's entry of a checkpoint's metadata. A policy without it would act in the wrong units."""
    if tag not in metadata:
        have = ", ".join(metadata) or "none"
        fail(
            f"checkpoint '{where}' has no statistics for --embodiment-tag {tag} (it has: {have}); evaluate with a tag it "
            "has, or fine-tune it on your data first"
        )
    entry = metadata[tag]
    for kind in ("state", "action"):
        for key in getattr(config, kind):
            wanted = {"min", "max", "mean", "std", "q01", "q99"}
            if not wanted <= set(entry.get("statistics", {}).get(kind, {}).get(key, {})):
                fail(f"checkpoint '{where}' has no statistics of {kind}.{key} for {tag}; was another data config used?")
            if key not in entry.get("modalities", {}).get(kind, {}):
                fail(f"checkpoint '{where}' does not describe {kind}.{key} for {tag} in its metadata.json")
    return entry


def prepare_data(args: Args, stored: dict, say) -> tuple[Args, list[Episodes], Demonstrations, dict]:
    """Reads and checks everything but frames. Returns args with the data config named, and the metadata to save."""
    folders = [find_folder(path) for path in args.dataset_path]
    info = read_info(folders[0])
    default = "fetch" if info.get("robot_type") == "fetch" else "fourier_gr1_arms_only"
    args = replace(args, data_config=args.data_config or default)
    config = find_data_config(args.data_config, read_modality(folders[0], info, lambda text: None))
    if args.model_path == "lite" or stored.get("no_images"):
        config = replace(config, video=())
    sets = read_mixture(folders, config, args, say)
    tag = args.embodiment_tag
    if args.eval_only:
        metadata = statistics_for(stored["metadata"], config, tag, args.model_path)
    else:
        metadata = make_metadata(sets, config, set_weights(sets, args.balance_dataset_weights), tag)
    data = Demonstrations(sets, config, metadata, EMBODIMENTS[tag], args.seed)
    return args, sets, data, stored["metadata"] | {tag: metadata}


def has_no_images(path: str) -> bool:
    """Whether a checkpoint is of the lite model."""
    try:
        config = json.loads((Path(resolve_model_path(path)) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("backbone_cfg", {}).get("instruction_vocab"))


def main(args: Args) -> None:
    stop = StopSignal()
    world = setup_world(args.device)
    checkpoint = None
    if args.resume:
        free = {"resume", "device", "track", "wandb_mode", "num_workers", "prefetch_factor", "cache_dir"}
        if given := [k for k, v in asdict(args).items() if k not in free and v != asdict(Args())[k]]:
            fail(f"--resume continues with the run's own settings; drop --{given[0].replace('_', '-')}")
        checkpoint = find_checkpoint(args.resume)
        run_dir = checkpoint.parent.parent
        args = replace(read_config(run_dir, Args), **{k: getattr(args, k) for k in free})
    args = resolve(args)
    check(args, world)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    seed_everything(args.seed)
    # everything about the data that can be wrong is found before a model is loaded or a folder is made
    stored = {"metadata": read_metadata(args.model_path), "no_images": has_no_images(args.model_path)}
    notes: list[str] = []
    args, sets, data, metadata = prepare_data(args, stored, notes.append)
    if not checkpoint:
        made = [str(create_run(__file__, args.exp_name, args.seed, args.output_dir))] if world.main else []
        run_dir = Path(world.gather(made)[0])
        if world.main:
            write_config(run_dir, args, world)
    logger = Logger(
        run_dir, asdict(args), track=args.track, wandb_mode=args.wandb_mode, tags=args.tags, enabled=world.main
    )
    for note in notes:
        logger.say(note)
    exit_code = 1  # unless the end is reached
    try:
        exit_code = run(args, world, stop, logger, run_dir, checkpoint, sets, data, metadata)
    finally:
        logger.finish(exit_code)
        close_world(world)
    sys.exit(exit_code)


def run(
    args: Args, world: World, stop, logger, run_dir: Path, checkpoint: Path | None, sets: list[Episodes],
    data: Demonstrations, metadata: dict,
) -> int:  # fmt: skip
    # ---- setup: who trains on what ----
    device = world.device
    held_out = [validation_episodes(len(episodes.ids), args.val_episodes) for episodes in sets]
    val_episodes = [e for e in data.episodes if e["position"] in held_out[e["set"]]]
    train_episodes = [e for e in data.episodes if e["position"] not in held_out[e["set"]]]
    train_rows, val_rows = rows_of(train_episodes), rows_of(val_episodes)
    if args.max_samples and args.max_samples < len(train_rows):
        train_rows = np.sort(np.random.default_rng(args.seed).choice(train_rows, args.max_samples, replace=False))
    mean_action = data.raw_action[train_rows].mean(0)
    if args.eval_only and not val_episodes:
        fail("--eval-only needs held-out episodes; --val-episodes is 0 or the data set has one episode")

    # ---- setup: model, tokenizer, frames ----
    source = str(checkpoint) if checkpoint else args.model_path
    model = load_model(replace(args, model_path=source), device)
    if checkpoint and args.model_path in FRESH:
        model.carried = {}  # made anew by every save of such a model, as if it had never been loaded
    config = model.config
    if (config.action_horizon, config.state_dim, config.action_dim) != (HORIZON, STATE_DIM, ACTION_DIM):
        fail(
            f"'{source}' has a horizon of {config.action_horizon}, {config.state_dim} state and {config.action_dim} action "
            f"dims; this script trains {HORIZON}, {STATE_DIM}, {ACTION_DIM}"
        )
    model.set_trainable(args.tune_llm, args.tune_visual, args.tune_projector, args.tune_diffusion_model)
    torch.manual_seed(args.seed)
    adapters = add_lora(model, args) if args.lora_rank else {}
    if args.gradient_checkpointing:
        model.gradient_checkpointing(True)
    if args.compile:
        compile_head(model)
    if args.fsdp:
        shard(model, world)
    takes_part = world.main or args.fsdp  # sharded weights compute in all processes at once
    toy = config.instruction_vocab or config.image_token_index == FRESH["tiny"]().image_token_index
    tokenizer = load_tokenizer(
        args.tokenizer or (str(ROOT / "assets" / "tiny-qwen2") if toy else "lerobot/eagle2hg-processor-groot-n1p5"),
        None if config.instruction_vocab else config.image_token_index,
    )
    attach_prompts(data, tokenizer, config.tokens_per_image, args.prompt_form)
    data.beta = (config.noise_beta_alpha, config.noise_beta_beta, config.noise_s)
    start = time.time()
    if data.config.video:
        used = [*val_episodes] if args.eval_only else [*train_episodes, *val_episodes]
        use = [sorted(e["position"] for e in used if e["set"] == n) for n in range(len(sets))]
        if world.main:  # the others find it finished
            attach_frames(data, sets, use, args, config.image_size)
        world.gather([])
        attach_frames(data, sets, use, args, config.image_size)
    cache_s = time.time() - start
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in parameters)
    total = sum(p.numel() for p in model.parameters())
    names = action_names(data)
    optimizer = torch.optim.AdamW(  # fused: in place, without a second copy of the gradients
        parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=args.adam_betas, eps=1e-8, fused=True
    )
    state = {
        "script": SCRIPT, "args": asdict(args), "rows": len(data.end), "step": 0, "elapsed": 0.0, "train_s": 0.0,
        "best": None, "base": {}, "last": {}, "tally": None,
    }  # fmt: skip
    tally = Tally(device)

    def evaluate(prefix: str, steps: int = args.denoising_steps) -> tuple[dict, list[dict]]:
        """Open loop on the held-out episodes."""
        chosen = val_episodes[: args.eval_trajs]
        if not chosen or not takes_part:
            return {}, []
        results = open_loop(model, data, chosen, mean_action, args, device, steps)
        return open_loop_metrics(results, prefix), results

    def act() -> dict[str, float]:
        """Closed loop, where there is a simulator for the data."""
        if not args.closed_loop or not takes_part or any(e.info.get("robot_type") != "fetch" for e in sets):
            return {}
        from common.robot.fetch_robot import ACTION, INSTRUCTIONS, STATE

        if not set(data.config.state) <= set(STATE) or list(data.config.action) != list(ACTION):
            logger.say(f"closed loop is off: it needs the actions {', '.join(ACTION)} and state of {', '.join(STATE)}")
            return {}
        found = {}
        for env_id, instruction in INSTRUCTIONS.items():
            if instruction in data.instructions:
                try:
                    found |= closed_loop(model, data, env_id, args, device)
                except Exception as error:  # whatever a graphics driver throws must not cost the run its result
                    if not data.config.video:
                        raise
                    logger.say(f"closed loop is off, it needs pictures: {type(error).__name__}: {error}")
                    return {}
        return found

    def finish(step: int) -> dict[str, float]:
        """The whole evaluation: held-out episodes with several numbers of Euler steps, tables, figures, simulator."""
        metrics, results = evaluate("eval")
        if results and world.main:
            open_loop_tables(logger, step, data, results)
            for result in results[: args.eval_figures]:
                draw_open_loop(result, raw_names(data), run_dir / "open_loop" / f"episode_{result['episode']:06d}.png")
        if results:
            for k in args.denoising_sweep:
                metrics[f"eval/mse_k{k}"] = metrics["eval/mse"]
                if k != args.denoising_steps:
                    metrics[f"eval/mse_k{k}"] = evaluate("eval", k)[0]["eval/mse"]
        metrics |= act()
        if world.main:
            logger.table("evaluation_summary", step, [metrics])
        return metrics

    def report(metrics: dict, base: dict) -> None:
        if "eval/mse" in metrics:
            m = {key.removeprefix("eval/"): value for key, value in metrics.items()}
            before = f"{base['base/mse']:.4g} (untrained on this data) -> " if base else ""
            one = np.isnan(m["mse_low"])  # the spread of one episode is unknown
            interval = "(one episode, no interval)" if one else f"[{m['mse_low']:.4g}, {m['mse_high']:.4g}]"
            logger.say(
                f"open loop, {m['num_trajectories']:.0f} held-out episodes: MSE {before}{m['mse']:.4g} "
                f"{interval}; hold last action {m['mse_hold_last']:.4g} "
                f"({m['mse_hold_last'] / m['mse']:.1f}x), mean action {m['mse_mean_action']:.4g} "
                f"({m['mse_mean_action'] / m['mse']:.1f}x); normalised {m['mse_normalized']:.4g}"
            )
            sweep = ", ".join(f"{k}: {m[f'mse_k{k}']:.4g}" for k in args.denoising_sweep)
            logger.say(f"MSE by number of Euler steps: {sweep}")
        for name, rate in metrics.items():
            if name.startswith("closed_loop/") and name.endswith("/success_rate"):
                low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
                task = name.split("/")[1]
                logger.say(f"closed loop, {task}: {rate:.0%} [{low:.0%}, {high:.0%}] of {args.closed_loop_episodes}")

    def save() -> None:
        sums = [tally.bins.clone(), tally.dims.clone()]
        world.all_sum(sums)
        state["tally"] = [x.tolist() for x in sums]
        weights = moments = None
        if args.fsdp:
            weights = gathered(model.state_dict(), world.main)
            moments = {i: gathered(slots, world.main) for i, slots in optimizer.state_dict()["state"].items()}
        if not world.main:
            return
        folder = run_dir / "checkpoints" / f"step-{state['step']:06d}"
        with atomic_folder(folder) as temporary:
            with merged(model, adapters):
                model.save_pretrained(temporary, weights)
            (temporary / "experiment_cfg").mkdir()
            (temporary / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
            if adapters:  # what a continued run needs beside the merged weights
                tensors = {
                    f"{name}.{part}": tensor.detach().cpu().contiguous()
                    for name, adapter in adapters.items()
                    for part, tensor in (("A", adapter.A), ("B", adapter.B), ("weight", adapter.linear.weight))
                }
                save_file(tensors, temporary / "lora.safetensors")
            save_state(temporary, optimizer, state | {"elapsed": logger.elapsed}, moments)
        link(run_dir, "last", folder)
        if state["best"] and state["best"]["step"] == state["step"]:
            link(run_dir, "best", folder)
        prune(run_dir, args.keep)

    if args.eval_only:
        metrics = (validate(model, data, val_rows, args, device) if takes_part else {}) | finish(0)
        logger.log(0, metrics)
        report(metrics, {})
        logger.say(f"evaluated {args.model_path}; {run_dir}")
        return 0

    if checkpoint:
        if adapters:
            tensors = load_file(checkpoint / "lora.safetensors")
            with torch.no_grad():
                for name, adapter in adapters.items():
                    for part, to in (("A", adapter.A), ("B", adapter.B), ("weight", adapter.linear.weight)):
                        to.copy_(tensors[f"{name}.{part}"])
        saved = load_state(checkpoint, optimizer, SCRIPT)
        if saved["rows"] != state["rows"]:
            fail(
                f"the data has {state['rows']} rows, the run to continue had {saved['rows']}; --resume needs the same data"
            )
        state.update({key: saved[key] for key in state if key != "args"})
        if world.main:  # what was summed up since the last line of metrics
            tally.bins.copy_(torch.tensor(state["tally"][0]))
            tally.dims.copy_(torch.tensor(state["tally"][1]))
        logger.truncate(state["step"], state["elapsed"])
        logger.say(f"resuming {run_dir} after step {state['step']}")
    else:
        logger.say(
            f"{', '.join(str(e.path.name) for e in sets)} as {args.data_config}/{args.embodiment_tag}: "
            f"{len(train_rows):,} of {len(data.end):,} frames to train on, {len(val_episodes)} episodes held out, "
            f"{len(data.config.video)} camera(s) cached in {cache_s:.1f} s, {data.dims} action dims\n"
            f"{args.model_path}: {trainable:,} of {total:,} parameters train; batch {args.batch_size} = {world.size} "
            f"process(es) x {args.gradient_accumulation_steps} micro-batch(es) x "
            f"{args.batch_size // world.size // args.gradient_accumulation_steps}, {args.max_steps} steps = "
            f"{args.max_steps * args.batch_size / len(train_rows):.1f} epochs, lr {args.learning_rate:g}, amp {args.amp}; "
            f"log {run_dir}"
        )
        state["base"], _ = evaluate("base")
        first = validate(model, data, val_rows, args, device) if takes_part and len(val_rows) else {}
        logger.log(0, state["base"] | first)
    order = Order(data, train_rows, set_weights(sets, args.balance_dataset_weights), args)
    workers = {"num_workers": args.num_workers}
    if args.num_workers:
        workers |= {"prefetch_factor": args.prefetch_factor, "worker_init_fn": one_thread}
    loader = DataLoader(
        data, sampler=plans(order, data, args, world, state["step"] + 1), batch_size=None,
        pin_memory=device.type == "cuda", **workers,
    )  # fmt: skip
    batches = iter(loader)
    mark, waited, since = time.time(), 0.0, 0
    logger.progress(args.max_steps, state["step"])

    # ---- the loop ----
    for step in range(state["step"] + 1, args.max_steps + 1):
        # dropout: a stream per step and process, so that a run can go on anywhere
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, world.rank]).generate_state(1)[0]))
        set_training(model, adapters)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)

        # ---- 1. gradients of the batch, micro-batch by micro-batch ----
        for _ in range(args.gradient_accumulation_steps):
            start = time.time()
            batch = to_device(next(batches), device)
            waited += time.time() - start
            with autocast(args, device):
                error, valid, t = velocity_error(model, batch, batch["noise"], batch["t"])
            # eq: L = sum_m (B_m / B) L_m: every sample has the same number of valid entries
            loss = masked_mean(error, valid) * (len(batch["action"]) / args.batch_size)
            loss.backward()
            tally.add(error, valid, t)
        if world.size > 1 and not args.fsdp:  # which has done it
            sum_gradients(world, parameters)

        # ---- 2. update ----
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        grad_norm = grad_norm.full_tensor() if args.fsdp else grad_norm
        if not grad_norm.isfinite():  # the same in every process; the weights are still those of the step before
            logger.say(f"step {step}: gradients are not finite; lower --learning-rate, or look at the data")
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"], since = step, since + 1

        # ---- 3. log, evaluate, save, stop ----
        ending, pause = step == args.max_steps, time.time()
        metrics: dict = {}
        if ending or step % args.log_every == 0:
            seconds, mark = pause - mark, pause
            state["train_s"] += seconds
            metrics = tally.metrics("train", names, world) | {
                "train/grad_norm": grad_norm.item(),
                "train/learning_rate": optimizer.param_groups[0]["lr"],
                "train/epoch": step * args.batch_size / len(train_rows),
                "time/samples_per_s": since * args.batch_size / seconds,
                "time/waiting_for_data": waited / seconds,
                "time/train_s": state["train_s"],
            }
            waited, since = 0.0, 0
            if device.type == "cuda":
                metrics["time/memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if ending or (args.eval_every and step % args.eval_every == 0):
            if takes_part and len(val_rows):
                metrics |= validate(model, data, val_rows, args, device)
                state["last"]["val/loss"] = metrics["val/loss"]
                if state["best"] is None or metrics["val/mse"] < state["best"]["mse"]:
                    state["best"] = {"mse": metrics["val/mse"], "step": step}
        stopped = any(world.gather([stop.number is not None]))
        is_best = any(world.gather([state["best"] is not None and state["best"]["step"] == step]))
        if stopped or ending or is_best or (args.save_steps and step % args.save_steps == 0):
            save()
        if ending:
            metrics |= finish(step)
        if metrics:
            logger.log(step, metrics)
        logger.advance(loss=metrics.get("train/loss"), val=state["last"].get("val/loss"))
        if stopped and not ending:
            logger.say(f"stopped at step {step}; continue with: uv run python {SCRIPT}.py --resume {run_dir}")
            return stop.exit_code
        mark += time.time() - pause  # evaluating and saving are no training

    # ---- the end: what came out of it, and where it is ----
    if world.main:
        logger.finish()  # closes the bar
        figures = plot.draw([run_dir], SCRIPT, run_dir)
        report(metrics, state["base"])
        print(
            f"{args.max_steps} steps in {state['train_s']:.1f} s of training, {logger.elapsed:.0f} s in all; validation "
            f"loss {state['last'].get('val/loss', math.nan):.4f}\n"
            f"figures {', '.join(str(f) for f in figures)}, {run_dir}/open_loop; model "
            + (f"{run_dir}/best (step {state['best']['step']})" if state["best"] else f"{run_dir}/last")
        )
    return 0


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism


if __name__ == "__main__":
    main(parse(Args, __doc__))
