"""Which cameras, joint groups and instruction of a data set the model sees, robot by robot, and in which units.

The entries are those published with GR00T N1.5 and N1.7, plus "fetch" for assets/fetch_demos. A robot of your own: an
object of these classes in a module of yours, `--data-config my_module:MY_CONFIG`, or for N1.7 a file in the form that
NVIDIA's scripts read, `--data-config my_robot.py`.
"""

import importlib
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from pydantic import StringConstraints

from common.cli import fail

Mode = Literal["min_max", "q99", "mean_std", "binary", "scale", "sin_cos"] | None
FORMS = "rotation_6d|axis_angle|quaternion|matrix|euler_angles_[rpy]{3}"
Rotation = Annotated[str, StringConstraints(pattern=f"^({FORMS})$")]


@dataclass(frozen=True)
class DataConfig:
    """What the model sees of a data set, in this order. Keys are those of meta/modality.json.

    state, action: key -> min_max | q99 | mean_std | binary | scale | sin_cos (state only) | None: as recorded.
    rotations: "state.<key>" or "action.<key>" -> rotation_6d, axis_angle, quaternion, matrix or euler_angles_rpy.
    Observations are those of the current row, actions those of the current and the following 15 rows.
    """

    video: tuple[str, ...]
    state: dict[str, Mode]
    action: dict[str, Mode]
    language: str
    rotations: dict[str, Rotation] = field(default_factory=dict)
    horizon: ClassVar[int] = 16  # actions of a chunk
    video_steps: ClassVar[tuple[int, ...]] = (0,)
    relative: ClassVar[dict] = {}

    def fault(self) -> str:
        """What is wrong with it, whatever the data set; empty if nothing is."""
        for kind in ("state", "action"):
            if not getattr(self, kind):
                return f"has no {kind}: a policy needs at least one key of it"
            for key, mode in getattr(self, kind).items():
                if mode not in (None, "min_max", "q99", "mean_std", "binary", "scale", "sin_cos"):
                    return f"normalises {kind} '{key}' in an unknown way, '{mode}'"
                if kind == "action" and mode in ("scale", "sin_cos"):
                    return f"normalises action '{key}' by {mode}, which cannot be undone: it is for states only"
        known = [f"{kind}.{key}" for kind in ("state", "action") for key in getattr(self, kind)]
        stray = [name for name in self.rotations if name not in known]
        return f"converts the rotation {stray[0]}, which it does not use" if stray else ""

    def difference(self, other: "DataConfig") -> str:
        """In which part, and how, another config differs; the order of keys counts. Empty if in none."""
        for part in (one.name for one in fields(self)):
            a, b = getattr(self, part), getattr(other, part)
            if a != b or (isinstance(a, dict) and list(a) != list(b)):
                return f"{part} {shown(a)} against {shown(b)}"
        return ""


@dataclass(frozen=True)
class Relative:
    """An action that is recorded as it is and learnt relative to the state at the time of the observation."""

    form: Literal["joint", "xyz_rot6d", "xyz_rotvec"]  # joint: a difference; else a pose in the frame of the state's
    state: str  # key of that state


@dataclass(frozen=True)
class ChunkConfig(DataConfig):
    """The same for GR00T N1.7, whose chunks are as long as the robot wants and may be relative to the state.

    Modes are q99 or min_max, both clipped to [-1, 1], mean_std, and sin_cos for states.
    """

    horizon: Annotated[int, Interval(ge=1, le=1000)] = field(kw_only=True)
    relative: dict[str, Relative] = field(default_factory=dict)  # key of the action -> how
    video_steps: tuple[Annotated[int, Interval(ge=-1000, le=0)], ...] = (0,)  # rows from now whose frames are seen

    def fault(self) -> str:
        if fault := super().fault():
            return fault
        for kind in ("state", "action"):
            for key, mode in getattr(self, kind).items():
                if mode not in ("q99", "min_max", "mean_std", "sin_cos"):
                    return f"normalises {kind} '{key}' by {mode}; N1.7 knows q99, min_max, mean_std, sin_cos for states"
        for key, how in self.relative.items():
            if key not in self.action or how.state not in self.state:
                return f"has action '{key}' relative to state '{how.state}': name both among its keys (state_key)"
        if self.rotations:
            return f"converts the rotation {next(iter(self.rotations))}: N1.7 takes it as recorded"
        steps = list(self.video_steps)
        in_order = steps == sorted(set(steps)) and steps[-1:] == [0]
        return "" if in_order else f"sees the frames of rows {steps}: name them once each, in order, the last one 0"


def shown(part) -> str:
    """{"arm": "min_max"} -> arm (min_max)"""
    if isinstance(part, dict):
        return ", ".join(f"{key} ({mode or 'as recorded'})" for key, mode in part.items()) or "none"
    return str(part) if isinstance(part, str | int) else ", ".join(map(str, part)) or "none"


def modes(mode: str | None, *keys: str) -> dict[str, str | None]:
    return dict.fromkeys(keys, mode)


TASK = "human.action.task_description"
ARMS = ("left_arm", "right_arm", "left_hand", "right_hand")
SO100 = modes("min_max", "single_arm", "gripper")
FULL_BODY = modes("min_max", "left_leg", "right_leg", "waist", *ARMS)
RELATIVE = ("end_effector_position_relative", "end_effector_rotation_relative")
FETCH = ("gripper_position", "gripper_velocity", "fingers", "finger_velocity", "object_relative")
FETCH += ("goal", "goal_relative")
GENIE_ARMS = ("left_arm_joint_position", "right_arm_joint_position")
GENIE = (*GENIE_ARMS, "left_effector_position", "right_effector_position", "head_position", "waist_position")


def bimanual(view: str, hand: str, close: str, state_mode: str, action_mode: str) -> DataConfig:
    """Two Panda arms: end effectors as position and quaternion, the hand's keys differ."""
    state, action = {}, {}
    for side in ("right", "left"):
        state |= {f"{side}_arm_eef_pos": "min_max", f"{side}_arm_eef_quat": None, f"{side}_{hand}": state_mode}
        action |= {f"{side}_arm_eef_pos": None, f"{side}_arm_eef_rot": None, f"{side}_{close}": action_mode}
    quaternions = {f"state.{side}_arm_eef_quat": "rotation_6d" for side in ("right", "left")}
    return DataConfig(("right_wrist_view", "left_wrist_view", view), state, action, TASK, quaternions)


DATA_CONFIGS = {
    "fourier_gr1_arms_only": DataConfig(("ego_view",), modes("sin_cos", *ARMS), modes("min_max", *ARMS), TASK),
    "fourier_gr1_arms_waist": DataConfig(
        ("ego_view",), modes("sin_cos", *ARMS, "waist"), modes("min_max", *ARMS, "waist"), "human.coarse_action"
    ),
    "fourier_gr1_full_upper_body": DataConfig(
        ("front_view",), modes("min_max", *ARMS, "waist", "neck"), modes("min_max", *ARMS, "waist", "neck"), TASK
    ),
    "so100": DataConfig(("webcam",), SO100, SO100, "human.task_description"),
    "so100_dualcam": DataConfig(("front", "wrist"), SO100, SO100, "human.task_description"),
    "unitree_g1": DataConfig(("rs_view",), modes("min_max", *ARMS), modes("min_max", *ARMS), "human.task_description"),
    "unitree_g1_full_body": DataConfig(("rs_view",), FULL_BODY, modes("min_max", *ARMS), "human.task_description"),
    "bimanual_panda_gripper": bimanual("front_view", "gripper_qpos", "gripper_close", "min_max", "binary"),
    "bimanual_panda_hand": bimanual("ego_view", "hand", "hand", "min_max", "min_max"),
    "single_panda_gripper": DataConfig(
        ("left_view", "right_view", "wrist_view"),
        modes("min_max", *RELATIVE, "gripper_qpos", "base_position", "base_rotation"),
        modes("min_max", "end_effector_position", "end_effector_rotation")
        | {"gripper_close": "binary"}
        | {"base_motion": "min_max", "control_mode": "binary"},
        TASK,
        {"state.end_effector_rotation_relative": "rotation_6d", "state.base_rotation": "rotation_6d"},
    ),
    "oxe_droid": DataConfig(
        ("exterior_image_1", "exterior_image_2", "wrist_image"),
        {"eef_position": "min_max", "eef_rotation": None, "gripper_position": "min_max"},
        {"eef_position_delta": None, "eef_rotation_delta": None, "gripper_position": "binary"},
        "language.language_instruction",
        {"state.eef_rotation": "rotation_6d", "action.eef_rotation_delta": "axis_angle"},
    ),
    "agibot_genie1": DataConfig(
        ("top_head", "hand_left", "hand_right"),
        modes("min_max", *GENIE),
        modes("min_max", *GENIE, "robot_velocity"),
        "language.action_text",
    ),
    "fetch": DataConfig(  # assets/fetch_demos without the block's rotation and velocities: noise to a cloned policy
        ("front",), modes("min_max", *FETCH), modes("min_max", "displacement", "gripper"), "human.task_description"
    ),
}


def chunks(video, state, action, language: str, horizon: int = 16, steps=(0,), **relative) -> ChunkConfig:
    """relative: forms of the actions that are relative to the state of the same name."""
    relative = {key: Relative(form, key) for key, form in relative.items()}
    state, action = modes("q99", *state), modes("q99", *action)
    return ChunkConfig(tuple(video), state, action, language, horizon=horizon, relative=relative, video_steps=steps)


SEEN, DROID = ("exterior_image_1_left", "wrist_image_left"), ("eef_9d", "gripper_position", "joint_position")
POSED = dict(eef_9d="xyz_rot6d", joint_position="joint")
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
CHUNK_CONFIGS = {  # GR00T N1.7's: of what its repository ships, and of its examples' arms
    "oxe_droid": chunks(SEEN, DROID, DROID, "language.language_instruction", 40, (-15, 0), **POSED),
    "libero_sim": chunks(("image", "wrist_image"), POSE, POSE, TASK),
    "so100": chunks(("front", "wrist"), SO100, SO100, "human.task_description", single_arm="joint"),
    "fourier_gr1_arms_only": chunks(("ego_view",), ARMS, ARMS, TASK, left_arm="joint", right_arm="joint"),
    "fetch": chunks(("front",), FETCH, ("displacement", "gripper"), "human.task_description", 8),
}


def own_config(name: str, kind: type[DataConfig]) -> DataConfig:
    """module:NAME, an object of the reader's own module."""
    module, attribute = name.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        config = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"--data-config {name}: {error}")
    if type(config) is not kind:
        is_one = f"must be a common.robot.data_configs.{kind.__name__}"
        fail(f"--data-config {name}: {is_one}, not a {type(config).__name__}")
    return config


def find_data_config(name: str, modality: dict) -> DataConfig:
    """The table's entry, everything that modality.json names ("auto"), or an object of the reader's own module."""
    if name == "auto":
        if not modality["language"]:
            fail("--data-config auto: the data set has no annotation to take the instruction from")
        state, action = (modes("min_max", *modality[kind]) for kind in ("state", "action"))
        return DataConfig(tuple(modality["video"]), state, action, next(iter(modality["language"])))
    if ":" in name:
        return own_config(name, DataConfig)
    if name not in DATA_CONFIGS:
        fail(f"--data-config {name} is unknown; there are {', '.join(DATA_CONFIGS)}, auto and module:NAME")
    return DATA_CONFIGS[name]


def check_keys(config: DataConfig, modality: dict, where: str, name: str) -> None:
    """Every camera, joint group and annotation of the config exists in the data set.

    name: what asks for it, for messages: a name of --data-config, or "checkpoint '…'".
    """
    trained = name.startswith("checkpoint ")
    name, cure = (name, "") if trained else (f"--data-config {name}", "; --data-config auto takes what is there")
    if fault := config.fault():
        fail(f"{name} {fault}")
    for kind in ("video", "state", "action"):
        if missing := [key for key in getattr(config, kind) if key not in modality[kind] and key != "task_progress"]:
            there = ", ".join(modality[kind]) or "none"
            fail(f"{name} needs {kind} '{missing[0]}', but {where} has {there}{cure}")
    if modality["language"] and config.language not in modality["language"]:
        fail(
            f"{name} takes the instruction from annotation '{config.language}', but {where} has "
            f"{', '.join(modality['language'])}"
        )
    for key in config.rotations:
        kind, key = key.split(".", 1)
        if modality[kind][key]["rotation_type"] is None:
            fail(f"{name} converts the rotation {kind}.{key}: modality.json must give its rotation_type")
    for kind in () if isinstance(config, ChunkConfig) else ("state", "action"):
        for key, mode in getattr(config, kind).items():
            if key in modality[kind] and not modality[kind][key]["continuous"] and mode not in (None, "binary"):
                fail(f"{kind} '{key}' of {where} is not a float: it can be normalised as binary only, not {mode}")
