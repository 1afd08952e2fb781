"""Whole runs of ppo_gr00t.py: parity with gr00t_finetune.py, chunks in the simulator, resume, what it refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, flags_of, rows, run_script, timeless, two_forks
from safetensors.torch import load_file
from test_docs import documented_metrics
from test_ppo_math import WORLD

import gr00t_finetune
import ppo_gr00t as p
from common.cli import parse
from common.robot import fetch, fetch_robot
from common.robot.data_configs import DATA_CONFIGS
from common.robot.gr00t_n15 import GR00T, GR00TConfig
from common.robot.policy import About, read_stored
from common.robot.video import no_renderer
from ppo_gr00t import Args

SMALL = dict(dit_layers=2, dit_heads=2, dit_head_dim=8, vl_heads=2, vl_head_dim=8, hidden_size=16, num_future_tokens=2)
RUN = dict(  # FetchReach, 3 iterations of 4 x 2 chunks of 5
    num_envs=4, num_steps=2, total_timesteps=120, hidden=16, num_minibatches=2, update_epochs=1, eval_episodes=2,
    eval_every=2, critic_warmup=1, capture_video=False, num_threads=2, exp_name="r",
)  # fmt: skip


@pytest.fixture(scope="module")
def policies(tmp_path_factory, fetch_metadata):
    """Checkpoints in the published layout, random weights: a lite one and a tiny one that sees."""
    stored, folders = {"new_embodiment": fetch_metadata}, {}
    for name, config in {
        "lite": GR00TConfig.lite(**SMALL),
        "tiny": GR00TConfig.tiny(image_size=32, patch_size=16, **(SMALL | dict(vl_heads=4, vl_head_dim=16))),
    }.items():
        torch.manual_seed(0)
        model = GR00T(config)
        with torch.no_grad():
            for q in model.parameters():
                q.add_(0.05 * torch.randn(q.shape))
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        (folders[name] / "experiment_cfg").mkdir()
        (folders[name] / "experiment_cfg" / "metadata.json").write_text(json.dumps(stored))
        config = replace(DATA_CONFIGS["fetch"], video=("front",) if name == "tiny" else ())
        about = About(name="fetch", data_config=config)
        (folders[name] / "experiment_cfg" / "policy.json").write_text(about.model_dump_json())
    return folders


@pytest.fixture
def run(tmp_path, monkeypatch, policies):
    """Runs main() in this process; returns (exit code, run folder)."""

    def start(**flags):
        base = {"output_dir": tmp_path / "runs", "model_path": policies["lite"]} | RUN
        argv = flags_of(**flags if "resume" in flags else base | flags)
        code = run_script(p, ["ppo_gr00t.py", *argv], monkeypatch)
        runs = sorted((tmp_path / "runs" / "ppo_gr00t").glob("*"), key=lambda path: path.stat().st_mtime)
        return code, runs[-1] if runs else None

    return start


def loaded(policy: Path, **changes):
    """Settings, agent and robot as a run has them."""
    args, interface = p.read_interface(replace(p.resolve(replace(Args(), **changes)), model_path=str(policy)))
    agent, robot, _ = p.load_agent(args, interface, SimpleNamespace(checkpoint=None, world=WORLD))
    return args, agent, robot


# ---- chunks in the simulator -----------------------------------------------------------------------------------------


def group_of_three(args) -> p.Group:
    return p.Group(p.make_envs(args, 3), slice(0, 3), [5, 6, 7], args)


@pytest.mark.parametrize("reward_mode", ["dense", "shaped"])
def test_a_chunk_is_its_steps_and_ends_where_its_episode_does(reward_mode):
    """Against gymnasium's own environments, stepped one by one; 50 steps are 7 chunks of 8, the last one cut at 2."""
    args = replace(p.resolve(Args()), execute_steps=8, gamma=0.9, reward_mode=reward_mode)
    group, rng = group_of_three(args), np.random.default_rng(0)
    fetch.import_robotics()
    env = gym.make("FetchReach-v4")
    obs, _ = env.reset(seed=6)
    phi = fetch.potential({k: v[None] for k, v in obs.items()}, "FetchReach")
    group.envs.elapsed[2] = 40  # another age
    total = 0.0
    for chunk in range(7):
        actions = rng.uniform(-1, 1, (3, 8, 4)).astype(np.float32)
        lengths = np.minimum(8, 50 - group.envs.elapsed)
        out, last, episodes = p.play_chunk(group, actions, args)
        assert lengths.tolist() == [8 if chunk < 6 else 2] * 2 + [{1: 2, 6: 8}.get(chunk, 8)]
        assert out["dones"].tolist() == [chunk == 6] * 2 + [chunk == 1]
        expected = 0.0
        for k in range(lengths[1]):
            obs, _, _, truncated, info = env.step(actions[1, k])
            one = {key: value[None] for key, value in obs.items()}
            r = fetch.reward(one, "dense")[0]
            if reward_mode == "shaped":
                new = fetch.potential(one, "FetchReach")
                r, phi = (0.1 * info["is_success"] + 5 * (new - phi))[0], new
            expected, total = expected + 0.9**k * r, total + r
        assert out["rewards"][1] == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32
    assert truncated
    assert np.array_equal(last[1]["observation"], obs["observation"]) and set(last) == {0, 1}
    assert last[1]["physics"].ndim == 1
    (episode,) = [e for e in episodes if e["env"] == 1]
    assert episode["length"] == 50 and episode["return"] == pytest.approx(total, abs=1e-6)
    assert episode["success"] == bool(info["is_success"])
    assert group.envs.elapsed.tolist() == [0, 0, 40]  # 40: the next episode's
    assert group.episodes.length.tolist()[:2] == [0, 0]
    assert not np.array_equal(group.obs["desired_goal"][1], obs["desired_goal"])  # already the next start


def test_the_state_that_follows_an_end_is_the_episodes_last(policies, monkeypatch):
    """The value after a time limit is that of the last observation, not of the reset."""
    args, agent, robot = loaded(policies["lite"], num_envs=4, num_steps=3, env_groups=1, execute_steps=8)
    groups = p.make_groups(args, WORLD)
    assert groups[0].envs.elapsed.tolist() == [0, 8, 24, 40]
    played, play_chunk = [], p.play_chunk
    monkeypatch.setattr(p, "play_chunk", lambda *a: played.append(play_chunk(*a)) or played[-1])
    batch, cache, episodes = p.rollout(agent, robot, groups, args, torch.Generator().manual_seed(0), WORLD)
    assert batch["dones"].nonzero().tolist() == [[1, 3]] and batch["lengths"][1, 3] == 2 and len(cache.features) == 1
    width = agent.model.config.vl_width
    last = {k: v[None] for k, v in played[1][1][3].items()}
    assert np.array_equal(batch["next_condition"][1, 3, width:].numpy(), robot.state(last)[0])
    assert torch.equal(batch["next_condition"][0], batch["condition"][1])  # elsewhere the next decision's
    assert not torch.equal(batch["next_condition"][1, 3], batch["condition"][2, 3])
    assert episodes == []  # it had not begun at its beginning


def test_groups_that_overlap_collect_what_one_does(policies):
    found = []
    for groups in (1, 2):
        args, agent, robot = loaded(policies["lite"], num_envs=4, num_steps=3, env_groups=groups)
        agent.load_state_dict(found[0][1] if found else agent.state_dict())
        made = p.make_groups(args, WORLD)
        batch, _, _ = p.rollout(agent, robot, made, args, torch.Generator().manual_seed(0), WORLD)
        found.append((batch, agent.state_dict()))
    for key in found[0][0]:  # a matrix product may round by its batch size, and physics passes it on
        torch.testing.assert_close(found[0][0][key], found[1][0][key], rtol=1e-3, atol=1e-3)


def test_a_model_with_a_camera_looks_at_rendered_frames_and_learns_from_the_cache(policies):
    if why := no_renderer():
        pytest.skip(why)
    flags = dict(num_envs=2, num_steps=2, env_groups=1, num_minibatches=1, stagger=False)
    args, agent, robot = loaded(policies["tiny"], **flags)
    groups = p.make_groups(args, WORLD)
    batch, cache, _ = p.rollout(agent, robot, groups, args, torch.Generator().manual_seed(0), WORLD)
    robot.camera.close()
    S = agent.prompt.shape[1]
    assert S > 4 and len(cache.features) == 6  # two environments, three looks, none of them alike
    images = cache.features[int(batch["frame"][0, 0])]
    assert images.shape == (S, 64) and not torch.equal(images, cache.features[int(batch["frame"][1, 0])])
    flat = {k: v.flatten(0, 1) for k, v in batch.items()}
    look = cache.look(flat["frame"], flat["state"])
    mask = p.executed_mask(flat["lengths"], flat["chain"][:, 0])
    logprobs, _ = p.chain_logprobs(agent, look, flat["chain"], flat["first"], mask, args)
    torch.testing.assert_close(logprobs, flat["logprobs"], rtol=1e-4, atol=1e-4)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_logs_what_the_page_documents_and_leaves_a_policy_that_loads(run, policies, capsys, tmp_path, figures):
    code, folder = run(save_every=1)
    assert code == 0
    logged = {name for row in rows(folder) for name in row} - {"step"}
    assert logged <= documented_metrics("ppo_gr00t.md"), logged - documented_metrics("ppo_gr00t.md")
    assert [row["step"] for row in rows(folder)] == [0, 40, 80, 120]
    assert rows(folder)[2]["losses/first_ratio_error"] < 1e-5
    levels = [row["charts/noise_level"] for row in rows(folder)[1:]]
    assert levels == pytest.approx([0.8, 0.55, 0.3])  # from --noise-level to --final-noise-level
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["model_path"] == str(policies["lite"]) and (folder / "learning.png").stat().st_size > 5000
    model = GR00T.from_pretrained(folder / "last")
    start = GR00T.from_pretrained(policies["lite"])
    assert not torch.equal(model.action_head.action_decoder.layer2.b, start.action_head.action_decoder.layer2.b)
    assert torch.equal(model.backbone.instruction_table.weight, start.backbone.instruction_table.weight)
    assert read_stored(str(folder / "last")).about == read_stored(str(policies["lite"])).about
    code, again = run(model_path=str(folder), eval_only=True, eval_episodes=2)  # a run folder is a policy, too
    assert "was trained with" not in capsys.readouterr().out
    run(model_path=str(folder), eval_only=True, eval_episodes=2, denoising_steps=2, output_dir=tmp_path / "other")
    assert "with --denoising-steps 2; this policy was trained with 4" in capsys.readouterr().out
    first = rows(folder)[0]  # other starts, and other x_0
    assert first["validation/episodic_return"] != first["eval/episodic_return"] == first["baseline/episodic_return"]
    score = [f"validation/{name}" for name in ("success_rate", "episodic_return")]
    best = max(rows(folder), key=lambda r: [r.get(name, -99) for name in score])
    if best["step"]:
        assert rows(again)[0]["eval/episodic_return"] == pytest.approx(best["eval/episodic_return"], abs=1e-6)


GROUPS = dict(advantage="group", group_size=2, num_steps=2)  # with episodes of 10 steps


@pytest.mark.parametrize("flags", [dict(sampler="flow-noise"), dict(lora_rank=2, noisy_step="any"), dict(amp="bf16"),
                                   GROUPS], ids=["flow-noise", "lora, any", "bf16", "group"])  # fmt: skip
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run, flags, monkeypatch):
    monkeypatch.setattr(p, "EPISODE", 10 if flags == GROUPS else 50)
    if flags == GROUPS:
        monkeypatch.delitem(RUN, "critic_warmup")
    code, whole = run(save_every=1, keep=9, **flags)
    assert code == 0
    if flags == GROUPS:  # from the first iteration on, without a critic
        for row in rows(whole)[1:]:
            assert row["losses/first_ratio_error"] < 1e-5 and row["losses/optimizer_steps"] == 2
            assert (
                row["charts/groups_alike"] == 0 and not {"losses/critic_loss", "losses/explained_variance"} & row.keys()
            )
        own = [
            load_file(folder / "trainer" / "agent.safetensors") for folder in sorted((whole / "checkpoints").iterdir())
        ]
        assert all(torch.equal(own[0][key], own[-1][key]) for key in own[0])
    lines, last = timeless(whole), load_file(whole / "last" / "model.safetensors")
    middle = whole / "checkpoints" / "step-000000080"
    code, resumed = run(resume=middle)
    assert code == 0 and resumed == whole and timeless(whole) == lines
    again = load_file(whole / "last" / "model.safetensors")
    assert all(torch.equal(last[k], again[k]) for k in last)


@pytest.mark.parametrize("how", ["gae", "group"])
def test_two_processes_agree_with_one_also_where_a_minibatch_is_all_the_others(how, run, monkeypatch):
    """Policy and critic see the same minibatches, here of one row; only the order of float sums differs."""
    flags = dict(num_minibatches=8, env_groups=1, target_kl=0) | (GROUPS if how == "group" else dict(critic_epochs=2))
    if how == "group":
        monkeypatch.setattr(p, "EPISODE", 10)
        monkeypatch.delitem(RUN, "critic_warmup")
    code, single = run(**flags)
    main = p.main
    monkeypatch.setattr(p, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code_two, double = run(**flags)
    assert code == code_two == 0 and single != double
    for a, b in zip(timeless(single), timeless(double), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), (a["step"], key)


def test_a_policy_that_an_update_drove_too_far_ends_the_run_in_one_line(run, capsys):
    code, _ = run(learning_rate=1e30, total_timesteps=400, target_kl=0)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and "no longer finite" in errors[0] and "--learning-rate" in errors[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(model_path="nowhere/at/all"), "nowhere/at/all"),
        (dict(env_id="FetchSlide-v4"), "FetchPush-v4"),
        (dict(env_id="CartPole-v1"), "FetchReach-v4"),
        (dict(execute_steps=17, total_timesteps=1360), "at most 16"),
        (dict(num_minibatches=3), "does not divide"),
        (dict(num_envs=3), "--env-groups"),
        (dict(embodiment_tag="gr1"), "no statistics"),
        (dict(data_config="so100"), "single_arm"),
        (dict(total_timesteps=10), "one batch"),
        (dict(noise_range=(0.3, 0.1)), "noise-range"),
        (dict(model_path=None, eval_only=True), "--model-path"),
        (dict(noisy_step="any", sampler="flow-noise"), "--noisy-step"),
        (dict(noise_range=(0.1, 0.2)), "--noise-range"),
        (dict(ent_coef=0.01), "--ent-coef"),
    ],
)
def test_bad_input_ends_in_one_line(run, flags, message, capsys):
    code, _ = run(**flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("error: ") and message in lines[-1]


def test_a_checkpoint_without_statistics_or_of_another_script_is_refused(run, policies, tmp_path, capsys):
    shutil.copytree(policies["lite"], tmp_path / "bare")
    (tmp_path / "bare/experiment_cfg/policy.json").unlink()
    code, _ = run(model_path=str(tmp_path / "bare"))
    assert code == 2 and "no experiment_cfg/policy.json" in (error := capsys.readouterr().err)
    assert "give --data-config" in error
    (tmp_path / "bare/experiment_cfg/metadata.json").unlink()
    code, _ = run(model_path=str(tmp_path / "bare"), data_config="fetch")
    assert code == 2 and "no statistics" in capsys.readouterr().err
    code, folder = run(total_timesteps=40)
    trainer = folder / "last" / "trainer.json"
    trainer.write_text(trainer.read_text().replace('"script": "ppo_gr00t"', '"script": "ppo_fetch"'))
    code, _ = run(resume=folder)
    assert code == 2 and "belongs to ppo_fetch" in capsys.readouterr().err


def test_the_default_start_is_fine_tuned_by_the_command_that_is_printed(monkeypatch, tmp_path, capsys):
    """Another command, the same way: what it leaves is the policy, and a failure is the end."""
    calls = []

    class Done:
        returncode, stderr = 0, ""

    def fake(command, **kwargs):
        calls.append(command)
        (tmp_path / "start" / "gr00t_finetune" / "made").mkdir(parents=True)
        return Done

    monkeypatch.setattr(fetch_robot.subprocess, "run", fake)
    run = SimpleNamespace(folder=tmp_path, world=WORLD, say=print)
    args = p.fine_tune_start(Args(), run)
    assert args.model_path == str(tmp_path / "start" / "gr00t_finetune" / "made")
    assert p.START in capsys.readouterr().out and calls[0][1] == str(ROOT / "gr00t_finetune.py")
    monkeypatch.setattr(sys, "argv", ["gr00t_finetune.py", *calls[0][2:]])
    assert parse(gr00t_finetune.Args, "").model_path == "lite"  # every flag exists
    Done.returncode, Done.stderr = 2, "error: no disk\n"
    monkeypatch.setattr(fetch_robot.subprocess, "run", lambda *a, **k: Done)
    with pytest.raises(SystemExit):
        p.fine_tune_start(Args(), run)
    assert "no disk" in capsys.readouterr().err
