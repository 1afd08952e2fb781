"""What a trained GR00T needs to act, and the policy itself: raw observations in, chunks of raw actions out.

    policy = Policy.from_pretrained("runs/gr00t_finetune/RUN")
    actions = policy.get_action({"video.front": frame, "state.arm": joints, "annotation.task": "lift it"})

The scripts evaluate through the same `Policy`, by their own sampler, and the server answers with it: there is one road
from an observation to an action. No simulator is loaded from here: fetch_robot.py has the one there is.

Dims: B observations, V cameras, S prompt tokens, H = 16 actions of a chunk, A raw action numbers.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, FiniteFloat
from safetensors.torch import save_file
from typing_extensions import TypedDict

from common.checkpoint import find_checkpoint, trainer_file
from common.cli import Count, Natural, NonNegative, Text, fail, flag
from common.files import Object, read_json
from common.parallel import gathered
from common.robot import transforms
from common.robot.data_configs import DataConfig, find_data_config
from common.robot.files import ROOT, find_folder
from common.robot.gr00t import ELSE, FILES, HINT
from common.robot.gr00t_n15 import EMBODIMENTS, GR00T, GR00TConfig
from common.robot.lerobot import STATISTICS
from common.robot.lora import LoRALinear, adapter_tensors, add_lora, merged
from common.robot.transforms import ACTION_DIM, HORIZON, STATE_DIM, pad, to_device
from common.streams import stream

OPEN = ConfigDict(extra="allow")  # another program may write more
Tag = Literal["new_embodiment", "gr1", "oxe_droid", "agibot_genie1"]


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


class About(BaseModel):
    """experiment_cfg/policy.json: how a checkpoint sees and acts. It lies beside the files that the reference reads."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    name: str  # of the data config, for people: what is meant is in `data_config`
    data_config: DataConfig  # keys in order, modes, cameras, rotations, language key
    embodiment_tag: Tag = "new_embodiment"
    horizon: Literal[16] = HORIZON
    image_size: Natural = 0  # what the model sees of a frame, in pixels; 0: nothing
    cache_side: Natural = 256  # larger frames are first reduced to this, as they were for training; 0: they are not
    prompt_form: Literal["plain", "bracketed"] = "plain"
    tokenizer: Text | None = None  # folder or hub id; None: the bundled one of a toy model, or the published one
    fps: NonNegative | None = None  # of the recordings
    image_mean: dict[str, Annotated[list[FiniteFloat], Len(3, 3)]] = {}  # camera -> mean R, G, B, 0 to 255


class StoredArgs(TypedDict, total=False):
    """What an evaluation takes from the settings of the run that made a checkpoint. Its data config is not among them:
    a name may stand for code."""

    __pydantic_config__ = ConfigDict(strict=True)
    dataset_path: list[Text] | None
    embodiment_tag: Tag | None
    val_episodes: Natural | None
    batch_size: Count | None


class Trainer(TypedDict, total=False):
    args: StoredArgs


class Meaning(TypedDict):
    """What metadata.json says of a key of state or action."""

    __pydantic_config__ = OPEN
    absolute: bool
    rotation_type: str | None
    shape: Annotated[list[Count], Len(1, 1)]
    continuous: bool


class Modalities(TypedDict, total=False):
    __pydantic_config__ = OPEN
    video: dict[str, Object]
    state: dict[str, Meaning]
    action: dict[str, Meaning]


class Embodiment(TypedDict, total=False):
    """An entry of metadata.json."""

    __pydantic_config__ = OPEN
    statistics: dict[str, dict[str, dict[str, list[FiniteFloat]]]]  # state or action -> key -> min, … -> a number a dim
    modalities: Modalities
    embodiment_tag: str


@dataclass
class Stored:
    """A checkpoint in the published layout, but for its weights."""

    source: str  # as it was asked for
    folder: Path | None = None
    args: StoredArgs = field(default_factory=dict)  # of the run that made it; none if another program did
    metadata: dict[str, Embodiment] = field(default_factory=dict)  # embodiment tag -> statistics, meaning of each key
    sees: bool = True  # False: the lite model, which has no cameras
    about: About | None = None  # None: made by another program, or by an older version of these scripts

    def embodiment(self, tag: str, config: DataConfig) -> Embodiment:
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
            numbers = entry.get("statistics", {}).get(kind, {}).get(key, {})
            if not set(STATISTICS) <= set(numbers):
                fail(f"checkpoint '{self.source}' has no statistics of {kind}.{key} for {tag}: another data config?")
            if key not in entry.get("modalities", {}).get(kind, {}):
                fail(f"checkpoint '{self.source}' does not describe {kind}.{key} for {tag} in its metadata.json")
            (width,) = entry["modalities"][kind][key]["shape"]
            if wrong := [name for name in STATISTICS if len(numbers[name]) != width]:
                found = f"{len(numbers[wrong[0]])} numbers of {wrong[0]} for the {width} of {kind}.{key}"
                fail(f"checkpoint '{self.source}' has {found} ({tag}) in its metadata.json")
        return entry

    def acts(self, data_config=None, embodiment_tag=None, tokenizer=None, modality: dict | None = None) -> About:
        """How this checkpoint sees and acts: as its policy.json says, or where that is missing as these flags say.

        modality: of the data set that it meets, for `--data-config auto`. A data config that contradicts policy.json is
        refused.
        """
        about = self.about
        tag = embodiment_tag or (about.embodiment_tag if about else "new_embodiment")
        if not (about or data_config):
            fail(
                f"checkpoint '{self.source}' does not say what it sees and in which order (it has no "
                "experiment_cfg/policy.json: an older run's, or another program's): give --data-config, and "
                "--embodiment-tag and --tokenizer where they were not the defaults"
            )
        config = about.data_config if about else None
        if data_config:
            own = dict(video={}, state={}, action={}, language={config.language: ""} if config else {})
            own |= self.metadata.get(tag, {}).get("modalities", {})  # metadata.json keeps the order of its training
            given = find_data_config(data_config, modality or own)
            given = given if self.sees else replace(given, video=())
            if config and (difference := config.difference(given)):
                what = f"--data-config {data_config} is not what checkpoint '{self.source}' was trained with"
                fail(f"{what}: {difference}; leave the flag away")
            config = given
        if fault := config.fault():
            fail(f"checkpoint '{self.source}': its data config {fault}")
        if about is None:
            return About(name=data_config, data_config=config, embodiment_tag=tag, tokenizer=tokenizer)
        return about.model_copy(update={"embodiment_tag": tag, "tokenizer": tokenizer or about.tokenizer})

    def interface(self, about: About) -> "Interface":
        config, tag = about.data_config, about.embodiment_tag
        return Interface(config, self.embodiment(tag, config), EMBODIMENTS[tag], about)


def model_folder(path: str) -> Path:
    """The folder that --model-path means: a run's best checkpoint (or its last), a folder itself, a hub id's copy."""
    if (Path(path) / "checkpoints").is_dir():
        return find_checkpoint(path, best=True)
    return find_folder(path, "model", ELSE, FILES)


def read_stored(path: str) -> Stored:
    """Reads config.json, and where they are trainer.json, experiment_cfg/metadata.json, policy.json: data, no code."""
    folder = model_folder(path)
    config = read_json(folder / "config.json", Object, HINT)
    backbone, extra = config.get("backbone_cfg"), folder / "experiment_cfg"
    trainer = read_json(folder / "trainer.json", Trainer, HINT, optional=True) or {}
    return Stored(
        source=path,
        folder=folder,
        args=trainer.get("args", {}),
        metadata=read_json(extra / "metadata.json", dict[str, Embodiment], HINT, optional=True) or {},
        sees=not (isinstance(backbone, dict) and backbone.get("instruction_vocab")),
        about=read_json(extra / "policy.json", About, "give --data-config once the file is gone", optional=True),
    )


def model_tokenizer(c: GR00TConfig, source: str | None = None):
    """The tokenizer of a model: the one of --tokenizer, the bundled one of tiny and lite, or the published one."""
    toy = c.instruction_vocab or c.image_token_index == GR00TConfig.tiny().image_token_index
    default = str(ROOT / "assets" / "tiny-qwen2") if toy else "lerobot/eagle2hg-processor-groot-n1p5"
    if c.instruction_vocab:
        return transforms.load_tokenizer(source or default, None)
    framed = toy and c.eagle["text_config"]["vocab_size"] > 272  # tiny models of before have no rows for it
    return transforms.load_tokenizer(source or default, c.image_token_index, framed)


def trained_parts(model: GR00T, args: GR00TArgs) -> dict[str, LoRALinear]:
    """Freezes what the flags leave frozen, adds the adapters they ask for and returns those."""
    c, sizes = model.config, (HORIZON, STATE_DIM, ACTION_DIM)
    if (c.action_horizon, c.state_dim, c.action_dim) != sizes:
        fail(
            f"'{args.model_path}' has a horizon of {c.action_horizon}, {c.state_dim} state and {c.action_dim} action "
            f"dims; this code trains {HORIZON}, {STATE_DIM}, {ACTION_DIM}"
        )
    for name in () if args.lora_rank else ("lora_full_model", "lora_alpha", "lora_targets", "lora_dropout"):
        if getattr(args, name) != getattr(type(args), name):
            fail(f"{flag(name)} shapes adapters, and there are none: give --lora-rank too (8 to 64)")
    model.set_trainable(args.tune_llm, args.tune_visual, args.tune_projector, args.tune_diffusion_model)
    adapters = add_lora(model, args) if args.lora_rank else {}
    if args.gradient_checkpointing:
        model.gradient_checkpointing(True)
    return adapters


def save_policy(
    folder: Path | None, model: GR00T, adapters: dict[str, LoRALinear], metadata: dict, about: About | None = None
) -> None:
    """Writes the published layout, adapters merged. Every process calls it, those that do not write with None."""
    with merged(model, adapters):
        weights = gathered(model.state_dict(), keep=folder is not None)
        if folder is None:
            return
        model.save_pretrained(folder, weights)
    (folder / "experiment_cfg").mkdir()
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    if about:
        (folder / "experiment_cfg" / "policy.json").write_text(about.model_dump_json(indent=1) + "\n")
    if adapters:
        save_file(adapter_tensors(adapters), trainer_file(folder, "lora.safetensors"))


# ---- units -----------------------------------------------------------------------------------------------------------


def array_of(key: str, observation: dict, rank: int, width: int = 3) -> tuple[np.ndarray, bool]:
    """An entry of an observation as (B, …, width) with `rank` axes behind B, and whether it came with a batch axis."""
    one = "(height, width, 3)" if rank == 3 else f"({width},)"
    try:
        x = np.asarray(observation[key])
    except (ValueError, TypeError, RuntimeError):  # ragged, or no array at all
        raise ValueError(f"{key} is not an array of shape {one}") from None
    if not rank <= x.ndim <= rank + 2 or x.shape[-1] != width:
        raise ValueError(f"{key} has shape {x.shape}, not {one}, (1, …) with a time axis or (B, 1, …) for a batch")
    if x.ndim > rank and x.shape[-rank - 1] != 1:
        raise ValueError(f"{key} has {x.shape[-rank - 1]} times {x.shape}: the policy sees 1, a batch is (B, 1, …)")
    if 0 in x.shape:
        raise ValueError(f"{key} is empty: {x.shape}")
    batched, x = x.ndim == rank + 2, x.reshape(-1, *x.shape[-rank:])
    if rank == 3:
        if x.dtype != np.uint8:
            raise ValueError(f"{key} is {x.dtype}: frames are uint8, RGB, 0 to 255")
        if not 2 <= min(x.shape[1:3]) <= max(x.shape[1:3]) <= 8192:
            raise ValueError(f"{key} is {x.shape[1]} x {x.shape[2]} pixels; 2 to 8,192 are possible")
        return x, batched
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{key} holds {x.dtype}, not numbers")
    x = x.astype(np.float64)
    if not (np.abs(x) < 1e9).all():  # nan neither
        raise ValueError(f"{key} holds a number that is not finite or beyond 1e9")
    return x, batched


class Interface:
    """Between a robot and a model, in the units of a checkpoint: raw observations in, chunks of raw actions out."""

    def __init__(self, config: DataConfig, metadata: dict, embodiment: int, about: About | None = None):
        """metadata: the embodiment's entry of metadata.json; embodiment: its row in the embodiment layers."""
        self.config, self.metadata, self.embodiment, self.about = config, metadata, embodiment, about
        self.prompts: dict[str, np.ndarray] = {}  # instruction -> token ids
        self.pad_id, self.image_size, self.tokenizer = 0, 0, None

    def prepare(self, c: GR00TConfig, tokenizer, instructions: Iterable[str] = (), form: str = "plain") -> None:
        """Takes picture size and tokenizer of the model; the token ids of these instructions are made at once."""
        self.image_size, self.pad_id, self.tokenizer = c.image_size, tokenizer.pad_token_id, tokenizer
        self.prompts, self.image_tokens, self.form = {}, c.tokens_per_image, form
        self.vocabulary = c.instruction_vocab or c.eagle["text_config"]["vocab_size"]
        for text in instructions:
            if max(self.tokens(text), default=0) >= self.vocabulary:
                fail(f"the tokenizer makes ids beyond the {self.vocabulary} of the model: --tokenizer is another one's")

    def fit(self, c: GR00TConfig, instructions: Iterable[str] = ()) -> None:
        """Prepares it for a model as policy.json says; what is wrong with its tokenizer ends the program."""
        self.prepare(c, model_tokenizer(c, self.about.tokenizer), instructions, self.about.prompt_form)

    def read(self, observation: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[str], bool]:
        """Checks an observation as `Policy.get_action` takes it -> frames (B, height, width, 3) of each camera, state:
        key -> (B, width) float64, B instructions, whether there was a batch axis. ValueError: in one line."""
        config, metadata = self.config, self.metadata
        language = f"annotation.{config.language}"
        wanted = [*(f"video.{key}" for key in config.video), *(f"state.{key}" for key in config.state), language]
        if not isinstance(observation, dict):
            raise ValueError(f"an observation is a dict of {', '.join(wanted)}, not a {type(observation).__name__}")
        faults = [f"lacks {key}" for key in wanted if key not in observation]
        for key in [str(key)[:80] for key in observation if key not in wanted]:
            near = difflib.get_close_matches(key, wanted, 1)
            faults.append(f"has {key!r}, which the policy does not read" + (f" (it reads {near[0]})" if near else ""))
        if faults:
            raise ValueError(f"the observation {'; '.join(faults[:8])}; it reads {', '.join(wanted)}")
        arrays = {f"video.{key}": array_of(f"video.{key}", observation, 3) for key in config.video}
        for key in config.state:
            (width,) = metadata["modalities"]["state"][key]["shape"]
            arrays[f"state.{key}"] = array_of(f"state.{key}", observation, 1, width)
        facts = {key: (len(x), batched) for key, (x, batched) in arrays.items()}
        if len(set(facts.values())) > 1:
            raise ValueError(f"a batch axis is on all or on none, as long on all: (length, has one) is {facts}")
        ((count, batched),), texts = set(facts.values()), observation[language]
        texts = [texts] * count if isinstance(texts, str) else np.asarray(texts, dtype=object).reshape(-1).tolist()
        if len(texts) != count or not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise ValueError(f"{language} must be {count} string(s), one an observation")
        if max(map(len, texts)) > 1000:
            raise ValueError(f"{language} has {max(map(len, texts))} characters; 1,000 are the most")
        frames = [arrays[f"video.{key}"][0] for key in config.video]
        return frames, {key: arrays[f"state.{key}"][0] for key in config.state}, texts, batched

    def tokens(self, instruction: str) -> np.ndarray:
        """The prompt's token ids."""
        if instruction not in self.prompts:
            if len(self.prompts) > 10_000:  # a client that never says the same twice
                self.prompts.clear()
            views = len(self.config.video)
            # a model without cameras (lite) reads the bare instruction
            words = transforms.prompt(instruction, views, self.image_tokens, self.form) if views else instruction
            self.prompts[instruction] = np.array(self.tokenizer(words, add_special_tokens=False).input_ids, np.int64)
        return self.prompts[instruction]

    def see(self, observation: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the model sees of an observation, see `batch`."""
        return self.seen(*self.read(observation)[:3])

    def seen(self, frames: list[np.ndarray], state: dict[str, np.ndarray], texts: list[str]) -> dict[str, torch.Tensor]:
        """The same of what `read` has found in it."""
        images = [self.images(pictures[:, None]) for pictures in frames]  # of each camera
        return self.batch(self.state(state), texts, torch.stack(images, dim=1).flatten(0, 1) if images else None)

    def state(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        """Raw state (N, width) of each key -> (N, 64) float32; what is beyond 64 is cut, as in the reference."""
        state = transforms.encode("state", raw, self.config, self.metadata)[:, :STATE_DIM]
        return pad(state, STATE_DIM).astype(np.float32)

    def images(self, frames: np.ndarray) -> torch.Tensor:
        """Pictures (N, V, height, width, 3) uint8 -> (N * V, 3, size, size) uint8: reduced as the frame cache of the
        training reduces them, the centre, resized."""
        side = self.about.cache_side if self.about else 0
        small = [transforms.shrink(frame, side) for frame in frames.reshape(-1, *frames.shape[2:])]
        return transforms.transform_images(np.stack(small), self.image_size)

    def batch(
        self, state: np.ndarray, instructions: Sequence[str], images: torch.Tensor | None = None, length: int = 0
    ) -> dict[str, torch.Tensor]:
        """What the policy sees: state (N, 64), N instructions, images (N * V, 3, size, size) as `images` gives them.

        Prompts are padded on the left to the longest, or to `length`.
        """
        prompts = [self.tokens(text) for text in instructions]
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
        return np.concatenate(list(self.decode(chunk).values()), axis=-1)

    def decode(self, chunk: np.ndarray) -> dict[str, np.ndarray]:
        """The same, each key apart: (N, H, width)."""
        return transforms.decode_actions(chunk.astype(np.float64), self.config, self.metadata)

    def action_names(self, raw: bool = False) -> list[str]:
        """One name per action number of the model or, where a rotation is converted, as recorded."""
        names = []
        for key in self.config.action:
            width = len(transforms.statistics_of("action", key, self.config, self.metadata)["min"])
            width = self.metadata["modalities"]["action"][key]["shape"][0] if raw else width
            names += [key] if width == 1 else [f"{key}.{i}" for i in range(width)]
        return names


# ---- the policy ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def euler(model: GR00T, batch: dict[str, torch.Tensor], noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Noise (B, H, 32) -> actions (B, H, 32) in model units: `sample_actions` of gr00t_finetune.py, to the last bit."""
    features, mask = model.vl_features(batch)
    x = noise.float()
    for k in range(num_steps):
        t = torch.full((len(x),), k / num_steps, dtype=torch.float64, device=x.device)
        # eq: x_{k+1} = x_k + v(x_k, k / K) / K
        x = x + model.velocity(features, mask, batch["state"], x, t, batch["embodiment_id"]).float() / num_steps
    return x


class Policy:
    """A trained GR00T that acts: raw observations in, chunks of raw actions out."""

    def __init__(
        self, model: GR00T, interface: Interface, sampler: Callable = euler, denoising_steps: int = 4, amp: bool = False
    ):
        """interface: prepared. sampler(model, batch, noise, num_steps) -> actions (B, H, 32). amp: in bfloat16."""
        if not isinstance(denoising_steps, int) or not 1 <= denoising_steps <= 100:
            fail(f"denoising_steps {denoising_steps!r}: a number of Euler steps, 1 to 100")
        self.model, self.interface, self.sampler = model, interface, sampler
        self.denoising_steps, self.amp = denoising_steps, amp

    @classmethod
    def from_pretrained(
        cls, folder, device="auto", denoising_steps=4, data_config=None, embodiment_tag=None, tokenizer=None
    ) -> "Policy":
        """The policy of a run folder (its best checkpoint), of a checkpoint's folder or of a hub id.

        What is not given comes from the checkpoint; a data config that contradicts it is refused. device: auto (a GPU,
        in bfloat16, where there is one), cpu or cuda. What is wrong ends in one line and exit code 2.
        """
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            fail(f"device '{device}' is not there: auto, cpu{', cuda' if torch.cuda.is_available() else ''}")
        if embodiment_tag not in (None, *EMBODIMENTS):
            fail(f"embodiment tag '{embodiment_tag}' is unknown; there are {', '.join(EMBODIMENTS)}")
        stored = read_stored(str(folder))
        interface = stored.interface(stored.acts(data_config, embodiment_tag, tokenizer))
        # what is wrong with the files is found before they are loaded
        interface.fit(GR00T.plan(stored.folder)[0].config)
        amp = device != "cpu" and torch.cuda.is_available()
        model = GR00T.from_pretrained(
            stored.folder, device="cuda" if amp else "cpu", backbone_dtype=torch.bfloat16 if amp else torch.float32
        )
        return cls(model, interface, denoising_steps=denoising_steps, amp=amp)

    def get_action(self, observation: dict[str, Any], seed: int | None = None) -> dict[str, np.ndarray]:
        """{"action.<key>": (16, width) float64} in raw units, the first action for now.

        observation: for every camera "video.<camera>", (height, width, 3) uint8 RGB of any size; for every key of the
        state "state.<key>", (width,) numbers as recorded; "annotation.<language key>", a string. A leading time axis of
        length 1 is allowed, and a batch axis before that, on all of them: then the answer is (B, 16, width).
        seed: of x_0; the same seed and observation give the same actions. None: torch's generator.
        What is missing, unknown or of another shape, type or range: ValueError, in one line.
        """
        *found, batched = self.interface.read(observation)
        chunk = self.chunk(self.interface.seen(*found), self.noise(len(found[2]), seed)).numpy()
        if not np.isfinite(chunk).all():
            raise ValueError("the policy's actions are not finite: its weights are damaged")
        actions = {f"action.{key}": x for key, x in self.interface.decode(chunk).items()}
        return actions if batched else {key: x[0] for key, x in actions.items()}

    def modality_config(self) -> dict[str, dict[str, list]]:
        """What is read and written: video, state, action, language -> delta_indices (rows from now), modality_keys."""
        config, rows = self.interface.config, {"action": list(range(HORIZON))}
        keys = {kind: [f"{kind}.{key}" for key in getattr(config, kind)] for kind in ("video", "state", "action")}
        keys["language"] = [f"annotation.{config.language}"]
        return {kind: {"delta_indices": rows.get(kind, [0]), "modality_keys": keys[kind]} for kind in keys}

    def noise(self, count: int, seed: int | None = None) -> torch.Tensor:
        """x_0 (count, H, 32); with a seed that of observation i depends on the seed and i alone."""
        if seed is None:
            return torch.randn(count, HORIZON, ACTION_DIM)
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed {str(seed)[:40]!r}: a number from 0 on")
        rngs = [stream(seed, "action", i) for i in range(count)]
        return torch.from_numpy(np.stack([r.standard_normal((HORIZON, ACTION_DIM), dtype=np.float32) for r in rngs]))

    @torch.no_grad()
    def chunk(self, batch: dict[str, torch.Tensor], noise: torch.Tensor, num_steps: int | None = None) -> torch.Tensor:
        """The policy's actions (B, H, 32) from x_0 `noise` (B, H, 32), in model units, on the CPU."""
        self.model.eval()
        device = self.model.device
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            return self.sampler(self.model, batch, noise.to(device), num_steps or self.denoising_steps).cpu()
