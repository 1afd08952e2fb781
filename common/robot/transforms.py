"""What is done to numbers, pictures and words before the model sees them, and its actions undone: GR00T N1.5's
published specification. tests/test_gr00t_data.py compares it with what the reference's code makes of the same rows.

    encode, decode_actions      raw arrays of each key <-> what the model reads and writes, in a data config's order
    to_matrix, from_matrix      the rotation_type of modality.json
    transform_images            crop, resize and, for training, jitter;  pixel_values: what the vision tower takes
    prompt, load_tokenizer      instruction -> chat text -> token ids

Dims: V cameras, D dims of state or action.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import fail
from common.robot.data_configs import DataConfig

HORIZON, STATE_DIM, ACTION_DIM = 16, 64, 32  # of every published configuration; narrower robots are padded with zeros

# ---- units -----------------------------------------------------------------------------------------------------------


LIMITS = {"min_max": ("min", "max"), "q99": ("q01", "q99")}  # mode -> what becomes -1 and 1


def normalize(x: np.ndarray, mode: str | None, stats: dict[str, np.ndarray]) -> np.ndarray:
    """Raw -> model units, (…, width) float64. `stats`: arrays (width,) named as in metadata.json."""
    s = {name: np.asarray(value, dtype=np.float64).astype(x.dtype) for name, value in stats.items()}
    if mode in LIMITS:
        low, high = (s[name] for name in LIMITS[mode])
        varies = low != high
        # eq: y = 2 (x - low) / (high - low) - 1
        y = 2 * ((x - low) / np.where(varies, high - low, 1)) - 1
        return np.where(varies, y, 0) if mode == "min_max" else np.where(varies, y, x).clip(-1, 1)
    if mode == "mean_std":
        # eq: y = (x - mean) / std
        return np.where(s["std"] != 0, (x - s["mean"]) / np.where(s["std"] != 0, s["std"], 1), x)
    if mode == "scale":
        largest = np.maximum(np.abs(s["min"]), np.abs(s["max"]))
        return np.where(largest != 0, x / np.where(largest != 0, largest, 1), 0)
    if mode == "binary":
        return (x > 0.5).astype(x.dtype)
    return np.concatenate([np.sin(x), np.cos(x)], axis=-1) if mode == "sin_cos" else x


def unnormalize(y: np.ndarray, mode: str | None, stats: dict[str, np.ndarray]) -> np.ndarray:
    """Model units -> raw, the inverse of `normalize` without its clipping."""
    s = {name: np.asarray(value, dtype=np.float64).astype(y.dtype) for name, value in stats.items()}
    if mode in LIMITS:
        low, high = (s[name] for name in LIMITS[mode])
        # eq: x = (y + 1) / 2 (high - low) + low
        return (y + 1) / 2 * (high - low) + low
    if mode == "mean_std":
        return y * s["std"] + s["mean"]
    return (y > 0.5).astype(y.dtype) if mode == "binary" else y


def rotation_of(kind: str, key: str, config: DataConfig, metadata: dict) -> tuple[str, str] | None:
    """(recorded form, model's form) of a key whose rotation is converted."""
    source = metadata["modalities"][kind][key].get("rotation_type")  # N1.7 says nothing of it
    target = config.rotations.get(f"{kind}.{key}")
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


# ---- rotations -------------------------------------------------------------------------------------------------------


def bounds(kind: str) -> tuple[float, int]:
    """Largest absolute value and width of a form of rotation."""
    return {"matrix": (1, 9), "rotation_6d": (1, 6), "quaternion": (1, 4)}.get(kind, (np.pi, 3))


def to_matrix(x: np.ndarray, kind: str) -> np.ndarray:
    """Rotations (…, width) -> (…, 3, 3). Quaternions have the real part first; 6D are the first two rows."""
    if kind == "matrix":
        return x.reshape(*x.shape[:-1], 3, 3)
    if kind == "rotation_6d":
        a, b = x[..., :3], x[..., 3:]
        a = a / np.linalg.norm(a, axis=-1, keepdims=True)
        b = b - (a * b).sum(-1, keepdims=True) * a
        b = b / np.linalg.norm(b, axis=-1, keepdims=True)
        return np.stack([a, b, np.cross(a, b)], axis=-2)
    if kind == "axis_angle":
        angle = np.linalg.norm(x, axis=-1, keepdims=True)
        # eq: q = (cos(|w| / 2), sin(|w| / 2) w / |w|), and sinc is defined at 0
        return to_matrix(np.concatenate([np.cos(angle / 2), np.sinc(angle / 2 / np.pi) / 2 * x], axis=-1), "quaternion")
    if kind == "quaternion":
        w, i, j, k = np.moveaxis(x / np.linalg.norm(x, axis=-1, keepdims=True), -1, 0)
        rows = [
            [1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)],
            [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)],
            [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)],
        ]
        return np.moveaxis(np.array(rows), (0, 1), (-2, -1))
    # eq: R = R_a(x_0) R_b(x_1) R_c(x_2) for the axes named by the last three letters (r: x, p: y, y: z)
    result = np.eye(3)
    for n, letter in enumerate(kind[-3:]):
        axis_angle = np.zeros_like(x)
        axis_angle[..., "rpy".index(letter)] = x[..., n]
        result = result @ to_matrix(axis_angle, "axis_angle")
    return result


def from_matrix(m: np.ndarray, kind: str) -> np.ndarray:
    """(…, 3, 3) -> (…, width), the inverse of `to_matrix`."""
    if kind == "matrix":
        return m.reshape(*m.shape[:-2], 9)
    if kind == "rotation_6d":
        return m[..., :2, :].reshape(*m.shape[:-2], 6)
    if kind == "axis_angle":
        q = from_matrix(m, "quaternion")
        sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
        half = np.arctan2(sine, q[..., :1])
        return q[..., 1:] * 2 / np.sinc(half / np.pi)
    if kind == "quaternion":
        # q q^T from the matrix's entries; its row with the largest diagonal is q up to length
        xx, yy, zz = (m[..., i, i] for i in range(3))
        wi, wj, wk = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
        ij, ik, jk = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
        rows = [
            [1 + xx + yy + zz, wi, wj, wk],
            [wi, 1 + xx - yy - zz, ij, ik],
            [wj, ij, 1 - xx + yy - zz, jk],
            [wk, ik, jk, 1 - xx - yy + zz],
        ]
        outer = np.moveaxis(np.array(rows), (0, 1), (-2, -1))  # (…, 4, 4)
        best = np.diagonal(outer, axis1=-2, axis2=-1).argmax(-1)
        q = np.take_along_axis(outer, best[..., None, None], axis=-2)[..., 0, :]
        q = q / np.linalg.norm(q, axis=-1, keepdims=True)
        return np.where(q[..., :1] < 0, -q, q)
    a, b, c = ("rpy".index(letter) for letter in kind[-3:])
    sign = 1 if (b - a) % 3 == 1 else -1
    first, third = np.arctan2(-sign * m[..., b, c], m[..., c, c]), np.arctan2(-sign * m[..., a, b], m[..., a, a])
    return np.stack([first, np.arcsin((sign * m[..., a, c]).clip(-1, 1)), third], axis=-1)


# ---- images ----------------------------------------------------------------------------------------------------------

CROP, JITTER = 0.95, (0.3, 0.4, 0.5, 0.08)  # brightness, contrast, saturation, hue


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
    turns = [(h + n).remainder_(6) for n in (5, 3, 1)]
    return torch.stack([high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in turns], dim=1)


def jitter(x: torch.Tensor, rng: np.random.Generator, strengths: Sequence[float] = JITTER) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of (V, 3, H, W) in [0, 1], in random order, one draw for all views."""
    factors = [rng.uniform(1 - s, 1 + s) for s in strengths[:3]] + [rng.uniform(-strengths[3], strengths[3])]
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


def shrink(frame: np.ndarray, side: int) -> np.ndarray:
    """A frame (H, W, 3) uint8 as the cache keeps it: one larger than `side` (0: never) becomes (side, side, 3)."""
    if not side or max(frame.shape[:2]) <= side:
        return frame
    x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return x[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


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


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as the model takes it: images as its pixel values."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "images" in batch:
        batch["eagle_pixel_values"] = pixel_values(batch.pop("images"))
    if "patches" in batch:  # N1.7's: (patches, 3, pixels), the one frame for both of a patch's times
        values = pixel_values(batch.pop("patches"))
        batch["pixel_values"] = values[:, :, None].expand(-1, -1, 2, -1).flatten(1)
    return batch


# ---- prompts ---------------------------------------------------------------------------------------------------------

IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")
HUB = {"Qwen3": "lerobot/eagle2hg-processor-groot-n1p5, Qwen/Qwen3-1.7B", "Qwen3-VL": "Qwen/Qwen3-VL-2B-Instruct"}
EAGLE_TOKENS = (*IMAGE_TOKENS, "<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>", "<interval>", "</interval>")
FRAME = ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "<image 1>", "<image 2>", "<image 3>")


def prompt(instruction: str, views: int, image_tokens: int, form: str = "plain") -> str:
    """The chat text: all cameras, `image_tokens` placeholders each, then the instruction."""
    images = "".join(f"<image {i + 1}><img>{'<IMG_CONTEXT>' * image_tokens}</img>" for i in range(views))
    instruction = str([instruction]) if form == "bracketed" else instruction
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


def load_tokenizer(
    source: str, image_token_id: int | None, frame=False, added=EAGLE_TOKENS, image=IMAGE_TOKENS[0], of="Qwen3"
):
    """A Qwen tokenizer with the image tokens; `image_token_id` is what the model takes for a place of an image.

    frame: one id more for each piece of the chat text around an instruction, half of what a model that reads bytes
    would have to read. added: tokens that the plain one lacks, in the order of their ids; image: the one for an image;
    of: for messages.
    """
    from transformers import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source, trust_remote_code=False)
        if len(tokenizer) < 256:  # nothing found makes an empty one
            raise ValueError("it has no vocabulary, or the hub cannot be reached")
    except Exception as error:  # offline, no such repository, no vocabulary in the folder
        reason = str(error).splitlines()[0]
        fail(
            f"no tokenizer in '{source}' ({reason}); the weights come without one: give --tokenizer a folder or hub id "
            f"with the vocab.json and merges.txt of {of} ({HUB[of]})"
        )
    # a plain Qwen3 tokenizer lacks these: appended in this order they get the ids the model was trained with
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    if frame:
        tokenizer.add_tokens(list(FRAME))
    found = tokenizer.convert_tokens_to_ids(image)
    if image_token_id is not None and found != image_token_id:
        fail(f"tokenizer '{source}' gives {image} the id {found}, the model expects {image_token_id}")
    return tokenizer
