"""What acts: units, pictures and prompts of a checkpoint, and Fetch seen and moved through them."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.robot import fetch, fetch_robot
from common.robot.data_configs import DATA_CONFIGS
from common.robot.fetch_robot import STATE, FetchRobot, misfit, slices, state_vector
from common.robot.gr00t_n15 import GR00T, GR00TConfig
from common.robot.policy import Interface, model_folder, model_tokenizer, read_stored
from common.robot.transforms import decode_actions, encode, pad, prompt, transform_images

FETCH = DATA_CONFIGS["fetch"]


@pytest.mark.parametrize("env_id", ["FetchReach-v4", "FetchPush-v4"])
def test_fetch_is_seen_and_moved_in_the_units_of_the_checkpoint(fetch_metadata, env_id):
    robot = FetchRobot(Interface(replace(FETCH, video=()), fetch_metadata, 31), env_id)
    envs = fetch.FetchVec(env_id, 3, 1)
    obs = envs.reset(seed=0)[0]
    vector = state_vector(obs).astype(np.float64)
    raw = {key: vector[:, at["start"] : at["end"]] for key, at in slices(STATE).items()}
    expected = pad(encode("state", raw, FETCH, fetch_metadata), 64).astype(np.float32)
    state = robot.state(obs)
    assert np.array_equal(state, expected) and state.dtype == np.float32 and robot.images(None, None) is None
    chunk = torch.randn(3, 16, 32)
    decoded = decode_actions(chunk[..., :4].numpy().astype(np.float64), FETCH, fetch_metadata)
    expected = np.concatenate(list(decoded.values()), -1)[:, :5].astype(np.float32)
    assert np.array_equal(robot.actions(chunk, 5), expected) and robot.actions(chunk, 5).dtype == np.float32
    envs.close()


def test_fetch_is_drawn_as_the_demonstrations_were(fetch_metadata, monkeypatch):
    """The camera is stubbed: crop, resize and rounding are compared, on any machine."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)

    class Camera:
        def __init__(self, env_id, size):
            assert size == 96

        def draw(self, physics, goal):
            return frames[physics]

        def close(self):
            pass

    monkeypatch.setattr(fetch_robot, "Camera", Camera)
    interface = Interface(FETCH, fetch_metadata, 31)
    interface.image_size = 32
    images = FetchRobot(interface, "FetchReach-v4").images(np.arange(5), np.zeros((5, 3)))
    assert torch.equal(images, torch.cat([transform_images(frame[None], 32) for frame in frames]))


def test_a_batch_holds_what_the_model_reads(fetch_metadata):
    c = GR00TConfig.tiny(image_size=32, patch_size=16)
    interface, texts = Interface(FETCH, fetch_metadata, 31), ["lift it", "put it down again"]
    tokenizer = model_tokenizer(c)
    interface.prepare(c, tokenizer, texts)
    images = interface.images(np.zeros((2, 1, 96, 96, 3), np.uint8))
    batch = interface.batch(np.zeros((2, 64), np.float32), texts, images, length=120)
    assert batch["images"].shape == (2, 3, 32, 32) and batch["state"].shape == (2, 1, 64)
    ids, mask = batch["eagle_input_ids"], batch["eagle_attention_mask"]
    assert ids.shape == mask.shape == (2, 120) and batch["embodiment_id"].tolist() == [31]
    for row, keep, text in zip(ids, mask, texts):
        expected = tokenizer(prompt(text, 1, 4), add_special_tokens=False).input_ids
        assert row[keep.bool()].tolist() == expected and (row[~keep.bool()] == tokenizer.pad_token_id).all()
        assert keep.tolist() == sorted(keep.tolist())  # padded on the left
    with torch.no_grad():
        pixels = {"eagle_pixel_values": batch.pop("images").float()}
        assert GR00T(c).vl_features(batch | pixels)[0].shape == (2, 120, 64)


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(state={"arm": "min_max"}), "state of gripper_position"),
        (dict(action={"gripper": "min_max"}), "actions displacement, gripper"),
        (dict(video=("front", "wrist")), "front, wrist"),
        (dict(video=()), ""),
    ],
)
def test_what_does_not_fit_fetch_is_told(change, why):
    reason = misfit(replace(FETCH, **change))
    assert why in reason and bool(reason) == bool(why)


def test_a_run_folder_means_its_best_checkpoint_and_carries_settings_and_statistics(fetch_metadata, tmp_path, capsys):
    for step in (1, 2, 3):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        GR00T(GR00TConfig.lite()).save_pretrained(folder)
        (folder / "trainer.json").write_text(json.dumps({"args": {"data_config": f"of {step}"}}))
        (folder / "experiment_cfg").mkdir()
        (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps({"gr1": fetch_metadata}))
    run = tmp_path / "run"
    assert model_folder(str(run)) == folder and model_folder(str(folder)) == folder
    (run / "best").symlink_to("checkpoints/step-2")
    found = read_stored(str(run))
    assert found.folder.name == "step-2" and found.args == {"data_config": "of 2"} and not found.sees
    assert found.embodiment("gr1", FETCH) == fetch_metadata
    with pytest.raises(SystemExit):
        found.embodiment("oxe_droid", FETCH)
    assert "no statistics for --embodiment-tag oxe_droid (it has: gr1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        found.embodiment("gr1", DATA_CONFIGS["so100"])
    assert "no statistics of state.single_arm for gr1" in capsys.readouterr().err


def test_the_policys_code_loads_no_simulator():
    code = "import sys, common.robot.policy; print({'mujoco', 'gymnasium'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_nothing_that_runs_comes_from_a_builder_of_assets():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")]:
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("from assets", "import assets"))], path
