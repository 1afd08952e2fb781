"""Trackers behind one interface, with stand-ins for their packages; the packages themselves where they are installed."""

import sys
import types
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import rows

from common import track
from common.log import Logger
from common.run import Run, RunArgs

FILM = {"video": "videos/step-1.mp4", "episode": 0, "success": True}


class Recorder:
    """Any function of a package: keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    id = "reach-1"


def stand_in(monkeypatch, name) -> Recorder:
    """A module `name` that records; its tables, videos and artifacts are tuples."""
    recorder = Recorder()
    module = types.ModuleType(name)
    for part in ("init", "log", "finish", "SummaryWriter"):
        setattr(module, part, getattr(recorder, part))
    module.Table = lambda columns, data: ("table", columns, data)
    module.Video = lambda path, format: ("video", path)
    module.Artifact = lambda name, type: recorder
    monkeypatch.setitem(sys.modules, name, module)
    return recorder


def use(tmp_path, tracker) -> None:
    (tmp_path / "reach-1").mkdir(parents=True)
    logger = Logger(tmp_path / "reach-1", {"seed": 1, "tags": ("a", "b")}, tracker)
    logger.log(5, {"train/reward": 0.5, "train/none": float("nan")})
    logger.table("completions", 5, [{"completion": "<b>|7", "reward": 1.0}, {"completion": "8", "reward": -1.0}])
    logger.table("completions", 6, [{"completion": "not sent"}], upload=False)
    logger.table("video_table", 5, [FILM])
    logger.finish(3)
    logger.finish()
    assert rows(tmp_path / "reach-1")[0]["train/reward"] == 0.5
    assert len(rows(tmp_path / "reach-1", "completions")) == 3


def test_wandb_gets_numbers_tables_videos_and_the_exit_code(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "wandb").calls
    use(tmp_path, "wandb")
    assert calls[0][0] == "init" and calls[0][2]["tags"] == ["a", "b"] and calls[0][2]["mode"] == "offline"
    (numbers,), (table,), (film,) = [args for name, args, _ in calls if name == "log"]
    assert numbers["train/reward"] == 0.5 and numbers["global_step"] == 5 and "train/none" not in numbers
    columns, cells = ["step", "completion", "reward"], [[5, "<b>|7", 1.0], [5, "8", -1.0]]
    assert table == {"completions": ("table", columns, cells), "global_step": 5}
    assert film["video_table"][2] == [[5, ("video", "videos/step-1.mp4"), 0, True]]
    assert [kwargs for name, _, kwargs in calls if name == "finish"] == [{"exit_code": 3}]


def test_checkpoints_become_artifacts_of_wandb(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "wandb").calls
    track.Wandb(tmp_path, {}).checkpoint(Path("checkpoints/step-000000005"))
    assert ("add_dir", ("checkpoints/step-000000005",), {}) in calls
    assert calls[-1][0] == "log_artifact" and calls[-1][2] == {"aliases": ["latest", "step-000000005"]}


def test_trackio_gets_numbers_tables_and_videos(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "trackio").calls
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    use(tmp_path / "runs", "trackio")
    assert calls[0][2] | {"project": "groundup", "name": "reach-1", "resume": "allow"} == calls[0][2]
    (numbers, table, film) = [(args[0], kwargs) for name, args, kwargs in calls if name == "log"]
    assert numbers[0]["train/reward"] == 0.5 and numbers[1] == {"step": 5}
    assert table[0]["completions"][2] == [[5, "<b>|7", 1.0], [5, "8", -1.0]]
    assert film[0]["video_table"] == ("table", ["step", "episode", "success"], [[5, 0, True]])
    assert film[0]["video_table/video"] == ("video", "videos/step-1.mp4")
    assert calls[-1][0] == "finish"


def test_tensorboard_gets_numbers_and_tables_as_text(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "torch.utils.tensorboard").calls
    use(tmp_path, "tensorboard")
    assert ("add_scalar", ("train/reward", 0.5, 5), {}) in calls
    (text,) = [args[1] for name, args, _ in calls if name == "add_text" and args[0] == "completions"]
    assert text.splitlines()[0] == "| step | completion | reward |" and "| 5 | &lt;b>\\|7 | 1.0 |" in text
    assert calls[-1][0] == "close"


@dataclass
class Args(RunArgs):
    exp_name: str | None = "toy"


def test_a_tracker_that_is_not_installed_is_refused_in_a_line_before_there_is_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    for flags, words in (
        ({"tracker": "trackio"}, "uv sync --extra trackio installs it"),
        ({"tracker": "tensorboard"}, "uv sync --extra tensorboard installs it"),
        ({"track": True}, "--tracker wandb: the package wandb is not installed; uv sync installs it"),
        ({"track": True, "tracker": "trackio"}, "--track is --tracker wandb"),
        ({"track_checkpoints": True}, "add --tracker wandb"),
    ):
        with pytest.raises(SystemExit) as stop:
            Run(__file__, Args(output_dir=str(tmp_path / "runs"), **flags))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and words in said
    assert not (tmp_path / "runs").exists()
    assert track.chosen(Args()) == "none"


def test_track_is_an_alias(monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: name)
    assert track.chosen(Args(track=True)) == track.chosen(Args(track=True, tracker="wandb")) == "wandb"
    assert track.chosen(Args(tracker="trackio")) == "trackio"


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed (uv sync --extra tensorboard)")
def test_tensorboard_itself(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "reach-1" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(5, 0.5)]
