"""What a trained GR00T needs to act, and the policy itself: raw observations in, chunks of raw actions out.

    policy = Policy.from_pretrained("runs/gr00t_finetune/RUN")
    actions = policy.get_action({"video.front": frame, "state.arm": joints, "annotation.task": "lift it"})

The scripts evaluate through the same `Policy`, by their own sampler, and the server answers with it: there is one road
from an observation to an action. No simulator is loaded from here: fetch_robot.py has the one there is.

Dims: B observations, H actions of a model's chunk, h <= H of the robot's (N1.5: 16 both), D padded action dims.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from safetensors.torch import save_file
from typing_extensions import TypedDict

from common.checkpoint import find_checkpoint, trainer_file
from common.cli import Count, Name, Natural, NonNegative, Text, fail, flag
from common.files import Object, read_json
from common.parallel import gathered
from common.robot import processor_n17
from common.robot.data_configs import ChunkConfig, DataConfig, find_data_config
from common.robot.files import find_folder
from common.robot.gr00t import ELSE, FILES, HINT, Network
from common.robot.gr00t_n15 import EMBODIMENTS, GR00T
from common.robot.gr00t_n17 import GR00TN17
from common.robot.interface import Interface
from common.robot.interface_n17 import InterfaceN17
from common.robot.lerobot import STATISTICS
from common.robot.lora import LoRALinear, adapter_tensors, add_lora, merged
from common.robot.processor_n17 import Numbers, Processor
from common.robot.transforms import ACTION_DIM, HORIZON, STATE_DIM, to_device
from common.streams import stream

OPEN = ConfigDict(extra="allow")  # another program may write more
Version = Literal["n15", "n17"]  # of GR00T
NETWORKS: dict[Version, type[Network]] = {"n15": GR00T, "n17": GR00TN17}


@dataclass
class GR00TArgs:
    """Flags of the scripts that train a GR00T."""

    # model
    model_path: Text | None = None
    """a folder in the published layout, a run folder, or a hub id such as nvidia/GR00T-N1.5-3B or
    nvidia/GR00T-N1.7-3B"""
    data_config: Text | None = None  # what the policy sees, see common/robot/data_configs.py; default: the checkpoint's
    embodiment_tag: Name | None = None
    """whose rows of the embodiment layers to use: a pretrained robot's (gr1, oxe_droid, agibot_genie1 of N1.5), or the
    free ones of new_embodiment (default)"""
    tokenizer: Text | None = None
    """folder or hub id of the tokenizer; default: bundled for toy models, for N1.5
    lerobot/eagle2hg-processor-groot-n1p5, for N1.7 Qwen/Qwen3-VL-2B-Instruct"""
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
    data_config: Annotated[ChunkConfig | DataConfig, Field(union_mode="left_to_right")]  # keys in order, their modes
    embodiment_tag: Name = "new_embodiment"
    horizon: Count = HORIZON
    image_size: Natural = 0  # what the model sees of a frame, in pixels; 0: nothing
    cache_side: Natural = 256  # larger frames are first reduced to this, as they were for training; 0: they are not
    prompt_form: Literal["plain", "bracketed"] = "plain"
    tokenizer: Text | None = None  # folder or hub id; None: the bundled one of a toy model, or the published one
    fps: NonNegative | None = None  # of the recordings
    image_mean: dict[str, Annotated[list[FiniteFloat], Len(3, 3)]] = {}  # camera -> mean R, G, B, 0 to 255
    # of N1.7, which the reference's files hold: not written to policy.json
    processor: Processor | None = Field(default=None, exclude=True)  # None: the published values
    rows: dict[str, Natural] = Field(default={}, exclude=True)  # embodiment_id.json


class StoredArgs(TypedDict, total=False):
    """What an evaluation takes from the settings of the run that made a checkpoint. Its data config is not among them:
    a name may stand for code."""

    __pydantic_config__ = ConfigDict(strict=True)
    dataset_path: list[Text] | None
    embodiment_tag: Name | None
    val_episodes: Natural | None
    batch_size: Count | None


class Trainer(TypedDict, total=False):
    args: StoredArgs


class Meaning(TypedDict):
    """What metadata.json says of a key of state or action."""

    __pydantic_config__ = OPEN
    absolute: bool
    rotation_type: str | None
    continuous: bool
    shape: Annotated[list[Count], Len(1, 1)]


class Modalities(TypedDict, total=False):
    __pydantic_config__ = OPEN
    video: dict[str, Object]
    state: dict[str, Meaning]
    action: dict[str, Meaning]


class Embodiment(TypedDict, total=False):
    """An entry of metadata.json."""

    __pydantic_config__ = OPEN
    # state, action or relative_action -> key -> min, … -> a number a dim; relative: a list of them a step
    statistics: dict[str, dict[str, dict[str, Numbers]]]
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
    version: Version = "n15"
    processor: Processor | None = None  # of N1.7: processor_config.json
    rows: dict[str, int] = field(default_factory=dict)  # embodiment tag -> row of the embodiment layers

    def __post_init__(self):
        self.rows = self.rows or {"n15": EMBODIMENTS, "n17": processor_n17.EMBODIMENTS}[self.version]

    @property
    def network(self) -> type[Network]:
        return NETWORKS[self.version]

    def row(self, tag: str) -> int:
        """The row of an embodiment's layers."""
        if tag not in self.rows:
            fail(f"embodiment tag '{tag}' is unknown to '{self.source}'; there are {', '.join(self.rows)}")
        return self.rows[tag]

    def find_config(self, name: str, modality: dict) -> DataConfig:
        """What --data-config means for this version: see `find_data_config`, `find_chunk_config`."""
        if self.version == "n15":
            return find_data_config(name, modality)
        return processor_n17.find_chunk_config(name, modality, self.processor or Processor())

    def describe(self, name: str, config: DataConfig, tag: str, **more) -> About:
        """The policy.json of a policy that is trained from this checkpoint."""
        more |= dict(processor=self.processor, rows=self.rows, horizon=config.horizon)
        return About(name=name, data_config=config, embodiment_tag=tag, **more)

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
        for kind, key in keys + [("relative_action", key) for key in config.relative]:
            numbers, meant = entry.get("statistics", {}).get(kind, {}).get(key, {}), kind.removeprefix("relative_")
            if not set(STATISTICS) <= set(numbers):
                fail(f"checkpoint '{self.source}' has no statistics of {kind}.{key} for {tag}: another data config?")
            if key not in entry.get("modalities", {}).get(meant, {}):
                fail(f"checkpoint '{self.source}' does not describe {kind}.{key} for {tag} in its metadata.json")
            shape = (width,) = tuple(entry["modalities"][meant][key]["shape"])
            shape = shape if kind == meant else (config.horizon, width)
            file = "metadata.json" if self.version == "n15" else "statistics.json"
            for name in STATISTICS:
                if (there := np.array(numbers[name], dtype=object).shape) != shape:
                    there, wanted = (" x ".join(map(str, x)) for x in (there, shape))
                    found = f"{there} numbers of {name} for the {wanted} of {kind}.{key}"
                    fail(f"checkpoint '{self.source}' has {found} ({tag}) in its {file}")
        return entry

    def acts(self, data_config=None, embodiment_tag=None, tokenizer=None, modality: dict | None = None) -> About:
        """How this checkpoint sees and acts: as its own files say, or where they do not as these flags say.

        modality: of the data set that it meets, for `--data-config auto`. A data config that contradicts the files is
        refused.
        """
        about = self.about
        tag = embodiment_tag or (about.embodiment_tag if about else self.likely_tag())
        config = self.published(tag) if self.processor else about.data_config if about else None
        if self.processor and not (config or data_config):
            have = ", ".join(self.processor.modality_configs) or "none"
            fail(
                f"checkpoint '{self.source}' has no keys for --embodiment-tag {tag} (it has: {have}); give a tag it has"
            )
        if not (config or data_config):
            fail(
                f"checkpoint '{self.source}' does not say what it sees and in which order (it has no "
                "experiment_cfg/policy.json: an older run's, or another program's): give --data-config, and "
                "--embodiment-tag and --tokenizer where they were not the defaults"
            )
        if data_config:
            own = dict(video={}, state={}, action={}, language={config.language: ""} if config else {})
            own |= self.metadata.get(tag, {}).get("modalities", {})  # metadata.json keeps the order of its training
            given = self.find_config(data_config, modality or own)
            given = given if self.sees else replace(given, video=())
            if config and (difference := config.difference(given)):
                what = f"--data-config {data_config} is not what checkpoint '{self.source}' was trained with"
                fail(f"{what}: {difference}; leave the flag away")
            config = given
        if fault := config.fault():
            fail(f"checkpoint '{self.source}': its data config {fault}")
        if about is None:
            side = {"cache_side": self.processor.shortest_image_edge or 0} if self.processor else {}
            return self.describe(data_config or tag, config, tag, tokenizer=tokenizer, **side)
        if about.horizon != config.horizon and tag == about.embodiment_tag:
            chunks = f"chunks of {about.horizon}, not {config.horizon} actions"
            fail(f"checkpoint '{self.source}': its policy.json has {chunks}")
        own = dict(data_config=config, embodiment_tag=tag, tokenizer=tokenizer or about.tokenizer)
        own |= dict(horizon=config.horizon, processor=self.processor, rows=self.rows)
        return about.model_copy(update=own)

    def likely_tag(self) -> str:
        """The embodiment of a checkpoint that does not name it: its only one, or new_embodiment."""
        only = list(self.metadata) if self.version == "n17" else []
        return only[0] if len(only) == 1 else "new_embodiment"

    def published(self, tag: str) -> DataConfig | None:
        """What processor_config.json says that an embodiment sees and does."""
        keys = self.processor.modality_configs.get(tag) if self.processor else None
        if keys is None:
            return None
        config = processor_n17.config_of(keys, self.processor, f"checkpoint '{self.source}'")
        return config if self.sees else replace(config, video=())

    def interface(self, about: About) -> Interface:
        config, tag = about.data_config, about.embodiment_tag
        return make_interface(config, self.embodiment(tag, config), self.row(tag), about)


def make_interface(config: DataConfig, metadata: dict, embodiment: int, about: About | None = None) -> Interface:
    """The interface of the version that a data config is of."""
    kind = InterfaceN17 if isinstance(config, ChunkConfig) else Interface
    return kind(config, metadata, embodiment, about)


def model_folder(path: str) -> Path:
    """The folder that --model-path means: a run's best checkpoint (or its last), a folder itself, a hub id's copy."""
    if (Path(path) / "checkpoints").is_dir():
        return find_checkpoint(path, best=True)
    return find_folder(path, "model", ELSE, FILES)


def read_stored(path: str) -> Stored:
    """Reads config.json, and where they are trainer.json, experiment_cfg/metadata.json, policy.json, and N1.7's
    processor_config.json, statistics.json, embodiment_id.json: data, no code."""
    folder = model_folder(path)
    config = read_json(folder / "config.json", Object, HINT)
    backbone, extra = config.get("backbone_cfg"), folder / "experiment_cfg"
    trainer = read_json(folder / "trainer.json", Trainer, HINT, optional=True) or {}
    metadata = read_json(extra / "metadata.json", dict[str, Embodiment], HINT, optional=True) or {}
    about = read_json(extra / "policy.json", About, "give --data-config once the file is gone", optional=True)
    said = dict(source=path, folder=folder, args=trainer.get("args", {}), about=about)
    if config.get("model_type") != "Gr00tN1d7":
        sees = not (isinstance(backbone, dict) and backbone.get("instruction_vocab"))
        return Stored(**said, metadata=metadata, sees=sees)
    units = processor_n17.read_units(folder)
    for tag, entry in units.items():  # cameras, and what a key is, if it was one of these scripts
        entry["modalities"] |= metadata.get(tag, {}).get("modalities", {})
    found = dict(processor=processor_n17.read_processor(folder), rows=processor_n17.read_rows(folder))
    return Stored(**said, **found, metadata=units, sees=not config.get("instruction_vocab"), version="n17")


def trained_parts(model: Network, args: GR00TArgs) -> dict[str, LoRALinear]:
    """Freezes what the flags leave frozen, adds the adapters they ask for and returns those."""
    c, sizes = model.config, (HORIZON, STATE_DIM, ACTION_DIM)
    if c.version == "n15" and (c.action_horizon, c.state_dim, c.action_dim) != sizes:
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
    folder: Path | None, model: Network, adapters: dict[str, LoRALinear], metadata: dict, about: About | None = None
) -> None:
    """Writes the published layout, adapters merged. Every process calls it, those that do not write with None."""
    with merged(model, adapters):
        weights = gathered(model.state_dict(), keep=folder is not None)
        if folder is None:
            return
        model.save_pretrained(folder, weights)
    (folder / "experiment_cfg").mkdir()
    if about and isinstance(about.data_config, ChunkConfig):
        processor_n17.write_processor(folder, about, metadata)
        facts = {tag: entry["modalities"] for tag, entry in metadata.items()}  # of another program's: shapes alone
        whole = {
            tag: all("absolute" in x for x in (*f["state"].values(), *f["action"].values())) for tag, f in facts.items()
        }
        metadata = {tag: {"modalities": facts[tag]} for tag in facts if whole[tag]}
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    if about:
        (folder / "experiment_cfg" / "policy.json").write_text(about.model_dump_json(indent=1) + "\n")
    if adapters:
        save_file(adapter_tensors(adapters), trainer_file(folder, "lora.safetensors"))


# ---- the policy ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def euler(model: Network, batch: dict[str, torch.Tensor], noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Noise (B, H, D) -> actions (B, H, D) in model units: `sample_actions` of gr00t_finetune.py, to the last bit."""
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
        self,
        model: Network,
        interface: Interface,
        sampler: Callable = euler,
        denoising_steps: int = 4,
        amp: bool = False,
    ):
        """interface: prepared. sampler(model, batch, noise, num_steps) -> actions (B, H, D). amp: in bfloat16."""
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
        stored = read_stored(str(folder))
        if embodiment_tag:
            stored.row(embodiment_tag)  # or why not
        interface = stored.interface(stored.acts(data_config, embodiment_tag, tokenizer))
        # what is wrong with the files is found before they are loaded
        interface.fit(stored.network.plan(stored.folder)[0].config)
        amp = device != "cpu" and torch.cuda.is_available()
        model = stored.network.from_pretrained(
            stored.folder, device="cuda" if amp else "cpu", backbone_dtype=torch.bfloat16 if amp else torch.float32
        )
        return cls(model, interface, denoising_steps=denoising_steps, amp=amp)

    def get_action(self, observation: dict[str, Any], seed: int | None = None) -> dict[str, np.ndarray]:
        """{"action.<key>": (h, width) float64} in raw units, the first action for now.

        observation: for every camera "video.<camera>", (height, width, 3) uint8 RGB of any size; for every key of the
        state "state.<key>", (width,) numbers as recorded; "annotation.<language key>", a string. A leading time axis of
        length 1 is allowed, and a batch axis before that, on all of them: then the answer is (B, h, width).
        seed: of x_0; the same seed and observation give the same actions. None: torch's generator.
        What is missing, unknown or of another shape, type or range: ValueError, in one line.
        """
        *found, batched = self.interface.read(observation)
        chunk = self.chunk(self.interface.seen(*found), self.noise(len(found[2]), seed)).numpy()
        if not np.isfinite(chunk).all():
            raise ValueError("the policy's actions are not finite: its weights are damaged")
        actions = {f"action.{key}": x for key, x in self.interface.decode(chunk, found[1]).items()}
        return actions if batched else {key: x[0] for key, x in actions.items()}

    def modality_config(self) -> dict[str, dict[str, list]]:
        """What is read and written: video, state, action, language -> delta_indices (rows from now), modality_keys."""
        config = self.interface.config
        rows = {"action": list(range(config.horizon)), "video": list(config.video_steps)}
        keys = {kind: [f"{kind}.{key}" for key in getattr(config, kind)] for kind in ("video", "state", "action")}
        keys["language"] = [f"annotation.{config.language}"]
        return {kind: {"delta_indices": rows.get(kind, [0]), "modality_keys": keys[kind]} for kind in keys}

    def noise(self, count: int, seed: int | None = None) -> torch.Tensor:
        """x_0 (count, H, D); with a seed that of observation i depends on the seed and i alone."""
        if seed is None:
            return torch.randn(count, *self.interface.chunk_shape)
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed {str(seed)[:40]!r}: a number from 0 on")
        rngs = [stream(seed, "action", i) for i in range(count)]
        shape = self.interface.chunk_shape
        return torch.from_numpy(np.stack([r.standard_normal(shape, dtype=np.float32) for r in rngs]))

    @torch.no_grad()
    def chunk(self, batch: dict[str, torch.Tensor], noise: torch.Tensor, num_steps: int | None = None) -> torch.Tensor:
        """The policy's actions (B, H, D) from x_0 `noise` (B, H, D), in model units, on the CPU."""
        self.model.eval()
        device = self.model.device
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            return self.sampler(self.model, batch, noise.to(device), num_steps or self.denoising_steps).cpu()
