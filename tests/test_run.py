"""`Run`: a toy script that fits a line, stopped, resumed, ended early."""

import fcntl
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, two_forks
from safetensors.torch import load_file, save_file

from common.cli import fail
from common.run import Run, RunArgs, create_folder


@dataclass
class Args(RunArgs):
    exp_name: str = "toy"
    steps: int = 6
    """optimizer steps"""


def toy(args, during=lambda run, step: None, unit=1):
    """A whole script: noise from torch's generator, a running mean in the state. Returns its run."""
    run = Run(__file__, args)
    args = run.args
    with run.open(args):
        run.unit = unit
        model = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if run.checkpoint:
            model.load_state_dict(load_file(run.checkpoint / "model.safetensors"))
        state = run.resume({"mean": 0.0}, optimizer)
        mean = state["mean"]

        def write(folder):
            if folder:
                save_file(model.state_dict(), folder / "model.safetensors")
            return {"extra": 1}

        for step in run.steps(args.steps):
            x = torch.randn(8, 2)
            loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = 0.9 * mean + 0.1 * loss.item()
            if run.due(step + 1, 2):
                run.is_best(step + 1, -mean)
            during(run, step + 1)
            run.end_step(step + 1, {"loss": loss.detach(), "mean": mean}, {"mean": mean}, optimizer, write)
        run.finish(f"loss {mean:.3f}")
    return run


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr("common.run.plot.draw", lambda *_: [])
    return Args(output_dir=str(tmp_path), device="cpu", save_every=3, keep=1)


def test_a_run_stopped_by_a_signal_continues_as_if_it_had_not_been(args, capsys):
    whole = toy(args)

    def interrupt(run, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = toy(args, interrupt)
    assert (whole.exit_code, stopped.exit_code) == (0, 143)
    assert f"--resume {stopped.folder}" in capsys.readouterr().out
    continued = toy(Args(resume=str(stopped.folder), device="cpu"))
    assert continued.folder == stopped.folder and continued.exit_code == 0
    assert lines(continued.folder) == lines(whole.folder) and len(lines(whole.folder)) == 6


def test_checkpoints_best_last_and_newest_are_kept(args):
    run = toy(args)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names[-1] == "step-000000006" == (run.folder / "last").resolve().name
    assert (run.folder / "best").resolve().name == f"step-{run.best['step']:09d}"
    assert len(names) == len({names[-1], f"step-{run.best['step']:09d}"})
    state = json.loads((run.folder / "last" / "trainer.json").read_text())
    assert state["step"] == 6 and state["extra"] == 1 and state["script"] == "test_run"


def test_what_is_logged_as_the_step_may_be_counted_in_another_unit(args):
    run = toy(args, unit=100)
    assert [row["step"] for row in lines(run.folder)] == [100, 200, 300, 400, 500, 600]
    assert (run.folder / "last").resolve().name == "step-000000600"
    again = toy(Args(resume=str(run.folder), device="cpu"), unit=100)  # nothing left to do
    assert len(lines(again.folder)) == 6


def test_a_run_that_ends_early_saves_and_logs_its_last_step(args):
    def satisfied(run, step):
        if step == 4:
            run.end("good enough")

    run = toy(args, satisfied)
    assert run.exit_code == 0 and len(lines(run.folder)) == 4
    assert (run.folder / "last").resolve().name == "step-000000004"


def test_an_exception_closes_the_logs_and_is_not_swallowed(args):
    finished = []

    def crash(run, step):
        run.log.finish = lambda code=0: finished.append(code)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy(args, crash)
    assert finished == [1]


def test_resume_takes_the_runs_own_settings_and_refuses_others(args, capsys):
    run = toy(args)
    with pytest.raises(SystemExit) as stop:
        toy(Args(resume=str(run.folder), device="cpu", steps=9))
    assert stop.value.code == 2 and "drop --steps" in capsys.readouterr().err
    path = run.folder / "last" / "trainer.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mean"}))
    with pytest.raises(SystemExit) as stop:
        toy(Args(resume=str(run.folder), device="cpu"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "'mean' is missing" in error and error.count("\n") == 1


def test_a_warning_is_said_once_in_fifty_steps(args, capsys):
    run = toy(args)
    run.say = print
    for step in range(1, 121):
        run.warn(step, {"kl": "KL is large"})
    assert capsys.readouterr().out.count("KL is large") == 3


def test_config_names_settings_versions_and_hardware(args):
    facts = json.loads((toy(args).folder / "config.json").read_text())
    assert facts["args"]["steps"] == 6 and facts["cores"] >= 1 and facts["cpu"] and facts["versions"]["torch"]


def test_the_score_is_compared_number_by_number_and_the_first_of_equals_stays(args):
    run = Run(__file__, args)
    scores = [(float("nan"), 9.0), (0.5, 1.0), (0.5, 2.0), (0.4, 9.0), (0.5, 2.0), (float("nan"), 9.0)]
    better = [run.is_best(step, *score) for step, score in enumerate(scores)]
    assert better == [False, True, True, False, False, False] and run.best == {"score": [0.5, 2.0], "step": 2}


def resumed(run, **changed):
    return toy(Args(resume=str(run.folder), device="cpu", **changed))


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_resuming_a_finished_run_changes_nothing_and_says_its_result_again(args, capsys):
    run = toy(args)
    before = snapshot(run.folder)
    said = capsys.readouterr().out.splitlines()[-2]
    again = resumed(run)
    assert snapshot(run.folder) == before and again.exit_code == 0
    assert capsys.readouterr().out.splitlines()[-2].split()[0] == said.split()[0] == "loss"


def test_a_run_that_has_ended_early_does_not_go_on_training(args):
    run = toy(args, lambda run, step: run.end() if step == 4 else None)
    assert len(lines(resumed(run).folder)) == 4


def test_resuming_an_older_checkpoint_leaves_nothing_of_the_later_timeline(args):
    run = toy(replace(args, save_every=1, keep=9))
    reference = lines(run.folder)
    older = run.folder / "checkpoints" / "step-000000002"

    def killed(run, step):
        if step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy(Args(resume=str(older), device="cpu"), killed)
    assert sorted(p.name[-1] for p in (run.folder / "checkpoints").iterdir()) == ["1", "2", "3"]
    again = resumed(run)
    assert lines(again.folder) == reference and (run.folder / "last").resolve().name.endswith("6")


def test_links_that_a_kill_left_out_are_set_again(args):
    run = toy(args, lambda run, step: run.end() if step == 4 else None)
    targets = {name: (run.folder / name).resolve() for name in ("last", "best")}
    for name in targets:
        (run.folder / name).unlink()
    (run.folder / "best").symlink_to("checkpoints/step-000000099")  # dangling
    resumed(run)
    assert {name: (run.folder / name).resolve() for name in targets} == targets


def refused(capsys, start) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        start()
    said = re.split(r"[\r\n]+", capsys.readouterr().err)
    (error,) = [line for line in said if line and "step/s]" not in line and not line.isspace()]
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


def test_one_process_writes_into_a_folder(args, capsys):
    run, inside = toy(args), multiprocessing.get_context("fork").Event()
    run.lock.close()  # as the end of its process would

    def hold():
        with open(run.folder / ".lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            inside.set()
            time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    assert inside.wait(10)
    before = snapshot(run.folder)
    assert "in use by another process" in refused(capsys, lambda: resumed(run))
    assert snapshot(run.folder) == before
    child.kill()
    child.join()
    assert resumed(run).exit_code == 0  # a killed process gives it back


def test_starts_in_one_moment_get_a_folder_each(args, monkeypatch):
    monkeypatch.setattr("common.run.time.strftime", lambda form: "now")
    folders = [create_folder(Path(__file__), args) for _ in range(3)]
    assert [folder.name for folder in folders] == ["toy-42-now", "toy-42-now-1", "toy-42-now-2"]


def test_a_refused_start_leaves_no_folder_behind(args, capsys):
    def refuse(run, step):
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
        fail("found too late")

    refused(capsys, lambda: toy(args, refuse))
    assert not any((Path(args.output_dir) / "test_run").iterdir())


@pytest.mark.parametrize("kind", ["a file", "below a file", "a long name"])
def test_an_output_folder_that_cannot_be_is_refused_first(args, capsys, tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "a long name": tmp_path / ("x" * 400)}
    assert "--output-dir" in refused(capsys, lambda: toy(replace(args, output_dir=str(path[kind]))))


HALF = '{"step": 7, "lo'


@pytest.mark.parametrize("what", ["config.json", "trainer.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", HALF, "[]", "null", '{"args": {"steps": "six"}}', '{"a": 1', "{}\n"])
def test_broken_files_of_a_run_folder_end_in_one_line_before_anything_is_changed(args, capsys, what, text):
    run = toy(args)
    path = run.folder / what if what != "trainer.json" else run.folder / "last" / what
    whole = what == "metrics.jsonl" and text in ("", HALF)  # an unfinished last line is what a full disk leaves
    path.write_text(path.read_text() + text if whole else text)
    before = snapshot(run.folder)
    if whole:
        assert resumed(run).exit_code == 0
    else:
        assert what in refused(capsys, lambda: resumed(run)) and snapshot(run.folder) == before


def test_a_config_may_lack_what_need_not_be_given_and_nothing_else(args, capsys):
    """A flag that is new since the run, None by default, means what it meant before: nothing."""
    run = toy(args)
    path = run.folder / "config.json"
    facts = json.loads(path.read_text())
    del facts["args"]["resume"]
    path.write_text(json.dumps(facts))
    assert resumed(run).exit_code == 0
    del facts["args"]["seed"]
    path.write_text(json.dumps(facts))
    assert "args.seed: is missing" in refused(capsys, lambda: resumed(run))


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(args, capsys):
    """A limit on the size of files stands in for the disk: the write fails in the same place."""

    def fill(run, step):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        error = refused(capsys, lambda: toy(args, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (folder,) = (Path(args.output_dir) / "test_run").iterdir()
    assert str(folder) in error and "make room" in error
    stand = {(folder / name).resolve() for name in ("last", "best")}
    assert set((folder / "checkpoints").iterdir()) == stand  # and no temporary folder
    whole, continued = toy(args), toy(Args(resume=str(folder), device="cpu"))
    assert lines(continued.folder) == lines(whole.folder)


def test_a_checkpoint_shows_no_tensors_but_the_models(args):
    """vLLM and others read every *.safetensors of a folder."""
    folder = toy(args).folder / "last"
    names = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert sorted(names) == ["bias", "weight"] and (folder / "trainer" / "trainer.safetensors").exists()


SIGNALS = """
import os, signal, sys, time
from common import stop
stop.listen()
def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("send(signal.SIGINT)", 130, "stopped: SIGINT\n"),
        ("send(signal.SIGTERM)", 143, "stopped: SIGTERM\n"),
        (
            "stop.opened = True\ntry: send(signal.SIGTERM)\nfinally: print('closed', file=sys.stderr)",
            143,
            "stopped: SIGTERM\nclosed\n",
        ),
        ("with stop.patience(): send(signal.SIGTERM)\nsys.exit(0 if stop.received == 15 else 1)", 0, ""),
        ("with stop.patience(): send(signal.SIGTERM, signal.SIGTERM)", 143, "stopped: SIGTERM\n"),
        ("with stop.patience(): send(signal.SIGTERM, signal.SIGINT)", 130, "stopped: SIGINT\n"),
        ("stop.opened = True\ntry: send(signal.SIGINT)\nfinally: send(signal.SIGINT)", 130, "stopped: SIGINT\n"),
    ],
)
def test_every_signal_is_answered_by_one_line_and_the_shells_code(code, status, said):
    done = subprocess.run([sys.executable, "-c", SIGNALS + code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def collectives():
    """What two processes see of `World`; run in both."""
    from common.language.stats import Sums
    from common.parallel import clip_gradients, join_world, sum_gradients
    from common.robot.sim import explained_variance

    world = join_world("cpu")
    rank = world.rank
    assert [world.share(6), world.share(2)] == [slice(3 * rank, 3 * rank + 3), slice(rank, rank + 1)]
    a, b = world.total(torch.full((2,), float(rank + 1)), torch.tensor(10.0 * rank))
    assert a.tolist() == [3.0, 3.0] and b.item() == 10.0
    assert world.gather([rank, rank]) == [0, 0, 1, 1] and world.any(rank == 0, False) == [True, False]
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), float(rank))
    layer.bias.grad = torch.ones(2) if rank else None  # one process did not need it
    sum_gradients(layer.parameters(), world)
    assert layer.weight.grad.eq(1).all() and layer.bias.grad.eq(1).all()
    assert clip_gradients(layer.parameters(), 0.1).item() == pytest.approx(6**0.5)
    sums = Sums()
    sums.add({"loss": torch.tensor(1.0 + rank)}, passes=2)
    sums.add({"low_min": torch.tensor(float(rank)), "high_max": torch.tensor(float(rank))})
    assert sums.totals(world) == {"loss": 1.5, "low_min": 0.0, "high_max": 1.0}
    rng = np.random.default_rng(0)
    returns, values = torch.from_numpy(rng.normal(size=(2, 3, 8)))
    mine = world.share(8)
    expected = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert explained_variance(returns[:, mine], values[:, mine], world) == pytest.approx(expected.item())
    world.leave()
    sys.exit(0)


def test_two_processes_share_sum_and_gather():
    assert two_forks(collectives) == [0, 0]


def test_sums_over_micro_batches_equal_those_of_the_whole():
    from common.language.stats import Sums
    from common.parallel import World

    values, sums = torch.arange(6.0), Sums()
    for part in values.split(2):
        sums.add({"mean": part.sum() / len(values)})
        sums.add({"low_min": part.min(), "high_max": part.max()})
    assert sums.totals(World(0, 1, torch.device("cpu"))) == {"mean": 2.5, "low_min": 0.0, "high_max": 5.0}
