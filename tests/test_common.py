"""The plumbing: atomic checkpoints, JSONL logs, process helpers."""

import json
import os
import signal

import pytest
import torch

from common.checkpoint import atomic_folder, find_checkpoint, link, load_state, prune, save_state
from common.log import Logger, keep_until
from common.parallel import join_world


def write_checkpoint(run_dir, step, optimizer):
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    with atomic_folder(folder) as temporary:
        save_state(temporary, optimizer, {"script": "test", "step": step})
    link(run_dir, "last", folder)
    return folder


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
                save_state(temporary, optimizer, {"script": "test", "step": 2})
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert load_state(find_checkpoint(str(tmp_path)), optimizer, "test")["step"] == 1
    write_checkpoint(tmp_path, 2, optimizer)  # the leftovers are no obstacle
    assert load_state(find_checkpoint(str(tmp_path)), optimizer, "test")["step"] == 2


def test_optimizer_and_generators_come_back_bit_for_bit(tmp_path):
    import random

    import numpy as np

    model, optimizer = trained_optimizer(5)
    folder = write_checkpoint(tmp_path, 5, optimizer)
    expected = (torch.rand(3), random.random(), np.random.rand())
    _, other = trained_optimizer(2)
    assert load_state(folder, other, "test") == json.loads((folder / "trainer.json").read_text())
    assert (
        torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1] and np.random.rand() == expected[2]
    )
    for a, b in zip(optimizer.state.values(), other.state.values()):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_pruning_keeps_the_newest_and_the_linked(tmp_path):
    _, optimizer = trained_optimizer(1)
    for step in range(1, 6):
        folder = write_checkpoint(tmp_path, step, optimizer)
        if step == 2:
            link(tmp_path, "best", folder)
    prune(tmp_path, keep=2)
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert find_checkpoint(str(tmp_path)).name == "step-000005"


def test_logs_are_json_lines_without_nan_and_can_be_cut_back(tmp_path):
    logger = Logger(tmp_path, {})
    for step in range(3):
        logger.log(step, {"a": torch.tensor(float(step)), "b": float("nan")})
        logger.table("samples", step, [{"text": "é\n", "value": torch.tensor(1)}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "a')  # killed in the middle of a line
    for name in ("metrics", "samples"):
        keep_until(tmp_path / f"{name}.jsonl", 1)
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
