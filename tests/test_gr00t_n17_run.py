"""gr00t_finetune.py and ppo_gr00t.py with GR00T N1.7: loss, sampler, real-time chunking, what decays, whole runs."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_gr00t_run
import torch
from conftest import flags_of, run_script
from safetensors.torch import load_file
from test_gr00t_n17_model import (
    FIXTURES,
    distance,
    golden_batch,
    golden_model,
    head_fixture,
    load_fixture,
    needs_fixtures,
)
from test_gr00t_run import QUICK, metrics_of, pin, same_weights

import gr00t_finetune as g
import ppo_gr00t
from common.parallel import World
from common.robot.gr00t_n15 import GR00TConfig
from common.robot.gr00t_n17 import GR00TN17, GR00TN17Config
from common.robot.policy import Policy
from common.robot.transforms import to_device
from gr00t_finetune import Args, flow_matching_loss, real_time_chunk, sample_actions

run = test_gr00t_run.run

# ---- the algorithm ---------------------------------------------------------------------------------------------------


@needs_fixtures
@pytest.mark.parametrize("kind", ["equal", "padded"])
def test_the_scripts_loss_and_sampler_are_the_originals(kind):
    tensors, batch, facts = load_fixture("full_small", f"{kind}.")
    model = GR00TN17.from_pretrained(FIXTURES / "full_small")
    loss = flow_matching_loss(model, batch, batch["noise"], batch["t"])
    assert abs(loss.item() / facts["batches"][kind]["loss"] - 1) < 1e-5
    for steps in (1, 4, 8):
        actions = sample_actions(model, batch, batch["initial_noise"], steps)
        assert distance(actions, tensors[f"{kind}.expected.actions_{steps}_steps"]) < 5e-5


@needs_fixtures
def test_a_chunk_goes_on_from_the_previous_one_as_in_the_original():
    model, batch, tensors, facts = head_fixture()
    model.config, how = model.action_head.config, facts["rtc_options"]
    rtc = {key: value for key, value in how.items() if key.startswith("rtc_")}
    rtc |= dict(rtc_horizon=how["action_horizon"], rtc_previous=batch["rtc_previous"])
    actions = sample_actions(model, batch, batch["initial_noise"], 4, **rtc)
    assert distance(actions, tensors["expected.actions_rtc_4_steps"]) < 5e-5


@needs_fixtures
def test_the_scripts_loss_without_the_state_of_some_samples_is_the_originals():
    """Only in training; the fixture's model has no dropout then but this."""
    model, batch, _, facts = head_fixture()
    expected = facts["expected"]
    for training, value in ((False, expected["loss"]), (True, expected["loss_state_dropped"])):
        model.training = training  # of its parts none: they would drop out
        loss = flow_matching_loss(model, batch, batch["noise"], batch["t"])
        assert abs(loss.item() / value - 1) < 1e-5


def test_real_time_chunking_freezes_ramps_and_starts_from_the_end_of_the_previous_chunk():
    previous, noise = torch.arange(12.0).reshape(1, 12, 1), torch.full((1, 20, 1), -1.0)
    x, strength = real_time_chunk(noise, previous, rtc_overlap_steps=11, rtc_frozen_steps=3)
    assert x.flatten().tolist() == [*range(1, 12)] + [-1.0] * 9
    ramp = [0.487792, 0.738233, 0.866813, 0.932829, 0.966722, 0.984124, 0.993058, 0.997645]
    assert strength.flatten().tolist() == pytest.approx([0, 0, 0, *ramp] + [1] * 9, abs=1e-6)
    x, _ = real_time_chunk(noise, previous, rtc_overlap_steps=2, rtc_horizon=8)
    assert x.flatten()[:3].tolist() == [6, 7, -1]
    model, batch = golden_model(), golden_batch()
    rtc = dict(rtc_previous=torch.ones(3, 8, 6), rtc_overlap_steps=4, rtc_frozen_steps=2)
    actions = sample_actions(model, batch, batch["initial_noise"], **rtc)
    assert (actions[:, :2] == 1).all() and (actions[:, 2:] != 1).all()
    for wrong in (dict(rtc_overlap_steps=13), dict(rtc_overlap_steps=2, rtc_frozen_steps=3)):
        with pytest.raises(ValueError, match="steps that overlap"):
            real_time_chunk(noise, previous, **wrong)


def test_times_of_the_flow_are_those_of_the_version():
    s = np.linspace(0, 1, 5)
    assert np.allclose(g.flow_time(s, GR00TN17Config()), 0.999 * (1 - s))
    assert np.allclose(g.flow_time(s, GR00TConfig()), (0.999 - s) / 0.999)
    torch.manual_seed(0)
    t = g.sample_time(GR00TN17Config(), 200_000, torch.device("cpu"))
    assert t.mean().item() == pytest.approx(0.3995, abs=2e-3) and t.std().item() == pytest.approx(0.2615, abs=2e-3)
    assert 0 <= t.min() and t.max() <= 0.999


def test_weight_decay_spares_what_the_original_spares():
    with torch.device("meta"):
        model = GR00TN17(GR00TN17Config())
    decayed, not_decayed = g.parameter_groups(model, 1e-5)
    counts = [(len(group["params"]), sum(p.numel() for p in group["params"])) for group in (decayed, not_decayed)]
    assert counts == [(267, 1_619_857_536), (270, 658_432)]
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (1e-5, 0)


@needs_fixtures
def test_weight_decay_of_the_fixture_under_every_choice_of_flags():
    model = GR00TN17.from_pretrained(FIXTURES / "full_small")
    for case in load_fixture("full_small")[2]["trainable"]:
        model.set_trainable(**{flag: value for flag, value in case.items() if flag.startswith("tune_")})
        decayed, not_decayed = ([p.numel() for p in group["params"]] for group in g.parameter_groups(model, 1e-5))
        norm = [64] if case["tune_llm"] else []  # the stored norm that nothing uses
        assert [len(decayed), sum(decayed)] == case["decayed"]
        assert [len(not_decayed + norm), sum(not_decayed + norm)] == case["not_decayed"]


def test_recipes_are_those_of_the_version():
    stored = g.Stored("somewhere", version="n17")
    args = g.resolve(Args(model_path="nvidia/GR00T-N1.7-3B", device="cpu"), stored)
    assert (args.batch_size, args.adam_betas, args.state_dropout, args.tune_llm) == (64, (0.9, 0.999), 0.2, False)
    assert g.resolve(Args(model_path="nvidia/GR00T-N1.5-3B", device="cpu")).state_dropout == 0


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Toys of a smaller head: a run takes a second."""
    for name in ("tiny-n17", "lite-n17"):
        monkeypatch.setitem(g.FRESH, name, partial(g.FRESH[name], hidden_size=16, dit_heads=2, dit_head_dim=8))


RUN = QUICK | dict(max_steps=4, eval_every=2, save_every=2, batch_size=4, noises_per_sample=2, log_every=1)
RUN |= dict(val_episodes=2, max_samples=60, warmup_ratio=0.0)


PPO = dict(num_envs=4, num_steps=2, total_timesteps=40, hidden=16, num_minibatches=2, update_epochs=1, num_threads=1)
PPO |= dict(eval_episodes=2, critic_warmup=0, capture_video=False, device="cpu", learning_rate=1e-3)


def test_the_tiny_model_trains_goes_on_is_measured_and_acts(run, small):
    flags = RUN | dict(model_path="tiny-n17", state_dropout=0.5)
    code, whole = run(**flags)
    assert code == 0 and np.isfinite(metrics_of(whole)[-1]["eval/mse"])
    files = {path.name for path in (whole / "last").iterdir()}
    assert {"processor_config.json", "statistics.json", "embodiment_id.json", "backbone_config.json"} <= files
    assert json.loads((whole / "last" / "config.json").read_text())["model_type"] == "Gr00tN1d7"
    GR00TN17.from_pretrained(whole / "last")

    cut = whole.with_name("cut")
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000000004")
    assert run(resume=str(cut))[0] == 0
    assert metrics_of(cut) == metrics_of(whole) and same_weights(cut / "checkpoints/step-000000004", whole / "last")

    measured = {k: v for k, v in RUN.items() if k.startswith(("eval_t", "eval_s", "closed", "deno", "dev", "torch"))}
    code, evaluated = run(eval_only=True, model_path=str((whole / "last").resolve()), **measured)
    last, again = metrics_of(whole)[-1], metrics_of(evaluated)[0]
    assert code == 0 and abs(again["eval/mse"] - last["eval/mse"]) < 1e-6

    policy = Policy.from_pretrained(whole, device="cpu")
    seen = {"video.front": np.zeros((96, 96, 3), np.uint8), "annotation.human.task_description": "reach"}
    facts = policy.interface.metadata["modalities"]["state"]
    seen |= {f"state.{key}": np.zeros(facts[key]["shape"]) for key in policy.interface.config.state}
    actions = policy.get_action(seen, seed=0)
    assert actions["action.displacement"].shape == (8, 3) and actions["action.gripper"].shape == (8, 1)

    flags = RUN | dict(model_path=str((whole / "last").resolve()), lora_rank=4, max_steps=2)
    code, adapted = run(**flags)
    assert code == 0
    GR00TN17.from_pretrained(adapted / "last")  # merged


def test_the_lite_model_trains_and_closes_the_loop(run, small):
    flags = RUN | dict(model_path="lite-n17", max_steps=2, closed_loop=True, closed_loop_episodes=2)
    code, folder = run(**flags)
    assert code == 0 and 0 <= metrics_of(folder)[-1]["closed_loop/FetchReach/success_rate"] <= 1
    assert run(**flags | dict(execute_steps=9))[0] == 2  # of 8


@pytest.fixture
def fetch_n17():
    """The interface of N1.7 for the bundled demonstrations."""
    args = Args(model_path="tiny-n17", device="cpu")
    stored = g.find_stored(args)
    return g.read_data(g.resolve(args, stored), stored, lambda text: None)[1].interface


def test_ppo_trains_a_lite_model(run, small, tmp_path, monkeypatch):
    policy = run(**RUN | dict(model_path="lite-n17", max_steps=1, eval_every=0))[1]
    argv = flags_of(model_path=policy, output_dir=tmp_path / "ppo", **PPO)
    assert run_script(ppo_gr00t, ["ppo_gr00t.py", *argv], monkeypatch) == 0
    (folder,) = (tmp_path / "ppo" / "ppo_gr00t").iterdir()
    old, new = (load_file(f / "last" / "model.safetensors") for f in (policy, folder))
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)
    assert Policy.from_pretrained(folder, device="cpu").interface.horizon == 8
    argv = flags_of(model_path=policy, output_dir=tmp_path / "ppo", **PPO | dict(execute_steps=9))
    assert run_script(ppo_gr00t, ["ppo_gr00t.py", *argv], monkeypatch) == 2


def test_ppo_sees_a_picture_as_the_policy_does(fetch_n17):
    """Prompt and picture by the agent's road and by the interface's, and the velocity from there."""
    torch.manual_seed(0)
    model, interface = GR00TN17(GR00TN17Config.tiny(action_horizon=8)).eval(), fetch_n17
    interface.fit(model.config)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 64, 64), np.uint8))
    batch = to_device(interface.batch(np.ones((2, 132), np.float32), ["reach"] * 2, list(images)), torch.device("cpu"))
    agent = ppo_gr00t.Agent(model, 10, batch["input_ids"][:1], ppo_gr00t.resolve(ppo_gr00t.Args()))
    features, kinds = model.backbone(batch)
    found = agent.backbone(images, 2)
    assert torch.equal(found, features)
    look = agent.look(found, torch.tensor([0, 1]), batch["state"][:, 0])
    x, t = torch.randn(2, 8, 132), torch.zeros(2, dtype=torch.float64)
    direct = model.velocity(model.process_backbone(features), kinds, batch["state"], x, t, batch["embodiment_id"])
    assert torch.allclose(agent.velocity(look, x, t), direct, atol=1e-6)


def test_hidden_states_are_drawn_for_each_sample_and_in_training_alone(small):
    args = replace(Args(model_path="tiny-n17", device="cpu", val_episodes=2, max_samples=60), state_dropout=0.5)
    stored = g.find_stored(args)
    args = g.resolve(args, stored)
    args, data, _ = g.read_data(replace(args, model_path="lite-n17"), replace(stored, sees=False))
    held, config = g.hold_out(data, args), GR00TN17Config.lite(action_horizon=8)
    data.interface.fit(config, data.instructions)
    samples, rows = g.Samples(data, config), held.rows[:40]
    plain, hidden = (samples[g.Plan(rows, np.arange(40), seed=1, hidden=share)] for share in (0.0, 0.5))
    assert "state_dropped" not in plain and torch.equal(plain["noise"], hidden["noise"])
    assert torch.equal(plain["t"], hidden["t"]) and plain["noise"].shape == (40, 8, 132)
    zeroed = (hidden["state"] == 0).all(-1).flatten()
    assert torch.equal(hidden["state"][~zeroed], plain["state"][~zeroed])
    both = torch.stack([zeroed, hidden["state_dropped"]], 1).float()
    assert ((both.mean(0) - 0.5).abs() < 0.25).all() and 0 < both.prod(1).mean() < 0.5  # apart from each other
    again = samples[g.Plan(rows[5:6], np.arange(5, 6), seed=1, hidden=0.5)]
    assert again["state_dropped"].item() == hidden["state_dropped"][5].item()
    world = World(0, 1, torch.device("cpu"))
    (plan,) = {p.hidden for p in itertools.islice(g.plans(g.Order(data, held.rows, args), data, args, world, 0), 2)}
    assert plan == 0.5
    assert all(torch.equal(x, hidden[name]) for name, x in pin(hidden).items())
