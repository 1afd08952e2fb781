"""What a trained GR00T needs to act: which folder is meant, what it carries, in which units it sees and moves a robot.

    stored = read_stored(args.model_path)                       folder, settings, statistics; weights are not read
    interface = Interface(config, stored.embodiment(tag, config), EMBODIMENTS[tag])
    interface.prepare(model.config, tokenizer, instructions)    picture size and token ids
    batch = interface.batch(interface.state(raw), instructions, interface.images(frames))
    actions = interface.actions(chunk)                          raw, in the order of the data config

Loss and sampler are the scripts', and no simulator is loaded from here: fetch_robot.py has the one there is.

Dims: N observations, V cameras, S prompt tokens, H = 16 actions of a chunk, A raw action numbers.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from common.checkpoint import find_checkpoint, trainer_file
from common.cli import Count, Natural, Text, fail
from common.parallel import gathered
from common.robot import transforms
from common.robot.data_configs import DataConfig
from common.robot.files import ROOT, find_folder, read_json
from common.robot.gr00t_n15 import ELSE, FILES, GR00T, HINT, GR00TConfig
from common.robot.lerobot import STATISTICS
from common.robot.lora import LoRALinear, adapter_tensors, add_lora, merged
from common.robot.transforms import ACTION_DIM, HORIZON, STATE_DIM, pad


@dataclass
class GR00TArgs:
    """Flags of the scripts that train a GR00T."""

    # model
    model_path: Text | None = None
    """a folder in the published layout, a run folder, or a hub id such as nvidia/GR00T-N1.5-3B"""
    data_config: Text | None = None  # what the policy sees, see common/robot/data_configs.py; default: the checkpoint's
    embodiment_tag: Literal["new_embodiment", "gr1", "oxe_droid", "agibot_genie1"] | None = None
    """whose rows of the embodiment layers to use: a pretrained robot's, or the free ones of new_embodiment (default)"""
    tokenizer: Text | None = None
    """folder or hub id of the tokenizer; default: bundled for tiny and lite, lerobot/eagle2hg-processor-groot-n1p5"""
    tune_llm: bool = False  # train the language model (lite: its table of instruction tokens)
    tune_visual: bool = False  # train the vision tower and its connector
    tune_projector: bool = True
    """train the embodiment layers: state encoder, action encoder, action decoder, position table"""
    tune_diffusion_model: bool = True  # train the diffusion transformer
    lora_rank: Natural = 0  # rank of the low-rank adapters, 8 to 64; 0: none, train the weights themselves
    lora_alpha: Count = 16  # adapters are scaled by alpha / rank
    lora_full_model: bool = False  # adapters in the backbone too
    lora_targets: Literal["qkv", "qkvo"] = "qkv"  # projections of each attention that get adapters
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # attention kernel of the backbone
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time


# ---- what a folder holds beside the weights --------------------------------------------------------------------------


@dataclass
class Stored:
    """A checkpoint in the published layout, but for its weights."""

    source: str  # as it was asked for
    folder: Path | None = None
    args: dict = field(default_factory=dict)  # settings of the run that made it; none if another program did
    metadata: dict = field(default_factory=dict)  # embodiment tag -> statistics and description of each key
    sees: bool = True  # False: the lite model, which has no cameras

    def embodiment(self, tag: str, config: DataConfig) -> dict:
        """The metadata of this tag, complete for the keys of `config`. A policy without it would act in wrong units."""
        if tag not in self.metadata:
            have = ", ".join(self.metadata) or "none"
            fail(
                f"checkpoint '{self.source}' has no statistics for --embodiment-tag {tag} (it has: {have}); give a tag "
                f"it has, or fine-tune it on your data first: gr00t_finetune.py --model-path {self.source}"
            )
        entry = self.metadata[tag]
        keys = [(kind, key) for kind in ("state", "action") for key in getattr(config, kind)]
        for kind, key in keys:
            if not set(STATISTICS) <= set(entry.get("statistics", {}).get(kind, {}).get(key, {})):
                fail(f"checkpoint '{self.source}' has no statistics of {kind}.{key} for {tag}: another data config?")
            if key not in entry.get("modalities", {}).get(kind, {}):
                fail(f"checkpoint '{self.source}' does not describe {kind}.{key} for {tag} in its metadata.json")
        return entry


def model_folder(path: str) -> Path:
    """The folder that --model-path means: a run's best checkpoint (or its last), a folder itself, a hub id's copy."""
    if (Path(path) / "checkpoints").is_dir():
        return find_checkpoint(path, best=True)
    return find_folder(path, "model", ELSE, FILES)


def read_stored(path: str) -> Stored:
    """Reads trainer.json, experiment_cfg/metadata.json and config.json; the first two may be absent."""
    folder = model_folder(path)
    config = read_json(folder / "config.json", HINT, optional=True)
    return Stored(
        source=path,
        folder=folder,
        args=read_json(folder / "trainer.json", HINT, optional=True).get("args", {}),
        metadata=read_json(folder / "experiment_cfg" / "metadata.json", HINT, optional=True),
        sees=not config.get("backbone_cfg", {}).get("instruction_vocab"),
    )


def model_tokenizer(c: GR00TConfig, source: str | None = None):
    """The tokenizer of a model: the one of --tokenizer, the bundled one of tiny and lite, or the published one."""
    toy = c.instruction_vocab or c.image_token_index == GR00TConfig.tiny().image_token_index
    default = str(ROOT / "assets" / "tiny-qwen2") if toy else "lerobot/eagle2hg-processor-groot-n1p5"
    return transforms.load_tokenizer(source or default, None if c.instruction_vocab else c.image_token_index)


def trained_parts(model: GR00T, args: GR00TArgs) -> dict[str, LoRALinear]:
    """Freezes what the flags leave frozen, adds the adapters they ask for and returns those."""
    c, sizes = model.config, (HORIZON, STATE_DIM, ACTION_DIM)
    if (c.action_horizon, c.state_dim, c.action_dim) != sizes:
        fail(
            f"'{args.model_path}' has a horizon of {c.action_horizon}, {c.state_dim} state and {c.action_dim} action "
            f"dims; this code trains {HORIZON}, {STATE_DIM}, {ACTION_DIM}"
        )
    model.set_trainable(args.tune_llm, args.tune_visual, args.tune_projector, args.tune_diffusion_model)
    adapters = add_lora(model, args) if args.lora_rank else {}
    if args.gradient_checkpointing:
        model.gradient_checkpointing(True)
    return adapters


def save_policy(folder: Path | None, model: GR00T, adapters: dict[str, LoRALinear], metadata: dict) -> None:
    """Writes the published layout, adapters merged. Every process calls it, those that do not write with None."""
    with merged(model, adapters):
        weights = gathered(model.state_dict(), keep=folder is not None)
        if folder is None:
            return
        model.save_pretrained(folder, weights)
    (folder / "experiment_cfg").mkdir()
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    if adapters:
        save_file(adapter_tensors(adapters), trainer_file(folder, "lora.safetensors"))


# ---- units -----------------------------------------------------------------------------------------------------------


class Interface:
    """Between a robot and a model, in the units of a checkpoint: raw observations in, chunks of raw actions out."""

    def __init__(self, config: DataConfig, metadata: dict, embodiment: int):
        """metadata: the embodiment's entry of metadata.json; embodiment: its row in the embodiment layers."""
        self.config, self.metadata, self.embodiment = config, metadata, embodiment
        self.prompts: dict[str, np.ndarray] = {}  # instruction -> token ids
        self.pad_id, self.image_size = 0, 0

    def prepare(self, c: GR00TConfig, tokenizer, instructions: Iterable[str], form: str = "plain") -> None:
        """Takes the picture size from the model, and the token ids of all instructions that will be given."""
        self.image_size, self.pad_id, views = c.image_size, tokenizer.pad_token_id, len(self.config.video)
        for text in instructions:
            # a model without cameras (lite) reads the bare instruction
            words = transforms.prompt(text, views, c.tokens_per_image, form) if views else text
            self.prompts[text] = np.array(tokenizer(words, add_special_tokens=False).input_ids)

    def state(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        """Raw state (N, width) of each key -> (N, 64) float32; what is beyond 64 is cut, as in the reference."""
        state = transforms.encode("state", raw, self.config, self.metadata)[:, :STATE_DIM]
        return pad(state, STATE_DIM).astype(np.float32)

    def images(self, frames: np.ndarray) -> torch.Tensor:
        """Pictures (N, V, height, width, 3) uint8 -> (N * V, 3, size, size) uint8: the centre, resized."""
        return transforms.transform_images(frames.reshape(-1, *frames.shape[2:]), self.image_size)

    def batch(
        self, state: np.ndarray, instructions: Sequence[str], images: torch.Tensor | None = None, length: int = 0
    ) -> dict[str, torch.Tensor]:
        """What the policy sees: state (N, 64), N instructions, images (N * V, 3, size, size) as `images` gives them.

        Prompts are padded on the left to the longest, or to `length`.
        """
        prompts = [self.prompts[text] for text in instructions]
        length = max(length, max(map(len, prompts)))
        ids = np.full((len(prompts), length), self.pad_id)  # (N, S)
        for row, tokens in zip(ids, prompts):
            row[length - len(tokens) :] = tokens
        mask = np.arange(length) >= length - np.array([len(tokens) for tokens in prompts])[:, None]
        batch = {
            "eagle_input_ids": torch.from_numpy(ids),
            "eagle_attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "state": torch.from_numpy(np.ascontiguousarray(state))[:, None].float(),
            "embodiment_id": torch.tensor([self.embodiment]),
        }
        return batch if images is None else batch | {"images": images}

    def actions(self, chunk: np.ndarray) -> np.ndarray:
        """The model's chunk (N, H, 32) -> raw actions (N, H, A) float64, the keys side by side, not clipped."""
        raw = transforms.decode_actions(chunk.astype(np.float64), self.config, self.metadata)
        return np.concatenate(list(raw.values()), axis=-1)

    def action_names(self, raw: bool = False) -> list[str]:
        """One name per action number of the model or, where a rotation is converted, as recorded."""
        names = []
        for key in self.config.action:
            width = len(transforms.statistics_of("action", key, self.config, self.metadata)["min"])
            width = self.metadata["modalities"]["action"][key]["shape"][0] if raw else width
            names += [key] if width == 1 else [f"{key}.{i}" for i in range(width)]
        return names
