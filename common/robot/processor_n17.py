"""What a checkpoint of GR00T N1.7 says of the robots that it knows, and what --data-config may say of another.

    Processor                      processor_config.json: sizes, rules, each embodiment's keys
    config_of, modalities_of       an embodiment's keys there <-> a ChunkConfig
    read_units, read_rows          statistics.json, embodiment_id.json;  write_processor: all three
    find_chunk_config              --data-config

interface_n17.py does what these files say.
"""

import json
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal
from unittest.mock import patch

from annotated_types import Interval, Len
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from common.cli import Count, Natural, NonNegative, Share, Text, fail, in_words
from common.files import read_json
from common.robot.data_configs import CHUNK_CONFIGS, ChunkConfig, Relative, own_config

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
