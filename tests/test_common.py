"""The plumbing: atomic checkpoints, JSONL logs, process helpers."""

import json
import os
import signal
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import (
    atomic_folder,
    find_checkpoint,
    load_state,
    read_state,
    replace_file,
    save_state,
    settle,
    trainer_file,
)
from common.log import Logger, lines_until
from common.parallel import join_world

STATE = {"script": "test", "best": None, "elapsed": 1.0}


def write_checkpoint(run_dir, step, optimizer):
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    with atomic_folder(folder) as temporary:
        save_state(temporary, optimizer, STATE | {"step": step})
    return folder


def loaded(run_dir, optimizer):
    state = read_state(folder := find_checkpoint(str(run_dir)), "test")
    load_state(folder, state, optimizer)
    return state


def trained_optimizer(steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_kill_9_during_a_save_leaves_the_earlier_checkpoint_loadable(tmp_path, moment):
    _, optimizer = trained_optimizer(1)
    write_checkpoint(tmp_path, 1, optimizer)
    child = os.fork()
    if child == 0:
        with atomic_folder(tmp_path / "checkpoints" / "step-000002") as temporary:
            (temporary / "trainer.json").write_text('{"script": "te')
            if moment == "before the rename":
                save_state(temporary, optimizer, STATE | {"step": 2})
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert loaded(tmp_path, optimizer)["step"] == 1
    write_checkpoint(tmp_path, 2, optimizer)  # the leftovers are no obstacle
    assert loaded(tmp_path, optimizer)["step"] == 2


def test_optimizer_and_generators_come_back_bit_for_bit(tmp_path):
    import random

    import numpy as np

    model, optimizer = trained_optimizer(5)
    folder = write_checkpoint(tmp_path, 5, optimizer)
    expected = (torch.rand(3), random.random(), np.random.rand())
    _, other = trained_optimizer(2)
    assert loaded(tmp_path, other) == json.loads((folder / "trainer.json").read_text())
    assert (
        torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1] and np.random.rand() == expected[2]
    )
    for a, b in zip(optimizer.state.values(), other.state.values()):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_pruning_keeps_the_newest_and_the_linked(tmp_path):
    _, optimizer = trained_optimizer(1)
    folders = [write_checkpoint(tmp_path, step, optimizer) for step in range(1, 6)]
    (tmp_path / "checkpoints" / ".tmp-step-000009").mkdir()  # a kill
    settle(tmp_path, folders[4], folders[1], keep=2)
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert [(tmp_path / name).resolve() for name in ("last", "best")] == [folders[4], folders[1]]
    assert find_checkpoint(str(tmp_path)) == folders[4] and find_checkpoint(str(tmp_path), best=True) == folders[1]
    settle(tmp_path, folders[3], folders[0], keep=2)  # an older one goes on: the later is of another timeline
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert not (tmp_path / "best").is_symlink() and (tmp_path / "last").resolve() == folders[3]


def test_logs_are_json_lines_without_nan_and_can_be_cut_back(tmp_path):
    logger = Logger(tmp_path, {})
    for step in range(3):
        logger.log(step, {"a": torch.tensor(float(step)), "b": float("nan")})
        logger.table("samples", step, [{"text": "é\n", "value": torch.tensor(1)}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "a')  # killed in the middle of a line
    for name in ("metrics", "samples"):
        replace_file(tmp_path / f"{name}.jsonl", "".join(lines_until(tmp_path / f"{name}.jsonl", 1)))
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["b"] is None


def test_a_gpu_is_set_up_without_cudnn_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert join_world("cuda").device == torch.device("cuda:0")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])


def refused(capsys, call, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_a_best_link_that_leads_nowhere_is_not_passed_over(tmp_path, capsys):
    folder = write_checkpoint(tmp_path, 1, trained_optimizer(1)[1])
    settle(tmp_path, folder, folder, keep=1)
    assert find_checkpoint(str(tmp_path), best=True) == folder
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("checkpoints/step-000009")
    assert f"'{tmp_path}/best' does not exist" in refused(capsys, find_checkpoint, str(tmp_path), True)
    assert find_checkpoint(str(tmp_path)) == folder


def test_half_a_line_in_the_middle_of_a_log_is_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    error = refused(capsys, lines_until, tmp_path / "metrics.jsonl", 9)
    (tmp_path / "noise.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe not the half of a line')
    assert "noise.jsonl', line 2" in refused(capsys, lines_until, tmp_path / "noise.jsonl", 9)
    assert "metrics.jsonl', line 2" in error


@pytest.mark.parametrize("kind", ["another shape", "integers", "another count", "one moment missing", "none"])
def test_moments_that_do_not_fit_the_weights_are_refused_before_a_step_reads_beyond_them(tmp_path, capsys, kind):
    _, optimizer = trained_optimizer(1)
    folder = write_checkpoint(tmp_path, 1, optimizer)
    file = trainer_file(folder, "trainer.safetensors")
    tensors = load_file(file)
    if kind == "another shape":
        tensors["optimizer.0.exp_avg"] = torch.zeros(1)
    elif kind == "integers":
        tensors = {k: v.int() if "exp_avg" in k else v for k, v in tensors.items()}
    elif kind == "another count":
        names = ("step", "exp_avg", "exp_avg_sq")
        tensors |= {f"optimizer.7.{name}": tensors[f"optimizer.0.{name}"].clone() for name in names}
        state = json.loads((folder / "trainer.json").read_text()) | {"tensors": sorted(tensors)}
        (folder / "trainer.json").write_text(json.dumps(state))
    else:
        gone = "exp_avg_sq" if "one" in kind else ""
        tensors = {k: v for k, v in tensors.items() if k.startswith("rng") or (gone and not k.endswith(gone))}
    save_file(tensors, file)
    assert "optimizer." in refused(capsys, loaded, tmp_path, trained_optimizer(1)[1])


@pytest.mark.parametrize("rng", [{"numpy": []}, {"python": [3, [1], None], "numpy": []}, {"python": [], "numpy": []}])
def test_generators_that_cannot_be_restored_are_noticed_before_a_model_is_read(tmp_path, capsys, rng):
    folder = write_checkpoint(tmp_path, 1, trained_optimizer(1)[1])
    state = json.loads((folder / "trainer.json").read_text()) | {"rng": rng}
    (folder / "trainer.json").write_text(json.dumps(state))
    assert "random generators" in refused(capsys, read_state, folder, "test")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"script": "te', '{"step": "three"}', '{"script": "test"}'])
def test_a_broken_trainer_json_ends_in_one_line(tmp_path, capsys, text):
    folder = write_checkpoint(tmp_path, 1, trained_optimizer(1)[1])
    (folder / "trainer.json").write_text(text)
    assert "trainer.json' cannot be read" in refused(capsys, read_state, folder, "test")


def test_checkpoints_of_the_older_layout_still_load(tmp_path):
    _, optimizer = trained_optimizer(3)
    folder = write_checkpoint(tmp_path, 3, optimizer)
    trainer_file(folder, "trainer.safetensors").rename(folder / "trainer.safetensors")
    (folder / "trainer").rmdir()
    state = json.loads((folder / "trainer.json").read_text())
    del state["tensors"]
    (folder / "trainer.json").write_text(json.dumps(state))
    _, other = trained_optimizer(1)
    assert loaded(tmp_path, other)["step"] == 3
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(optimizer.state.values(), other.state.values()))


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    given = []

    class Tracker:
        def define_metric(self, *_, **__): ...

        def finish(self, **_): ...

    fake = types.SimpleNamespace(init=lambda **settings: given.append(settings) or Tracker())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        Logger(tmp_path / "reach-1-20260101", {}, "wandb").finish()
    assert [(one["id"], one["resume"]) for one in given] == [("reach-1-20260101", "allow")] * 2
