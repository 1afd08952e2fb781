"""The data of GR00T N1.7: the reference's numbers, own golden values, the published files, what is refused.

`parity` compares with items that the reference transformed; its files are not part of the repository. The rest runs on
a data set made here, with the bundled tokenizer.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from test_gr00t_data import write_set
from test_gr00t_doctor import record

from common.robot import demonstrations, doctor, interface_n17, processor_n17, transforms
from common.robot.data_configs import CHUNK_CONFIGS, ChunkConfig, Relative
from common.robot.demonstrations import Demonstrations
from common.robot.gr00t_n17 import GR00TN17, GR00TN17Config
from common.robot.policy import Policy, Stored, read_stored, save_policy
from common.robot.processor_n17 import Modalities, Processor
from common.robot.transforms import to_device

SHARED = ROOT.parent / "shared" / "data"
DEMO, PARITY = SHARED / "robot_sim.PickNPlace", SHARED / "gr00t_n17_parity"
parity = pytest.mark.skipif(not PARITY.exists(), reason="the reference's outputs are not on this machine")
CPU = torch.device("cpu")


def sizes(**changes) -> SimpleNamespace:
    """What an interface asks of a model's config."""
    published = dict(state_dim=132, action_horizon=40, action_dim=132, instruction_vocab=0, vocab_size=151936)
    published |= dict(num_embodiments=32)
    return SimpleNamespace(
        **(published | dict(patch_size=16, merge_size=2, image_token_id=151655, toy=False) | changes)
    )


# ---- the reference's numbers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    stored = read_stored(str(PARITY / "full_small"))
    about = stored.acts()
    sets = demonstrations.read_mixture([DEMO], about.data_config, "test", lambda text: None)
    metadata = stored.embodiment(about.embodiment_tag, about.data_config)
    data = Demonstrations(sets, about.data_config, metadata, stored.row(about.embodiment_tag), about)
    cache = tmp_path_factory.mktemp("demo")
    data.open_frames([e for e in data.episodes if e.position in (0, 2, 4)], cache, about.cache_side)
    source = str(SHARED / "eagle_tokenizer")
    tokenizer = interface_n17.load_tokenizer(sizes(), source)
    data.interface.prepare(sizes(), tokenizer, data.instructions)
    return data, json.loads((PARITY / "data_demo.json").read_text())


@parity
def test_parity_of_items_with_the_reference(demo):
    from safetensors.numpy import load_file

    data, fixture = demo
    stored = load_file(PARITY / "data_demo_images.safetensors")
    for n, item in enumerate(fixture["items"]):
        row = np.array([int(data.sets[0].starts[item["episode"]]) + item["frame"]])
        batch = data.batch(row)
        images = data.interface.pictures([data.frames(row[0])])
        if item["task"] != item["language"]:  # altered, to exercise the clean-up
            state = data.interface.state(data.state_at(row))
            batch |= data.interface.batch(state, [item["task"]], images)
        batch = to_device(batch, CPU)
        H, D = fixture["horizon"], len(item["state"]) - 1
        assert np.abs(batch["state"][0, 0, : D + 1].numpy() - item["state"]).max() <= 2e-6
        assert batch["state"].shape == (1, 1, 132) and not batch["state"][..., D:].any()
        action = np.array(item["action"])
        assert np.abs(batch["action"][0, : H + 1, : action.shape[1]].numpy() - action).max() <= 2e-6
        assert batch["action"].shape == (1, 40, 132) and not batch["action"][:, H:].any()
        ones = item["action_mask_ones"]
        assert batch["action_mask"][0, : ones[0], : ones[1]].all() and batch["action_mask"].sum() == ones[0] * ones[1]
        ids = [id for id, count in item["input_ids_compact"] for _ in range(count)]
        assert batch["input_ids"][0].tolist() == ids and batch["attention_mask"].all()
        assert len(ids) == item["num_tokens"] == data.interface.prompt_length(item["task"], data.frames(row[0]).shape)
        assert batch["image_grid_thw"].tolist() == item["image_grid_thw"]
        assert batch["embodiment_id"].tolist() == [item["embodiment_id"]]
        image = images[0].permute(1, 2, 0).numpy()
        if sha(data.frames(row[0])[0]) == item["frame_sums"]["sha256"]:  # this decoder's frame is theirs
            assert sha(image) == item["image_sums"]["sha256"]  # OpenCV's, to the bit
        assert np.abs(image.mean((0, 1)) - item["image_sums"]["mean"]).max() < 0.05
        values = item["pixel_values"]
        assert list(batch["pixel_values"].shape) == values["shape"]
        if n == 0:
            image = interface_n17.transform_images(stored["item0.frame"][None], Processor())[0]
            assert np.array_equal(image.permute(1, 2, 0), stored["item0.image"])
            exact = transforms_of(image)
            for at, expected in values["rows"].items():
                assert np.abs(exact[int(at), ::64].numpy() - expected).max() <= 1e-6


def sha(x) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def transforms_of(image: torch.Tensor) -> torch.Tensor:
    """pixel_values of a transformed image (3, h, w)."""
    return to_device({"patches": interface_n17.patches(image[None], 16)}, CPU)["pixel_values"]


@parity
def test_parity_of_other_shapes_with_the_reference(demo):
    from safetensors.numpy import load_file

    data, fixture = demo
    stored = load_file(PARITY / "data_demo_images.safetensors")
    for case in fixture["other_shapes"]:
        height, width, _ = case["input_shape"]
        assert data.interface.image_tokens(height, width) == case["image_tokens"]
        frame = stored["odd.input"] if case["input"] == "cut" else np.zeros((height, width, 3), np.uint8)
        images = data.interface.pictures([frame[None]])
        batch = to_device(data.interface.batch(np.zeros((1, 132)), ["lift it"], images), CPU)
        assert batch["image_grid_thw"].tolist() == case["image_grid_thw"]
        if case["input"] == "cut":
            assert sha(images[0].permute(1, 2, 0)) == case["after_transform"]["sha256"]
            assert abs(batch["pixel_values"].mean() - case["pixel_values_mean"]) < 1e-6
            assert abs(batch["pixel_values"].std() - case["pixel_values_std"]) < 1e-6


@parity
def test_parity_of_statistics_decoding_and_poses_with_the_reference(demo):
    data, fixture = demo
    made = demonstrations.make_metadata(data.sets, data.config, [1.0], "new_embodiment")["statistics"]
    theirs = json.loads((PARITY / "full_small/statistics.json").read_text())["new_embodiment"]
    for kind, keys in theirs.items():
        for key, numbers in keys.items():
            for name, x in numbers.items():
                assert np.allclose(made[kind][key][name], x, rtol=1e-5, atol=1e-6), (kind, key, name)
    last, case = fixture["items"][-1], fixture["decode"]
    chunk = np.zeros((1, 40, 132), np.float32)
    normalised = np.array(case["normalised_action"])
    chunk[0, : len(normalised), : normalised.shape[1]] = normalised
    state = {key: np.array(x) for key, x in last["raw_state"].items()}
    assert np.abs(data.interface.actions(chunk, state)[0] - case["decoded_action"]).max() <= 2e-6
    eef = {name: np.array(x) for name, x in fixture["relative_eef"].items() if name != "note"}
    reference, form = eef["reference"][None], "xyz_rot6d"
    for name, function, given in (
        ("relative", interface_n17.relative, "absolute"),
        ("absolute", interface_n17.absolute, "relative"),
        ("noisy_absolute", interface_n17.absolute, "noisy_relative"),
    ):
        assert np.abs(function(eef[given][None], reference, form)[0] - eef[name]).max() <= 2e-6


# ---- own golden values: images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "seen", "fitted", "tokens"),
    [
        ((256, 256), (256, 256), (256, 256), 64),
        ((480, 640), (256, 340), (256, 352), 88),
        ((180, 320), (256, 455), (256, 448), 112),
        ((376, 672), (256, 458), (256, 448), 112),
        ((424, 240), (452, 256), (448, 256), 112),
        ((96, 96), (256, 256), (256, 256), 64),
    ],
)
def test_sizes_of_pictures_and_their_tokens(size, seen, fitted, tokens):
    image = interface_n17.transform_images(np.zeros((1, *size, 3), np.uint8), Processor())
    assert image.shape[2:] == seen and interface_n17.token_size(*seen, 32) == fitted
    assert fitted[0] * fitted[1] // 32**2 == tokens
    boxed = interface_n17.transform_images(np.zeros((1, *size, 3), np.uint8), Processor(letter_box_transform=True))
    assert boxed.shape[2:] == (256, 256)


def test_resizing_is_that_of_inter_area():
    row = torch.tensor([0, 10, 20, 30, 40], dtype=torch.uint8)
    line = interface_n17.resize_area(row[None, None], 1, 2)  # 2.5 old pixels make a new one
    assert line.flatten().tolist() == [8, 32]
    row = torch.tensor([0, 30, 60], dtype=torch.uint8)
    assert interface_n17.resize_area(row[None, None], 1, 4).flatten().tolist() == [0, 20, 40, 60]  # not 0, 19, 41, 60
    both = interface_n17.resize_area(row[:, None].expand(3, 3)[None], 4, 2)  # one axis grows: both go by that rule
    assert both[0, :, 0].tolist() == [0, 20, 40, 60] and both.shape == (1, 4, 2)
    noise = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    halves = noise.float().reshape(3, 10, 2, 15, 2).mean((2, 4)).round()
    assert (interface_n17.resize_area(noise, 10, 15) - halves).abs().max() == 0
    assert interface_n17.resize_area(noise, 20, 30) is noise


def test_the_crop_is_of_the_centre_or_drawn_once_for_all_views():
    frames = np.zeros((2, 256, 256, 3), np.uint8)
    frames[:, 6:249, 6:249] = 200  # all that the centre crop of 243 sees
    assert (interface_n17.transform_images(frames, Processor()) == 200).all()
    whole = Processor(crop_fraction=None, image_crop_size=[128, 128])  # half of 256
    frames[:, 64:192, 64:192] = 100
    assert (interface_n17.transform_images(frames, whole) == 100).all()
    noise = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8).repeat(2, axis=0)
    first, second = interface_n17.transform_images(noise, Processor(), np.random.default_rng(1))
    assert torch.equal(first, second)
    plain = interface_n17.transform_images(noise, Processor(color_jitter_params=None), np.random.default_rng(1))
    assert not torch.equal(plain[0], first)
    assert not torch.equal(plain, interface_n17.transform_images(noise, Processor()))


def test_pictures_are_turned_about_their_centre():
    image = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    assert torch.equal(interface_n17.rotate(image, 90), image.rot90(dims=(2, 3)))
    wide = torch.arange(24, dtype=torch.uint8).reshape(1, 3, 2, 4)
    assert torch.equal(interface_n17.rotate(wide, 180), wide.rot90(2, dims=(2, 3)))
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    plain, turning = Processor(color_jitter_params=None), Processor(color_jitter_params=None, random_rotation_angle=9.0)
    turned = [interface_n17.transform_images(noise, p, np.random.default_rng(1)) for p in (plain, turning)]
    assert not torch.equal(*turned)


def test_patches_of_a_token_follow_each_other():
    """Patch vectors are channel, time, row, column; tokens go by rows, the four patches of a token by rows too."""
    h = w = 8  # 2 x 2 tokens of 2 x 2 patches of 2 x 2 pixels
    image = torch.arange(3 * h * w, dtype=torch.uint8).reshape(1, 3, h, w)
    values = to_device({"patches": interface_n17.patches(image, 2)}, CPU)["pixel_values"]
    assert values.shape == (16, 3 * 2 * 2 * 2)
    levels = (values * 127.5 + 127.5).round().int().reshape(2, 2, 2, 2, 3, 2, 2, 2)
    for r, c, i, j, channel, y, x in [(0, 1, 1, 0, 2, 1, 0), (1, 0, 0, 1, 0, 0, 1), (1, 1, 1, 1, 1, 1, 1)]:
        expected = image[0, channel, 4 * r + 2 * i + y, 4 * c + 2 * j + x]
        assert levels[r, c, i, j, channel, :, y, x].tolist() == [expected, expected]


def test_frames_are_cached_by_the_first_steps_of_the_transform(robot):
    frame = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    small = robot.interface.reduce(frame, 256)
    assert small.shape == (256, 341, 3) and robot.interface.reduce(frame, 0) is frame
    both = [interface_n17.transform_images(x[None], Processor()) for x in (frame, small)]
    assert torch.equal(*both) and robot.interface.reduced == "short side"


# ---- own golden values: units ----------------------------------------------------------------------------------------


def test_normalisation_clips_and_what_does_not_vary_is_0():
    stats = dict(q01=[0.0, 1.0], q99=[4.0, 1.0], min=[-4.0, 1.0], max=[4.0, 1.0 + 1e-9], mean=[1, 1], std=[2, 0])
    x = np.array([[-1.0, 1.0], [3.0, 7.0], [9.0, 1.0]])
    assert interface_n17.normalize(x, "q99", stats).tolist() == [[-1, 0], [0.5, 0], [1, 0]]
    assert interface_n17.normalize(x, "q99", stats, clip=False).tolist() == [[-1.5, 0], [0.5, 0], [3.5, 0]]
    assert interface_n17.normalize(x, "min_max", stats).tolist() == [[-0.25, 0], [0.75, 0], [1, 0]]
    assert interface_n17.normalize(x, "mean_std", stats).tolist() == [[-1, 1], [1, 7], [4, 1]]
    assert interface_n17.unnormalize(np.array([[-2.0, 5.0], [0.5, 0.0]]), "q99", stats).tolist() == [[0, 1], [3, 1]]
    assert interface_n17.unnormalize(np.array([[-2.0, 5.0]]), "mean_std", stats).tolist() == [[-3, 1]]


def test_poses_are_relative_in_the_frame_of_the_state():
    turned = [0, 1, 0, -1, 0, 0]  # the first two rows of a quarter turn about z: x points to -y, y to x
    state = np.array([[1.0, 2.0, 3.0, *turned]])
    action = np.array([[[1.0, 3.0, 3.0, *turned], [2.0, 2.0, 3.0, 1, 0, 0, 0, 1, 0]]])
    relative = interface_n17.relative(action, state, "xyz_rot6d")[0]
    assert np.allclose(relative[0], [-1, 0, 0, 1, 0, 0, 0, 1, 0]) and np.allclose(relative[1, :3], [0, 1, 0])
    assert np.allclose(relative[1, 3:], [0, -1, 0, 1, 0, 0])
    rng = np.random.default_rng(0)
    for form, width in (("xyz_rot6d", 9), ("xyz_rotvec", 6), ("joint", 5)):
        state, action = rng.normal(size=(3, width)), rng.normal(size=(3, 4, width))
        if form == "xyz_rot6d":  # rows of rotations
            state, action = (np.concatenate([x[..., :3], rows(x[..., 3:])], -1) for x in (state, action))
        back = interface_n17.absolute(interface_n17.relative(action, state, form), state, form)
        assert np.allclose(back, action)
    assert interface_n17.relative(action, action[:, 0], "joint")[:, 0].any() == np.False_
    skew = np.concatenate([np.zeros((1, 1, 3)), [[[2.0, 0, 0, 3.0, 0.5, 0]]]], -1)  # rows that are not orthonormal
    still = np.array([[0.0, 0, 0, 1, 0, 0, 0, 1, 0]])
    assert np.allclose(interface_n17.absolute(skew, still, "xyz_rot6d"), [[[0, 0, 0, 1, 0, 0, 0, 1, 0]]])


def rows(x: np.ndarray) -> np.ndarray:
    return transforms.from_matrix(transforms.to_matrix(x, "rotation_6d"), "rotation_6d")


# ---- a data set ------------------------------------------------------------------------------------------------------

BOTH = ("arm", "gripper")
CONFIG = ChunkConfig(
    ("top",),
    {"arm": "q99", "gripper": "mean_std"},
    {"arm": "q99", "gripper": "q99"},
    "task",
    horizon=14,
    relative={"arm": Relative("joint", "arm")},
)
TOY = dict(state_dim=12, action_horizon=16, action_dim=10, vocab_size=272, patch_size=8, image_token_id=268, toy=True)


def about_of(config, **more):
    return Stored("test", version="n17").describe("test", config, "new_embodiment", **more)


def load(folders, cache, config=CONFIG, **changes) -> Demonstrations:
    sets = demonstrations.read_mixture(folders, config, "test", lambda text: None)
    weights = np.full(len(sets), 1 / len(sets))
    metadata = demonstrations.make_metadata(sets, config, weights, "new_embodiment")
    about = about_of(config)
    data = Demonstrations(sets, config, metadata, 10, about)
    data.interface.fit(sizes(**(TOY | changes)), data.instructions)
    if config.video:
        data.open_frames(data.episodes, cache, about.cache_side)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("lerobot") / "robot")  # episodes of 20, 12, 30 and 16 rows


@pytest.fixture(scope="module")
def robot(folder, tmp_path_factory):
    return load([folder], tmp_path_factory.mktemp("cache"))


def test_windows_are_complete_and_statistics_are_of_each_step(robot):
    split = robot.split([[2]])
    assert split.rows.tolist() == [*range(0, 7), *range(62, 65)]  # 12 rows hold no window of 14
    assert split.val_rows.tolist() == [*range(32, 49)]
    stats = robot.metadata["statistics"]["relative_action"]["arm"]
    action, state = (robot.raw[kind]["arm"].astype(np.float32) for kind in ("action", "state"))
    first = np.r_[0:7, 32:49, 62:65]
    for k in (0, 13):
        differences = action[first + k] - state[first]
        assert np.allclose(stats["min"][k], differences.min(0)) and np.allclose(stats["max"][k], differences.max(0))
        assert np.allclose(stats["q99"][k], np.quantile(differences, 0.99, axis=0), atol=1e-6)
    assert np.shape(stats["mean"]) == (14, 7)


def test_a_batch_of_a_toy_model(robot):
    rows = np.array([0, 62])  # instructions of 7 and 19 letters
    batch = to_device(robot.batch(rows), CPU)
    words = [robot.interface.tokenizer(text).input_ids for text in ("lift it", "put it down again")]  # a byte a token
    head, tail = [257, 84, 82, 68, 81, 198], [258, 198]
    image = [265, *[268] * 20, 266]  # 48 x 64 pixels become 64 x 85, tokens of 16 pixels: 4 x 5
    ids = [head + image + text + tail for text in words]
    assert batch["input_ids"][1].tolist() == ids[1]
    assert batch["input_ids"][0].tolist() == [256] * 10 + ids[0]  # padded on the left
    assert batch["attention_mask"].tolist() == [[0] * 10 + [1] * len(ids[0]), [1] * len(ids[1])]
    assert batch["image_grid_thw"].tolist() == [[1, 8, 10]] * 2 and batch["pixel_values"].shape == (160, 384)
    assert batch["state"].shape == (2, 1, 12) and batch["embodiment_id"].tolist() == [10]
    assert batch["action"].shape == batch["action_mask"].shape == (2, 16, 10)
    assert batch["action_mask"][0, :14, :8].all() and batch["action_mask"].sum() == 2 * 14 * 8
    assert not batch["action"][:, 14:].any() and not batch["action"][..., 8:].any()
    assert robot.longest_prompt(rows) == len(ids[1]) and robot.batch(rows, 60)["input_ids"].shape == (2, 60)
    assert robot.interface.about.processor.max_action_horizon == 16 and robot.interface.processor.max_state_dim == 12


def test_what_is_encoded_is_decoded(robot):
    rows = np.array([0, 5, 40])
    raw = robot.interface.decode(robot.actions(rows), robot.state_at(rows))
    for key, x in raw.items():
        recorded = robot.raw["action"][key][rows[:, None] + np.arange(14)]
        low, high = (np.array(robot.metadata["statistics"]["action"][key][name]) for name in ("q01", "q99"))
        want = recorded if key == "arm" else recorded.clip(low, high)
        assert x.shape == recorded.shape and np.abs(x - want).max() < 1e-5
    beyond = robot.interface.decode(np.full((3, 16, 10), 9.0), robot.state_at(rows))["arm"]
    top = np.array(robot.metadata["statistics"]["relative_action"]["arm"]["max"])
    assert np.allclose(beyond, top + robot.state_at(rows)["arm"][:, None])
    few = robot.interface.actions(np.zeros((3, 5, 10)), robot.state_at(rows))  # only the first steps of a chunk
    assert few.shape == (3, 5, 8)


def test_an_observation_is_seen_as_a_recorded_row(robot):
    rows = np.array([3, 40])
    recorded = robot.batch(rows)
    flat = {f"state.{key}": x[:, None] for key, x in robot.state_at(rows).items()}
    flat |= {"video.top": np.stack([robot.frames(row) for row in rows])}
    flat |= {"annotation.task": [robot.instructions[robot.text[row]] for row in rows]}
    seen = robot.interface.see(flat)
    assert all(torch.equal(seen[key], recorded[key]) for key in seen) and set(seen) < set(recorded)
    nested = {"video": {"top": flat["video.top"]}, "state": robot.state_at(rows)}
    nested["state"] = {key: x[:, None] for key, x in nested["state"].items()}
    nested["language"] = {"annotation.task": [[text] for text in flat["annotation.task"]]}
    again = robot.interface.see(nested)
    assert all(torch.equal(seen[key], again[key]) for key in seen)
    with pytest.raises(ValueError, match="lacks state.arm"):
        robot.interface.see({"video": {}, "state": {"gripper": [0.0]}, "language": {}})


def test_frames_of_the_past(folder, tmp_path):
    data = load([folder], tmp_path, replace(CONFIG, video_steps=(-2, 0)))
    frames = data.frames(1)
    assert np.array_equal(frames[0], data.frames(0)[1]) and np.array_equal(frames[1], data.frames(3)[0])  # 0 for -1
    batch = data.batch(np.array([40]))
    assert batch["image_grid_thw"].shape == (2, 3) and (batch["input_ids"] == 268).sum() == 40
    state = {f"state.{key}": x for key, x in data.state_at(np.array([40])).items()}
    seen = data.interface.see(state | {"video.top": data.frames(40), "annotation.task": "lift it"})
    assert torch.equal(seen["patches"], batch["patches"])
    with pytest.raises(ValueError, match="video.top has 1 times"):
        data.interface.see(state | {"video.top": data.frames(40)[0], "annotation.task": "lift it"})


def test_a_mixture_has_the_extreme_quantiles(folder, tmp_path):
    other = write_set(tmp_path / "other", seed=1, video=False)
    blind = replace(CONFIG, video=())
    parts = [load([path], tmp_path, blind) for path in (folder, other)]
    both = load([folder, other], tmp_path, blind)
    for kind, key in (("state", "arm"), ("action", "arm"), ("relative_action", "arm")):
        found = [np.array(d.metadata["statistics"][kind][key]["q99"]) for d in (*parts, both)]
        assert np.allclose(found[2], np.maximum(*found[:2]))
        found = [np.array(d.metadata["statistics"][kind][key]["mean"]) for d in (*parts, both)]
        assert np.allclose(found[2], (found[0] + found[1]) / 2, atol=1e-6)
    assert "patches" not in both.batch(np.array([0])) and both.longest_prompt(np.array([0])) == len("lift it")


# ---- configs and the published files ---------------------------------------------------------------------------------

NVIDIA = """
from gr00t.configs.data.embodiment_configs import register_modality_config
from gr00t.data.embodiment_tags import EmbodimentTag
from gr00t.data.types import ActionConfig, ActionFormat, ActionRepresentation, ActionType, ModalityConfig

mine = {
    "video": ModalityConfig(delta_indices=[-15, 0], modality_keys=["top"]),
    "state": ModalityConfig(delta_indices=[0], modality_keys=["arm", "gripper"], mean_std_embedding_keys=["gripper"]),
    "action": ModalityConfig(
        delta_indices=list(range(0, 12)),
        modality_keys=["arm", "gripper"],
        action_configs=[
            ActionConfig(
                rep=ActionRepresentation.RELATIVE,
                type=ActionType.EEF,
                format=ActionFormat.XYZ_ROT6D,
                state_key="arm",
            ),
            ActionConfig(rep=ActionRepresentation.ABSOLUTE, type=ActionType.NON_EEF, format=ActionFormat.DEFAULT),
        ],
    ),
    "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.task"]),
}
register_modality_config(mine, embodiment_tag=EmbodimentTag.NEW_EMBODIMENT)
"""
MODALITY = {
    "video": {"top": "observation.images.top"},
    "state": {"arm": dict(start=0, end=7), "gripper": dict(start=7, end=8)},
    "action": {
        "arm": dict(start=0, end=7, absolute=True, rotation_type=None, continuous=True),
        "gripper": dict(start=7, end=8, absolute=True, rotation_type=None, continuous=True),
        "arm_speed": dict(start=0, end=7, absolute=True, rotation_type=None, continuous=True),
    },
    "language": {"task": "task_index"},
}


def test_configs_by_file_by_name_and_from_modality_json(tmp_path):
    stored, file = Stored("test", version="n17"), tmp_path / "mine.py"
    file.write_text(NVIDIA)
    found = stored.find_config(str(file), MODALITY)
    state, action = {"arm": "q99", "gripper": "mean_std"}, {"arm": "q99", "gripper": "q99"}
    relative = {"arm": Relative("xyz_rot6d", "arm")}
    expected = ChunkConfig(("top",), state, action, "task", horizon=12, relative=relative, video_steps=(-15, 0))
    assert found == expected and not found.fault()
    keys = dict(delta_indices=[0], modality_keys=["arm"])
    file.write_text(f"OTHER = 1\nMINE = dict(state={keys}, action={keys}, language={keys | dict(modality_keys=['t'])})")
    assert stored.find_config(str(file), MODALITY) == ChunkConfig((), {"arm": "q99"}, {"arm": "q99"}, "t", horizon=1)
    auto = stored.find_config("auto", MODALITY)
    assert (
        auto.relative == {"arm": Relative("joint", "arm")}
        and auto.horizon == 16
        and list(auto.action)[2] == "arm_speed"
    )
    ranges = Stored("test", version="n17", processor=Processor(use_percentiles=False))
    assert set(ranges.find_config("auto", MODALITY).state.values()) == {"min_max"}
    for name, config in CHUNK_CONFIGS.items():
        assert stored.find_config(name, MODALITY) is config and config.fault() == "", name
        said = Modalities.model_validate_json(processor_n17.modalities_of(config).model_dump_json())
        assert processor_n17.config_of(said, Processor()) == config, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ImportError('numpyy')", "ImportError: numpyy"),
        ("x = 1", "registers no modality config"),
        (NVIDIA.replace("range(0, 12)", "range(1, 12)"), "0, 1, 2, … for the action"),
        (NVIDIA.replace("ActionRepresentation.RELATIVE", "ActionRepresentation.DELTA"), "DELTA EEF XYZ_ROT6D"),
        (NVIDIA.replace('["annotation.task"]', '["a", "b"]'), "2 language keys"),
        (NVIDIA.replace("[-15, 0]", "[0.5]"), "delta_indices[0] 0.5"),
    ],
)
def test_a_config_file_that_is_none_ends_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        Stored("test", version="n17").find_config(str(tmp_path / "mine.py"), MODALITY)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(horizon=17), "17 actions in a chunk"),
        (dict(horizon=31), "no episode of"),
        (dict(relative={"gripper": Relative("joint", "arm")}), "action 'gripper'"),
        (dict(relative={"arm": Relative("xyz_rot6d", "arm")}), "9 each"),
        (dict(relative={"arm": Relative("joint", "leg")}), "relative to state 'leg'"),
        (dict(video_steps=(0, -1)), "in order"),
        (dict(state={"arm": "binary"}), "normalises state 'arm' by binary"),
    ],
)
def test_a_config_that_does_not_fit_ends_in_one_line(folder, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as stop:
        load([folder], tmp_path, replace(CONFIG, **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


class Weightless(torch.nn.Module):
    """A model whose files are not looked at here."""

    def save_pretrained(self, folder: Path, weights: dict) -> None:
        (folder / "config.json").write_text(json.dumps({"model_type": "Gr00tN1d7"}))
        (folder / "model.safetensors").touch()


def test_the_published_files_are_written_and_read(robot, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    libero = {"statistics": robot.metadata["statistics"], "modalities": {"state": {"x": {"shape": [1]}}, "action": {}}}
    metadata = {"libero_sim": libero, "new_embodiment": robot.metadata}  # the first as of a published folder
    save_policy(first, Weightless(), {}, metadata, robot.interface.about)
    whole = json.loads((first / "processor_config.json").read_text())
    assert whole["processor_class"] == "Gr00tN1d7Processor"
    action = whole["processor_kwargs"]["modality_configs"]["new_embodiment"]["action"]
    assert action["delta_indices"] == [*range(14)] and action["modality_keys"] == ["arm", "gripper"]
    how = {"rep": "RELATIVE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
    assert action["action_configs"] == [how, how | {"rep": "ABSOLUTE"}]
    assert json.loads((first / "embodiment_id.json").read_text())["new_embodiment"] == 10
    stored = read_stored(str(first))
    again = stored.acts()
    assert again.data_config == CONFIG and again.processor.max_action_dim == 10
    assert again.model_copy(update={"processor": robot.interface.processor}) == robot.interface.about
    entry = stored.embodiment("new_embodiment", CONFIG)
    assert entry["statistics"] == robot.metadata["statistics"] and stored.row("libero_sim") == 2
    assert entry["modalities"] == robot.metadata["modalities"]
    save_policy(second, Weightless(), {}, stored.metadata, again)
    for file in (*processor_n17.FILES, "experiment_cfg/policy.json", "experiment_cfg/metadata.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    interface, rows = stored.interface(again), np.array([40])
    windows = {key: x[rows[:, None] + np.arange(14)] for key, x in robot.raw["action"].items()}
    interface.shape(12, 16, 10)
    assert np.array_equal(interface.encode(windows, robot.state_at(rows)), robot.actions(rows))
    shutil.rmtree(first / "experiment_cfg")  # as another program leaves it
    foreign = read_stored(str(first)).acts(embodiment_tag="new_embodiment")
    assert foreign.data_config == CONFIG and foreign.cache_side == 64 and foreign.processor == again.processor
    demonstrations.check_units(robot.sets, CONFIG, read_stored(str(first)).metadata["new_embodiment"], "a")


def test_a_config_that_contradicts_the_files_is_refused(robot, tmp_path, capsys):
    save_policy(tmp_path, Weightless(), {}, {"new_embodiment": robot.metadata}, robot.interface.about)
    (tmp_path / "mine.py").write_text(NVIDIA)
    with pytest.raises(SystemExit) as stop:
        read_stored(str(tmp_path)).acts(data_config=str(tmp_path / "mine.py"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "trained with: horizon 14 against 12" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        read_stored(str(tmp_path)).acts(data_config="auto")  # which has 16 actions and every key
    assert "state arm (q99), gripper (mean_std) against arm (q99), gripper (q99)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stored = read_stored(str(tmp_path))
        stored.interface(stored.acts(embodiment_tag="libero_sim", data_config="libero_sim"))
    with pytest.raises(SystemExit):
        stored.acts(embodiment_tag="libero_sim")
    assert "has no keys for --embodiment-tag libero_sim (it has: new_embodiment)" in (error := capsys.readouterr().err)
    assert "no statistics for --embodiment-tag libero_sim" in error


def test_a_checkpoint_acts_and_is_served(robot, tmp_path):
    pytest.importorskip("msgpack"), pytest.importorskip("zmq")
    from common.robot import serve

    config = GR00TN17Config.tiny(state_dim=12, action_dim=10, dit_layers=2)
    save_policy(tmp_path, GR00TN17.toy(config), {}, {"new_embodiment": robot.metadata}, robot.interface.about)
    policy, row = Policy.from_pretrained(tmp_path, "cpu"), np.array([40])
    state, frames = robot.state_at(row), robot.frames(40)
    seen = {f"state.{key}": x[0] for key, x in state.items()} | {"video.top": frames[0], "annotation.task": "Lift it!"}
    actions = policy.get_action(seen, seed=3)
    assert {key: x.shape for key, x in actions.items()} == {"action.arm": (14, 7), "action.gripper": (14, 1)}
    steps = actions["action.arm"] - state["arm"]  # relative to the state, within what was recorded of each step
    low, high = (np.array(robot.metadata["statistics"]["relative_action"]["arm"][name]) for name in ("min", "max"))
    assert (steps >= low - 1e-6).all() and (steps <= high + 1e-6).all() and np.ptp(steps) > 0
    nested = {"video": {"top": frames[None]}, "state": {key: x[:, None] for key, x in state.items()}}
    nested |= {"language": {"annotation.task": [["lift it"]]}}  # N1.7's own clients
    reply, _ = serve.answer(policy, [serve.pack({"data": nested, "seed": 3})])
    assert all(np.array_equal(reply[key][0], x) for key, x in actions.items())
    reply, _ = serve.answer(policy, [serve.pack({"endpoint": "get_modality_config"})])
    assert json.loads(reply["action"]["as_json"])["delta_indices"] == [*range(14)]


def test_the_doctor_reads_the_files_of_n17(tmp_path, monkeypatch, capsys):
    folder = record(tmp_path / "set", video=True)
    robot = load([folder], tmp_path / "cache", replace(CONFIG, horizon=12))
    save_policy(tmp_path, Weightless(), {}, {"new_embodiment": robot.metadata}, robot.interface.about)
    code = run_script(doctor, ["doctor", str(tmp_path), "--dataset-path", str(folder)], monkeypatch)
    assert code == 0, capsys.readouterr().out
    seen = {
        "state.arm": np.full((1, 7), 99.0),
        "state.gripper": [[0.5]],
        "video.top": np.zeros((1, 48, 64, 3), np.uint8),
    }
    np.savez(tmp_path / "seen.npz", **seen, **{"annotation.task": "lift it"})
    code = run_script(doctor, ["doctor", str(tmp_path), "--observation", str(tmp_path / "seen.npz")], monkeypatch)
    out = capsys.readouterr().out
    assert code == 1 and "WRONG  state.arm" in out and "WRONG  state.gripper" not in out


KEYS = "processor_kwargs/modality_configs/new_embodiment"
SPOILT = [
    (KEYS, ""),
    (f"{KEYS}/action", ...),
    (f"{KEYS}/state/modality_keys", []),
    (f"{KEYS}/action/delta_indices", []),
]
SPOILT += [(f"{KEYS}/video/delta_indices", [5]), (f"{KEYS}/action/action_configs", [{}]), (f"{KEYS}/language", None)]
SPOILT += [(f"{KEYS}/action/action_configs", [{"rep": 3}, {}]), ("processor_kwargs/max_action_dim", "132")]
SPOILT += [("processor_kwargs/image_crop_size", [0, 0]), ("processor_kwargs/model_type", "eagle")]
SPOILT += [("new_embodiment", []), ("new_embodiment/state/arm", ...), ("new_embodiment/state/arm/min", ["x"])]
SPOILT += [("new_embodiment/relative_action", ...), ("new_embodiment/relative_action/arm/q99", [[1.0], [1.0, 2.0]])]
TEXTS = {"empty": b"", "half": b'{"a": [1', "list": b"[]", "null": b"null", "word": b'"w"', "no text": b"\xff\xfe\x00"}


def test_every_kind_of_broken_file_ends_in_one_line(robot, tmp_path, capsys):
    save_policy(tmp_path, Weightless(), {}, {"new_embodiment": robot.metadata}, robot.interface.about)
    whole = {name: (tmp_path / name).read_bytes() for name in processor_n17.FILES}

    def refused(name: str, text: bytes, case) -> None:
        (tmp_path / name).write_bytes(text)
        with pytest.raises(SystemExit) as stop:
            stored = read_stored(str(tmp_path))
            stored.interface(stored.acts()).fit(sizes(**TOY))
            pytest.fail(f"{name} is taken: {case}")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), (case, error)
        (tmp_path / name).write_bytes(whole[name])

    for name in processor_n17.FILES:
        for case, text in TEXTS.items():
            refused(name, text, case)
    for place, value in SPOILT:
        name = processor_n17.FILES[0 if place.startswith("processor") else 1]
        content = entry = json.loads(whole[name])
        *parents, last = place.split("/")
        for key in parents:
            entry = entry[key]
        if value is ...:
            del entry[last]
        else:
            entry[last] = value
        refused(name, json.dumps(content).encode(), place)
    refused("embodiment_id.json", b'{"new_embodiment": 32}', "a row that is not there")
    stored = read_stored(str(tmp_path))
    stored.interface(stored.acts()).fit(sizes(**TOY))


@parity
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("processor_config.json", lambda c: c["processor_kwargs"].update(use_albumentations=False), "torchvision"),
        ("processor_config.json", lambda c: c["processor_kwargs"].update(crop_fraction=3.0), "crop_fraction 3.0"),
        ("processor_config.json", lambda c: c.pop("processor_kwargs"), "processor_kwargs"),
        (
            "statistics.json",
            lambda c: c["new_embodiment"]["relative_action"].pop("left_arm"),
            "relative_action.left_arm",
        ),
        (
            "statistics.json",
            lambda c: c["new_embodiment"]["state"]["left_arm"]["q01"].pop(),
            "6 numbers of q01 for the 7",
        ),
        ("statistics.json", lambda c: c.clear(), "no statistics for"),
        ("embodiment_id.json", lambda c: c.update(new_embodiment="x"), "new_embodiment"),
    ],
)
def test_broken_published_files_end_in_one_line(tmp_path, capsys, file, change, words):
    folder = tmp_path / "copy"
    shutil.copytree(PARITY / "full_small", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        stored = read_stored(str(folder))
        stored.interface(stored.acts())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_instructions_are_cleaned():
    assert interface_n17.clean("Pick the cup_cake, Gently!") == "pick the cup_cake gently"
    assert interface_n17.prompt("go", 2) == (
        "<|im_start|>user\n" + 2 * "<|vision_start|><|image_pad|><|vision_end|>" + "go<|im_end|>\n"
    )
