"""What acts: units, pictures and prompts of a checkpoint, and Fetch seen and moved through them."""

import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, imported
from test_gr00t_data import write_set

import gr00t_finetune as g
from common.robot import fetch, fetch_robot
from common.robot.data_configs import DATA_CONFIGS, DataConfig, modes
from common.robot.demonstrations import Demonstrations, make_metadata, raw_columns, read_mixture
from common.robot.fetch_robot import STATE, FetchRobot, misfit, slices, state_vector
from common.robot.gr00t_n15 import GR00T, GR00TConfig
from common.robot.interface import Interface, model_tokenizer
from common.robot.policy import About, Policy, euler, model_folder, read_stored, save_policy
from common.robot.transforms import decode_actions, encode, pad, prompt, to_device, transform_images

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
        (folder / "trainer.json").write_text(json.dumps({"args": {"batch_size": step}}))
        (folder / "experiment_cfg").mkdir()
        (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps({"gr1": fetch_metadata}))
    run = tmp_path / "run"
    assert model_folder(str(run)) == folder and model_folder(str(folder)) == folder
    (run / "best").symlink_to("checkpoints/step-2")
    found = read_stored(str(run))
    assert found.folder.name == "step-2" and found.args == {"batch_size": 2} and not found.sees
    assert found.embodiment("gr1", FETCH) == fetch_metadata
    with pytest.raises(SystemExit):
        found.embodiment("oxe_droid", FETCH)
    assert "no statistics for --embodiment-tag oxe_droid (it has: gr1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        found.embodiment("gr1", DATA_CONFIGS["so100"])
    assert "no statistics of state.single_arm for gr1" in capsys.readouterr().err


# ---- the policy ------------------------------------------------------------------------------------------------------

ABOUT = About(name="fetch", data_config=FETCH, image_size=32, fps=25.0)
SMALL = dict(dit_layers=2, dit_heads=2, dit_head_dim=8, vl_heads=4, vl_head_dim=16, hidden_size=16, num_future_tokens=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fetch_metadata):
    """A tiny policy with a camera, random weights, as a run leaves it."""
    torch.manual_seed(0)
    model = GR00T.toy(GR00TConfig.tiny(image_size=32, patch_size=16, **SMALL))
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, model, {}, {"new_embodiment": fetch_metadata, "gr1": fetch_metadata}, ABOUT)
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    return Policy.from_pretrained(folder, device="cpu")


def observation(seed=0, batch=None, size=(48, 64)) -> dict:
    """What a robot sees, in the shapes of the reference: with a time axis, and a batch axis where that is asked for."""
    rng, first = np.random.default_rng(seed), (1,) if batch is None else (batch, 1)
    seen = {f"state.{key}": rng.normal(size=(*first, STATE[key])) for key in FETCH.state}
    seen["video.front"] = rng.integers(0, 256, (*first, *size, 3), dtype=np.uint8)
    return seen | {"annotation.human.task_description": ["lift it"] * (batch or 1)}


def test_a_folder_is_a_policy(policy):
    actions = policy.get_action(observation(), seed=3)
    assert {key: x.shape for key, x in actions.items()} == {"action.displacement": (16, 3), "action.gripper": (16, 1)}
    assert all(np.array_equal(x, actions[key]) for key, x in policy.get_action(observation(), seed=3).items())
    other = policy.get_action(observation(), seed=4)["action.displacement"]
    assert not np.array_equal(other, actions["action.displacement"])
    assert policy.modality_config() == {
        "video": {"delta_indices": [0], "modality_keys": ["video.front"]},
        "state": {"delta_indices": [0], "modality_keys": [f"state.{key}" for key in FETCH.state]},
        "action": {"delta_indices": list(range(16)), "modality_keys": ["action.displacement", "action.gripper"]},
        "language": {"delta_indices": [0], "modality_keys": ["annotation.human.task_description"]},
    }


def test_axes_of_time_and_batch_are_free(policy):
    """A batch is its members: the first one's noise is that of the observation alone."""
    many = observation(batch=3)
    many["annotation.human.task_description"] = ["lift it", "lift it", "lift it"]
    one = {key: value[0] for key, value in many.items()}
    plain = {key: value if isinstance(value, str) else value[0] for key, value in one.items()}
    listed = {key: value if isinstance(value, str) else value.tolist() for key, value in plain.items()}
    listed["video.front"] = plain["video.front"]
    answers = [policy.get_action(seen, seed=5) for seen in (one, plain, listed)]
    batch = policy.get_action(many, seed=5)
    for key, x in answers[0].items():
        assert all(np.array_equal(x, other[key]) for other in answers[1:])
        assert batch[key].shape == (3, *x.shape) and np.allclose(batch[key][0], x, atol=1e-5)
    said = many | {"annotation.human.task_description": np.array([["lift it"]] * 3)}
    assert np.array_equal(policy.get_action(said, seed=5)["action.gripper"], batch["action.gripper"])
    said = many | {"annotation.human.task_description": "lift it"}
    assert np.array_equal(policy.get_action(said, seed=5)["action.gripper"], batch["action.gripper"])


def test_raw_frames_are_seen_as_training_saw_them(policy, fetch_metadata, tmp_path):
    """480 x 640 frames, as decoded, against rows of a data set that pass the frame cache: to the last bit."""
    path = write_set(tmp_path / "set", lengths=(4, 3), size=(480, 640))
    modality = json.loads((path / "meta/modality.json").read_text())
    modality["video"] = {"front": modality["video"]["top"]}
    (path / "meta/modality.json").write_text(json.dumps(modality))
    config = DataConfig(("front",), modes("min_max", "arm", "gripper"), modes("min_max", "arm", "gripper"), "task")
    sets = read_mixture([path], config, "test", lambda text: None)
    metadata = make_metadata(sets, config, [1.0], "new_embodiment")
    data = Demonstrations(sets, config, metadata, 31, About(name="test", data_config=config))
    data.interface.prepare(policy.model.config, policy.interface.tokenizer, data.instructions)
    data.open_frames(data.episodes, tmp_path / "cache", 256)
    rows = np.arange(7)
    batch, noise = data.batch(rows), policy.noise(7, seed=0)
    expected = data.interface.actions(euler(policy.model, to_device(batch, torch.device("cpu")), noise, 4).numpy())
    with av.open(str(next((path / "videos").rglob("episode_000000.mp4")))) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    robot = Policy(policy.model, data.interface)
    raw = {key: raw_columns(sets[0], "state", config)[key] for key in config.state}
    seen = {f"state.{key}": x[:4, None] for key, x in raw.items()}
    seen |= {"video.front": np.stack(frames)[:, None], "annotation.task": ["lift it"] * 4}
    assert seen["video.front"].shape == (4, 1, 480, 640, 3) and data.frames(0).shape == (1, 256, 256, 3)
    ours = robot.interface.see(seen)
    assert torch.equal(ours["images"], batch["images"][:4]) and torch.equal(ours["state"], batch["state"][:4])
    first = data.batch(rows[:4])
    again = to_device(first, torch.device("cpu"))
    expected = data.interface.actions(euler(policy.model, again, policy.noise(4, seed=0), 4).numpy())
    actions = np.concatenate(list(robot.get_action(seen, seed=0).values()), axis=-1)
    assert np.array_equal(actions, expected)


def test_the_samplers_of_script_and_policy_are_one(policy):
    seen = policy.interface.see(observation(batch=2))
    noise = policy.noise(2, seed=1)
    for steps in (1, 3, 4):
        theirs = g.sample_actions(policy.model, to_device(seen, torch.device("cpu")), noise, steps)
        assert torch.equal(policy.chunk(seen, noise, steps), theirs)


BAD = {  # what is changed in an observation -> what the line must say
    "missing": (lambda o: o.pop("state.goal"), "lacks state.goal"),
    "renamed": (lambda o: o.update({"state.gaol": o.pop("state.goal")}), "it reads state.goal"),
    "unknown": (lambda o: o.update({"state.head": np.zeros(3)}), "has 'state.head', which the policy does not read"),
    "no camera": (lambda o: o.pop("video.front"), "lacks video.front"),
    "no instruction": (lambda o: o.pop("annotation.human.task_description"), "lacks annotation.human.task_description"),
    "float frame": (lambda o: o.update({"video.front": np.zeros((1, 48, 64, 3))}), "frames are uint8"),
    "channels first": (lambda o: o.update({"video.front": np.zeros((1, 3, 48, 64), np.uint8)}), "shape (1, 3, 48, 64)"),
    "gray": (lambda o: o.update({"video.front": np.zeros((1, 48, 64, 1), np.uint8)}), "not (height, width, 3)"),
    "two times": (lambda o: o.update({"video.front": np.zeros((2, 48, 64, 3), np.uint8)}), "the policy sees 1"),
    "one pixel": (lambda o: o.update({"video.front": np.zeros((1, 1, 64, 3), np.uint8)}), "1 x 64 pixels"),
    "no pixel": (lambda o: o.update({"video.front": np.zeros((1, 0, 64, 3), np.uint8)}), "empty"),
    "width": (lambda o: o.update({"state.goal": np.zeros((1, 4))}), "state.goal has shape (1, 4), not (3,)"),
    "scalar": (lambda o: o.update({"state.goal": 3.0}), "state.goal has shape ()"),
    "words": (lambda o: o.update({"state.goal": ["a", "b", "c"]}), "not numbers"),
    "ragged": (lambda o: o.update({"state.goal": [[1.0], [1.0, 2.0]]}), "state.goal"),
    "object": (lambda o: o.update({"state.goal": object()}), "state.goal"),
    "none": (lambda o: o.update({"state.goal": None}), "state.goal"),
    "NaN": (lambda o: o.update({"state.goal": np.full((1, 3), np.nan)}), "not finite"),
    "infinity": (lambda o: o.update({"state.goal": np.full((1, 3), 1e300)}), "beyond 1e9"),
    "a batch of one thing": (lambda o: o.update({"state.goal": np.zeros((1, 1, 3))}), "a batch axis is on all or"),
    "number for words": (lambda o: o.update({"annotation.human.task_description": 3}), "must be 1 string"),
    "too many words": (lambda o: o.update({"annotation.human.task_description": ["a", "b"]}), "must be 1 string"),
    "a book": (lambda o: o.update({"annotation.human.task_description": "a" * 1001}), "1,000 are the most"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_seen_is_said_in_one_line(policy, fault):
    seen = observation()
    change, words = BAD[fault]
    change(seen)
    with pytest.raises(ValueError) as error:
        policy.get_action(seen)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_other_things_than_observations_are_said_in_one_line(policy):
    for seen in (None, [], "x", 3):
        with pytest.raises(ValueError, match="an observation is a dict of video.front"):
            policy.get_action(seen)
    uneven = observation(batch=2)
    uneven["state.goal"] = uneven["state.goal"][:1]
    with pytest.raises(ValueError, match="as long on all"):
        policy.get_action(uneven)
    for seed in (-1, "x", 1.5):
        with pytest.raises(ValueError, match="seed"):
            policy.get_action(observation(), seed=seed)


def test_a_policy_of_damaged_weights_moves_nothing(folder):
    broken = Policy.from_pretrained(folder, device="cpu")
    broken.model.action_head.action_decoder.layer2.b.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        broken.get_action(observation())


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(device="tpu"), "device 'tpu'"),
        (dict(denoising_steps=0), "denoising_steps 0"),
        (dict(embodiment_tag="gr2"), "embodiment tag 'gr2'"),
        (dict(embodiment_tag="oxe_droid"), "no statistics for --embodiment-tag oxe_droid"),
        (dict(data_config="so100"), "is not what checkpoint"),
        (dict(data_config="aloha"), "--data-config aloha is unknown"),
        (dict(tokenizer="no/such-tokenizer"), "no tokenizer in 'no/such-tokenizer'"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(folder, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        Policy.from_pretrained(folder, **{"device": "cpu"} | flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_the_folder_says_how_it_acts(folder, tmp_path, capsys):
    """Keys in their order; an older folder says what it lacks, and with the flag acts the same."""
    assert list(json.loads((folder / "experiment_cfg/policy.json").read_text())["data_config"]["state"]) == [
        *FETCH.state
    ]
    stored = read_stored(str(folder))
    assert stored.about == ABOUT and stored.acts().embodiment_tag == "new_embodiment"
    assert stored.acts(data_config="fetch", embodiment_tag="gr1").embodiment_tag == "gr1"
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "experiment_cfg/policy.json").unlink()
    with pytest.raises(SystemExit):
        Policy.from_pretrained(old, device="cpu")
    error = capsys.readouterr().err
    assert "no experiment_cfg/policy.json" in error and "give --data-config" in error
    a, b = Policy.from_pretrained(old, device="cpu", data_config="fetch"), Policy.from_pretrained(folder, device="cpu")
    a, b = (p.get_action(observation(), seed=0)["action.displacement"] for p in (a, b))
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(state=dict(reversed(FETCH.state.items()))), "state goal_relative (min_max), goal (min_max)"),
        (
            dict(action={"displacement": "q99", "gripper": "min_max"}),
            "action displacement (min_max), gripper (min_max)",
        ),
        (dict(video=("wrist",)), "video front against wrist"),
        (dict(language="task"), "language human.task_description against task"),
        (dict(rotations={"state.goal": "rotation_6d"}), "rotations"),
    ],
)
def test_configs_differ_in_order_modes_cameras_and_words(change, words):
    assert not FETCH.difference(replace(FETCH)) and words in (
        FETCH.difference(replace(FETCH, **change)) + replace(FETCH, **change).difference(FETCH)
    )


def test_names_of_the_robot_package_load_what_they_need():
    from common.robot import GR00T as model
    from common.robot import FetchVec, Policy

    assert (model.__module__, FetchVec.__module__) == ("common.robot.gr00t_n15", "common.robot.fetch")
    assert Policy.__module__ == "common.robot.policy"


def test_the_policys_code_loads_no_simulator():
    """Read, not run: another process would spend ten seconds on importing torch."""
    for module in ("common.robot", "common.robot.policy", "common.robot.serve"):
        names = {name.partition(".")[0] for name in imported(module)}
        assert not names & {"mujoco", "gymnasium", "gymnasium_robotics"}, module
    assert "torch" in imported("common.robot.policy") and "common.robot.transforms" in imported("common.robot.serve")
    assert "mujoco" in imported("common.robot.fetch_robot")  # it would be noticed


def test_nothing_that_runs_comes_from_a_builder_of_assets():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")]:
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("from assets", "import assets"))], path
