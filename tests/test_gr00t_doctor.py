"""common/robot/doctor.py: each check finds a data set with its fault, and is silent about the data of the training."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from test_gr00t_data import write_set

from common.robot import doctor
from common.robot.data_configs import DataConfig, modes
from common.robot.demonstrations import make_metadata, read_mixture
from common.robot.policy import About

CONFIG = DataConfig((), modes("min_max", "arm", "gripper"), modes("min_max", "arm", "gripper"), "task")
SEEING = replace(CONFIG, video=("top",))
ABOUT = About(name="test", data_config=CONFIG, fps=10.0)


def record(root, change=lambda state, action: (state, action), **flags):
    """A set of 4 episodes: 7 joints in radians, a gripper that is mostly open (1), actions that repeat the state."""
    write_set(root, **{"video": False} | flags)
    rng = np.random.default_rng(0)
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        n = len(table)
        grip = np.where(rng.random((n, 1)) < 0.3, rng.uniform(0, 0.1, (n, 1)), rng.uniform(0.9, 1, (n, 1)))
        state = np.concatenate([rng.uniform(-1, 1, (n, 7)), grip], axis=1)
        state[:, 0] += 2  # joints differ
        state, action = change(state, state + rng.normal(size=(n, 8)) * 0.05)
        columns = {"observation.state": state, "action": action}
        for name, x in columns.items():
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(list(x.astype(np.float32))))
        pq.write_table(table, path)
    return root


def checkpoint(folder, sets, about=ABOUT):
    """What the doctor reads of a folder: no weights."""
    config = about.data_config
    metadata = make_metadata(read_mixture([sets], config, "test", lambda text: None), config, [1.0], "new_embodiment")
    (folder / "experiment_cfg").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "experiment_cfg/metadata.json").write_text(json.dumps({"new_embodiment": metadata}))
    (folder / "experiment_cfg/policy.json").write_text(about.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return checkpoint(root / "run", record(root / "set"))


@pytest.fixture
def ask(monkeypatch, capsys, trained):
    """Runs the doctor; returns the exit code and the lines that say WRONG, each as its words."""

    def run(run_dir=trained, **flags):
        argv = [str(run_dir)]
        for name, value in flags.items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
        code = run_script(doctor, ["doctor", *argv], monkeypatch)
        out = capsys.readouterr()
        lines = [" ".join(line.split()) for line in out.out.splitlines() if line.startswith("WRONG")]
        return code, lines, out

    return run


def joints(**changes):
    """A change of (state, action): column -> function."""

    def change(state, action):
        for name, f in changes.items():
            which, dim = name.split("_")
            x = {"s": state, "a": action}[which]
            x[:, int(dim)] = f(x[:, int(dim)])
        return state, action

    return change


def rename(**names):
    def change(folder):
        path = folder / "meta/modality.json"
        modality = json.loads(path.read_text())
        for old, new in names.items():
            for kind in ("state", "action"):
                modality[kind][new] = modality[kind].pop(old)
        path.write_text(json.dumps(modality))

    return change


def slices(kind, **places):
    def change(folder):
        path = folder / "meta/modality.json"
        modality = json.loads(path.read_text())
        modality[kind] |= {key: {"start": start, "end": end} for key, (start, end) in places.items()}
        path.write_text(json.dumps(modality))

    return change


def rate(folder):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 30}))


def stale(folder):
    column = {"min": [-1.0] * 8, "max": [1.0] * 8, "mean": [0.0] * 8, "std": [1.0] * 8, "q01": [-1.0] * 8}
    column |= {"q99": [1.0] * 8}
    stats = {"observation.state": column, "action": column}
    (folder / "meta/stats.json").write_text(json.dumps(stats))


degrees = joints(**{f"{x}_{i}": np.degrees for x in "sa" for i in range(7)})
same = joints()
FAULTS = {  # how the rows are changed, how the folder is -> where, and in which words, it is found
    "degrees": (degrees, None, ["state.arm radians or degrees", "degrees here?"]),
    "far away": (joints(s_3=lambda x: x + 30), None, ["state.arm within 6 deviations", "dim 3"]),
    "renamed": (same, rename(gripper="grip"), ["state.gripper key", "renamed to 'grip'?"]),
    "missing": (same, rename(arm="head"), ["state.arm key", "is not there"]),
    "width": (same, slices("state", arm=(0, 6)), ["state.arm meaning", "shape [6], trained on [7]"]),
    "frame rate": (same, rate, ["info.json frame rate", "30 a second, trained on 10"]),
    "stale statistics": (same, stale, ["meta/stats.json stale", "is not of this data"]),
    "constant action": (joints(a_2=lambda x: 0 * x + 0.3), None, ["action.arm moves freely", "always 0.3"]),
    "clipped action": (joints(a_2=lambda x: x.clip(-0.2, 2)), None, ["action.arm moves freely", "is clipped"]),
    "gripper exchanged": (joints(s_7=lambda x: 1 - x), None, ["state.gripper gripper convention", "mirror"]),
    "gripper in percent": (joints(s_7=lambda x: 100 * x), None, ["state.gripper gripper convention", "the training"]),
    "half a gripper": (joints(a_7=lambda x: 0.5 + x / 2), None, ["action.gripper gripper convention", "the training"]),
    "gripper that never closes": (
        joints(a_7=lambda x: x.clip(0.5, 2)),
        None,
        ["action.gripper moves freely", "clipped"],
    ),
}


def test_the_data_of_the_training_is_healthy(ask, tmp_path):
    code, wrong, out = ask(dataset_path=record(tmp_path / "again"))
    assert code == 0 and wrong == [] and "0 of" in out.out


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_finds_its_fault(ask, tmp_path, fault):
    change, edit, (where, words) = *FAULTS[fault][:2], (FAULTS[fault][2] + [""])[:2]
    folder = record(tmp_path / "set", change)
    if edit:
        edit(folder)
    code, wrong, out = ask(dataset_path=folder)
    assert code == 1 and any(line.startswith(f"WRONG {where}") and words in line for line in wrong), out.out


def test_keys_that_were_exchanged_are_told(ask, tmp_path, monkeypatch):
    config = DataConfig((), modes("min_max", "left", "right"), modes("min_max", "arm"), "task")
    one = record(tmp_path / "one", joints(s_0=lambda x: x + 3))
    slices("state", left=(0, 3), right=(3, 6))(one)
    run = checkpoint(tmp_path / "run", one, ABOUT.model_copy(update={"data_config": config}))
    assert ask(run, dataset_path=one)[0] == 0
    slices("state", left=(3, 6), right=(0, 3))(one)
    code, wrong, out = ask(run, dataset_path=one)
    assert code == 1 and any("left, right swapped" in line for line in wrong), out.out


def test_what_is_shown_is_compared(ask, tmp_path, trained):
    """Size, colour and order of channels, of an observation and of a data set's videos."""
    shown = record(tmp_path / "shown", video=True, lengths=(20, 12))
    red = {"top": [180.0, 90.0, 60.0]}
    run = checkpoint(tmp_path / "run", shown, ABOUT.model_copy(update={"data_config": SEEING, "image_mean": red}))
    code, wrong, out = ask(run, dataset_path=shown)  # its frames are gray
    assert code == 1 and any("video.top image mean" in line for line in wrong), out.out
    frame = np.zeros((48, 64, 3), np.uint8) + np.uint8([180, 90, 60])
    seen = {"state.arm": np.r_[2.0, np.zeros(6)], "state.gripper": np.array([0.8]), "annotation.task": "lift it"}
    for picture, words in (
        (frame, None),
        (frame[..., ::-1], "channel order"),
        (frame // 4, "image mean"),
        (np.concatenate([frame] * 2), "size"),
        (frame.astype(float), "frames are uint8"),
        (frame.transpose(2, 0, 1), "can be read"),
    ):
        np.savez(tmp_path / "seen.npz", **seen | {"video.top": picture})
        code, wrong, out = ask(run, observation=tmp_path / "seen.npz")
        assert code == (1 if words else 0) and (not words or any(words in line for line in wrong)), out.out
    listed = {key: x if isinstance(x, str) else x.tolist() for key, x in (seen | {"video.top": frame}).items()}
    (tmp_path / "seen.json").write_text(json.dumps(listed))
    assert ask(run, observation=tmp_path / "seen.json")[0] == 0
    listed["state.grip"] = listed.pop("state.gripper")
    listed["state.arm"] = np.degrees(listed["state.arm"]).tolist()
    (tmp_path / "seen.json").write_text(json.dumps(listed))
    code, wrong, out = ask(run, observation=tmp_path / "seen.json")
    assert code == 1 and any("state.gripper key" in line for line in wrong)
    listed["state.gripper"] = listed.pop("state.grip")
    (tmp_path / "seen.json").write_text(json.dumps(listed))
    code, wrong, out = ask(run, observation=tmp_path / "seen.json")
    assert code == 1 and any("radians or degrees" in line for line in wrong), out.out


def test_wrong_questions_end_in_one_line(ask, tmp_path, trained):
    (tmp_path / "broken.npz").write_bytes(b"PK")
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    (old / "experiment_cfg/policy.json").unlink()
    for run_dir, flags, words in (
        (trained, {}, "one of --dataset-path and --observation"),
        ("", {"dataset_path": "x"}, "give a run folder"),
        (trained, {"dataset_path": tmp_path / "nothing"}, "is not a folder"),
        (trained, {"observation": tmp_path / "broken.npz"}, "cannot be read"),
        (trained, {"observation": tmp_path / "nothing.json"}, "cannot be read"),
        (tmp_path / "none", {"dataset_path": "x"}, "is not a folder"),
        (old, {"dataset_path": "x"}, "give --data-config"),
    ):
        code, wrong, out = ask(run_dir, **flags)
        assert code == 2 and wrong == [] and words in out.err and out.err.count("\n") == 1, out
