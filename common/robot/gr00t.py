"""What the versions of GR00T share beside the action head: configuration, what trains, checkpoint files.

The networks are in gr00t_n15.py and gr00t_n17.py; which of them a folder holds, `read_stored` of policy.py tells.
"""

import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from huggingface_hub import save_torch_state_dict
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available
from typing_extensions import TypedDict

from common.cli import Natural, NonNegative, Positive, Share, fail, in_words, schema_of
from common.files import Object, read_json
from common.robot.dit import ActionHead
from common.robot.files import find_folder

# ---- config ----------------------------------------------------------------------------------------------------------

# What config.json may say: a width in digits must not hang or exhaust the machine that reads it.
Size = Annotated[int, Interval(ge=1, le=10**7)]
Layers = Annotated[int, Interval(ge=1, le=1000)]


def schema_like(name: str, defaults: dict):
    """A pydantic model whose fields have the kinds of these defaults; keys that are not used here pass."""
    fields = {}
    for key, value in defaults.items():
        kind = type(value) if isinstance(value, bool | str) or value == -1 else NonNegative
        if isinstance(value, list):
            kind = list[Natural]
        if isinstance(value, int) and value > 1 and key != "rope_theta":
            kind = Layers if key.endswith("layers") or key == "depth" else Size
        fields[key] = schema_like(key, value) if isinstance(value, dict) else kind, value
    return create_model(name, __config__=ConfigDict(extra="allow", strict=True, allow_inf_nan=False), **fields)


@dataclass(frozen=True)
class HeadConfig:
    """Sizes that both versions have, as published. A version adds its own and says where config.json has each."""

    num_embodiments: Size = 32
    max_seq_len: Size = 1024  # rows of the position table, of which the first action_horizon are used
    hidden_size: Size = 1024  # inner width of the embodiment layers and output width of the DiT
    dit_heads: Size = 32
    dit_head_dim: Size = 48
    dropout: Share = 0.2
    vl_heads: Size = 32
    vl_head_dim: Size = 64
    vl_dropout: Share = 0.2
    num_timestep_buckets: Size = 1000
    noise_beta_alpha: Positive = 1.5
    noise_beta_beta: Positive = 1.0
    noise_s: Positive = 0.999
    num_inference_timesteps: Size = 4
    mask_padding: bool = False  # keep pad tokens out of all attention; the originals let them into some
    # above 0: "lite", a table of that many tokens instead of the vision-language model
    instruction_vocab: Annotated[int, Interval(ge=0, le=10**7)] = 0
    source: dict = field(default_factory=dict)  # the config.json this came from: keys not used here are written again

    version: ClassVar[str]  # n15 or n17
    title: ClassVar[str]  # the same for people
    prefix: ClassVar[str]  # of the batch's keys that the backbone reads
    places: ClassVar[dict[str, str]]  # field -> where config.json has it
    optional: ClassVar[set[str]]  # fields that the published config.json does not say
    said_twice: ClassVar[tuple[str, ...]] = ()  # fields that stand at the top of config.json too
    published: ClassVar[dict]  # keys of the published config.json that nothing here depends on
    network: ClassVar[str]  # a key of it that LeRobot's config.json, which describes the policy alone, has not
    vlm: ClassVar[str]  # the field with the sizes of the vision-language model
    vlm_file: ClassVar[str]  # the file for them, where they are not `vlm_sizes`, the published ones
    vlm_sizes: ClassVar[dict]
    vlm_schema: ClassVar[type]
    toys: ClassVar[dict]  # fields of toy models

    @classmethod
    def lite(cls, instruction_vocab: int = 272, **changes):
        """The same head at toy width; the backbone is a learned table of instruction tokens, there are no images."""
        return cls(**(cls.toys | dict(instruction_vocab=instruction_vocab) | changes))

    @property
    def width(self) -> int:
        return self.dit_heads * self.dit_head_dim

    def fixed(self) -> dict[str, object]:
        """Places in config.json whose value follows from the architecture and the sizes."""
        raise NotImplementedError

    def sizes(self) -> list[tuple[str, object, object]]:
        """(what, its value, what it should be) of sizes that have to fit together."""
        return [("max_seq_len", self.max_seq_len, max(self.max_seq_len, self.action_horizon))]

    @classmethod
    def read(cls, config: dict) -> dict:
        return {name: get(config, place) for name, place in cls.places.items()}

    @classmethod
    def from_json(cls, config: dict, vlm: dict | None = None):
        """From the checkpoint's config.json and, where there is one, `vlm_file`. Another network: exit code 2."""
        if config.get("type") == "groot" and cls.network not in config:
            return cls()  # LeRobot describes its policy, not the network, which is the published one
        refused, values = f"config.json is not that of a {cls.title} checkpoint", cls.read(config)
        if absent := [cls.places[name] for name, value in values.items() if value is None and name not in cls.optional]:
            fail(f"{refused}, it has no {', '.join(absent)}")
        values = {name: value for name, value in values.items() if value is not None}
        try:
            vlm = cls.vlm_sizes | (vlm or {})
            cls.vlm_schema.model_validate(vlm)
            vlm |= {key: cls.vlm_sizes[key] | vlm[key] for key in ("vision_config", "text_config")}
            values = vars(cls()) | values | {cls.vlm: vlm, "source": config}
            found = cls(**TypeAdapter(schema_of(cls)).validate_python(values))
        except ValidationError as error:
            name, _, rest = in_words(error).partition(" ")
            fail(f"{refused}: {cls.places.get(name, name)} {rest}")
        # the head goes by its own sizes: a configuration derived from the published one may keep that one's above
        kept = {key: getattr(found, key) for key in cls.said_twice if config.get(key) == getattr(cls, key)}
        wrong = [(place, get(config | kept, place, want), want) for place, want in found.fixed().items()]
        if wrong := [f"{place} is {got!r}, not {want!r}" for place, got, want in wrong + found.sizes() if got != want]:
            fail(f"config.json is not that of {cls.title}: {'; '.join(wrong)}. N1 and N1.6 are other networks")
        return found

    def to_json(self) -> dict:
        """config.json in the published layout."""
        config = copy.deepcopy(self.published | self.source)
        for place, value in self.fixed().items():
            put(config, place, value)
        for name, place in self.places.items():
            default = getattr(type(self), name)
            if name not in self.optional or getattr(self, name) != default or get(config, place) is not None:
                put(config, place, getattr(self, name))
        return config


BOTH_STACKS = {"final_dropout": True, "positional_embeddings": None}
# A head of toy width, and a random one's dropout
TOY_HEAD = dict(hidden_size=64, dit_layers=4, dit_heads=4, dit_head_dim=16, vl_layers=1)
TOY_HEAD |= dict(vl_heads=4, vl_head_dim=16, max_seq_len=64, dropout=0.0, vl_dropout=0.0)


def get(config: dict, place: str, default=None):
    for key in place.split("."):
        config = config.get(key, default) if isinstance(config, dict) else default
    return config


def put(config: dict, place: str, value) -> None:
    *outer, last = place.split(".")
    for key in outer:
        config[key] = config.get(key) or {}
        config = config[key]
    config[last] = value


# ---- the model -------------------------------------------------------------------------------------------------------


class InstructionTable(nn.Module):
    """The lite backbone: a learned vector per instruction token, in no order, and no images."""

    parts, layers = (), ()

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.prefix = config.prefix
        self.instruction_table = nn.Embedding(config.instruction_vocab, config.vl_width)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = (batch[f"{self.prefix}{key}"] for key in ("input_ids", "attention_mask"))
        return self.instruction_table(ids), mask.bool()

    def restore_buffers(self) -> None:
        pass


PROJECTOR = ("state_encoder", "action_encoder", "action_decoder", "position_embedding")
PROJECTOR = tuple(f"action_head.{part}." for part in PROJECTOR)


class Network(nn.Module):
    """A GR00T of either version: what the scripts call is said at the top of gr00t_n15.py.

    A version says its parts (Config, Backbone, Head), what each flag trains (`groups`) and the names of the tied
    tensors. A backbone has `forward`, `restore_buffers`, `parts` (of transformers) and their `layers`.
    """

    Config: type[HeadConfig]
    Backbone: type[nn.Module]
    Head: type[ActionHead]
    groups: dict[str, tuple[str, ...]]  # flag -> tensors it unfreezes; the rest always trains
    embed: str
    lm_head: str
    tied: bool = False  # lm_head is always written as the embedding is, whatever the source checkpoint had
    not_decayed: tuple[str, ...] = ("bias",)  # parts of names that weight decay spares, beside LayerNorms
    unused: float = 0.0  # what a fresh model writes in tensors that nothing computes with
    dtype_key: str  # where config.json says the dtype
    hints: dict[str, str] = {}  # tensor -> why it may be missing

    def __init__(self, config: HeadConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            fail("--attn-implementation flash_attention_2 needs the flash-attn package; sdpa works everywhere")
        self.config = config
        lite = config.instruction_vocab > 0
        self.backbone = InstructionTable(config) if lite else self.Backbone(config, attn_implementation)
        self.action_head = self.Head(config)
        self.checkpointed = False
        self.carried: dict[str, Tensor] = {}  # stored tensors that nothing computes with, on the CPU
        self.set_trainable()

    @property
    def dtype(self) -> torch.dtype:
        return self.action_head.dtype

    @property
    def device(self) -> torch.device:
        return self.action_head.vlln.weight.device

    # -- forward parts

    def process_backbone(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.action_head.process_backbone(features, mask)

    def vl_features(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> VL features (B, S, vl_width) for `velocity`, mask (B, S). Uses a batch's `backbone_features` if there."""
        if "backbone_features" in batch:
            features, mask = batch["backbone_features"], batch["backbone_attention_mask"]
            if "image_mask" in batch:  # N1.7 as its original stores it: 0 pad, 1 text, 2 image
                mask = mask.long() * (1 + batch["image_mask"].long())
        else:
            features, mask = self.backbone(batch)
        return self.process_backbone(features, mask), mask

    def velocity(self, *inputs: Tensor | None, **more: Tensor | None) -> Tensor:
        """That of `ActionHead`, inputs and all."""
        return self.action_head.velocity(*inputs, **more)

    def kinds_of(self, ids: Tensor) -> Tensor | None:
        """What `velocity` takes as the mask (B, S) with the features of prompts without pads."""
        return None

    # -- what trains

    @classmethod
    def group_of(cls, name: str) -> str:
        """The flag that unfreezes the tensor (or module) of this name, or "always"."""
        return next((flag for flag, prefixes in cls.groups.items() if f"{name}.".startswith(prefixes)), "always")

    def set_trainable(
        self, tune_llm=False, tune_visual=False, tune_projector=True, tune_diffusion_model=True, **more: bool
    ) -> None:
        """Freezes and unfreezes. What no flag names trains under all of them.

        "Projector" means the embodiment layers and the position table; the lite model's table follows `tune_llm`.
        """
        flags = dict(tune_llm=tune_llm, tune_visual=tune_visual, tune_projector=tune_projector)
        self.flags = flags | dict(tune_diffusion_model=tune_diffusion_model, always=True) | more
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.flags[self.group_of(name)])
        self.train(self.training)

    def train(self, mode: bool = True) -> "Network":
        """Frozen parts stay in evaluation mode, which switches the DiT's dropout off when it is frozen."""
        super().train(mode)
        for name, module in self.named_modules():
            if not self.flags[self.group_of(name)] and not (self.checkpointed and name.startswith("backbone.")):
                module.eval()  # the backbone has no dropout, and transformers checkpoints in training mode only
        return self

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Trades a second forward pass of every block for the memory of its activations."""
        self.action_head.model.gradient_checkpointing = enabled
        self.action_head.vl_self_attention.gradient_checkpointing = enabled
        for part in self.backbone.parts:
            if enabled:
                part.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                part.gradient_checkpointing_disable()
        self.checkpointed = enabled
        self.train(self.training)

    # -- speed

    def compile_head(self, mode: str | None = None) -> None:
        """torch.compile of the action head. `mode` is what it does for the velocity, which runs K times a sample.

        "reduce-overhead" replays CUDA graphs; their outputs must be used up before the next call, as a sampler does.
        """
        head = self.action_head
        head.process_backbone = torch.compile(head.process_backbone)  # read in all K calls: never a graph's output
        head.velocity = torch.compile(head.velocity, mode=mode)

    def units(self) -> list[nn.Module]:
        """What FSDP gathers one after the other; the rest of the model is small but for the token embedding."""
        head, backbone = self.action_head, self.backbone
        units = [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]
        units += [head.state_encoder, head.action_encoder, head.action_decoder]  # with the rows of all embodiments
        return [*units, *backbone.layers, backbone]

    # -- files

    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a checkpoint holds but no output depends on."""
        return {} if self.config.instruction_vocab else self.backbone.carried_shapes()

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a checkpoint."""
        return {name: tuple(p.shape) for name, p in self.state_dict().items()} | self.carried_shapes()

    @classmethod
    def plan(
        cls, path: str | Path, *, mask_padding: bool | None = None, attn_implementation: str = "sdpa"
    ) -> tuple["Network", dict[str, tuple[safe_open, str]]]:
        """The model of a checkpoint without its numbers, and where those are: all that can be wrong, in no time."""
        folder = find_folder(path, "model", ELSE, FILES)
        config = read_json(folder / "config.json", Object, HINT)
        vlm = read_json(folder / cls.Config.vlm_file, Object, HINT, optional=True)
        config = cls.Config.from_json(config, vlm)
        if mask_padding is not None:
            config = dataclasses.replace(config, mask_padding=mask_padding)
        try:
            with torch.device("meta"):  # no memory, no initialisation
                model = cls(config, attn_implementation)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:  # heads that do not divide a width
            fail(f"no model can be built as '{folder}/config.json' says: {error}; {HINT}")
        return model, find_tensors(folder, model.layout(), (cls.lm_head, cls.embed), cls.hints)

    @classmethod
    @torch.no_grad()
    def toy(cls, config: HeadConfig, attn_implementation: str = "sdpa") -> "Network":
        """A random model of toy width whose state and positions can be heard: the published scales suit wide rows."""
        model = cls(config, attn_implementation)
        for name, parameter in model.named_parameters():
            if name.endswith(".W"):  # 0.02 suits rows of 2,500 numbers
                parameter.mul_(1 / (0.02 * math.sqrt(parameter.shape[1])))
            elif name.endswith(("position_embedding.weight", "future_tokens.weight")):
                parameter.mul_(0.5 / 0.02)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        backbone_dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = torch.float32,
        mask_padding: bool | None = None,
        attn_implementation: str = "sdpa",
    ) -> "Network":
        """Loads a folder or a hub repository, in evaluation mode and with the default tune flags.

        None keeps the file's dtype and padding. The published file is bfloat16, whose head training wants in float32.
        Anything missing, left over or of another shape ends in one line that names it, and exit code 2.
        """
        model, sources = cls.plan(path, mask_padding=mask_padding, attn_implementation=attn_implementation)
        state = {}
        for name in model.state_dict():
            dtype = backbone_dtype if name.startswith("backbone.") else head_dtype
            file, key = sources[name]
            state[name] = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        model.load_state_dict(state, assign=True)
        for name in model.carried_shapes():
            file, key = sources[name]
            model.carried[name] = file.get_tensor(key)  # a view of the file: its pages are read when it is saved
        model.backbone.restore_buffers()
        return model.eval()

    @torch.no_grad()
    def save_pretrained(
        self, folder: str | Path, state: dict[str, Tensor] | None = None, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        """Writes config.json, the vision-language model's sizes unless they are published, and model*.safetensors.

        `state` replaces `self.state_dict()` where a script has added to the modules (LoRA); any other names or shapes
        than those of the configuration raise ValueError, for no loader would take such a file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state is None else state)
        for name, shape in self.carried_shapes().items():
            if name == self.lm_head and (self.tied or name not in self.carried):  # as a fresh, tied one would be
                state[name] = state[self.embed].clone()
            elif name in self.carried:
                state[name] = self.carried[name].clone()  # it may be a view of a file that is about to be replaced
            else:
                state[name] = torch.full(shape, self.unused, dtype=state[self.embed].dtype)
        with torch.device("meta"):
            layout = type(self)(self.config).layout()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wrong := sorted({name for name, _ in layout.items() ^ shapes.items()}):
            raise ValueError(f"not the tensors of a GR00T checkpoint: {', '.join(wrong)}")
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        files = {"config.json": self.config.to_json() | {self.dtype_key: dtype}}
        vlm = getattr(self.config, self.config.vlm)
        if not self.config.instruction_vocab and vlm != self.config.vlm_sizes:
            files[self.config.vlm_file] = vlm
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        save_torch_state_dict(dict(sorted(state.items())), folder, max_shard_size=max_shard_bytes)


# ---- checkpoint files ------------------------------------------------------------------------------------------------

FLOATS = {"F64", "F32", "F16", "BF16"}
FILES = ["*.json", "*.safetensors"]  # to download
HINT = "a checkpoint folder has config.json and model*.safetensors"
HUB = "nvidia/GR00T-N1.5-3B or nvidia/GR00T-N1.7-3B"
ELSE = f"give a checkpoint folder or a hub id such as {HUB}; the bundled tiny model needs neither"


def find_tensors(
    folder: Path, layout: dict[str, tuple[int, ...]], tied: tuple[str, str], hints: dict[str, str]
) -> dict[str, tuple[safe_open, str]]:
    """Where each tensor of `layout` is: (open file, its name there). Reads headers only, reports all faults at once.

    tied: two names of one tensor. hints: why a tensor may be missing.
    """
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        files = sorted(
            set(read_json(index, TypedDict("Index", {"weight_map": dict[str, str]}), HINT)["weight_map"].values())
        )
        if outside := [file for file in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)]:
            fail(f"'{index}' names '{outside[0][:80]}': weights lie in files of this folder, called ….safetensors")
        if absent := [file for file in files if not (folder / file).exists()]:
            fail(f"'{folder}' lacks {', '.join(absent)}, which {index.name} lists: the download is incomplete")
    elif not (folder / files[0]).exists():
        adapter = (folder / "adapter_config.json").exists()
        reason = "it holds a LoRA adapter alone, merge it into its base model first" if adapter else "no weights there"
        fail(f"'{folder}' has neither model.safetensors nor {index.name}: {reason}")
    found, shapes, dtypes = {}, {}, {}
    for file in files:
        try:
            handle = safe_open(folder / file, "pt")
            for key in handle.keys():
                name = key.removeprefix("_groot_model.")  # LeRobot wraps the model once more
                view = handle.get_slice(key)
                found[name], shapes[name], dtypes[name] = (handle, key), tuple(view.get_shape()), view.get_dtype()
        except (OSError, SafetensorError) as error:
            fail(f"'{folder / file}' cannot be read ({error}): truncated or no safetensors file; fetch it again")
    for name, twin in (tied, tied[::-1]):
        if name in layout and name not in found and twin in found:  # tied when it was written: either may be left out
            found[name], shapes[name], dtypes[name] = found[twin], shapes[twin], dtypes[twin]
    faults = []
    if missing := [name for name in layout if name not in found]:
        faults.append(f"missing: {', '.join(missing)}")
        faults += [f"{name} {why}" for name, why in hints.items() if name in missing]
    if unexpected := [name for name in found if name not in layout]:
        faults.append(f"unexpected: {', '.join(unexpected)}")
    for name in layout:
        if name in found and shapes[name] != layout[name]:
            faults.append(f"{name} is {shapes[name]}, not {layout[name]}")
        elif name in found and dtypes[name] not in FLOATS:
            faults.append(f"{name} is stored as {dtypes[name]}; only float weights can be loaded")
    if faults:
        fail(f"the weights in '{folder}' do not fit its config.json: {'; '.join(faults)}")
    return found
