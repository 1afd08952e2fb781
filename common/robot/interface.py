"""Between a robot and a model: raw observations to what the model sees, its chunks to raw actions. Here GR00T N1.5's,
the names that every version has; interface_n17.py has N1.7's.

    interface.fit(model.config, instructions)      sizes and tokenizer of the model; before that, units alone
    batch = interface.see(observation)             or of recorded rows: interface.batch(state, texts, images)
    raw = interface.actions(chunk, state)          what a relative action refers to is the raw state

Dims: N observations, V cameras, S prompt tokens, H actions of a chunk, A raw action numbers.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from common.cli import fail
from common.robot import transforms
from common.robot.data_configs import DataConfig
from common.robot.files import ROOT
from common.robot.gr00t_n15 import GR00TConfig
from common.robot.transforms import ACTION_DIM, HORIZON, STATE_DIM, pad


def model_tokenizer(c: GR00TConfig, source: str | None = None):
    """The tokenizer of a model: the one of --tokenizer, the bundled one of tiny and lite, or the published one."""
    toy = c.instruction_vocab or c.image_token_index == GR00TConfig.tiny().image_token_index
    default = str(ROOT / "assets" / "tiny-qwen2") if toy else "lerobot/eagle2hg-processor-groot-n1p5"
    if c.instruction_vocab:
        return transforms.load_tokenizer(source or default, None)
    framed = toy and c.eagle["text_config"]["vocab_size"] > 272  # tiny models of before have no rows for it
    return transforms.load_tokenizer(source or default, c.image_token_index, framed)


def array_of(key: str, observation: dict, rank: int, width: int = 3, times: int = 1) -> tuple[np.ndarray, bool]:
    """An entry of an observation as (B * times, …, width), `rank` axes behind B, and whether it had a batch axis."""
    one = "(height, width, 3)" if rank == 3 else f"({width},)"
    try:
        x = np.asarray(observation[key])
    except (ValueError, TypeError, RuntimeError):  # ragged, or no array at all
        raise ValueError(f"{key} is not an array of shape {one}") from None
    if not rank <= x.ndim <= rank + 2 or x.shape[-1] != width:
        raise ValueError(f"{key} has shape {x.shape}, not {one}, (1, …) with a time axis or (B, 1, …) for a batch")
    found = x.shape[-rank - 1] if x.ndim > rank else 1
    if found != times:
        raise ValueError(f"{key} has {found} times {x.shape}: the policy sees {times}, a batch is (B, {times}, …)")
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

    horizon, chunk_shape, state_dim = HORIZON, (HORIZON, ACTION_DIM), STATE_DIM  # actions of the robot; of the model
    complete = False  # whether a sample needs all its actions: else the last one of the episode is repeated
    reduced = ""  # how frames are reduced, for the names of caches

    def __init__(self, config: DataConfig, metadata: dict, embodiment: int, about=None):
        """metadata: the embodiment's entry of metadata.json; embodiment: its row in the embodiment layers; about: an
        `About`."""
        self.config, self.metadata, self.embodiment, self.about = config, metadata, embodiment, about
        self.prompts: dict[str, np.ndarray] = {}  # instruction -> token ids
        self.pad_id, self.image_size, self.tokenizer = 0, 0, None

    def prepare(self, c: GR00TConfig, tokenizer, instructions: Iterable[str] = (), form: str = "plain") -> None:
        """Takes picture size and tokenizer of the model; the token ids of these instructions are made at once."""
        self.image_size, self.pad_id, self.tokenizer = c.image_size, tokenizer.pad_token_id, tokenizer
        self.prompts, self.image_tokens, self.form = {}, c.tokens_per_image, form
        self.vocabulary = c.instruction_vocab or c.eagle["text_config"]["vocab_size"]
        self.check_tokens(instructions)

    def check_tokens(self, instructions: Iterable[str]) -> None:
        for text in instructions:
            if max(self.tokens(text), default=0) >= self.vocabulary:
                fail(f"the tokenizer makes ids beyond the {self.vocabulary} of the model: --tokenizer is another one's")

    def fit(self, c: GR00TConfig, instructions: Iterable[str] = ()) -> None:
        """Prepares it for a model as policy.json says; what is wrong with its tokenizer ends the program."""
        self.prepare(c, model_tokenizer(c, self.about.tokenizer), instructions, self.about.prompt_form)

    def flat(self, observation: dict[str, Any]) -> dict[str, Any]:
        """An observation in the keys of `read`, in whichever form it came."""
        return observation

    def read(self, observation: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[str], bool]:
        """Checks an observation as `Policy.get_action` takes it -> frames (B, height, width, 3) of each camera (B * T
        where the policy sees T of them), state: key -> (B, width) float64, B instructions, whether there was a batch
        axis. ValueError: in one line."""
        config, metadata = self.config, self.metadata
        language, observation = f"annotation.{config.language}", self.flat(observation)
        wanted = [*(f"video.{key}" for key in config.video), *(f"state.{key}" for key in config.state), language]
        if not isinstance(observation, dict):
            raise ValueError(f"an observation is a dict of {', '.join(wanted)}, not a {type(observation).__name__}")
        faults = [f"lacks {key}" for key in wanted if key not in observation]
        for key in [str(key)[:80] for key in observation if key not in wanted]:
            near = difflib.get_close_matches(key, wanted, 1)
            faults.append(f"has {key!r}, which the policy does not read" + (f" (it reads {near[0]})" if near else ""))
        if faults:
            raise ValueError(f"the observation {'; '.join(faults[:8])}; it reads {', '.join(wanted)}")
        steps = len(config.video_steps)
        arrays = {f"video.{key}": array_of(f"video.{key}", observation, 3, times=steps) for key in config.video}
        for key in config.state:
            (width,) = metadata["modalities"]["state"][key]["shape"]
            arrays[f"state.{key}"] = array_of(f"state.{key}", observation, 1, width)
        facts = {k: (len(x) // (steps if k.startswith("video.") else 1), batched) for k, (x, batched) in arrays.items()}
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
            self.prompts[instruction] = np.array(self.tokenized(instruction), np.int64)
        return self.prompts[instruction]

    def tokenized(self, instruction: str) -> list[int]:
        views = len(self.config.video)
        # a model without cameras (lite) reads the bare instruction
        words = transforms.prompt(instruction, views, self.image_tokens, self.form) if views else instruction
        return self.tokenizer(words, add_special_tokens=False).input_ids

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

    def reduce(self, frame: np.ndarray, side: int) -> np.ndarray:
        """A frame (height, width, 3) uint8 as the cache keeps it: one larger than `side` (0: never) is made smaller."""
        return transforms.shrink(frame, side)

    def images(self, frames: np.ndarray) -> torch.Tensor:
        """Pictures (N, V, height, width, 3) uint8 -> (N * V, 3, size, size) uint8: reduced as the frame cache of the
        training reduces them, the centre, resized."""
        side = self.about.cache_side if self.about else 0
        small = [self.reduce(frame, side) for frame in frames.reshape(-1, *frames.shape[2:])]
        return transforms.transform_images(np.stack(small), self.image_size)

    def pictures(self, frames: Sequence[np.ndarray], rngs: Sequence | None = None) -> torch.Tensor:
        """Recorded frames (V, height, width, 3) of each sample -> what `batch` takes as images. rngs: for crop and
        jitter, one a sample; None: the centre."""
        pairs = zip(frames, rngs or [None] * len(frames))
        return torch.cat([transforms.transform_images(x, self.image_size, rng) for x, rng in pairs])

    def prompt_length(self, instruction: str, shape: tuple[int, ...] = ()) -> int:
        """Tokens of a prompt over recorded frames of this shape."""
        return len(self.tokens(instruction))

    def batch(
        self, state: np.ndarray, instructions: Sequence[str], images: torch.Tensor | None = None, length: int = 0
    ) -> dict[str, torch.Tensor]:
        """What the policy sees: state (N, 64), N instructions, images (N * V, 3, size, size) as `images` gives them.

        Prompts are padded on the left to the longest, or to `length`.
        """
        ids, mask = self.padded([self.tokens(text) for text in instructions], length)
        batch = {
            "eagle_input_ids": ids,
            "eagle_attention_mask": mask,
            "state": torch.from_numpy(np.ascontiguousarray(state))[:, None].float(),
            "embodiment_id": torch.tensor([self.embodiment]),
        }
        return batch if images is None else batch | {"images": images}

    def padded(self, prompts: list[np.ndarray], length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, on the left padded to the longest or to `length`, and the mask: (N, S) int64 each."""
        length = max(length, max(map(len, prompts)))
        ids = np.full((len(prompts), length), self.pad_id)
        for row, tokens in zip(ids, prompts):
            row[length - len(tokens) :] = tokens
        mask = np.arange(length) >= length - np.array([len(tokens) for tokens in prompts])[:, None]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def dims(self, kind: str) -> int:
        """Real dims of the state or of an action, in the model's form. The model takes the first 64 of the state."""
        width = 0
        for key, mode in getattr(self.config, kind).items():
            own = len(transforms.statistics_of(kind, key, self.config, self.metadata)["min"])
            width += own * (2 if mode == "sin_cos" else 1)
        return width

    def encode(self, raw: dict[str, np.ndarray], state: dict[str, np.ndarray], past: np.ndarray) -> np.ndarray:
        """Raw actions (N, H, width) of each key -> (N, H, 32) float32. past (N, H): behind the episode's end, where raw
        repeats its last row. state: raw (N, width), which relative actions refer to (none of this version do)."""
        metadata = self.metadata
        # what an action that is a difference (absolute: false) is past the end: the code of 0
        facts = [(key, metadata["modalities"]["action"][key]) for key in self.config.action]
        still = {key: np.where((past & (not fact["absolute"]))[..., None], 0, raw[key]) for key, fact in facts}
        with np.errstate(invalid="ignore"):
            return pad(transforms.encode("action", still, self.config, metadata), ACTION_DIM).astype(np.float32)

    def actions(self, chunk: np.ndarray, state: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """The model's chunk (N, H, D) -> raw actions (N, H, A) float64, the keys side by side, not clipped.

        state: raw (N, width) of each key, which relative actions refer to.
        """
        return np.concatenate(list(self.decode(chunk, state).values()), axis=-1)

    def decode(self, chunk: np.ndarray, state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
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
