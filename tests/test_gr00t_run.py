"""gr00t_finetune.py: loss and sampler, what trains, and whole runs on the bundled demonstrations."""

import copy
import json
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, two_forks
from safetensors.torch import load_file, save_file

import gr00t_finetune as g
import ppo_gr00t
from common.cli import parse
from common.robot import lora, sim, transforms
from common.robot.data_configs import DATA_CONFIGS
from common.robot.gr00t_n15 import GR00T, GR00TConfig
from common.robot.lora import add_lora
from common.robot.policy import read_stored
from common.robot.report import Tally
from gr00t_finetune import Args, flow_matching_loss, sample_actions

PARITY = ROOT.parent / "shared" / "data" / "gr00t_parity"
parity = pytest.mark.skipif(not PARITY.exists(), reason="the reference's outputs are not on this machine")


def pin(batch):
    """What pinning a batch for a GPU does with its tensors: it fails where two elements share their memory."""
    return {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for name, x in batch.items()}


def make_batch(B=3, seed=0, dims=5, views=1, config=None, lengths=None):
    """Random samples for the lite model, or for the tiny one."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    images = config is not None and not config.instruction_vocab
    S = 6 + (config.tokens_per_image * views if images else 0)
    ids = torch.randint(0, 200, (B, S), generator=generator)
    if images:
        ids[:, 2 : 2 + config.tokens_per_image * views] = config.image_token_index
    mask = torch.ones(B, S, dtype=torch.int64)
    for b, length in enumerate(lengths or [S] * B):
        mask[b, : S - length] = 0
    batch = {
        "eagle_input_ids": ids,
        "eagle_attention_mask": mask,
        "state": rand(B, 1, 64),
        "embodiment_id": torch.tensor([31]),
        "action": torch.nn.functional.pad(rand(B, 16, dims), (0, 32 - dims)),
        "action_mask": (torch.arange(32) < dims).expand(B, 16, 32),
        "noise": rand(B, 16, 32),
        "t": torch.rand(B, generator=generator),
    }
    if images:
        batch["eagle_pixel_values"] = rand(B * views, 3, config.image_size, config.image_size)
    return batch


class Perfect:
    """Knows the data: its velocity is a - x_0 everywhere on the straight path from x_0 to a."""

    config = GR00TConfig.lite()

    def __init__(self, actions, noise):
        self.actions, self.noise = actions, noise

    def vl_features(self, batch):
        return torch.zeros(1), None

    def velocity(self, features, mask, state, x_t, t, embodiment_id):
        return self.actions - self.noise


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.lite())
    with torch.no_grad():  # biases and the like start at zero, where gradients hide
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model.eval()


# ---- loss and sampler ------------------------------------------------------------------------------------------------


def test_a_perfect_velocity_has_no_loss_and_euler_lands_on_the_target():
    batch = make_batch()
    model = Perfect(batch["action"], batch["noise"])
    assert flow_matching_loss(model, batch, batch["noise"], batch["t"]) == 0
    for steps in (1, 3, 4, 8):
        landed = sample_actions(model, batch, batch["noise"], steps)
        assert torch.allclose(landed, batch["action"], atol=1e-5)


def test_euler_asks_at_the_times_of_the_reference(lite):
    """Buckets 0, 250, 500, 750 for K = 4, whatever the rounding of k / K."""
    asked = []
    batch = make_batch()

    class Listening(Perfect):
        def velocity(self, features, mask, state, x_t, t, embodiment_id):
            asked.append(set((t * 1000).long().tolist()))
            return torch.zeros_like(x_t)

    for steps in (4, 10, 7):
        asked.clear()
        out = sample_actions(Listening(None, None), batch, batch["noise"], steps)
        assert asked == [{int(1000 * k / steps)} for k in range(steps)]
    assert torch.equal(out, batch["noise"])


def test_loss_by_hand():
    """A velocity of zero: the loss is the mean of (a - x_0)^2 over valid dims, steps past the end included."""
    batch = make_batch()

    class Zero(Perfect):
        def velocity(self, features, mask, state, x_t, t, embodiment_id):
            tau = batch["t"][:, None, None]
            assert torch.allclose(x_t, (1 - tau) * batch["noise"] + tau * batch["action"])
            return torch.zeros_like(x_t)

    loss = flow_matching_loss(Zero(None, None), batch, batch["noise"], batch["t"])
    assert torch.allclose(loss, ((batch["action"] - batch["noise"])[..., :5] ** 2).mean())


def test_several_noises_of_a_sample_are_so_many_samples_and_one_pass_of_the_backbone(lite, monkeypatch):
    one, two = make_batch(), make_batch(seed=1)
    noise = torch.stack([one["noise"], two["noise"]], 1).flatten(0, 1)  # the two noises of a sample in a row
    t = torch.stack([one["t"], two["t"]], 1).flatten()
    passes = []
    vl_features = lite.vl_features
    monkeypatch.setattr(lite, "vl_features", lambda batch: passes.append(len(batch["state"])) or vl_features(batch))
    both = flow_matching_loss(lite, one, noise, t)
    assert passes == [3]
    single = [flow_matching_loss(lite, one, draw["noise"], draw["t"]) for draw in (one, two)]
    assert torch.allclose(both, sum(single) / 2, rtol=1e-5) and abs(single[0] - single[1]) > 1e-3


def test_padded_dims_have_no_gradient_and_padded_steps_do(lite):
    batch = make_batch()
    lite.zero_grad()
    flow_matching_loss(lite, batch, batch["noise"], batch["t"]).backward()
    decoder = lite.action_head.action_decoder.layer2
    assert decoder.W.grad[31, :, 5:].abs().max() == 0 and decoder.b.grad[31, 5:].abs().max() == 0
    assert decoder.b.grad[31, :5].abs().min() > 0
    changed = {k: v.clone() for k, v in batch.items()}
    changed["action"][:, -1] += 1  # the last step may lie past the episode's end: it counts
    assert flow_matching_loss(lite, changed, batch["noise"], batch["t"]) != flow_matching_loss(
        lite, batch, batch["noise"], batch["t"]
    )


def test_only_the_rows_of_the_embodiment_get_gradient(lite):
    batch = make_batch()
    lite.zero_grad()
    flow_matching_loss(lite, batch, batch["noise"], batch["t"]).backward()
    for name, parameter in lite.named_parameters():
        if parameter.dim() and len(parameter) == 32 and name.endswith((".W", ".b")):
            others = torch.cat([parameter.grad[:31].flatten()])
            assert others.abs().max() == 0 and parameter.grad[31].abs().max() > 0, name


def test_drawn_times_have_the_published_density():
    t = g.sample_time(GR00TConfig(), 20_000, torch.device("cpu"))
    # E[s] = 0.6, Var[s] = 0.06857 for Beta(1.5, 1)
    assert abs(t.mean() - (0.999 - 0.6) / 0.999) < 0.006 and abs(t.std() - 0.26186 / 0.999) < 0.005
    assert -0.0011 < t.min() < 0.01 and 0.9 < t.max() < 1


def test_loss_and_actions_are_drawn_when_nothing_is_given(lite):
    batch = make_batch()
    torch.manual_seed(1)
    first = flow_matching_loss(lite, batch), sample_actions(lite, batch)
    torch.manual_seed(1)
    assert flow_matching_loss(lite, batch) == first[0] and torch.equal(sample_actions(lite, batch), first[1])
    assert first[1].shape == (3, 16, 32) and not first[1].requires_grad


@parity
@pytest.mark.parametrize("name", ["equal", "padded"])
def test_parity_of_loss_gradients_and_actions_with_the_reference(name):
    model = GR00T.from_pretrained(PARITY / "full_small")
    tensors = load_file(PARITY / "full_small.safetensors")
    facts = json.loads((PARITY / "full_small.json").read_text())["batches"][name]
    batch = {k.removeprefix(f"{name}.input."): v for k, v in tensors.items() if k.startswith(f"{name}.input.")}
    model.set_trainable(True, True, True, True)
    model.eval()
    loss = flow_matching_loss(model, batch, batch["noise"], batch["t"])
    assert abs(loss.item() - facts["loss"]) <= 1e-5 * facts["loss"]
    loss.backward()
    for key, expected in facts["grad_norm"].items():
        if expected > 1e-6:
            assert abs(model.get_parameter(key).grad.norm().item() - expected) <= 3e-4 * expected, key
    for steps in (4, 8):
        expected = tensors[f"{name}.expected.actions_{steps}_steps"]
        actions = sample_actions(model, batch, batch["initial_noise"], steps)
        assert (actions - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_metrics_by_time_and_by_dim_add_up_to_the_loss(lite):
    batch = make_batch(B=40)
    error, _, t = g.velocity_error(lite, batch, batch["noise"], batch["t"])
    tally = Tally(torch.device("cpu"), 32)
    for part in (slice(0, 15), slice(15, 40)):
        tally.add(error[part], batch["action_mask"][part], t[part])
    metrics = tally.metrics("train", list("abcde"))
    loss = g.masked_mean(error, batch["action_mask"]).item()
    assert abs(metrics["train/loss"] - loss) < 1e-5
    assert abs(np.mean([metrics[f"train/loss_dim/{name}"] for name in "abcde"]) - loss) < 1e-5
    inside = (t >= 0.25) & (t < 0.5)
    assert abs(metrics["train/loss_t/0.25-0.50"] - error[inside][..., :5].mean().item()) < 1e-5


def test_a_compiled_head_is_one_graph_that_computes_the_same(lite, monkeypatch):
    """Traced without a break (the code generator is left out: it takes a minute), in training and in sampling."""
    model, batch = copy.deepcopy(lite), make_batch()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: compiler(f, backend="aot_eager", fullgraph=True))
    model.compile_head()
    assert set(model.state_dict()) == set(lite.state_dict())
    for m in (lite, model):
        m.zero_grad()
        flow_matching_loss(m, batch, batch["noise"], batch["t"]).backward()
    for (name, a), b in zip(lite.named_parameters(), model.parameters()):
        assert not a.requires_grad or torch.allclose(a.grad, b.grad, atol=1e-6, rtol=1e-4), name
    actions = [sample_actions(m, batch, batch["noise"]) for m in (lite, model)]
    assert torch.allclose(*actions, atol=1e-5)


# ---- what trains -----------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_from_zero_and_falls_to_zero():
    args = Args(max_steps=1000, learning_rate=2.0, warmup_ratio=0.05)
    rates = [g.learning_rate(step, args) for step in range(1000)]
    assert rates[0] == 0 and rates[25] == 1.0 and max(rates) == rates[50] == 2.0
    assert abs(rates[525] - 1.0) < 1e-9 and 0 < rates[-1] < 1e-4


def test_decay_groups_of_the_full_size_are_those_of_the_reference():
    with torch.device("meta"):
        model = GR00T(GR00TConfig())
    decayed, rest = g.parameter_groups(model, 1e-5)
    count = lambda group: (len(group["params"]), sum(p.numel() for p in group["params"]))  # noqa: E731
    assert count(decayed) == (156, 1_068_418_048) and decayed["weight_decay"] == 1e-5
    assert count(rest) == (158, 388_096) and rest["weight_decay"] == 0


@pytest.mark.parametrize("rank, full, expected", [(16, False, 3_276_800), (16, True, 8_228_864), (8, False, 1_638_400)])
def test_adapters_of_the_full_size_are_those_of_the_reference(rank, full, expected):
    with torch.device("meta"):
        model = GR00T(GR00TConfig())
        adapters = add_lora(model, Args(lora_rank=rank, lora_full_model=full))
    assert sum(a.A.numel() + a.B.numel() for a in adapters.values()) == expected
    assert len(adapters) == (177 if full else 60)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "action_head.action_decoder.layer2.W" in trainable  # which the reference would freeze
    assert "action_head.vlln.weight" not in trainable


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("targets", ["qkv", "qkvo"])
def test_merged_adapters_compute_the_same_and_leave_no_trace(full, targets):
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.tiny(image_size=16)).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    batch = make_batch(config=model.config)
    adapters = add_lora(model, Args(lora_rank=4, lora_full_model=full, lora_targets=targets))
    plain = flow_matching_loss(model, batch, batch["noise"], batch["t"])
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.5)
    adapted = flow_matching_loss(model, batch, batch["noise"], batch["t"])
    with lora.merged(model, adapters):
        assert set(model.state_dict()) == set(before)  # the layout that every loader knows
        assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
        merged = flow_matching_loss(model, batch, batch["noise"], batch["t"])
    assert (merged - adapted).abs() < 0.02 * (plain - adapted).abs()
    assert torch.equal(flow_matching_loss(model, batch, batch["noise"], batch["t"]), adapted)
    for name, adapter in adapters.items():
        assert torch.equal(adapter.linear.weight, before[f"{name}.weight"])


@pytest.mark.parametrize(
    "flags", [dict(tune_projector=False), dict(tune_diffusion_model=False), dict(tune_llm=True), dict(tune_visual=True)]
)
def test_frozen_parameters_stay_as_they_are_bit_for_bit(flags):
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.tiny(image_size=16))
    model.set_trainable(**flags)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(g.parameter_groups(model, 0.1), lr=1e-2)
    g.set_training(model, {})
    batch = make_batch(config=model.config)
    for _ in range(3):
        optimizer.zero_grad()
        flow_matching_loss(model, batch, batch["noise"], batch["t"]).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_what_bfloat16_autocast_leaves_in_float32_is_exact(tmp_path, monkeypatch):
    """Rotary angles, in all three robot scripts: the device is set up with TF32 products."""
    simulated = SimpleNamespace(torch_threads=torch.get_num_threads(), torch_deterministic=False, amp="bf16")
    none = ["gr00t_finetune.py", "--amp", "bf16", "--model-path", "lite", "--dataset-path", str(tmp_path / "none")]
    try:
        for set_up in (lambda: sim.set_up_torch(simulated), lambda: run_script(g, none, monkeypatch)):
            torch.set_float32_matmul_precision("high")
            set_up()
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_micro_batches_give_the_gradient_of_the_whole_batch(lite):
    batch = make_batch(B=8)
    grads = []
    for cuts in (1, 4):
        lite.zero_grad()
        for rows in np.array_split(np.arange(8), cuts):
            part = {k: v[rows] if len(v) == 8 else v for k, v in batch.items()}
            loss = flow_matching_loss(lite, part, part["noise"], part["t"]) * (len(rows) / 8)
            loss.backward()
        grads.append({n: p.grad.clone() for n, p in lite.named_parameters() if p.grad is not None})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4), name


def test_masked_padding_makes_a_sample_independent_of_its_batch():
    torch.manual_seed(0)
    for masked in (False, True):
        model = GR00T(GR00TConfig.lite(mask_padding=masked)).eval()
        batch = make_batch(B=2, lengths=[6, 3])
        short = {k: v[1:] if len(v) == 2 else v for k, v in batch.items()}
        alone = {k: v[:, 3:] if k.startswith("eagle") else v for k, v in short.items()}
        same = torch.allclose(
            sample_actions(model, short, short["noise"]), sample_actions(model, alone, alone["noise"]), atol=1e-5
        )
        assert same == masked


# ---- whole runs ------------------------------------------------------------------------------------------------------

QUICK = dict(
    model_path="lite",
    max_steps=6,
    batch_size=8,
    log_every=2,
    eval_every=3,
    eval_batches=1,
    eval_steps=20,
    eval_trajs=2,
    closed_loop=False,
    denoising_sweep=4,
    save_every=3,
    device="cpu",
    torch_threads=1,
)


@contextmanager
def quiet_signals():
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        torch.set_num_threads(threads)


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """Runs main() in this process; returns (exit code, run folder)."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(g, "draw_open_loop", lambda result, names, chunk, path: path)

    def start(**flags):
        argv = ["gr00t_finetune.py"]
        place = (
            {} if "resume" in flags else {"output_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "cache")}
        )
        for name, value in (place | flags).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                argv += [flag, *map(str, value if isinstance(value, (tuple, list)) else [value])]
        monkeypatch.setattr(sys, "argv", argv)
        with quiet_signals(), pytest.raises(SystemExit) as stop:
            g.main(parse(Args, g.__doc__))
        runs = sorted((tmp_path / "runs" / "gr00t_finetune").glob("*"), key=lambda p: p.stat().st_mtime)
        return stop.value.code, runs[-1] if runs else None

    return start


def metrics_of(run_dir: Path) -> list[dict]:
    """Everything but the times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights_of(a), weights_of(b)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_explains_itself_and_its_checkpoint_has_the_published_layout(run, tmp_path, figures):
    code, folder = run(**QUICK)
    assert code == 0
    drawn = ("learning.png", "health.png", "report.html")
    for name in ("config.json", "metrics.jsonl", "gr00t_finetune.py", "last", "best", *drawn):
        assert (folder / name).exists(), name
    assert len(list((folder / "open_loop").glob("*.png"))) == 2
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]
    last = rows[-1]
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/loss_t/0.00-0.25",
        "train/loss_dim/displacement.0",
        "val/loss",
        "eval/mse",
        "eval/mse_hold_last",
        "eval/mse_mean_action",
        "eval/smoothness",
        "eval/mse_k4",
    ):
        assert np.isfinite(last[name]), name
    assert "base/mse" in rows[0] and "val/loss" in rows[0]
    tables = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("trajectory_results", "per_joint_mse", "evaluation_summary")
    }
    assert [row["joint"] for row in tables["per_joint_mse"]] == [*(f"displacement.{i}" for i in range(3)), "gripper"]
    assert len(tables["trajectory_results"]) == 2 and tables["evaluation_summary"][0]["eval/mse"] == last["eval/mse"]
    checkpoint = folder / "last"
    metadata = json.loads((checkpoint / "experiment_cfg/metadata.json").read_text())["new_embodiment"]
    assert set(metadata["statistics"]["action"]["displacement"]) == {"min", "max", "mean", "std", "q01", "q99"}
    assert metadata["modalities"]["action"]["gripper"]["shape"] == [1]
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "gr00t_n1_5"
    GR00T.from_pretrained(checkpoint)

    # the same evaluation from the checkpoint alone, with the data, the split and the statistics of the run
    flags = {k: v for k, v in QUICK.items() if k.startswith(("eval_t", "eval_s", "closed", "deno", "dev", "torch"))}
    code, evaluated = run(eval_only=True, model_path=str(folder / "last"), **flags)
    assert code == 0
    again = metrics_of(evaluated)[0]
    assert all(abs(again[name] - last[name]) < 1e-6 for name in ("eval/mse", "eval/mse_hold_last", "eval/max_error"))


@pytest.mark.parametrize(
    "flags", [{}, dict(gradient_accumulation_steps=2, gradient_checkpointing=True)], ids=["plain", "cut"]
)
def test_resume_is_bit_exact(run, flags):
    _, whole = run(**QUICK, **flags)
    cut = whole.with_name("cut")
    whole_weights = whole / "checkpoints/step-000000006"

    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000000006")
    code, _ = run(resume=str(cut))
    assert code == 0 and metrics_of(cut) == metrics_of(whole)
    assert same_weights(cut / "checkpoints/step-000000006", whole_weights)


def test_same_seed_same_run_and_workers_change_nothing(run, tmp_path):
    first = run(**QUICK)[1]
    second = run(**QUICK, num_workers=2)[1]
    assert first != second and metrics_of(first) == metrics_of(second)
    assert same_weights(first / "last", second / "last")


def test_accumulation_agrees_with_the_whole_batch(run):
    flags = QUICK | dict(max_steps=4, warmup_ratio=0.0, save_every=0, noises_per_sample=2)
    first, second = run(**flags)[1], run(**flags, gradient_accumulation_steps=4)[1]
    a, b = metrics_of(first)[-1], metrics_of(second)[-1]
    for name in ("train/loss", "val/loss", "eval/mse"):
        assert abs(a[name] - b[name]) < 2e-4 * abs(a[name]), name


def test_adapters_train_resume_and_leave_a_whole_model(run, tmp_path):
    base = run(**QUICK)[1] / "last"
    flags = QUICK | dict(model_path=str(base.resolve()), lora_rank=4, warmup_ratio=0.0)
    code, whole = run(**flags)
    assert code == 0

    cut = whole.with_name("cut")
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000000006")
    assert run(resume=str(cut))[0] == 0
    assert metrics_of(cut) == metrics_of(whole) and same_weights(cut / "checkpoints/step-000000006", whole / "last")
    trained = GR00T.from_pretrained(whole / "last")  # merged: nothing but the published layout
    old = load_file(base / "model.safetensors")
    changed = {name for name, p in trained.state_dict().items() if not torch.equal(p, old[name])}
    assert changed and all(
        name.endswith((".W", ".b", "to_q.weight", "to_k.weight", "to_v.weight")) or "position" in name
        for name in changed
    )


def test_the_tiny_model_trains_on_pictures(run):
    flags = QUICK | dict(model_path="tiny", max_steps=2, max_samples=50, val_episodes=1, eval_trajs=1, eval_batches=1)
    code, folder = run(**flags)
    assert code == 0 and np.isfinite(metrics_of(folder)[-1]["eval/mse"])
    assert len(list((folder.parent.parent.parent / "cache").glob("fetch_demos-front-*.npy"))) == 1
    GR00T.from_pretrained(folder / "best")


def test_gradients_that_are_not_finite_end_the_run_before_they_reach_the_weights(run, capsys):
    code, folder = run(**QUICK | dict(learning_rate=1e30, save_every=1, warmup_ratio=0.0))
    out = capsys.readouterr()
    assert code == 1 and "gradients are not finite" in out.out + out.err
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder / "last").values())


@pytest.mark.parametrize("config", ["fetch", "auto"])
def test_a_policy_closes_the_loop(run, config):
    code, folder = run(**(QUICK | dict(closed_loop=True, closed_loop_episodes=2, max_steps=2, data_config=config)))
    last = metrics_of(folder)[-1]
    assert code == 0 and 0 <= last["closed_loop/FetchReach/success_rate"] <= 1
    assert {name.split("/")[1] for name in last if name.startswith("closed_loop/")} == {
        "FetchReach",
        "FetchPush",
        "FetchPickAndPlace",
    }


def test_the_expert_seen_through_the_policy_interface_succeeds(monkeypatch):
    """The loop itself is sound: with the expert's actions in place of predictions, every episode ends at the goal."""
    from assets.build_fetch_demos import EXPERTS
    from common.robot.fetch import FetchVec

    args = g.resolve(Args(model_path="lite", closed_loop_episodes=4, execute_steps=1))
    args, data, _ = g.read_data(args, g.find_stored(args), lambda text: None)
    data.interface.prompts = dict.fromkeys(data.instructions, np.arange(3))
    lastly = {}
    step = FetchVec.step
    reset = FetchVec.reset
    monkeypatch.setattr(FetchVec, "step", lambda self, a: lastly.update(obs=(out := step(self, a))[0]) or out)
    monkeypatch.setattr(FetchVec, "reset", lambda self, **k: lastly.update(obs=(out := reset(self, **k))[0]) or out)

    def expert(model, batch, noise, num_steps):
        actions = EXPERTS["FetchReach-v4"](lastly["obs"])
        raw = {"displacement": actions[:, None, :3], "gripper": actions[:, None, 3:]}
        codes = transforms.pad(transforms.encode("action", raw, data.config, data.metadata), 32)
        return torch.from_numpy(codes).expand(-1, 16, -1)

    monkeypatch.setattr(g, "sample_actions", expert)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    found = g.closed_loop(model, g.Samples(data, GR00TConfig.lite()), "FetchReach-v4", args)
    assert found["closed_loop/FetchReach/success_rate"] == 1.0


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(batch_size=8, gradient_accumulation_steps=3), "--batch-size 6"),
        (dict(dataset_path="nowhere"), "assets/fetch_demos"),
        (dict(data_config="so100"), "--data-config auto"),
        (dict(data_config="aloha"), "so100"),
        (dict(val_episodes=120), "nothing to train on"),
        (dict(lora_rank=4), "fresh"),
        (dict(lora_rank=4, model_path="someone/model", tune_llm=True), "drop --tune-llm"),
        (dict(lora_rank=4, model_path="someone/model", tune_diffusion_model=False), "--no-tune-diffusion-model"),
        (dict(adam_betas=(0.9, 1.0)), "--adam-betas[1] 1.0: must be below 1"),
        (dict(noises_per_sample=0), "--noises-per-sample"),
        (dict(eval_only=True), "run folder"),
        (dict(execute_steps=17), "at most 16"),
        (dict(max_samples=0), "--max-samples"),
        (dict(learning_rate=0), "--learning-rate"),
        (dict(model_path="no/such-model"), "no/such-model"),
        (dict(denoising_steps=0), "--denoising-steps"),
        (dict(fsdp=True), "torchrun --nproc-per-node"),
        (dict(fsdp=True, compile=True), "--fsdp goes with neither"),
        (dict(fsdp=True, lora_rank=4, model_path="someone/model"), "--fsdp goes with neither"),
        (dict(learning_rate="fast"), "learning-rate"),
        (dict(lora_full_model=True), "--lora-full-model shapes adapters"),
        (dict(lora_alpha=32), "--lora-alpha shapes adapters"),
        (dict(lora_targets="qkvo"), "--lora-targets shapes adapters"),
        (dict(lora_dropout=0.3), "--lora-dropout shapes adapters"),
    ],
)
def test_bad_flags_end_in_one_line(run, capsys, flags, message):
    code, folder = run(**(QUICK | flags))
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.strip().count("\n") == 0
    assert folder is None


def test_checkpoints_without_the_statistics_asked_for_are_refused(run, capsys, tmp_path):
    folder = run(**QUICK)[1]
    flags = dict(eval_only=True, model_path=str(folder), closed_loop=False)
    code, _ = run(**flags, embodiment_tag="gr1")
    error = capsys.readouterr().err
    assert code == 2 and "no statistics for --embodiment-tag gr1 (it has: new_embodiment)" in error
    (folder / "best/experiment_cfg/metadata.json").unlink()
    code, _ = run(**flags)
    assert code == 2 and "it has: none" in capsys.readouterr().err


def test_another_order_of_keys_is_read_by_name_or_refused(run, tmp_path, capsys):
    """With --data-config auto, the order in modality.json was the order of the model's numbers: MSE 42 became 801."""
    folder = run(**QUICK | dict(max_steps=1, data_config="auto"))[1]
    other = tmp_path / "other"
    shutil.copytree(ROOT / "assets/fetch_demos", other, ignore=shutil.ignore_patterns("*.mp4"))
    path = other / "meta/modality.json"
    modality = json.loads(path.read_text())
    for kind in ("state", "action"):
        modality[kind] = dict(reversed(modality[kind].items()))
    path.write_text(json.dumps(modality))
    flags = dict(eval_only=True, model_path=str(folder), eval_trajs=1, closed_loop=False, denoising_sweep=4)
    first, second = (metrics_of(run(**flags, dataset_path=str(where))[1])[0] for where in ("assets/fetch_demos", other))
    assert first["eval/mse"] == second["eval/mse"]
    capsys.readouterr()
    assert run(**flags, dataset_path=str(other), data_config="auto")[0] == 2
    error = capsys.readouterr().err
    assert "is not what checkpoint" in error and "against goal_relative (min_max), goal (min_max)" in error
    modality["state"]["fingers"]["end"] -= 1
    path.write_text(json.dumps(modality))
    assert run(**flags, dataset_path=str(other))[0] == 2
    assert "state.fingers of" in (error := capsys.readouterr().err) and "shape [1]" in error and "with [2]" in error


def test_a_folder_names_no_code(run, tmp_path, monkeypatch, capsys):
    """module:NAME comes from the command line alone; a folder's is data, whoever wrote it."""
    folder, mark = run(**QUICK | dict(max_steps=1))[1], tmp_path / "mark"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/payload.py").write_text(f"open({str(mark)!r}, 'w')\nfrom common.robot.data_configs import *\n")
    monkeypatch.chdir(tmp_path)
    name, last = "evil.payload:X", (folder / "last").resolve()
    for file in (last / "trainer.json", folder / "config.json"):
        content = json.loads(file.read_text())
        content["args"]["data_config"] = name
        file.write_text(json.dumps(content))
    policy = last / "experiment_cfg/policy.json"
    old = policy.read_text()
    policy.write_text(json.dumps(json.loads(old) | {"name": name}))
    evaluate = dict(eval_only=True, model_path=str(last), eval_trajs=1, closed_loop=False)
    fetch = ppo_gr00t.resolve(ppo_gr00t.Args(model_path=str(last)))
    assert run(**evaluate)[0] == 0 and run(resume=str(folder))[0] == 0
    assert ppo_gr00t.read_interface(fetch)[1].config == replace(DATA_CONFIGS["fetch"], video=()) and not mark.exists()
    policy.unlink()  # as older versions left it: the name is all that is there
    capsys.readouterr()
    for start in (
        lambda: run(**evaluate)[0],
        lambda: run(resume=str(folder))[0],
        lambda: ppo_gr00t.read_interface(fetch),
    ):
        with suppress(SystemExit):
            assert start() == 2
        error = capsys.readouterr().err
        assert "experiment_cfg/policy.json" in error and "--data-config" in error and error.count("\n") == 1
    assert not mark.exists()
    run(**evaluate, data_config=name)
    assert mark.exists()  # who types it, means it


@pytest.mark.parametrize("file", ["trainer.json", "experiment_cfg/metadata.json", "experiment_cfg/policy.json"])
@pytest.mark.parametrize(
    "content", ["[]", "null", '{"args": [], "name": 3, "gr1": 4}', '"x"', '{"args": {"val', "\x00"]
)
def test_what_a_folder_says_is_read_through_its_schema(lite, file, content, tmp_path, capsys):
    lite.save_pretrained(tmp_path)
    (tmp_path / "experiment_cfg").mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        read_stored(str(tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and file in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "args", [{"val_episodes": "3"}, {"batch_size": 0}, {"dataset_path": [3]}, {"embodiment_tag": "../x"}]
)
def test_settings_of_a_folder_have_the_types_of_flags(lite, args, tmp_path, capsys):
    lite.save_pretrained(tmp_path)
    (tmp_path / "trainer.json").write_text(json.dumps({"args": args}))
    with pytest.raises(SystemExit):
        g.resolve(Args(eval_only=True, model_path=str(tmp_path)))
    assert f"args.{next(iter(args))}" in capsys.readouterr().err


def test_what_is_wrong_with_a_checkpoint_is_found_before_it_is_loaded(run, tmp_path, capsys, monkeypatch):
    folder = run(**QUICK | dict(max_steps=1))[1]
    for name in ("toy", "from_pretrained"):
        monkeypatch.setattr(GR00T, name, lambda *a, **k: pytest.fail("a model is made before its files are checked"))
    base = (folder / "last").resolve()
    weights = load_file(base / "model.safetensors")
    weights.pop("action_head.vlln.bias")
    save_file(weights, base / "model.safetensors")
    capsys.readouterr()
    for flags in (
        dict(model_path=str(base)),
        dict(model_path=str(base), eval_only=True, closed_loop=False),
        dict(model_path="tiny", tokenizer="someone/no-tokenizer"),
        dict(model_path="tiny", attn_implementation="flash_attention_2"),
        dict(resume=str(folder)),
    ):
        code, after = run(**flags if "resume" in flags else QUICK | flags)
        error = capsys.readouterr().err
        assert code == 2 and after == folder and error.strip().count("\n") == 0, error
        if "tiny" not in flags.values():
            assert "missing: action_head.vlln.bias" in error


def test_adapters_of_another_run_are_refused(tmp_path, capsys):
    model = GR00T(GR00TConfig.lite())
    adapters = add_lora(model, Args(lora_rank=2))
    tensors = lora.adapter_tensors(adapters)
    first = next(iter(tensors))
    for damage in ({first: tensors[first][:-1].clone()}, {"x": torch.zeros(1)}):
        save_file(tensors | damage, tmp_path / "lora.safetensors")
        with pytest.raises(SystemExit):
            lora.load_adapters(adapters, tmp_path)
        assert f"another run's: {next(iter(damage))}" in capsys.readouterr().err
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    with pytest.raises(SystemExit):
        lora.load_adapters(adapters, tmp_path)
    assert "lora.safetensors' cannot be read" in capsys.readouterr().err


def test_other_checkpoints_and_tokenizers_are_refused(run, capsys, tmp_path):
    folder = run(**QUICK)[1]
    state = json.loads((folder / "last/trainer.json").read_text())
    (folder / "last/trainer.json").write_text(json.dumps(state | {"script": "ppo_fetch"}))
    code, _ = run(resume=str(folder))
    assert code == 2 and "belongs to ppo_fetch" in capsys.readouterr().err
    (folder / "last/trainer.json").write_text(json.dumps(state | {"rows": 7}))
    assert run(resume=str(folder))[0] == 2 and "it had 7 rows" in capsys.readouterr().err
    code, _ = run(resume=str(folder), learning_rate=1.0)
    assert code == 2 and "--learning-rate" in capsys.readouterr().err
    code, _ = run(**QUICK, tokenizer="someone/no-tokenizer")
    error = capsys.readouterr().err
    assert code == 2 and "--tokenizer" in error and error.strip().count("\n") == 0
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit):
        transforms.load_tokenizer(str(ROOT / "assets/tiny-qwen2"), 151669)
    assert "the model expects 151669" in capsys.readouterr().err


def test_recipes_fill_in_by_model_size():
    tiny, full = g.resolve(Args()), g.resolve(Args(model_path="nvidia/GR00T-N1.5-3B", device="cpu"))
    assert tiny.tune_llm and tiny.tune_visual and not full.tune_llm and not full.tune_visual
    assert (full.max_steps, full.batch_size, full.learning_rate) == (10_000, 32, 1e-4) and full.amp == "off"
    assert replace(full).embodiment_tag == "new_embodiment"


def test_two_processes_agree_with_one(run, monkeypatch):
    """The flags name the global batch, so the numbers are those of one process up to rounding."""
    flags = QUICK | dict(max_steps=3, log_every=1, eval_every=0, save_every=0, warmup_ratio=0.0)
    code, single = run(**flags)
    main = g.main
    monkeypatch.setattr(g, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code_two, double = run(**flags)
    rows = [metrics_of(single)[-1], metrics_of(double)[-1]]
    assert code == code_two == 0 and single != double
    for name in ("train/loss", "train/grad_norm", "val/loss", "eval/mse"):
        assert abs(rows[0][name] - rows[1][name]) < 1e-5 * abs(rows[0][name]), name


def test_sharded_weights_train_as_whole_ones_and_go_on_from_their_checkpoint(run, monkeypatch):
    """FSDP's numbers are one process's up to rounding; its checkpoint is a whole model, and continues bit-exactly."""
    flags = QUICK | dict(model_path="tiny", max_steps=3, save_every=2, max_samples=50, warmup_ratio=0.0, eval_trajs=1)
    flags |= dict(gradient_accumulation_steps=2, gradient_checkpointing=True, log_every=1, eval_every=2)
    flags |= dict(denoising_steps=1, denoising_sweep=1)  # two processes on one core wait for each other at every block
    flags |= dict(learning_rate=1e-3)  # Adam's first steps are as large for a gradient that is rounding alone
    code, single = run(**flags)
    main = g.main
    monkeypatch.setattr(g, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code_two, sharded = run(**flags, fsdp=True)
    assert code == code_two == 0 and len(metrics_of(single)) == len(metrics_of(sharded)) == 4
    for one, two in zip(metrics_of(single), metrics_of(sharded)):
        assert one.keys() == two.keys()
        for name in one.keys() & {"train/loss", "train/grad_norm", "val/loss", "val/mse", "eval/mse", "base/mse"}:
            assert abs(one[name] - two[name]) < 1e-5 * abs(one[name]), (name, one["step"])
    whole, parts = weights_of(single / "last"), weights_of(sharded / "last")
    assert {name: tensor.shape for name, tensor in whole.items()} == {n: tensor.shape for n, tensor in parts.items()}
    GR00T.from_pretrained(sharded / "last")

    cut = sharded.with_name("cut")
    shutil.copytree(sharded, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000000003")
    assert run(resume=str(cut))[0] == 0
    assert metrics_of(cut) == metrics_of(sharded)
    assert same_weights(cut / "checkpoints/step-000000003", sharded / "last")

    # from a checkpoint the backbone is frozen: it is sharded too, and stays as it is
    flags |= dict(model_path=str((single / "last").resolve()), max_steps=1, eval_every=0)
    flags |= dict(gradient_accumulation_steps=1, gradient_checkpointing=False)
    two = run(**flags, fsdp=True)[1]
    monkeypatch.setattr(g, "main", main)
    one = run(**flags)[1]
    for name in ("train/loss", "train/grad_norm", "eval/mse"):
        a, b = (metrics_of(folder)[-1][name] for folder in (one, two))
        assert abs(a - b) < 1e-5 * abs(a), name
    parts = weights_of(two / "last")
    assert all(
        torch.equal(tensor, whole[n]) == n.startswith("backbone.")
        for n, tensor in parts.items()
        if n in whole and n.startswith(("backbone.", "action_head.model.proj_out"))
    )
