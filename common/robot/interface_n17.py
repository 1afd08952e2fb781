"""`Interface` of GR00T N1.7, and what it does to numbers, pictures and words: the published processor, without OpenCV.

    relative, absolute             chunks of actions against the state they refer to, joints and poses
    transform_images, patches      resize, crop, jitter;  pixels in the order of the vision tower
    InterfaceN17                   raw observations -> batches, chunks -> raw actions; the names are interface.py's

tests/test_gr00t_n17_data.py compares it with what the reference makes of the same rows.

Dims: N samples, T frames a camera, V cameras, H steps of the model's chunk, h <= H of the robot's, D padded dims.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import fail
from common.robot import transforms
from common.robot.data_configs import ChunkConfig
from common.robot.files import ROOT
from common.robot.interface import Interface
from common.robot.lerobot import STATISTICS, column_statistics
from common.robot.processor_n17 import JITTER, Processor
from common.robot.transforms import LIMITS, from_matrix, pad, to_matrix

# ---- numbers ---------------------------------------------------------------------------------------------------------


def normalize(x: np.ndarray, mode: str, stats: dict, clip: bool = True) -> np.ndarray:
    """Raw -> model units. `stats`: arrays (width,), or (h, width) of relative actions (…, h, width)."""
    if mode not in LIMITS:
        return transforms.normalize(x, mode, stats)
    low, high = (np.asarray(stats[name], np.float64) for name in LIMITS[mode])
    varies = ~np.isclose(high, low)
    # eq: y = 2 (x - low) / (high - low) - 1, clipped to [-1, 1]; 0 where nothing varies
    y = np.where(varies, 2 * (x - low) / np.where(varies, high - low, 1) - 1, 0)
    return y.clip(-1, 1) if clip else y


def unnormalize(y: np.ndarray, mode: str, stats: dict) -> np.ndarray:
    """Model units -> raw; what is beyond [-1, 1] is clipped first, whatever the training did."""
    return transforms.unnormalize(y.clip(-1, 1) if mode in LIMITS else y, mode, stats)


def single(x) -> np.ndarray:
    """Recorded numbers as the reference reads them, in single precision: a joint that hardly moves shows it."""
    return np.asarray(x, np.float32).astype(np.float64)


def pose(x: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """x, y, z and a rotation (…, 9 or 6) -> rotation matrix (…, 3, 3), position (…, 3, 1)."""
    return to_matrix(x[..., 3:], ROTATIONS[form]), x[..., :3, None]


def unposed(rotation: np.ndarray, position: np.ndarray, form: str) -> np.ndarray:
    return np.concatenate([position[..., 0], from_matrix(rotation, ROTATIONS[form])], axis=-1)


ROTATIONS = {"xyz_rot6d": "rotation_6d", "xyz_rotvec": "axis_angle"}
WIDTHS = {"xyz_rot6d": 9, "xyz_rotvec": 6}


def relative(action: np.ndarray, state: np.ndarray, form: str) -> np.ndarray:
    """Actions (N, h, width) as recorded -> relative to the states (N, width) at the time of the observation."""
    state = state[:, None]
    if form == "joint":
        return action - state
    (R, p), (R_s, p_s) = pose(action, form), pose(state, form)
    back = np.swapaxes(R_s, -1, -2)
    # eq: T_rel = T_s^-1 T: R_rel = R_s^T R, p_rel = R_s^T (p - p_s)
    return unposed(back @ R, back @ (p - p_s), form)


def absolute(action: np.ndarray, state: np.ndarray, form: str) -> np.ndarray:
    """The inverse of `relative`; rotations that are none are made orthonormal."""
    state = state[:, None]
    if form == "joint":
        return action + state
    (R, p), (R_s, p_s) = pose(action, form), pose(state, form)
    # eq: T = T_s T_rel
    return unposed(R_s @ R, R_s @ p + p_s, form)


def relative_statistics(windows: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Per step and dim, (h, width) each: `windows` are relative actions (N, width) of all rows, step by step."""
    steps = [column_statistics(x) for x in windows]
    return {name: np.stack([one[name] for one in steps]) for name in STATISTICS}


# ---- images ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(64)
def taps(n_in: int, n_out: int, shrinking: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """An axis of OpenCV's INTER_AREA: which pixels (K, n_out) make each new one, with which weights (K, n_out)."""
    scale = n_in / n_out
    d = torch.arange(n_out, dtype=torch.float64)
    first = (d * scale).floor()
    i = first + torch.arange(math.ceil(scale) + 1 if shrinking else 2)[:, None]
    if shrinking:
        # eq: w = |[d s, (d + 1) s) and [i, i + 1)| / s, the share of the new pixel that the old one covers
        weight = (torch.minimum(i + 1, (d + 1) * scale) - torch.maximum(i, d * scale)).clamp_min(0) / scale
    else:
        # eq: w = (d + 1) - (i + 1) / s, its fraction where positive: not the linear interpolation of pixel centres
        w = d + 1 - (first + 1) / scale
        w = torch.where(w <= 0, 0, w - w.floor())
        weight = torch.stack([1 - w, w])
    return i.clamp_max(n_in - 1).long(), weight.float()


def resize_area(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(…, h, w) uint8 -> (…, height, width) uint8: cv2.resize with INTER_AREA, enlarging to the bit."""
    h, w = x.shape[-2:]
    if (h, w) == (height, width):
        return x
    shrinking = h >= height and w >= width
    (rows, down), (columns, across) = taps(h, height, shrinking), taps(w, width, shrinking)
    if shrinking:
        y = sum(x.float().index_select(-1, i) * weight for i, weight in zip(columns, across))
        y = sum(y.index_select(-2, i) * weight[:, None] for i, weight in zip(rows, down))
        return y.round_().to(torch.uint8)
    # OpenCV enlarges in whole numbers: weights of 11 bits; 4 bits fall after the first pass, 16 after the second
    down, across = ((weight * 2048).round().int() for weight in (down, across))
    y = sum(x.index_select(-1, i).int() * weight for i, weight in zip(columns, across)) >> 4
    y = sum((y.index_select(-2, i) * weight[:, None]) >> 16 for i, weight in zip(rows, down))
    return ((y + 2) >> 2).clamp_(0, 255).to(torch.uint8)


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Size with the same proportions whose short side is `side`."""
    scale = side / min(height, width)
    return round(height * scale), round(width * scale)


def letter_box(x: torch.Tensor) -> torch.Tensor:
    """(…, h, w) -> a square, black where nothing was."""
    down, right = (max(x.shape[-2:]) - n for n in x.shape[-2:])
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


def resized(height: int, width: int, p: Processor) -> tuple[int, int]:
    if p.shortest_image_edge:
        return short_side(height, width, p.shortest_image_edge)
    return tuple(p.image_target_size)


def cropped(height: int, width: int, p: Processor) -> tuple[int, int]:
    share = p.crop_fraction or p.image_crop_size[0] / p.image_target_size[0]
    return int(share * height), int(share * width)


def transform_images(frames: np.ndarray, p: Processor, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Frames of one sample (T V, h, w, 3) uint8 -> (T V, 3, h', w') uint8; one draw for all, None: the centre."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    x = letter_box(x) if p.letter_box_transform else x
    x = resize_area(x, *resized(*x.shape[2:], p))
    height, width = cropped(*x.shape[2:], p)
    down, right = x.shape[2] - height, x.shape[3] - width
    top, left = (down // 2, right // 2) if rng is None else (rng.integers(down + 1), rng.integers(right + 1))
    x = x[:, :, top : top + height, left : left + width]
    x = resize_area(x, *resized(height, width, p))
    if rng is not None and p.random_rotation_angle:
        x = rotate(x, rng.uniform(-p.random_rotation_angle, p.random_rotation_angle))
    if rng is not None and p.color_jitter_params:
        strengths = [p.color_jitter_params.get(name, 0.0) for name in JITTER]
        x = (transforms.jitter(x.float() / 255, rng, strengths) * 255).round().to(torch.uint8)
    return x


def rotate(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """(n, 3, h, w) uint8, turned against the clock about the centre; the picture is mirrored at its borders."""
    (h, w), angle = x.shape[2:], math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[cosine, -sine * h / w, 0], [sine * w / h, cosine, 0]]).expand(len(x), 2, 3)
    places = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), places, padding_mode="reflection", align_corners=False).round().to(torch.uint8)


MOST, LEAST, TOY_EDGE = 16_384, 64, 64  # tokens of a picture, before sides are rounded; a toy's image in pixels


def token_size(height: int, width: int, unit: int, least: int = LEAST) -> tuple[int, int]:
    """Size in pixels as the vision tower takes it: sides are multiples of `unit`, the side of a token."""
    h, w = round(height / unit) * unit, round(width / unit) * unit
    if h * w > MOST * unit**2:
        scale = math.sqrt(MOST * unit**2 / (height * width))
        h, w = (max(unit, math.floor(n * scale / unit) * unit) for n in (height, width))
    elif h * w < least * unit**2:
        scale = math.sqrt(least * unit**2 / (height * width))
        h, w = (math.ceil(n * scale / unit) * unit for n in (height, width))
    return h, w


def patches(images: torch.Tensor, patch: int, merge: int = 2) -> torch.Tensor:
    """(n, 3, h, w) uint8 -> (n * h * w / patch^2, 3, patch^2) uint8, the patches of a token one after the other."""
    n, _, h, w = images.shape
    x = images.reshape(n, 3, h // patch // merge, merge, patch, w // patch // merge, merge, patch)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, patch * patch)


# ---- prompts ---------------------------------------------------------------------------------------------------------

QWEN_TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>")
QWEN_TOKENS += ("<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")
QWEN_TOKENS += ("<|video_pad|>",)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def clean(instruction: str) -> str:
    """As `formalize_language` asks: small letters, no punctuation."""
    return re.sub(r"[^\w\s]", "", instruction.lower())


def prompt(instruction: str, images: int) -> str:
    """The chat text: one user turn, an image token for each image, to be repeated, then the instruction."""
    return f"<|im_start|>user\n{IMAGE * images}{instruction}<|im_end|>\n"


def load_tokenizer(c, source: str | None):
    """The tokenizer of a model: the one of --tokenizer, the bundled one of toys, or the backbone's."""
    default = str(ROOT / "assets" / "tiny-qwen2") if c.toy else "Qwen/Qwen3-VL-2B-Instruct"
    expected = None if c.instruction_vocab else c.image_token_id
    own = dict(added=QWEN_TOKENS, image="<|image_pad|>", of="Qwen3-VL")
    return transforms.load_tokenizer(source or default, expected, **own)


# ---- between a robot and the model -----------------------------------------------------------------------------------


class InterfaceN17(Interface):
    """`Interface` of GR00T N1.7. Its batches: input_ids and attention_mask (N, S), state (N, 1, D), embodiment_id (1,),
    and with cameras image_grid_thw (images, 3) and patches, which `to_device` makes pixel_values of."""

    config: ChunkConfig
    complete = True

    def __init__(self, config: ChunkConfig, metadata: dict, embodiment: int, about=None):
        super().__init__(config, metadata, embodiment, about)
        self.processor: Processor = about.processor if about and about.processor else Processor()
        self.horizon, self.sizes, p = config.horizon, {}, self.processor
        self.reduced = "short side, boxed" if p.letter_box_transform else "short side"
        self.shape(p.max_state_dim, p.max_action_horizon, p.max_action_dim)
        facts, statistics = metadata["modalities"], metadata["statistics"]
        for key, how in config.relative.items():
            (width,), (of,) = facts["action"][key]["shape"], facts["state"][how.state]["shape"]
            if width != of or width != WIDTHS.get(how.form, width):
                want = f"{WIDTHS[how.form]} each" if how.form in WIDTHS else "as many each"
                fail(f"action '{key}' ({width} numbers) relative to state '{how.state}' ({of}) by {how.form}: {want}")
            if (there := len(statistics["relative_action"][key]["min"])) != config.horizon:
                fail(f"the statistics of relative action '{key}' are of {there} steps, the horizon is {config.horizon}")

    def shape(self, state_dim: int, horizon: int, action_dim: int) -> None:
        """Sizes that states and chunks are padded to."""
        self.state_dim, self.chunk_shape = state_dim, (horizon, action_dim)
        if self.horizon > horizon:
            fail(f"the data config has {self.horizon} actions in a chunk (delta_indices), the model {horizon}")
        for kind, most in (("state", state_dim), ("action", action_dim)):
            if (dims := self.dims(kind)) > most:
                fail(f"the data config has {dims} {kind} dims, the model takes {most}")

    def prepare(self, c, tokenizer, instructions: Iterable[str] = (), form: str = "plain") -> None:
        """Takes sizes and tokenizer of the model; the token ids of these instructions are made at once."""
        if form != "plain":
            fail(f"--prompt-form {form} is a quirk of N1.5: leave it away")
        self.shape(c.state_dim, c.action_horizon, c.action_dim)
        if self.embodiment >= c.num_embodiments:
            fail(f"the embodiment's row is {self.embodiment} (embodiment_id.json), the model has {c.num_embodiments}")
        sizes = dict(max_state_dim=c.state_dim, max_action_horizon=c.action_horizon, max_action_dim=c.action_dim)
        if c.toy and not (self.about and self.about.processor):
            sizes |= dict(shortest_image_edge=TOY_EDGE)
        self.processor = self.processor.model_copy(update=sizes)
        if self.about:
            self.about = self.about.model_copy(update={"processor": self.processor})
        self.tokenizer, self.pad_id, self.prompts, self.sizes = tokenizer, tokenizer.pad_token_id, {}, {}
        self.patch, self.merge, self.unit = c.patch_size, c.merge_size, c.patch_size * c.merge_size
        self.least, self.image_size = 1 if c.toy else LEAST, self.processor.shortest_image_edge or 0
        self.vocabulary, self.image_id = c.instruction_vocab or c.vocab_size, c.image_token_id
        self.check_tokens(instructions)

    def fit(self, c, instructions: Iterable[str] = ()) -> None:
        self.prepare(c, load_tokenizer(c, self.about.tokenizer), instructions, self.about.prompt_form)

    # ---- what is seen

    def flat(self, observation: dict[str, Any]) -> dict[str, Any]:
        """From the form of N1.7's own clients too: {"video": {camera: …}, "state": {…}, "language": {…}}."""
        if not isinstance(observation, dict) or not isinstance(observation.get("state"), dict):
            return observation
        flat = {}
        for kind, parts in observation.items():
            prefix = "" if kind == "language" else f"{kind}."
            flat |= {f"{prefix}{key}": x for key, x in parts.items()} if isinstance(parts, dict) else {kind: parts}
        return flat

    @property
    def views(self) -> int:
        """Pictures of an observation: of every camera, at every time that is seen."""
        return len(self.config.video) * len(self.config.video_steps)

    def tokenized(self, instruction: str) -> list[int]:
        """With one id for each picture, which `batch` repeats."""
        words = clean(instruction) if self.processor.formalize_language else instruction
        words = prompt(words, self.views) if self.views else words  # lite: the bare instruction
        ids = self.tokenizer(words, add_special_tokens=False).input_ids
        if self.views and ids.count(self.image_id) != self.views:
            raise ValueError(f"the instruction {instruction[:80]!r} holds image tokens")
        return ids

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture that was recorded in this size."""
        if (height, width) not in self.sizes:
            p = self.processor
            h, w = (max(height, width),) * 2 if p.letter_box_transform else (height, width)
            h, w = token_size(*resized(*cropped(*resized(h, w, p), p), p), self.unit, self.least)
            self.sizes[height, width] = h * w // self.unit**2
        return self.sizes[height, width]

    def prompt_length(self, instruction: str, shape: tuple[int, ...] = ()) -> int:
        return len(self.tokens(instruction)) + (self.views * (self.image_tokens(*shape[1:3]) - 1) if self.views else 0)

    def reduce(self, frame: np.ndarray, side: int) -> np.ndarray:
        """By the first steps of `transform_images`: proportions stay, and the published size is made but once."""
        if not side or min(frame.shape[:2]) <= side:
            return frame
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        x = letter_box(x) if self.processor.letter_box_transform else x
        return resize_area(x, *short_side(*x.shape[1:], side)).permute(1, 2, 0).numpy()

    def images(self, frames: np.ndarray) -> list[torch.Tensor]:
        """Pictures (N, V, height, width, 3) uint8 -> N * V of (3, h, w) uint8: reduced, the centre, resized."""
        side = self.about.cache_side if self.about else 0
        return self.pictures([np.stack([self.reduce(frame, side) for frame in each]) for each in frames])

    def pictures(self, frames: Sequence[np.ndarray], rngs: Sequence | None = None) -> list[torch.Tensor]:
        pairs = zip(frames, rngs or [None] * len(frames))
        return [image for x, rng in pairs for image in transform_images(x, self.processor, rng)]

    def seen(self, frames: list[np.ndarray], state: dict[str, np.ndarray], texts: list[str]) -> dict[str, torch.Tensor]:
        cameras = [self.images(pictures[:, None]) for pictures in frames]  # of each, N * T pictures
        images = [image for same_time in zip(*cameras) for image in same_time]  # sample by sample, time by time
        return self.batch(self.state(state), texts, images or None)

    def state(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        """Raw state (N, width) of each key -> (N, D) float32."""
        p, parts = self.processor, []
        for key, mode in self.config.state.items():
            x, stats = single(raw[key]), self.metadata["statistics"]["state"][key]
            parts.append(normalize(x, mode, stats if mode != "sin_cos" else {}, p.clip_outliers))
        state = np.concatenate(parts, axis=-1) * (not p.exclude_state)
        return pad(state, self.state_dim).astype(np.float32)

    def batch(
        self, state: np.ndarray, instructions: Sequence[str], images: Sequence[torch.Tensor] | None = None, length=0
    ) -> dict[str, torch.Tensor]:
        """What the policy sees: state (N, D), N instructions, N * T * V images (3, h, w) uint8, see `pictures`."""
        images, each = images or [], len(images or []) // len(instructions)
        sizes = [token_size(*image.shape[1:], self.unit, self.least) for image in images]
        counts = np.array([h * w // self.unit**2 for h, w in sizes], int).reshape(len(instructions), each)
        prompts = []
        for text, many in zip(instructions, counts):
            tokens = self.tokens(text)
            repeats = np.ones(len(tokens), int)
            if each:
                repeats[tokens == self.image_id] = many
            prompts.append(np.repeat(tokens, repeats))
        batch = dict(zip(("input_ids", "attention_mask"), self.padded(prompts, length)))
        batch |= {"state": torch.from_numpy(np.ascontiguousarray(state))[:, None].float()}  # (N, 1, D)
        batch |= {"embodiment_id": torch.tensor([self.embodiment])}
        if images:
            fitted = [
                image[None]
                if image.shape[1:] == size
                else F.interpolate(image[None], size, mode="bicubic", antialias=True)
                for image, size in zip(images, sizes)
            ]
            batch["patches"] = torch.cat([patches(image, self.patch, self.merge) for image in fitted])
            batch["image_grid_thw"] = torch.tensor([[1, h // self.patch, w // self.patch] for h, w in sizes])
        return batch

    # ---- what is done

    def units(self, key: str) -> dict:
        return self.metadata["statistics"]["relative_action" if key in self.config.relative else "action"][key]

    def mode(self, key: str) -> str:
        """How an action is normalised: relative ones never by percentiles."""
        mode = self.config.action[key]
        return "min_max" if key in self.config.relative and mode == "q99" else mode

    def encode(self, raw: dict[str, np.ndarray], state: dict[str, np.ndarray], past=None) -> np.ndarray:
        """Raw actions (N, h, width) and raw state (N, width) of each key -> (N, H, D) float32, zeros beyond."""
        parts = []
        for key in self.config.action:
            x, how = single(raw[key]), self.config.relative.get(key)
            x = relative(x, single(state[how.state]), how.form) if how else x
            parts.append(normalize(x, self.mode(key), self.units(key), self.processor.clip_outliers))
        actions = pad(np.concatenate(parts, axis=-1), self.chunk_shape[1])
        return np.pad(actions, ((0, 0), (0, self.chunk_shape[0] - actions.shape[1]), (0, 0))).astype(np.float32)

    def decode(self, chunk: np.ndarray, state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The model's chunk (N, H or fewer, D) and the raw state of each key -> raw actions (N, h or fewer, width)."""
        chunk, raw, start = chunk[:, : self.horizon].astype(np.float64), {}, 0
        for key in self.config.action:
            (width,), steps = self.metadata["modalities"]["action"][key]["shape"], chunk.shape[1]
            how, units = self.config.relative.get(key), self.units(key)
            units = {name: np.asarray(x)[:steps] for name, x in units.items()} if how else units
            x = unnormalize(chunk[..., start : start + width], self.mode(key), units)
            raw[key] = absolute(x, single(state[how.state]), how.form) if how else x
            start += width
        return raw
