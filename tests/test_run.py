"""`Run`: a toy script that fits a line, stopped, resumed, ended early."""

import json
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import two_forks
from safetensors.torch import save_file

from common.run import Run, RunArgs


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
            from safetensors.torch import load_file

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
    assert stop.value.code == 2 and "without 'mean'" in error and error.count("\n") == 1


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


def collectives():
    """What two processes see of `World`; run in both."""
    from common.parallel import clip_gradients, join_world, sum_gradients
    from common.robot.sim import explained_variance
    from common.stats import Sums

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
    sums.minimum("low", torch.tensor(float(rank)))
    sums.maximum("high", torch.tensor(float(rank)))
    assert sums.totals(world) == {"loss": 1.5, "low": 0.0, "high": 1.0}
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
    from common.parallel import World
    from common.stats import Sums

    values, sums = torch.arange(6.0), Sums()
    for part in values.split(2):
        sums.add({"mean": part.sum() / len(values)})
        sums.minimum("low", part.min())
        sums.maximum("high", part.max())
    assert sums.totals(World(0, 1, torch.device("cpu"))) == {"mean": 2.5, "low": 0.0, "high": 5.0}
