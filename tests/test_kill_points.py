"""Nothing is lost: runs killed at points spread over what they do to files; the whole: benchmarks/kill_points.py."""

import functools
import os

from test_run import Args, toy

from benchmarks import short_runs
from benchmarks.file_operations import killed, photographed
from benchmarks.kill_points import all_points, calls_of, contents, difference, run_folder
from common import plot


def toy_calls(folder):
    """Starting a toy that logs, fills a table and saves, and resuming it; each in a fork, which may change modules."""
    root = folder / "run"

    def run(**flags):
        plot.draw = lambda *_: []
        toy(Args(device="cpu", **flags), during=fill)

    def fill(run, step):
        run.table("samples", step, [{"x": step, "of": name} for name in "ab"])

    def resume():
        run(resume=str(run_folder(root, "test_run")))

    return functools.partial(run, output_dir=str(root), save_every=2, keep=1, steps=5), resume


def test_a_toy_run_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    tried, losses = all_points("test_run", *toy_calls(tmp_path), 12, tmp_path, tell=lambda _: None)
    assert losses == [] and tried >= 12


def test_a_script_killed_ends_as_if_it_had_not_been(tmp_path):
    short_runs.warm_up()
    short_runs.make_demonstrations(tmp_path / "demos")
    calls = calls_of("gr00t_finetune", short_runs.flags_of("gr00t_finetune", tmp_path), tmp_path / "run")
    tried, losses = all_points("gr00t_finetune", *calls, 20, tmp_path, tell=lambda _: None, resumes=False)
    assert losses == [] and tried >= 5


def test_a_point_is_what_a_kill_leaves(tmp_path):
    """Photos, and kills in the middle of writes, hold what was written so far and no more."""
    root = tmp_path / "root"

    def work():
        root.mkdir()
        with open(root / "a", "w") as file:
            file.write("12345678")
        os.replace(root / "a", root / "b")
        (root / "b").unlink()

    points, outcome = photographed(work, root, tmp_path / "album")
    assert outcome.code == 0 and not list(root.iterdir())
    assert [(p.kind, p.path, p.half) for p in points] == [
        ("open", "a", False), ("write", "a", False), ("write", "a", True), ("os.rename", "b", False),
        ("os.remove", "b", False),
    ]  # fmt: skip
    seen = [[(f.name, f.read_text()) for f in point.photo(tmp_path / "album").iterdir()] for point in points]
    assert seen == [[], [("a", "")], [("a", "1234")], [("a", "12345678")], [("b", "12345678")]]
    for point, photo in zip(points, seen):
        root.rmdir() if root.exists() else None
        killed(work, root, point)
        assert [(f.name, f.read_text()) for f in root.iterdir()] == photo
        for file in root.iterdir():
            file.unlink()


def test_what_is_compared_leaves_times_out_and_sees_every_number(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"step": 1, "time/s": 0.1, "loss": 1.5}\n{"step": 2, "time/a": 3}\n')
    wanted = contents(tmp_path)
    rows.write_text('{"step": 1, "time/s": 0.25, "loss": 1.5}\n{"step": 2, "time/a": null}\n')
    assert difference(contents(tmp_path), wanted) == ""
    rows.write_text('{"step": 1, "time/s": 0.25, "loss": 1.25}\n{"step": 2, "time/a": null}\n')
    assert "metrics.jsonl:1 differs" in difference(contents(tmp_path), wanted)
    rows.write_text('{"step": 1, "time/s": 0.1, "loss": 1.5}\n{"step": 2, "time/a": 3}\n')
    (tmp_path / ".tmp-step").mkdir()
    assert "temporary differs" in difference(contents(tmp_path), wanted)
