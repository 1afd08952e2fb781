"""The bundled demonstrations are what their metadata says, and happen again when their actions are executed."""

import json
from pathlib import Path

import av
import gymnasium as gym
import mujoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gl import gl_missing

from assets import build_fetch_demos as demos
from common.robot import fetch
from common.robot.fetch import GOAL_RADIUS, FetchVec
from common.robot.fetch_robot import VIEW

ROOT = Path(demos.HERE) / "fetch_demos"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "meta" / f"{name}.jsonl").read_text().splitlines()]


def path_of(template: str, episode: int) -> Path:
    return ROOT / INFO[template].format(episode_chunk=episode // 1000, episode_index=episode, video_key=demos.CAMERA)


def column(table: pa.Table, name: str) -> np.ndarray:
    x = table[name].combine_chunks()
    return x.flatten().to_numpy().reshape(len(x), -1) if pa.types.is_fixed_size_list(x.type) else np.asarray(x)


INFO, MODALITY, STATS = (
    json.loads((ROOT / "meta" / f"{name}.json").read_text()) for name in ("info", "modality", "stats")
)
EPISODES, TASKS = lines("episodes"), lines("tasks")
TABLES = [pq.read_table(path_of("data_path", e["episode_index"])) for e in EPISODES]


def test_meta_files_count_what_is_there():
    assert INFO["codebase_version"] == "v2.1" and INFO["fps"] == 25 and INFO["total_chunks"] == 1
    assert INFO["total_episodes"] == INFO["total_videos"] == len(EPISODES)
    assert INFO["total_frames"] == sum(e["length"] for e in EPISODES)
    assert INFO["total_tasks"] == len(TASKS) and INFO["splits"] == {"train": f"0:{len(EPISODES)}"}
    assert [e["episode_index"] for e in EPISODES] == list(range(len(EPISODES)))
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    meta = ("info.json", "modality.json", "stats.json", "tasks.jsonl", "episodes.jsonl", "episodes_stats.jsonl")
    expected = {"README.md"} | {f"meta/{name}" for name in meta}
    for template in ("data_path", "video_path"):
        expected |= {str(path_of(template, i).relative_to(ROOT)) for i in range(len(EPISODES))}
    assert files == expected
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 3e6


def test_parquet_files_have_the_declared_columns():
    types = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    declared = {name: f for name, f in INFO["features"].items() if f["dtype"] != "video"}
    assert set(INFO["features"]) - set(declared) == {demos.CAMERA}
    index = 0
    for episode, table in zip(EPISODES, TABLES):
        assert table.num_rows == episode["length"] and table.column_names == list(declared)
        for name, f in declared.items():
            scalar = types[f["dtype"]]
            vector = f["shape"] != [1]
            assert table.schema.field(name).type == (pa.list_(scalar, f["shape"][0]) if vector else scalar), name
            assert not vector or len(f["names"]) == f["shape"][0]
            assert table[name].null_count == 0
        n = np.arange(table.num_rows)
        np.testing.assert_array_equal(column(table, "frame_index"), n)
        np.testing.assert_array_equal(column(table, "index"), index + n)
        np.testing.assert_array_equal(column(table, "timestamp"), (n / 25).astype(np.float32))
        np.testing.assert_array_equal(column(table, "next.done"), n == n[-1])
        assert set(column(table, "episode_index")) == {episode["episode_index"]}
        assert {TASKS[i]["task"] for i in column(table, "task_index")} == set(episode["tasks"])
        assert episode["tasks"] == [demos.INSTRUCTIONS[episode["env_id"]]]
        index += table.num_rows


def test_modality_parts_tile_the_vectors():
    for group, name in (("state", "observation.state"), ("action", "action")):
        parts = list(MODALITY[group].values())
        assert [0, *(part["end"] for part in parts[:-1])] == [part["start"] for part in parts]
        assert parts[-1]["end"] == INFO["features"][name]["shape"][0]
        named = [f"{part}.{i}" for part, at in MODALITY[group].items() for i in range(at["end"] - at["start"])]
        assert named == INFO["features"][name]["names"]
    assert MODALITY["video"] == {"front": {"original_key": demos.CAMERA}}
    assert MODALITY["annotation"] == {"human.task_description": {"original_key": "task_index"}}


def test_statistics_are_numpys_over_the_parquet_files():
    per_episode = lines("episodes_stats")
    assert [line["episode_index"] for line in per_episode] == list(range(len(EPISODES)))
    names = TABLES[0].column_names
    assert set(STATS) == set(names) and all(set(line["stats"]) == {*names, demos.CAMERA} for line in per_episode)
    functions = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    for name in names:
        parts = [column(table, name).astype(np.float64).reshape(table.num_rows, -1) for table in TABLES]
        x = np.concatenate(parts)
        expected = {key: f(x, axis=0) for key, f in functions.items()}
        expected |= {"q01": np.quantile(x, 0.01, axis=0), "q99": np.quantile(x, 0.99, axis=0)}
        assert set(STATS[name]) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(STATS[name][key], value, rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}")
        for line, part in zip(per_episode, parts):
            own = line["stats"][name]
            assert own["count"] == [len(part)]
            for key, f in functions.items():
                np.testing.assert_allclose(own[key], f(part, axis=0), rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}")


@pytest.mark.parametrize("episode", [0, 1, 2, len(EPISODES) - 1])
def test_videos_decode_to_one_frame_per_row(episode):
    with av.open(str(path_of("video_path", episode))) as container:
        stream = container.streams.video[0]
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        info = INFO["features"][demos.CAMERA]["info"]
        assert stream.codec_context.name == info["video.codec"] and stream.average_rate == info["video.fps"]
        assert stream.codec_context.pix_fmt == info["video.pix_fmt"]
    times, pictures = [t for t, _ in frames], np.stack([picture for _, picture in frames])
    assert list(pictures.shape) == [EPISODES[episode]["length"], *INFO["features"][demos.CAMERA]["shape"]]
    np.testing.assert_allclose(times, column(TABLES[episode], "timestamp"), atol=1e-6)
    image = lines("episodes_stats")[episode]["stats"][demos.CAMERA]
    assert np.shape(image["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(image["mean"]), pictures.mean((0, 1, 2)) / 255, atol=0.01)


@pytest.mark.parametrize("env_id", demos.EXPERTS)
def test_recorded_actions_replayed_from_the_recorded_seed_give_the_recorded_states_and_succeed(env_id):
    """Bit for bit on the machine that recorded them; 1e-4 leaves room for another processor's last digits."""
    mine = [e for e in EPISODES if e["env_id"] == env_id]
    tables = [TABLES[e["episode_index"]] for e in mine]
    states, actions = ([column(table, name) for table in tables] for name in ("observation.state", "action"))
    assert all(np.abs(a).max() <= 1 for a in actions)
    if mujoco.__version__ != INFO["recorded_with"]["mujoco"]:
        pytest.skip(f"recorded with MuJoCo {INFO['recorded_with']['mujoco']}, here is {mujoco.__version__}")
    vec = FetchVec(env_id, len(mine), num_threads=1, max_episode_steps=100)
    obs, _ = vec.reset(seed=[e["seed"] for e in mine])
    for t in range(max(e["length"] for e in mine)):
        now = demos.state_vector(obs)
        for i, e in enumerate(mine):
            if t < e["length"]:
                np.testing.assert_allclose(now[i], states[i][t], atol=1e-4, err_msg=f"episode {e}, step {t}")
        obs, *_ = vec.step(np.stack([a[min(t, len(a) - 1)] for a in actions]))
        reached = fetch.goal_distance(obs) < GOAL_RADIUS
        for i, e in enumerate(mine):
            if t < e["length"]:
                assert column(tables[i], "next.success")[t] == reached[i]
                assert column(tables[i], "next.reward")[t] == reached[i] - 1
            if t == e["length"] - 1:
                assert reached[i], f"episode {e} does not end at the goal"
    vec.close()


def test_state_vector_names_the_simulators_numbers():
    """Every number of the observation is in the state or follows from it."""
    for env_id in demos.EXPERTS:
        vec = FetchVec(env_id, 2, num_threads=1)
        vec.reset(seed=3)
        for _ in range(4):
            obs, *_ = vec.step(vec.action_space.sample())
        vec.close()
        state = demos.state_vector(obs)
        assert state.shape == (2, 28) and state.dtype == np.float32
        part = {name: state[:, at["start"] : at["end"]] for name, at in MODALITY["state"].items()}
        block = part["gripper_position"] + part["object_relative"]
        if env_id == "FetchReach-v4":
            order = [part["gripper_position"], part["fingers"], part["gripper_velocity"], part["finger_velocity"]]
            assert not state[:, 10:22].any()
        else:
            names = "object_relative fingers object_rotation object_velocity object_angular_velocity gripper_velocity"
            order = [part["gripper_position"], block, *(part[name] for name in names.split()), part["finger_velocity"]]
        np.testing.assert_allclose(np.concatenate(order, axis=1), obs["observation"], atol=1e-6)
        np.testing.assert_array_equal(part["goal"], obs["desired_goal"].astype(np.float32))
        np.testing.assert_allclose(part["goal_relative"], obs["desired_goal"] - obs["achieved_goal"], atol=1e-7)


@pytest.mark.parametrize("env_id", demos.EXPERTS)
def test_expert_solves_fresh_scenes(env_id):
    won, _ = demos.verify(env_id, 20, noise=0.05, first_seed=500)
    assert won >= 19


def test_same_command_same_bytes_and_the_bundled_episodes(tmp_path):
    """The number of episodes asked for does not change the first ones; without --no-video nothing else differs."""
    short = dict(episodes=1, verify=0, video=False)
    for name in "ab":
        demos.main(demos.Args(out=str(tmp_path / name), **short))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 10 and not (tmp_path / "a.partial").exists()
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for i in range(3):
        made = pq.read_table(tmp_path / "a" / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
        assert made.schema == TABLES[i].schema
        if mujoco.__version__ == INFO["recorded_with"]["mujoco"]:
            for name in made.column_names:
                np.testing.assert_allclose(column(made, name), column(TABLES[i], name), atol=1e-4, err_msg=name)
    info = json.loads((tmp_path / "a" / "meta" / "info.json").read_text())
    assert info["total_videos"] == 0 and demos.CAMERA not in info["features"]


def test_bad_flags_end_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demos.EXPERTS, "FetchReach-v4", lambda obs: np.ones((len(obs["observation"]), 4)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    cases = {
        "FetchSlide-v4": dict(tasks=("FetchSlide-v4",)),
        "--episodes": dict(episodes=0),
        "--size 33": dict(size=33),
        "--tail 0": dict(tail=0),
        "--noise -1": dict(noise=-1.0),
        "not one ends at the goal": dict(tasks=("FetchReach-v4",), verify=0, video=False),
        "no data set": dict(out=str(tmp_path / "mine")),
    }
    for words, flags in cases.items():
        with pytest.raises(SystemExit) as stop:
            demos.main(demos.Args(**{"out": str(tmp_path / "new"), **flags}))
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and words in message, message
    assert (tmp_path / "mine" / "thesis.tex").is_file() and not (tmp_path / "new").exists()


def test_camera_draws_what_the_environment_would(tmp_path):
    """A replayed simulator state gives the environment's own picture, the marker moves with the goal, and the video's
    first frame is that picture but for compression."""
    if why := gl_missing():
        pytest.skip(f"no video here: {why}")
    e = EPISODES[1]
    camera = demos.Camera(e["env_id"], INFO["features"][demos.CAMERA]["shape"][0])
    vec = FetchVec(e["env_id"], 1, num_threads=1)
    obs, _ = vec.reset(seed=[e["seed"]])
    physics, goal = vec.get_state()[0]["physics"][0], obs["desired_goal"][0]
    picture = camera.draw(physics, goal)
    size = dict(width=picture.shape[1], height=picture.shape[0])
    own = gym.make(e["env_id"], render_mode="rgb_array", default_camera_config=VIEW, **size)
    own.reset(seed=e["seed"])
    np.testing.assert_array_equal(own.render(), picture)
    moved = camera.draw(physics, goal + [0.0, 0.1, 0.0])
    assert (moved != picture).any() and (camera.draw(physics, goal) == picture).all()
    with av.open(str(path_of("video_path", 1))) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first.astype(float) - picture).mean() < 6
    for thing in (own, camera, vec):
        thing.close()
