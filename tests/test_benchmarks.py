"""The one command for a GPU: its parts name flags that exist, its models are the real ones, its table loses no row."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, imported

from benchmarks.table import tables
from common.cli import parse
from common.parallel import World
from common.robot.gr00t_n15 import GR00TConfig

SH = (ROOT / "benchmarks/gpu.sh").read_text()
PARTS = [shlex.split(line.split("$python ")[1]) for line in SH.splitlines() if line.startswith("  part ")]


@pytest.mark.parametrize("words", PARTS, ids=" ".join)
def test_every_part_of_gpu_sh_parses(words, monkeypatch):
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        return
    if "grpo" in words[0] or "decode" in words[0]:
        if not (ROOT / "benchmarks/gpu_decode.py").exists():
            pytest.skip("benchmarks/gpu_decode.py is not part of this tree yet")
    module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [words[0], *(w.replace("$device", "cpu") for w in words[1:])])
    parse(module.Args, "")


def test_the_language_models_gpu_tests_need_no_simulator():
    """Read, not run: collecting them in a process without one takes twenty seconds."""
    names = {name.partition(".")[0] for name in imported("test_grpo_gpu")}
    assert "grpo_arithmetic" in names and "transformers" in names  # it followed the test files and the script
    assert not names & {"gymnasium", "mujoco", "gymnasium_robotics"}
    assert "gymnasium" in {name.partition(".")[0] for name in imported("test_ppo_run")}  # it would be noticed


def test_gpu_sh_goes_on_after_a_failure_names_it_and_fails(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), "cpu"], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": "false", "LOG": str(tmp_path / "log")})  # fmt: skip
    names = [line.split('"')[1] for line in SH.split("elif")[1].splitlines() if line.startswith("  part ")]
    assert done.returncode == 1 and len(names) > 4
    assert done.stderr.splitlines() == [f"error: failed: {name}" for name in names]
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), "tpu"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_tables_keep_every_row_and_its_heading():
    log = ["noise", "## A", '{"x": 1, "y": "a"}', 'ours {"t": 0.12345}', 'trl {"t": 12345.6}', "{not json}", "## B"]
    found = tables([*log, '{"x": 2, "y": "b"}', '{"x": 3, "y": "c"}'])
    assert found.count("## A") == found.count("## B") == 1
    assert re.findall(r"^\| .* \|$", found, re.M) == [
        "| x | y |", "| 1 | a |", "| side | t |", "| ours | 0.1235 |", "| trl | 12,346 |",
        "| x | y |", "| 2 | b |", "| 3 | c |",
    ]  # fmt: skip


def test_the_benchmarked_gr00t_is_made_as_a_loaded_one():
    from benchmarks import gpu_gr00t

    args = gpu_gr00t.g.Args(amp="bf16")
    model = gpu_gr00t.make_model(GR00TConfig.tiny(image_size=32), torch.device("cpu"), args)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.backbone.parameters())
    batch = gpu_gr00t.make_batch(model.config, 2, 2, torch.device("cpu"))
    with gpu_gr00t.g.autocast(args, torch.device("cpu")):
        assert gpu_gr00t.g.flow_matching_loss(model, batch, batch["noise"], batch["t"]).isfinite()


def test_the_benchmarked_ppo_batch_is_one_that_update_takes(capsys):
    from benchmarks import gpu_ppo

    flags = gpu_ppo.Args(device="cpu", num_envs=8, reduced=True, rounds=1)
    gpu_ppo.measure(16, "off", False, flags, World(0, 1, torch.device("cpu")))
    assert '"update_steps_per_s"' in capsys.readouterr().out


def test_both_sides_of_the_comparison_sample_the_whole_vocabulary_of_the_random_model(tmp_path, tokenizer):
    """Ours samples the ids of the tokenizer, TRL those of the model."""
    from transformers import AutoTokenizer

    from benchmarks.grpo_vs_trl import copy_tokenizer

    end = copy_tokenizer(str(tmp_path), 151936)
    large = AutoTokenizer.from_pretrained(tmp_path)
    text = "Calculate: 7 * 8 = "
    assert len(large) == 151936 and large(text).input_ids == tokenizer(text).input_ids
    assert large.eos_token_id == large.pad_token_id == end
    assert large.decode([*tokenizer("56").input_ids, 300, end - 1]) == f"56w300w{end - 1}"
