"""The data of gr00t_finetune.py: the reference's numbers, LeRobot folders as they come, and what is refused.

`parity` compares with items that the reference transformed; its files are not part of the repository. Everything else
runs on a data set made here: two robots' worth of joints, a moving square on video.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from test_gr00t_run import pin

import gr00t_finetune as g
from common.parallel import World
from common.robot import demonstrations, lerobot, transforms
from common.robot.data_configs import DATA_CONFIGS, DataConfig, check_keys, find_data_config, modes
from common.robot.demonstrations import Demonstrations
from common.robot.gr00t_n15 import GR00TConfig
from common.robot.report import describe
from common.streams import stream
from gr00t_finetune import Args, Order, Plan, Samples

SHARED = ROOT.parent / "shared" / "data"
DEMO, PARITY = SHARED / "robot_sim.PickNPlace", SHARED / "gr00t_parity" / "data_demo.json"
parity = pytest.mark.skipif(not PARITY.exists(), reason="the reference's outputs are not on this machine")
WORLD = World(0, 1, torch.device("cpu"))
NAMES = [*(f"left_{i}" for i in range(3)), "left_gripper", *(f"right_{i}" for i in range(3)), "right_gripper"]


def write_set(root: Path, lengths=(20, 12, 30, 16), seed=0, video=True, modality=True, size=(48, 64)) -> Path:
    """A LeRobot v2.1 data set: 8 joints, 2 tasks in turns, one camera."""
    import av

    rng = np.random.default_rng(seed)
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [8], "names": NAMES}
    features = {"observation.state": vector, "action": vector, "task_index": {"dtype": "int64", "shape": [1]}}
    if video:
        features["observation.images.top"] = {
            "dtype": "video",
            "shape": [*size, 3],
            "names": ["height", "width", "channels"],
            "info": {"video.fps": 10},
        }
    for i, n in enumerate(lengths):
        state = rng.normal(size=(n, 8)).astype(np.float32)
        action = np.concatenate([state[:, :7] * 2 + 1, np.full((n, 1), 0.5)], axis=1).astype(np.float32)
        table = {k: pa.array(list(v)) for k, v in {"observation.state": state, "action": action}.items()}
        table |= {"timestamp": pa.array(np.arange(n) / 10), "task_index": pa.array(np.full(n, i % 2))}
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{i:06d}.parquet")
        if video:
            file = root / f"videos/chunk-000/observation.images.top/episode_{i:06d}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(file), "w") as out:
                stream = out.add_stream("libx264", rate=10, options={"crf": "10"})
                stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
                for t in range(n):
                    frame = np.full((*size, 3), 40 + 30 * (i % 4), np.uint8)
                    frame[8:24, t : t + 16] = 220  # where the square is tells the frame's number
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                out.mux(stream.encode())
    info = {
        "codebase_version": "v2.1",
        "robot_type": "test",
        "fps": 10,
        "chunks_size": 1000,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    parts = {"arm": {"start": 0, "end": 7}, "gripper": {"start": 7, "end": 8}}
    mapping = {
        "state": parts,
        "action": parts | {"speed": {"start": 0, "end": 2, "absolute": False}},
        "video": {"top": {"original_key": "observation.images.top"}} if video else {},
        "annotation": {"task": {"original_key": "task_index"}},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    if modality:
        (root / "meta/modality.json").write_text(json.dumps(mapping))
    lines = [{"episode_index": i, "tasks": [], "length": n} for i, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = [{"task_index": 0, "task": "lift it"}, {"task_index": 1, "task": "put it down again"}]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return root


CONFIG = DataConfig(("top",), modes("min_max", "arm", "gripper"), modes("min_max", "arm", "gripper", "speed"), "task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("lerobot") / "robot")


def load(folders, config=CONFIG, **flags) -> tuple[Demonstrations, Args]:
    folders = [folders] if isinstance(folders, Path) else folders
    args = Args(data_config="test", seed=3, max_steps=100, batch_size=8, **flags)
    sets = demonstrations.read_mixture(folders, config, "test", lambda text: None)
    metadata = demonstrations.make_metadata(sets, config, g.set_weights(sets, args), "new_embodiment")
    data = Demonstrations(sets, config, metadata, 31)
    data.interface.prompts = {text: np.arange(5 + i) for i, text in enumerate(data.instructions)}
    data.interface.pad_id = 99
    return data, args


def open_frames(data: Demonstrations, args: Args, positions, size: int) -> None:
    """The frames of these episodes of every data set."""
    data.interface.image_size = size
    data.open_frames([e for e in data.episodes if e.position in positions], Path(args.cache_dir), args.cache_side)


def samples_of(data: Demonstrations) -> Samples:
    return Samples(data, GR00TConfig())


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    data, args = load(folder, cache_dir=str(tmp_path_factory.mktemp("cache")))
    open_frames(data, args, range(4), 28)
    return data


# ---- the reference's numbers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    config = DATA_CONFIGS["fourier_gr1_arms_only"]
    data, args = load(DEMO, config, cache_dir=str(tmp_path_factory.mktemp("demo")))
    open_frames(data, args, [0, 2, 4], 224)
    tokenizer = transforms.load_tokenizer(str(SHARED / "eagle_tokenizer"), 151669)
    data.interface.prepare(GR00TConfig(), tokenizer, data.instructions)
    return data.sets[0], data, config, tokenizer, json.loads(PARITY.read_text())


@parity
def test_parity_of_items_with_the_reference(demo):
    episodes, data, config, tokenizer, fixture = demo
    for item in fixture["items"]:
        row = int(episodes.starts[item["episode"]]) + item["frame"]
        raw = {kind: demonstrations.raw_columns(episodes, kind, config) for kind in ("state", "action")}
        state = transforms.pad(
            transforms.encode("state", {k: v[[row]] for k, v in raw["state"].items()}, config, data.metadata), 64
        )
        rows = np.minimum(row + np.arange(16), episodes.starts[item["episode"] + 1] - 1)
        action = transforms.pad(
            transforms.encode("action", {k: v[rows] for k, v in raw["action"].items()}, config, data.metadata), 32
        )
        assert np.abs(state - item["state"]).max() <= 1e-12 and np.abs(action - item["action"]).max() <= 1e-12
        batch = samples_of(data)[Plan(np.array([row]), np.array([0]))]
        assert np.abs(batch["state"][0].numpy() - item["state"]).max() < 1e-7  # float32 of the same
        assert np.abs(batch["action"][0].numpy() - item["action"]).max() < 1e-7
        assert batch["action_mask"][0].tolist() == item["action_mask"]
        assert batch["eagle_input_ids"][0].tolist() == item["input_ids"] and batch["eagle_attention_mask"].all()
        assert data.instructions[data.text[row]] == item["language"]
        bracketed = tokenizer(transforms.prompt(item["language"], 1, 256, "bracketed")).input_ids
        assert bracketed == item["input_ids_bracketed_inference_form"]


@parity
def test_parity_of_images_with_the_reference(demo):
    from safetensors.numpy import load_file

    episodes, data, *_, fixture = demo
    stored = load_file(PARITY.with_name("data_demo_images.safetensors"))
    for item in fixture["items"]:
        row = int(episodes.starts[item["episode"]]) + item["frame"]
        name = f"episode{item['episode']}_frame{item['frame']}"
        assert (data.frames(row)[0] == stored[f"{name}.decoded"]).all()
        image = transforms.transform_images(stored[f"{name}.decoded"][None], 224)[0].permute(1, 2, 0).numpy()
        off = np.abs(image.astype(int) - stored[f"{name}.image"])
        assert off.max() <= 1 and (off == 0).mean() >= 0.98  # bit-equal with the fixture's torch version


@parity
def test_parity_of_normalisation_modes_with_the_reference(demo):
    _, data, config, _, fixture = demo
    for name, entry in fixture["normalisation_modes"]["keys"].items():
        kind, key = name.split(".")
        stats = data.metadata["statistics"][kind][key]
        for mode in ("min_max", "q99", "mean_std", "binary"):
            y = transforms.normalize(np.array(entry["raw"]), mode, stats)
            assert np.abs(y - entry[mode]["forward"]).max() <= 1e-12
            assert np.abs(transforms.unnormalize(y, mode, stats) - entry[mode]["inverse_of_forward"]).max() <= 1e-12
    case = fixture["unnormalise_action"]
    raw = transforms.decode_actions(np.array(case["normalised_action"], dtype=np.float32), config, data.metadata)
    for name, expected in case["raw"].items():
        assert np.abs(raw[name.split(".")[1]] - expected).max() <= 1e-6


@parity
def test_parity_of_statistics_and_metadata_with_the_reference(demo):
    episodes, data, *_ = demo
    reference = json.loads((PARITY.parent / "full_small/experiment_cfg/metadata.json").read_text())["gr1"]
    assert data.metadata | {"embodiment_tag": "gr1"} == reference
    vectors = {name: episodes.columns[name] for name in ("observation.state", "action")}
    for name, rows in vectors.items():
        for key, value in lerobot.column_statistics(rows).items():
            assert np.abs(value - episodes.statistics[name][key]).max() < 1e-13


# ---- units -----------------------------------------------------------------------------------------------------------

STATS = {
    "min": [0.0, -2.0, 5.0],
    "max": [4.0, 2.0, 5.0],
    "mean": [1.0, 0.0, 5.0],
    "std": [2.0, 1.0, 0.0],
    "q01": [0.0, -1.0, 5.0],
    "q99": [2.0, 1.0, 5.0],
}


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("min_max", [0.5, 1.5, 0.0]),  # beyond the range is kept, a constant dim is 0
        ("q99", [1.0, 1.0, 1.0]),  # clipped, the constant dim passes and is clipped too
        ("mean_std", [1.0, 3.0, 7.0]),
        ("scale", [0.75, 1.5, 1.4]),
        ("binary", [1.0, 1.0, 1.0]),
        (None, [3.0, 3.0, 7.0]),
    ],
)
def test_normalisation_by_hand(mode, expected):
    x = np.array([3.0, 3.0, 7.0])
    assert transforms.normalize(x, mode, STATS).tolist() == expected
    if mode in ("mean_std", None):
        back = transforms.unnormalize(transforms.normalize(x, mode, STATS), mode, STATS)
        assert np.allclose(back[:2], x[:2])
    assert transforms.normalize(np.array([0.0, np.pi / 2]), "sin_cos", {}).round(12).tolist() == [0, 1, 1, 0]


def test_min_max_actions_come_back_and_constant_joints_stay_at_their_value(data):
    rows = np.array([3, 25])
    codes = data.actions(rows)[..., : data.dims].astype(np.float64)
    raw = np.concatenate(list(transforms.decode_actions(codes, data.config, data.metadata).values()), axis=-1)
    assert np.allclose(raw[:, 0], data.raw_action[rows], atol=1e-5)
    assert (codes[..., 7] == 0).all() and np.allclose(raw[..., 7], 0.5)  # the gripper never moves


@pytest.mark.parametrize(
    "kind",
    ["quaternion", "axis_angle", "rotation_6d", "matrix"]
    + [f"euler_angles_{order}" for order in ("rpy", "ryp", "pry", "pyr", "yrp", "ypr")],
)
def test_rotations_come_back_from_every_form(kind):
    x = np.random.default_rng(0).normal(size=(50, 4))
    m = transforms.to_matrix(x, "quaternion")
    assert np.allclose(m @ m.swapaxes(-1, -2), np.eye(3)) and np.allclose(np.linalg.det(m), 1)
    assert np.allclose(transforms.to_matrix(transforms.from_matrix(m, kind), kind), m)


def test_rotation_conventions():
    """Real part first; 6D is the first two rows; rpy means R_x R_y R_z."""
    quarter = np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])  # a quarter turn about z
    m = transforms.to_matrix(quarter, "quaternion")
    assert np.allclose(m, [[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert np.allclose(transforms.from_matrix(m, "rotation_6d"), [0, -1, 0, 1, 0, 0])
    assert np.allclose(transforms.from_matrix(m, "axis_angle"), [0, 0, np.pi / 2])
    x, z = (transforms.to_matrix(np.array(a), "axis_angle") for a in ([0.3, 0, 0], [0, 0, 0.7]))
    assert np.allclose(transforms.to_matrix(np.array([0.3, 0, 0.7]), "euler_angles_rpy"), x @ z)
    assert np.allclose(transforms.from_matrix(np.eye(3), "axis_angle"), 0)


def test_converted_rotations_use_fixed_bounds_and_come_back():
    config = DataConfig((), {}, {"turn": "min_max"}, "task", {"action.turn": "axis_angle"})
    entry = {"rotation_type": "quaternion", "absolute": True, "shape": [4], "continuous": True}
    metadata = {"modalities": {"action": {"turn": entry}}, "statistics": {"action": {}}}
    q = np.array([[np.sqrt(0.5), np.sqrt(0.5), 0, 0]])
    code = transforms.encode("action", {"turn": q}, config, metadata)
    assert np.allclose(code, [[0.5, 0, 0]])  # pi / 2 of pi
    assert np.allclose(transforms.decode_actions(code, config, metadata)["turn"], q)


def test_past_the_end_absolute_actions_repeat_and_relative_ones_are_zero(data):
    last = data.episodes[0].end - 1
    action = data.actions(np.array([last]))[0]
    raw = transforms.decode_actions(action[:, : data.dims].astype(np.float64), data.config, data.metadata)
    assert (action[1:, :8] == action[0, :8]).all()
    assert np.abs(raw["speed"][1:]).max() < 1e-6 and np.abs(raw["speed"][0]).max() > 1e-3
    batch = samples_of(data)[Plan(np.array([last]), np.array([0]))]
    assert batch["action_mask"][0, :, :10].all() and not batch["action_mask"][0, :, 10:].any()  # steps: all valid


def test_statistics_of_a_mixture_are_those_of_its_rows(folder, tmp_path):
    other = write_set(tmp_path / "other", lengths=(25, 31), seed=5, video=False)
    config = DataConfig((), CONFIG.state, CONFIG.action, "task")
    both, _ = load([folder, other], config)
    rows = np.concatenate([e.columns["observation.state"] for e in both.sets])
    merged, pooled = both.metadata["statistics"]["state"]["arm"], lerobot.column_statistics(rows[:, :7])
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(merged[name], pooled[name], atol=1e-6)


def test_bundled_demonstrations_carry_the_statistics_of_their_rows():
    episodes = lerobot.read_episodes(ROOT / "assets/fetch_demos", "human.task_description")
    vectors = {name: episodes.columns[name] for name in ("observation.state", "action")}
    for name, rows in vectors.items():
        stats = lerobot.column_statistics(rows)
        for key, value in stats.items():
            assert np.abs(value - episodes.statistics[name][key]).max() < 1e-5, (name, key)
    check_keys(DATA_CONFIGS["fetch"], episodes.modality, "fetch_demos", "fetch")


def test_a_config_without_state_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_keys(DataConfig(("front",), {}, {"arm": None}, "task"), {}, "DIR", "my:CONFIG")
    assert "my:CONFIG has no state" in capsys.readouterr().err


# ---- images and prompts ----------------------------------------------------------------------------------------------


def test_evaluation_crops_the_centre_and_training_crops_anywhere():
    frame = np.zeros((1, 256, 256, 3), np.uint8)
    frame[0, :, :, 0] = np.arange(256)  # a ramp from left to right
    ramp = transforms.transform_images(frame, 243)[0, 0, 0].tolist()
    assert (
        ramp == [n - (n / 255 * 255 < n) for n in range(6, 249)]
        or np.abs(np.array(ramp) - np.arange(6, 249)).max() <= 1
    )
    lefts = {int(transforms.transform_images(frame, 243, np.random.default_rng(n)).shape[-1]) for n in range(3)}
    assert lefts == {243}
    wide = torch.zeros(1, 480, 640, 3, dtype=torch.uint8).numpy()
    assert transforms.transform_images(wide, 224).shape == (1, 3, 224, 224)
    assert (int(transforms.CROP * 480), int(transforms.CROP * 640)) == (456, 608)


def test_one_draw_of_crop_and_colour_for_all_cameras():
    frames = np.random.default_rng(0).integers(0, 255, (1, 40, 40, 3), dtype=np.uint8).repeat(2, axis=0)
    first, second = transforms.transform_images(frames, 28, np.random.default_rng(7))
    assert (first == second).all()
    assert (first != transforms.transform_images(frames, 28, np.random.default_rng(8))[0]).any()
    assert (first != transforms.transform_images(frames, 28)[0]).any()


def test_hue_turns_a_third_of_the_circle_from_red_to_green_and_leaves_gray_alone():
    x = torch.tensor([1.0, 0.2, 0.1])[None, :, None, None]
    assert torch.allclose(transforms.shift_hue(x, 1 / 3).flatten(), torch.tensor([0.1, 1.0, 0.2]), atol=1e-6)
    assert torch.allclose(transforms.shift_hue(x, 0.0), x, atol=1e-6)
    flat = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(transforms.shift_hue(flat, 0.2), flat)
    import colorsys

    rgb = torch.rand(1, 3, 1, 20, generator=torch.Generator().manual_seed(0))
    shifted = transforms.shift_hue(rgb, 0.07)[0, :, 0].T.tolist()
    for before, after in zip(rgb[0, :, 0].T.tolist(), shifted):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert np.allclose(colorsys.hsv_to_rgb((h + 0.07) % 1, s, v), after, atol=1e-5)


def test_jitter_stays_in_range_and_averages_to_the_picture():
    x = torch.full((1, 3, 8, 8), 0.5)
    x[:, 0] = 0.6
    out = torch.stack([transforms.jitter(x.clone(), np.random.default_rng(n)) for n in range(300)])
    assert out.min() >= 0 and out.max() <= 1 and (out.mean((0, 1, 3, 4)) - x.mean((0, 2, 3))).abs().max() < 0.03


def test_prompt_text():
    text = transforms.prompt("lift it", 2, 3)
    images = "<image 1><img>" + 3 * "<IMG_CONTEXT>" + "</img><image 2><img>" + 3 * "<IMG_CONTEXT>" + "</img>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}lift it<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "['lift it']" in transforms.prompt("lift it", 1, 3, "bracketed")


def test_bundled_tokenizer_gets_the_image_tokens_behind_its_own():
    tokenizer = transforms.load_tokenizer(str(ROOT / "assets/tiny-qwen2"), 259)
    ids = tokenizer(transforms.prompt("lift it", 1, 4)).input_ids
    assert ids.count(259) == 4 and ids[0] == 257 and max(ids) < 272


def test_prompts_of_different_length_are_padded_on_the_left(data):
    rows = np.array([0, 20])  # tasks 0 and 1, prompts of 5 and 6 tokens
    batch = samples_of(data)[Plan(rows, rows, length=8)]
    assert batch["eagle_input_ids"].tolist() == [[99, 99, 99, 0, 1, 2, 3, 4], [99, 99, 0, 1, 2, 3, 4, 5]]
    assert batch["eagle_attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]


def test_a_batch_can_be_pinned(data):
    rows = np.arange(3)
    batch = samples_of(data)[Plan(rows, rows, noises=2)]
    assert all(torch.equal(x, batch[name]) for name, x in pin(batch).items()) and "images" in batch


# ---- order and draws -------------------------------------------------------------------------------------------------


def test_every_epoch_takes_each_row_once_in_another_order(data):
    rows = np.arange(5, 60)
    order = Order(data, rows, Args(seed=1))
    first, second = ([order.row(i) for i in range(e * 55, (e + 1) * 55)] for e in range(2))
    assert sorted(first) == sorted(second) == rows.tolist() and first != second
    assert [order.row(i) for i in range(55)] == first  # a function of the draw's number: a run can go on anywhere


@pytest.mark.parametrize("by_set, by_frame", [(True, True), (False, True), (True, False)])
def test_mixtures_are_drawn_by_their_weights(folder, tmp_path, by_set, by_frame):
    other = write_set(tmp_path / "other", lengths=(10, 30), video=False)
    both, args = load([folder, other], DataConfig((), CONFIG.state, CONFIG.action, "task"))
    args = g.replace(args, balance_dataset_weights=by_set, balance_trajectory_weights=by_frame)
    order = Order(both, np.arange(len(both.end)), args)
    drawn = np.array([order.row(i) for i in range(3000)])
    share = (both.part[drawn] == 1).mean()
    assert abs(share - (40 / 118 if by_set else 0.5)) < 0.04
    short = (both.end[drawn] == 78 + 10)[both.part[drawn] == 1].mean()
    assert abs(short - (0.25 if by_frame else 0.5)) < 0.05


def test_batches_do_not_depend_on_how_they_are_cut_or_on_workers(data):
    order, samples = Order(data, np.arange(60), Args(seed=1)), samples_of(data)
    args = Args(batch_size=8, max_steps=2, noises_per_sample=3)
    whole = [samples[plan] for plan in g.plans(order, data, args, WORLD, 0)]
    parts = []
    for rank in range(2):
        world, cut = World(rank, 2, torch.device("cpu")), g.replace(args, gradient_accumulation_steps=2)
        parts.append(list(demonstrations.prepared(samples, g.plans(order, data, cut, world, 0), rank, WORLD.device)))
    for step in range(2):
        pieces = [parts[rank][2 * step + m] for rank in range(2) for m in range(2)]
        for name in ("images", "state", "action", "noise", "t", "eagle_input_ids"):
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), whole[step][name]), name


def test_no_two_draws_of_a_run_or_of_a_neighbour_share_a_stream(data, monkeypatch):
    """Evaluations draw the same in every run, everything else is the seed's own."""
    asked = []
    monkeypatch.setattr(g, "stream", lambda *key: asked.append(key) or stream(*key))
    rows = np.arange(60)
    for seed in (42, 43):
        args = Args(batch_size=8, max_steps=20, seed=seed, max_samples=9, noises_per_sample=1)
        order = Order(data, rows, args)
        list(map(samples_of(data).__getitem__, g.plans(order, data, args, WORLD, 0)))
        g.hold_out(data, args)
    assert {(key[0], key[1]) for key in asked} == {(s, n) for s in (42, 43) for n in ("training", "epoch", "frames")}
    epochs = {key for key in asked if key[1] == "epoch"}
    assert len({tuple(stream(*key).permutation(60)) for key in epochs}) == len(epochs) == 6
    firsts = {key: stream(*key).random() for key in asked}
    assert len(set(firsts.values())) == len(firsts)
    asked.clear()
    samples_of(data)[Plan(rows[:4], rows[:4], "validation")]
    assert asked == [(g.EVALUATION, "validation", i) for i in range(4)]


def test_noise_and_times_have_their_moments(data):
    rows = np.zeros(4000, dtype=int)
    bare = g.replace(data.config, video=())
    t = np.array([(0.999 - stream(0, "training", i).beta(1.5, 1.0)) / 0.999 for i in range(4000)])
    assert abs(t.mean() - 0.4) < 0.015 and abs(t.std() - 0.262) < 0.01 and -0.0011 < t.min() and t.max() < 1
    batch = samples_of(data)[Plan(rows[:500], np.arange(500))]
    assert abs(batch["noise"].mean()) < 0.01 and abs(batch["noise"].std() - 1) < 0.01
    assert torch.allclose(batch["t"][:50], torch.from_numpy(t[:50]).float()) and bare.video == ()


def test_held_out_episodes_are_spread_evenly():
    assert g.validation_episodes(120, None) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95, 105, 115]
    assert (
        g.validation_episodes(5, 1) == [2]
        and g.validation_episodes(5, 0) == []
        and g.validation_episodes(1, None) == []
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_frames_come_from_the_cache_and_belong_to_their_rows(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data, args = load(copy, cache_dir=str(tmp_path / "cache"))
    open_frames(data, args, [1, 3], 28)
    for episode in (1, 3):
        start, end = data.episodes[episode].start, data.episodes[episode].end
        for row in (start, start + 7, end - 1):
            frame = data.frames(row)[0]
            assert frame.shape == (48, 64, 3)
            bright = np.flatnonzero(frame[16, :, 1].astype(int) > 180)
            assert (
                abs(bright.min() - (row - start)) <= 1
                and abs(frame[40, 60].astype(int) - (40 + 30 * episode)).max() < 6
            )
    shutil.rmtree(copy / "videos")
    assert data.frames(data.episodes[1].start).shape == (1, 48, 64, 3)  # the videos are not opened again


def test_large_frames_are_cached_small_and_a_changed_video_is_decoded_again(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data, args = load(copy, cache_dir=str(tmp_path / "cache"), cache_side=32)
    open_frames(data, args, [0], 28)
    assert data.frames(0).shape == (1, 32, 32, 3)
    video = copy / "videos/chunk-000/observation.images.top/episode_000000.mp4"
    before = list((tmp_path / "cache").iterdir())
    shutil.copy(video, tmp_path / "again.mp4")
    shutil.move(tmp_path / "again.mp4", video)  # another time stamp
    open_frames(data, args, [0], 28)
    assert len(list((tmp_path / "cache").iterdir())) == len(before) + 1


def test_modality_is_proposed_from_the_names_of_the_joints(tmp_path, capsys):
    folder = write_set(tmp_path / "bare", lengths=(5,), video=True, modality=False)
    modality = lerobot.read_modality(folder, lerobot.read_info(folder))
    slices = {key: (entry["start"], entry["end"]) for key, entry in modality["state"].items()}
    assert slices == {"left_arm": (0, 3), "left_gripper": (3, 4), "right_arm": (4, 7), "right_gripper": (7, 8)}
    assert modality["video"] == {"top": "observation.images.top"}
    assert modality["language"] == {"human.task_description": "task_index"}
    assert '"left_gripper"' in capsys.readouterr().out  # printed, so that it can be corrected
    config = find_data_config("auto", modality)
    assert list(config.action) == list(slices) and config.language == "human.task_description"
    so100 = {
        "observation.state": {
            "dtype": "float32",
            "shape": [6],
            "names": {"motors": ["main_shoulder_pan"] + 4 * ["x"] + ["main_gripper"]},
        }
    }  # noqa: E501
    proposal = lerobot.propose_modality({"features": so100 | {"action": so100["observation.state"]}})
    assert proposal["state"] == {"single_arm": {"start": 0, "end": 5}, "gripper": {"start": 5, "end": 6}}


def edit(folder: Path, tmp_path: Path, file: str, change) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "edited"))
    path = copy / file
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("meta/info.json", lambda c: c.update(codebase_version="v1.6"), "user/name@v2.1"),
        ("meta/info.json", None, "not a LeRobot data set"),
        ("meta/info.json", lambda c: c.pop("data_path"), "data_path"),
        ("meta/modality.json", lambda c: c["action"].pop("gripper"), "--data-config auto"),
        ("meta/modality.json", lambda c: c["video"].update(top={"original_key": "observation.images.no"}), "missing"),
        ("meta/modality.json", lambda c: c["state"]["arm"].update(end=9), "8 wide"),
        ("meta/modality.json", lambda c: c["state"]["arm"].update(start=7), "start < end"),
        (
            "meta/modality.json",
            lambda c: c["state"]["arm"].update(original_key="observation.other"),
            "observation.other",
        ),
        ("meta/modality.json", lambda c: c.update(annotation={"other": {"original_key": "task_index"}}), "'task'"),
        ("meta/modality.json", lambda c: c["action"]["gripper"].update(dtype="int64"), "binary only"),
        ("meta/modality.json", b"{", "Invalid JSON"),
        ("meta/episodes.jsonl", None, "No such file"),
        ("meta/episodes.jsonl", b'{"episode_index": 0, "length": 21}', "20 rows"),
        ("meta/tasks.jsonl", b'{"task_index": 0, "task": "lift it"}', "holds task 1"),
        ("meta/tasks.jsonl", b'{"task_index": 0}', "line 1: task"),
        ("meta/episodes.jsonl", b'{"episode_index": 0}', "line 1: length"),
        ("meta/episodes.jsonl", b'{"episode_index": 0, "length": 0}', "length 0: must be at least 1"),
        ("meta/episodes.jsonl", b'{"episode_index": 0, "length": 20}\n{"episode_ind', "line 2"),
        ("meta/episodes.jsonl", b'{"episode_index": 0, "length": 20}\n' * 2, "twice"),
        ("meta/info.json", lambda c: c["features"]["action"].update(shape=[6]), "6 wide"),
        ("meta/info.json", lambda c: c["features"]["observation.state"].update(shape=[9]), "rows of 8 numbers"),
        ("meta/info.json", lambda c: c.update(chunks_size=0), "chunks_size 0"),
        ("meta/info.json", lambda c: c.update(fps="10"), "fps '10'"),
        ("meta/info.json", lambda c: c.update(video_path=None), "no video_path"),
        ("meta/info.json", lambda c: c.update(discarded_episode_indices=[0, 1, 2, 3]), "lists no episode"),
        ("meta/info.json", lambda c: c["features"]["observation.images.top"].update(dtype="float32"), "no camera"),
        ("meta/modality.json", lambda c: c["state"]["arm"].update(rotation_type="euler"), "rotation_type 'euler'"),
        ("data/chunk-000/episode_000001.parquet", None, "episode_000001.parquet"),
        ("data/chunk-000/episode_000001.parquet", b"nothing", "cannot be read"),
        ("videos/chunk-000/observation.images.top/episode_000001.mp4", None, "is missing"),
        ("videos/chunk-000/observation.images.top/episode_000001.mp4", b"nothing", "cannot be decoded"),
    ],
)
def test_bad_folders_end_in_one_line(folder, tmp_path, capsys, file, change, message):
    copy = edit(folder, tmp_path, file, change)
    with pytest.raises(SystemExit) as stop:
        data, args = load(copy, cache_dir=str(tmp_path / "cache"))
        open_frames(data, args, range(len(data.episodes)), 28)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


BROKEN = {"truncated": b'{"a', "list": b"[]", "null": b"null", "number": b"3", "nested": b'{"features": [1]}', "": b""}
META = ("info.json", "modality.json", "stats.json", "episodes.jsonl", "tasks.jsonl")


@pytest.mark.parametrize("file", META)
@pytest.mark.parametrize("content", BROKEN)
def test_meta_files_of_other_types_end_in_one_line(rows_only, tmp_path, capsys, file, content):
    copy = edit(rows_only, tmp_path, f"meta/{file}", BROKEN[content])
    with pytest.raises(SystemExit) as stop:
        load(copy, BLIND)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and file.partition(".")[0] in error


PAYLOADS = (
    "data/{episode_index.__class__.__mro__}.parquet",
    "data/{episode_index!r}.parquet",
    "data/{episode_index:01000000d}.parquet",
    "data/{episode_index:{episode_chunk}}.parquet",
    "data/{nobody}.parquet",
    "data/{}.parquet",
    "../outside/{episode_index}.parquet",
    "data/../../outside/{episode_index}.parquet",
    "/{episode_index}.parquet",
    "data/{episode_index}.parquet\0",
)


@pytest.mark.parametrize("kind", ["data_path", "video_path"])
@pytest.mark.parametrize("pattern", PAYLOADS)
def test_file_patterns_are_filled_in_and_never_leave_the_folder(folder, tmp_path, capsys, kind, pattern):
    """The files that the patterns lead to are there, and good: only their place is wrong."""
    copy = edit(folder, tmp_path, "meta/info.json", lambda c: c.update({kind: pattern}))
    (tmp_path / "outside").mkdir()
    for i in range(4):
        shutil.copy(copy / f"data/chunk-000/episode_{i:06d}.parquet", tmp_path / f"outside/{i}.parquet")
    with pytest.raises(SystemExit) as stop:
        load(copy)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.count("\n") == 1 and len(error) < 1000 and "must stay inside the folder" in error
    )


def test_a_cameras_name_does_not_leave_the_folder_either(folder, tmp_path, capsys):
    copy = edit(folder, tmp_path, "meta/info.json", lambda c: c["features"].update({"../../x": CAMERA}))
    with pytest.raises(SystemExit):
        load(copy)
    assert "must stay inside the folder" in capsys.readouterr().err


def test_a_hubs_snapshot_of_links_is_read(rows_only, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    for i, file in enumerate(path for path in rows_only.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(rows_only)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(i))
        link.symlink_to(blobs / str(i))
    assert (load(snapshot, BLIND)[0].raw_action == load(rows_only, BLIND)[0].raw_action).all()


# ---- folders as people have them -------------------------------------------------------------------------------------

CAMERA = {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]}
BLIND = DataConfig((), CONFIG.state, CONFIG.action, "task")


@pytest.fixture(scope="module")
def rows_only(tmp_path_factory):
    """A small data set without videos, with the statistics of its rows."""
    root = write_set(tmp_path_factory.mktemp("rows") / "robot", lengths=(5, 4, 6), video=False)
    columns = lerobot.read_episodes(root).columns
    stats = {name: lerobot.column_statistics(rows) for name, rows in columns.items()}
    text = json.dumps({n: {k: v.tolist() for k, v in s.items()} for n, s in stats.items()})
    (root / "meta/stats.json").write_text(text)
    return root


def change_column(folder: Path, name: str, values, episode=1) -> None:
    """Another column `name` in an episode's file; None: without it."""
    file = folder / f"data/chunk-000/episode_{episode:06d}.parquet"
    table = pq.read_table(file)
    table = table.drop_columns([name])
    pq.write_table(table if values is None else table.append_column(name, values), file)


VECTOR = np.zeros((4, 8)).tolist()
COLUMN_FAULTS = {
    "null row": ("action", pa.array([*VECTOR[:3], None]), "rows without a value"),
    "null number": ("action", pa.array([*VECTOR[:3], [None] * 8]), "rows without a value"),
    "ragged": ("action", pa.array([*VECTOR[:3], [0.0] * 7]), "rows of 7 numbers"),
    "narrow": ("action", pa.array([[0.0] * 6] * 4), "rows of 6 numbers"),
    "fixed and narrow": ("action", pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 24), 6), "rows of 6 numbers"),
    "2-D": ("action", pa.array([[[0.0] * 4] * 2] * 4), "not numbers or vectors"),
    "scalar": ("action", pa.array([0.0] * 4), "rows of 1 numbers"),
    "struct": ("action", pa.array([{"a": 1.0}] * 4), "not numbers or vectors"),
    "nan": ("observation.state", pa.array([[float("nan")] * 8] * 4), "not finite"),
    "text for a task": ("task_index", pa.array(["lift it"] * 4), "holds string"),
    "null task": ("task_index", pa.array([0, 0, 0, None]), "rows without a value"),
    "no column": ("observation.state", None, "has no column"),
    "empty": (None, None, "has 0 rows"),
}


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_columns_that_are_no_vectors_end_in_one_line(rows_only, tmp_path, capsys, fault):
    copy, (name, values, message) = Path(shutil.copytree(rows_only, tmp_path / "copy")), COLUMN_FAULTS[fault]
    if name:
        change_column(copy, name, values)
    else:
        file = copy / "data/chunk-000/episode_000001.parquet"
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(SystemExit) as stop:
        load(copy, BLIND)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and "episode" in error


def test_columns_of_every_number_type_are_read_alike(rows_only, tmp_path):
    copy = Path(shutil.copytree(rows_only, tmp_path / "copy"))
    rows = pq.read_table(copy / "data/chunk-000/episode_000001.parquet")["action"].to_pylist()
    whole = np.array(rows).round().astype(int).tolist()
    (copy / "meta/stats.json").unlink()
    found = []
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64()), pa.list_(pa.float32(), 8)):
        change_column(copy, "action", pa.array(whole, kind))
        found.append(load(copy, BLIND)[0].raw_action)
    assert all((x == found[0]).all() for x in found)


STAT_FAULTS = {
    "narrow": (lambda s: s["action"].update(max=[1.0] * 7), "needs 8 finite numbers"),
    "stale": (lambda s: s["action"].update(min=[-1e-3] * 8, max=[1e-3] * 8), "is not of this data"),
    "words": (lambda s: s["action"].update(mean=["a"] * 8), "lists of numbers"),
    "ragged": (lambda s: s["action"].update(mean=[[1.0], [1.0, 2.0]]), "lists of numbers"),
    "nan": (lambda s: s["action"].update(mean=[None] * 8), "needs 8 finite numbers"),
}


@pytest.mark.parametrize("fault", STAT_FAULTS)
def test_statistics_that_do_not_fit_the_rows_are_refused(rows_only, tmp_path, capsys, fault):
    change, message = STAT_FAULTS[fault]
    copy = edit(rows_only, tmp_path, "meta/stats.json", change)
    with pytest.raises(SystemExit) as stop:
        load(copy, BLIND)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "delete it" in error and error.count("\n") == 1


def test_statistics_wider_than_the_rows_are_somebodys_choice(rows_only, tmp_path):
    copy = edit(rows_only, tmp_path, "meta/stats.json", lambda s: s["action"].update(min=[-90.0] * 8, max=[90.0] * 8))
    assert load(copy, BLIND)[0].metadata["statistics"]["action"]["gripper"]["max"] == [90.0]


def test_many_missing_files_are_one_line(folder, tmp_path, capsys):
    for part, message in (("data", "rows; 3 of 4 files are"), ("videos", "video 'top'; 3 of 4 files are")):
        copy = Path(shutil.copytree(folder, tmp_path / part))
        for file in sorted((copy / part).rglob("episode_*"))[1:]:
            file.unlink()
        with pytest.raises(SystemExit):
            load(copy)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_what_threads_refuse_is_one_line(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file in (copy / "data").rglob("*.parquet"):
        file.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stop:
        load(copy)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "names",
    [
        {name: place for place, name in enumerate(NAMES)},
        dict(reversed({name: place for place, name in enumerate(NAMES)}.items())),
        {"motors": NAMES},
        {"left": NAMES[:4], "right": NAMES[4:]},
        NAMES,
    ],
)
def test_names_of_joints_come_in_several_forms(rows_only, names):
    info = lerobot.read_info(rows_only)
    for column in ("observation.state", "action"):
        info["features"][column]["names"] = names
    keys = {"left_arm": (0, 3), "left_gripper": (3, 4), "right_arm": (4, 7), "right_gripper": (7, 8)}
    found = lerobot.propose_modality(info)["action"]
    assert {key: (entry["start"], entry["end"]) for key, entry in found.items()} == keys


@pytest.mark.parametrize("names", [None, 3, "abc", ["too", "few"], {"a": "b"}, [["x"]], {}])
def test_names_that_do_not_fit_make_one_arm(rows_only, names):
    info = lerobot.read_info(rows_only)
    info["features"]["action"]["names"] = names
    assert lerobot.propose_modality(info)["action"] == {"single_arm": {"start": 0, "end": 8}}


def test_numbered_names_are_keys(rows_only):
    info = lerobot.read_info(rows_only)
    names = [*(f"gripper_position.{i}" for i in range(3)), *(f"goal.{i}" for i in range(5))]
    info["features"]["action"]["names"] = names
    expected = {"gripper_position": {"start": 0, "end": 3}, "goal": {"start": 3, "end": 8}}
    assert lerobot.propose_modality(info)["action"] == expected


def test_discarded_episodes_are_left_out_and_that_is_said(rows_only, tmp_path, capsys):
    copy = edit(rows_only, tmp_path, "meta/info.json", lambda c: c.update(discarded_episode_indices=[1, 7]))
    episodes = lerobot.read_episodes(copy)
    assert "1 of 3 episodes are marked as discarded" in capsys.readouterr().out
    whole = lerobot.read_episodes(rows_only)
    assert episodes.ids == [0, 2] and episodes.starts.tolist() == [0, 5, 11]
    assert (episodes.columns["action"] == np.delete(whole.columns["action"], np.s_[5:9], axis=0)).all()
    expected = lerobot.column_statistics(episodes.columns["action"])
    assert (episodes.statistics["action"]["max"] == expected["max"]).all()  # of what is trained on


@pytest.mark.parametrize(
    "feature",
    [
        CAMERA | {"info": {"video.is_depth_map": True}},
        CAMERA | {"video_info": {"is_depth_map": True}},
        CAMERA | {"shape": [48, 64, 1]},
        CAMERA | {"shape": [1, 48, 64]},
        CAMERA | {"shape": [48, 64]},
    ],
)
def test_depth_is_not_trained_on(folder, tmp_path, capsys, feature):
    copy = edit(folder, tmp_path, "meta/info.json", lambda c: c["features"].update({"observation.images.top": feature}))
    assert "top" not in lerobot.propose_modality(lerobot.read_info(copy))["video"]
    with pytest.raises(SystemExit):
        load(copy)
    error = capsys.readouterr().err
    assert "depth is not trained on" in error and error.count("\n") == 1


def test_a_video_of_another_length_is_refused(folder, tmp_path, capsys):
    videos = folder / "videos/chunk-000/observation.images.top"
    copy = edit(folder, tmp_path, "meta/info.json", lambda c: None)
    shutil.copy(videos / "episode_000002.mp4", copy / "videos/chunk-000/observation.images.top/episode_000001.mp4")
    data, args = load(copy, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        open_frames(data, args, [0, 1], 28)
    assert "30 frames for an episode of 12 rows" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())  # not even half a file


@pytest.mark.parametrize(
    "name, message", [("so101", "so100"), ("nomodule:X", "nomodule"), ("json:dumps", "DataConfig")]
)
def test_unknown_data_configs_end_in_one_line(folder, capsys, name, message):
    with pytest.raises(SystemExit):
        find_data_config(name, lerobot.read_modality(folder, lerobot.read_info(folder)))
    assert message in capsys.readouterr().err


def test_data_configs_have_the_published_widths():
    """arms-only: 26 action dims in the reference's order; all names of its table, and one for the bundled data."""
    assert list(DATA_CONFIGS["fourier_gr1_arms_only"].action) == ["left_arm", "right_arm", "left_hand", "right_hand"]
    assert len(DATA_CONFIGS) == 13 and DATA_CONFIGS["so100_dualcam"].video == ("front", "wrist")
    assert DATA_CONFIGS["fourier_gr1_arms_only"].state["left_arm"] == "sin_cos"
    panda = DATA_CONFIGS["bimanual_panda_gripper"]
    assert list(panda.state)[:3] == ["right_arm_eef_pos", "right_arm_eef_quat", "right_gripper_qpos"]
    assert panda.action["left_gripper_close"] == "binary" and panda.action["left_arm_eef_rot"] is None


def test_hub_names_without_a_network_end_in_one_line(capsys):
    for name in ("someone/no-such-set", "./nowhere", "someone/no-such-set@v2.1"):
        with pytest.raises(SystemExit):
            lerobot.find_folder(name)
        assert "assets/fetch_demos" in capsys.readouterr().err


def test_what_a_run_leaves_out_is_told(rows_only, tmp_path):
    """A single episode has nothing to be evaluated on; a state of more than 64 numbers is cut."""
    model, run = torch.nn.Linear(1, 1), SimpleNamespace(world=WORLD, folder=tmp_path)
    one = write_set(tmp_path / "one", lengths=(9,), video=False)
    path = one / "meta/modality.json"
    keys = {f"copy{i}": {"start": 0, "end": 8} for i in range(9)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": keys}))
    wide, told = g.replace(BLIND, state=modes("min_max", *keys)), []
    for folder, config in ((rows_only, BLIND), (one, wide)):
        data, args = load(folder, config, learning_rate=1e-3)
        told.append(describe(model, data, g.hold_out(data, args), args, run))
    assert "held out (" not in told[0] and "cut" not in told[0]
    assert "no episode is held out" in told[1] and "the state has 72 numbers, the model takes 64" in told[1]
