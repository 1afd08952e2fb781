"""What GR00T N1.7 sees of a robot and how its actions are read: the published processor, without OpenCV.

    Processor                      processor_config.json: sizes, rules, each embodiment's keys
    config_of, modalities_of       an embodiment's keys there <-> a ChunkConfig;  find_chunk_config: --data-config
    relative, absolute             chunks of actions against the state they refer to, joints and poses
    transform_images, patches      resize, crop, jitter;  pixels in the order of the vision tower
    InterfaceN17                   raw observations -> batches, chunks -> raw actions; the names are interface.py's

tests/test_gr00t_n17_data.py compares it with what the reference makes of the same rows.

Dims: N samples, T frames a camera, V cameras, H steps of the model's chunk, h <= H of the robot's, D padded dims.
"""

import functools
import json
import math
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval, Len
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from common.cli import Count, Natural, NonNegative, Share, Text, fail, in_words
from common.files import read_json
from common.robot import transforms
from common.robot.data_configs import CHUNK_CONFIGS, ChunkConfig, Relative, own_config
from common.robot.files import ROOT
from common.robot.interface import Interface
from common.robot.lerobot import STATISTICS, column_statistics
from common.robot.transforms import LIMITS, from_matrix, pad, to_matrix

EMBODIMENTS = {  # tag -> row of the embodiment layers; embodiment_id.json goes before it
    **{"simpler_env_google": 0, "simpler_env_widowx": 1, "libero_sim": 2, "new_embodiment": 10},
    "oxe_droid_relative_eef_relative_joint": 24,
    "real_g1_relative_eef_relative_joints": 25,
    "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
    **{f"real_r1_pro_sharpa_relative_eef{who}": 26 for who in ("", "_human", "_maxinsights", "_mecka")},
    **{"xdof_relative_eef_relative_joint": 27, "xdof_relative_eef_relative_joint_subtask": 27},
}
FILES = ("processor_config.json", "statistics.json", "embodiment_id.json")
HINT = "GR00T N1.7 keeps what its robots see and do there"

# ---- the published files ---------------------------------------------------------------------------------------------

Name = Annotated[str, BeforeValidator(lambda x: x.upper() if isinstance(x, str) else x)]
Row = Annotated[int, Interval(ge=-1000, le=1000)]
Side = Annotated[int, Interval(ge=16, le=4096)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class ActionConfig(Strict):
    rep: Name = "ABSOLUTE"
    type: Name = "NON_EEF"
    format: Name = "DEFAULT"
    state_key: Text | None = None


class Modality(Strict):
    """Which rows from now, and which keys of meta/modality.json."""

    delta_indices: Annotated[list[Row], Len(1, 1000)]
    modality_keys: Annotated[list[Text], Len(0, 1000)]
    sin_cos_embedding_keys: list[Text] | None = None
    mean_std_embedding_keys: list[Text] | None = None
    action_configs: list[ActionConfig] | None = None


class Modalities(Strict):
    """What an embodiment sees and does."""

    video: Modality | None = None
    state: Modality
    action: Modality
    language: Modality


JITTER = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 0.08}


class Processor(Strict):
    """`processor_kwargs` of processor_config.json; keys that are not used here are written again."""

    modality_configs: dict[str, Modalities] = {}
    image_crop_size: Annotated[list[Side], Len(2, 2)] | None = [230, 230]
    image_target_size: Annotated[list[Side], Len(2, 2)] | None = [256, 256]
    use_albumentations: bool = True
    random_rotation_angle: NonNegative | None = None
    color_jitter_params: dict[Literal["brightness", "contrast", "saturation", "hue"], NonNegative] | None = JITTER
    shortest_image_edge: Side | None = 256
    crop_fraction: Annotated[float, Interval(gt=0, le=1)] | None = 0.95
    letter_box_transform: bool = False
    model_name: str = "nvidia/Cosmos-Reason2-2B"
    model_type: Literal["qwen"] = "qwen"
    formalize_language: bool = True
    max_state_dim: Count = 132
    max_action_dim: Count = 132
    max_action_horizon: Count = 40
    use_percentiles: bool = True
    use_mean_std: bool = False
    clip_outliers: bool = True
    apply_sincos_state_encoding: bool = False
    use_relative_action: bool = True
    exclude_state: bool = False
    state_dropout_prob: Share = 0.2

    def fault(self) -> str:
        """What of it is not done here; empty if nothing is."""
        if not self.use_albumentations:
            return "use_albumentations false: the transforms of torchvision are not done here"
        sizes = self.image_crop_size and self.image_target_size
        return "" if sizes or (self.crop_fraction and self.shortest_image_edge) else "no size of images"


FORMS = {"joint": ("NON_EEF", "DEFAULT"), "xyz_rot6d": ("EEF", "XYZ_ROT6D"), "xyz_rotvec": ("EEF", "XYZ_ROTVEC")}


def config_of(keys: Modalities, p: Processor, who: str = "") -> ChunkConfig:
    """An embodiment's keys as a data config. What is not done here ends the program; who: has it, for messages."""

    def rules(part: Modality, angles: bool) -> dict[str, Any]:
        default = "mean_std" if p.use_mean_std else "q99" if p.use_percentiles else "min_max"
        found = dict.fromkeys(part.modality_keys, default)
        found |= {key: "mean_std" for key in part.mean_std_embedding_keys or () if key in found}
        return found | {key: "sin_cos" for key in (angles and part.sin_cos_embedding_keys) or () if key in found}

    steps, how, relative = keys.action.delta_indices, keys.action.action_configs or [], {}
    if steps != list(range(len(steps))) or keys.state.delta_indices != [0] or keys.language.delta_indices != [0]:
        fail(f"{who}: delta_indices must be [0] for state and language, and 0, 1, 2, … for the action")
    if len(keys.language.modality_keys) != 1:
        fail(f"{who} has {len(keys.language.modality_keys)} language keys: one is read")
    if how and len(how) != len(keys.action.modality_keys):
        fail(f"{who} has {len(how)} action_configs for {len(keys.action.modality_keys)} keys of the action: one each")
    for key, one in zip(keys.action.modality_keys, how):
        form = {kind: form for form, kind in FORMS.items()}.get((one.type, one.format))
        if one.rep != "ABSOLUTE" and (one.rep != "RELATIVE" or not form):
            known = "ABSOLUTE, RELATIVE NON_EEF DEFAULT, RELATIVE EEF XYZ_ROT6D or XYZ_ROTVEC"
            fail(f"{who}: action '{key}' is {one.rep} {one.type} {one.format}; there are {known}")
        if one.rep != "ABSOLUTE" and p.use_relative_action:
            relative[key] = Relative(form, one.state_key or key)
    video = keys.video.modality_keys if keys.video else []
    return ChunkConfig(
        tuple(video),
        rules(keys.state, p.apply_sincos_state_encoding),
        rules(keys.action, False),
        keys.language.modality_keys[0].removeprefix("annotation."),
        horizon=len(steps),
        relative=relative,
        video_steps=tuple(keys.video.delta_indices) if video else (0,),
    )


def modalities_of(config: ChunkConfig) -> Modalities:
    """The same the other way round: what processor_config.json says of a config."""

    def part(keys: Iterable[str], steps: Iterable[int] = (0,), modes: dict | None = None, **more) -> Modality:
        lists = {by: [key for key in modes or () if modes[key] == by] or None for by in ("sin_cos", "mean_std")}
        lists = {f"{by}_embedding_keys": keys for by, keys in lists.items()}
        return Modality(delta_indices=list(steps), modality_keys=list(keys), **lists, **more)

    how = []
    for key in config.action:
        one = config.relative.get(key)
        kind, form = FORMS[one.form if one else "joint"]
        state = one.state if one and one.state != key else None
        how.append(ActionConfig(rep="RELATIVE" if one else "ABSOLUTE", type=kind, format=form, state_key=state))
    return Modalities(
        video=part(config.video, config.video_steps),
        state=part(config.state, modes=config.state),
        action=part(config.action, range(config.horizon), config.action, action_configs=how),
        language=part([f"annotation.{config.language}"]),
    )


def read_processor(folder: Path) -> Processor | None:
    """processor_config.json of a checkpoint, None where it has none."""
    raw = read_json(folder / FILES[0], dict[str, Any], HINT, optional=True)
    if raw is None:
        return None
    try:
        p = TypeAdapter(Processor).validate_python(raw.get("processor_kwargs"))
    except ValidationError as error:
        fail(f"'{folder / FILES[0]}': processor_kwargs {in_words(error)}; {HINT}")
    if fault := p.fault():
        fail(f"'{folder / FILES[0]}': {fault}")
    return p


Numbers = list[FiniteFloat] | list[list[FiniteFloat]]


def read_units(folder: Path) -> dict[str, dict]:
    """statistics.json: embodiment tag -> statistics, and what follows from them of each key, as in metadata.json."""
    raw = read_json(folder / FILES[1], dict[str, dict[str, dict[str, dict[str, Numbers]]]], HINT, optional=True) or {}
    found = {}
    for tag, statistics in raw.items():
        facts: dict[str, dict] = {"video": {}, "state": {}, "action": {}}
        for kind in ("state", "action"):
            for key, numbers in statistics.setdefault(kind, {}).items():
                facts[kind][key] = {"shape": [len(numbers.get("min", [0]))]}
        found[tag] = {"statistics": statistics, "modalities": facts, "embodiment_tag": tag}
    return found


def read_rows(folder: Path) -> dict[str, int]:
    """Embodiment tag -> row of the embodiment layers: the published table under embodiment_id.json."""
    return EMBODIMENTS | (read_json(folder / FILES[2], dict[str, Natural], HINT, optional=True) or {})


def write_processor(folder: Path, about, metadata: dict) -> None:
    """The three files: of the embodiments in `metadata`, and the keys of the one that `about` (an `About`) is of."""
    p = about.processor or Processor()
    keys = p.modality_configs | {about.embodiment_tag: modalities_of(about.data_config)}
    kwargs = p.model_copy(update={"modality_configs": keys}).model_dump()
    whole = {"processor_class": "Gr00tN1d7Processor", "processor_kwargs": kwargs}
    units = {tag: entry["statistics"] for tag, entry in metadata.items()}
    for name, content in zip(FILES, (whole, units, about.rows or EMBODIMENTS)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# ---- --data-config ---------------------------------------------------------------------------------------------------


class Names:
    """An enumeration of whatever it is asked for."""

    def __getattr__(self, name: str) -> str:
        return name


def run_config_file(file: Path) -> dict:
    """Runs a Python file in the form of NVIDIA's modality configs -> what it registers, or the one that it defines.

    The few names that such a file imports are made here: the package itself is not needed.
    """
    registered: list[dict] = []
    names = ("gr00t", "gr00t.configs", "gr00t.configs.data", "gr00t.configs.data.embodiment_configs")
    names += ("gr00t.data", "gr00t.data.types", "gr00t.data.embodiment_tags")
    made = {name: ModuleType(name) for name in names}
    types, tags = made["gr00t.data.types"], made["gr00t.data.embodiment_tags"]
    types.ModalityConfig = types.ActionConfig = dict
    types.ActionRepresentation = types.ActionType = types.ActionFormat = tags.EmbodimentTag = Names()
    register = made["gr00t.configs.data.embodiment_configs"]
    register.register_modality_config = lambda config, embodiment_tag=None: registered.append(config)
    register.MODALITY_CONFIGS = {}
    try:
        with patch.dict(sys.modules, made):
            found = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:  # whatever a stranger's file does
        fail(f"--data-config {file}: {type(error).__name__}: {error}")
    whole = [x for x in found.values() if isinstance(x, dict) and {"state", "action", "language"} <= set(x)]
    if not (registered or whole):
        fail(f"--data-config {file}: registers no modality config, a dict of video, state, action and language")
    return (registered or whole)[-1]


def find_chunk_config(name: str, modality: dict, p: Processor) -> ChunkConfig:
    """A file (.py), an object of a module, an entry of CHUNK_CONFIGS, or what modality.json names ("auto").

    auto: 16 actions; arms are learnt relative to the state of the same name and width, as in all published configs.
    """
    if name.endswith(".py"):
        try:
            keys = Modalities.model_validate(run_config_file(Path(name)))
        except ValidationError as error:
            fail(f"--data-config {name}: {in_words(error)}")
        return config_of(keys, p, f"--data-config {name}")
    mode = "q99" if p.use_percentiles else "min_max"
    if name == "auto":
        if not modality["language"]:
            fail("--data-config auto: the data set has no annotation to take the instruction from")
        state, action = (dict.fromkeys(modality[kind], mode) for kind in ("state", "action"))
        relative = {key: Relative("joint", key) for key in action if "arm" in key and same_joints(key, modality)}
        language = next(iter(modality["language"]))
        return ChunkConfig(tuple(modality["video"]), state, action, language, horizon=16, relative=relative)
    if ":" in name:
        return own_config(name, ChunkConfig)
    if name not in CHUNK_CONFIGS:
        fail(f"--data-config {name} is unknown; there are {', '.join(CHUNK_CONFIGS)}, auto, FILE.py and module:NAME")
    return CHUNK_CONFIGS[name]


def same_joints(key: str, modality: dict) -> bool:
    """Whether state and action of this key are the same numbers at two times."""
    there, entry = modality["state"].get(key), modality["action"][key]
    if not there or not entry.get("absolute", True) or entry.get("rotation_type"):
        return False
    # of a data set: a place in a column; of a checkpoint: a shape
    width, own = (e["shape"][0] if "shape" in e else e["end"] - e["start"] for e in (there, entry))
    return width == own


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

    def tokens(self, instruction: str) -> np.ndarray:
        """The prompt's token ids, one for each image."""
        if instruction not in self.prompts:
            if len(self.prompts) > 10_000:  # a client that never says the same twice
                self.prompts.clear()
            images = len(self.config.video) * len(self.config.video_steps)
            words = clean(instruction) if self.processor.formalize_language else instruction
            # a model without cameras (lite) reads the bare instruction
            ids = self.tokenizer(prompt(words, images) if images else words, add_special_tokens=False).input_ids
            if images and ids.count(self.image_id) != images:
                raise ValueError(f"the instruction {instruction[:80]!r} holds image tokens")
            self.prompts[instruction] = np.array(ids, np.int64)
        return self.prompts[instruction]

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture that was recorded in this size."""
        if (height, width) not in self.sizes:
            p = self.processor
            h, w = (max(height, width),) * 2 if p.letter_box_transform else (height, width)
            h, w = token_size(*resized(*cropped(*resized(h, w, p), p), p), self.unit, self.least)
            self.sizes[height, width] = h * w // self.unit**2
        return self.sizes[height, width]

    def prompt_length(self, instruction: str, shape: tuple[int, ...] = ()) -> int:
        images = len(self.config.video) * len(self.config.video_steps)
        return len(self.tokens(instruction)) + (images * (self.image_tokens(*shape[1:3]) - 1) if images else 0)

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
