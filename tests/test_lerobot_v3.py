"""LeRobot v3.0, many episodes in a file, and cameras stored as images: the same rows and frames as in v2.1."""

import importlib.util
import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, flags_of, run_script, timeless
from test_gr00t_data import NAMES, load

import gr00t_finetune as g
from common.robot import frames, lerobot
from common.robot.data_configs import DataConfig, modes
from common.robot.frames import cache_frames
from common.run import Run

V30 = ROOT.parent / "shared" / "data" / "fetch_demos_v30"
shared = pytest.mark.skipif(not V30.exists(), reason="the converted data set is not on this machine")
LENGTHS = (7, 12, 5, 9, 6)
FPS, SIZES = 10, {"front": (32, 48), "wrist": (48, 48)}
EYES = DataConfig(("front", "wrist"), modes("min_max", "arm", "gripper"), modes("min_max", "arm", "gripper"), "task")
TASKS = ["lift it", "put it down — ゆっくり"]


def pictures(camera: str, episode: int) -> np.ndarray:
    """(rows, height, width, 3): noise that tells camera, episode and row."""
    rng = np.random.default_rng([list(SIZES).index(camera), episode])
    return rng.integers(0, 256, (LENGTHS[episode], *SIZES[camera], 3), dtype=np.uint8)


LOSSLESS = {"qp": "0", "g": "250", "bf": "3", "b-adapt": "0"}


def encode(file: Path, shots: np.ndarray, codec="libx264rgb", options=LOSSLESS) -> None:
    """Lossless, with one keyframe at the start and frames that are stored out of order."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=FPS, options=dict(options))
        stream.height, stream.width = shots.shape[1:3]
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
        for shot in shots:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(shot, format="rgb24")))
        out.mux(stream.encode())


def png(shot: np.ndarray) -> dict:
    from PIL import Image

    Image.fromarray(shot).save(buffer := io.BytesIO(), "png")
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(episode: int) -> dict:
    rng, n = np.random.default_rng(episode), LENGTHS[episode]
    state = rng.normal(size=(n, 8)).astype(np.float32)
    return {
        "observation.state": pa.array(list(state)),
        "action": pa.array(list(2 * state)),
        "timestamp": pa.array(np.arange(n, dtype=np.float32) / FPS),
        "task_index": pa.array(np.full(n, episode % 2)),
    }


def write_meta(root: Path, version: str, data_path: str, video_path: str | None, kind: str) -> None:
    vector = {"dtype": "float32", "shape": [8], "names": NAMES}
    features = {"observation.state": vector, "action": vector, "task_index": {"dtype": "int64", "shape": [1]}}
    for camera, size in SIZES.items():
        channels = {"dtype": kind, "shape": [*size, 3], "names": ["height", "width", "channels"]}
        features[f"observation.images.{camera}"] = channels
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 1000, "features": features, "data_path": data_path}
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info | {"video_path": video_path}))
    parts = {"arm": {"start": 0, "end": 7}, "gripper": {"start": 7, "end": 8}}
    video = {camera: {"original_key": f"observation.images.{camera}"} for camera in SIZES}
    mapping = {"state": parts, "action": parts, "video": video, "annotation": {"task": {"original_key": "task_index"}}}
    (root / "meta/modality.json").write_text(json.dumps(mapping))


def write_v2(root: Path, kind="video") -> Path:
    data, video = "data/episode_{episode_index:06d}", "videos/{video_key}/{episode_index}.mp4"
    write_meta(root, "v2.1", f"{data}.parquet", video if kind == "video" else None, kind)
    (root / "data").mkdir()
    for e in range(len(LENGTHS)):
        table = rows_of(e)
        for camera in SIZES:
            if kind == "video":
                encode(root / f"videos/observation.images.{camera}/{e}.mp4", pictures(camera, e))
            else:
                table[f"observation.images.{camera}"] = pa.array(list(map(png, pictures(camera, e))))
        pq.write_table(pa.table(table), root / f"data/episode_{e:06d}.parquet", row_group_size=4)
    lines = [json.dumps({"episode_index": e, "length": n, "tasks": []}) for e, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"task_index": i, "task": text}) for i, text in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    return root


# which episodes lie in which file: rows and cameras are cut independently of each other, and not in order
CUTS = {"data": ([0, 1, 2], [4], [3]), "front": ([0, 1], [3, 2, 4]), "wrist": ([0], [1, 2, 3, 4])}


def write_v3(root: Path, kind="video", lost: int | None = None, index_name="__index_level_0__") -> Path:
    """lost: an episode whose rows and entry are gone; its frames stay in the videos, as after a deletion."""
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if kind == "video" else None
    write_meta(root, "v3.0", "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", video, kind)
    kept = [e for e in range(len(LENGTHS)) if e != lost]
    entries = {e: {"episode_index": e, "length": LENGTHS[e], "tasks": [TASKS[e % 2]]} for e in kept}
    (root / "data/chunk-001").mkdir(parents=True)
    for number, inside in enumerate(CUTS["data"]):
        tables = []
        for e in inside:
            own = rows_of(e) | {"episode_index": pa.array(np.full(LENGTHS[e], e))}
            if kind == "image":
                own |= {f"observation.images.{c}": pa.array(list(map(png, pictures(c, e)))) for c in SIZES}
            if e != lost:
                tables.append(pa.table(own))
                entries[e] |= {"data/chunk_index": 1, "data/file_index": number}
        file = root / f"data/chunk-001/file-{number:03d}.parquet"
        pq.write_table(pa.concat_tables(tables), file, row_group_size=4)
    for camera in SIZES if kind == "video" else ():
        key = f"observation.images.{camera}"
        for number, inside in enumerate(CUTS[camera]):
            encode(
                root / f"videos/{key}/chunk-000/file-{number:03d}.mp4",
                np.concatenate([pictures(camera, e) for e in inside]),
            )
            ends = np.cumsum([LENGTHS[e] for e in inside]) / FPS
            for e, end in zip(inside, ends):
                if e != lost:
                    times = {"from_timestamp": end - LENGTHS[e] / FPS, "to_timestamp": end}
                    own = {"chunk_index": 0, "file_index": number} | times
                    entries[e] |= {f"videos/{key}/{name}": value for name, value in own.items()}
    for number, some in enumerate((kept[:2], kept[2:])):
        file = root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([entries[e] for e in some]), file)
    tasks = pa.table({"task_index": [0, 1], index_name: TASKS})
    about = json.dumps({"index_columns": [index_name], "columns": [], "column_indexes": []})
    pq.write_table(tasks.replace_schema_metadata({"pandas": about}), root / "meta/tasks.parquet")
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return write_v2(tmp_path_factory.mktemp("two") / "robot")


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    return write_v3(tmp_path_factory.mktemp("three") / "robot")


def read(folder: Path) -> lerobot.Episodes:
    return lerobot.read_episodes(folder, "task", lambda text: None, EYES.video)


def cached(episodes: lerobot.Episodes, use: list[int], cache_dir: Path, side=0) -> list[np.ndarray]:
    """The frames of each camera."""
    return [np.load(cache_frames(episodes, [camera], use, cache_dir, side)[0]) for camera in SIZES]


def same_rows(a: lerobot.Episodes, b: lerobot.Episodes) -> None:
    assert a.ids == b.ids and (a.starts == b.starts).all() and a.tasks == b.tasks and a.modality == b.modality
    assert all((a.columns[name] == b.columns[name]).all() for name in ("observation.state", "action", "task_index"))
    for name, numbers in a.statistics.items():
        assert all(np.allclose(numbers[key], b.statistics[name][key], rtol=0, atol=1e-5) for key in numbers), name
        assert all((numbers[key] == b.statistics[name][key]).all() for key in ("min", "max"))


# ---- equal to v2 -----------------------------------------------------------------------------------------------------


def test_files_cut_anywhere_hold_the_same_rows_and_frames(two, three, tmp_path):
    a, b = read(two), read(three)
    same_rows(a, b)
    for use in ([0, 1, 2, 3, 4], [3], [4, 2]):
        for camera, x, y in zip(SIZES, cached(a, use, tmp_path), cached(b, use, tmp_path)):
            expected = np.concatenate([pictures(camera, e) for e in use])
            assert (x == expected).all() and (y == expected).all(), (camera, use)


def test_training_sees_no_difference(two, three, tmp_path):
    batches = []
    for folder in (two, three):
        data, _ = load(folder, EYES)
        data.interface.image_size = 28
        data.open_frames(data.episodes, tmp_path, 16)  # both cameras 16 x 16
        batches.append(data.batch(np.array([0, 8, 38])) | {"metadata": data.metadata, "texts": data.instructions})
    assert batches[0]["images"].shape == (6, 3, 28, 28)
    for name, value in batches[0].items():
        other = batches[1][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else name == "metadata" or value == other


@pytest.mark.parametrize("index_name", ["task", "__index_level_0__", "instruction"])
def test_the_tasks_are_the_index_whatever_its_name(tmp_path, index_name):
    folder = write_v3(tmp_path / "robot", kind="none", index_name=index_name)
    assert lerobot.read_episodes(folder, "task").tasks == dict(enumerate(TASKS))


def test_a_deleted_episode_leaves_a_gap_and_nothing_else(tmp_path):
    episodes = read(write_v3(tmp_path / "robot", lost=1))
    assert episodes.ids == [0, 2, 3, 4] and episodes.starts[-1] == sum(LENGTHS) - LENGTHS[1]
    for camera, found in zip(SIZES, cached(episodes, [0, 1, 2, 3], tmp_path / "cache")):
        assert (found == np.concatenate([pictures(camera, e) for e in (0, 2, 3, 4)])).all()


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_images_in_parquet_files_are_frames(two, tmp_path, write):
    """With and without a modality.json that names them."""
    folder = write(tmp_path / "robot", kind="image")
    same_rows(read(two), read(folder))
    (folder / "meta/modality.json").unlink()
    proposed = lerobot.read_episodes(folder, say=lambda text: None, videos=EYES.video)
    for camera, found in zip(SIZES, cached(proposed, [4, 1], tmp_path / "cache")):
        assert (found == np.concatenate([pictures(camera, e) for e in (4, 1)])).all()


@shared
def test_the_bundled_demonstrations_are_the_same_in_v3(tmp_path):
    a, b = (lerobot.read_episodes(folder, "human.task_description") for folder in (ROOT / "assets/fetch_demos", V30))
    same_rows(a, b)
    use = [0, 1, 57, 104, 105, 119]
    x, y = (np.load(cache_frames(episodes, ["front"], use, tmp_path, 256)[0]) for episodes in (a, b))
    assert (x == y).all() and x.shape == (sum(a.recorded[e].length for e in use), 96, 96, 3)


@shared
def test_a_run_does_not_tell_v2_from_v3(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "draw_open_loop", lambda *given: None)
    monkeypatch.setattr(Run, "finish", lambda run, text: None)  # nor figures of learning
    found = []
    for folder in (ROOT / "assets/fetch_demos", V30):
        flags = dict(
            dataset_path=str(folder), max_steps=2, max_samples=8, batch_size=4, noises_per_sample=1, eval_trajs=1
        )
        flags |= dict(
            eval_batches=1, denoising_sweep=(4,), closed_loop=False, torch_threads=1, log_every=1, device="cpu"
        )
        out = tmp_path / folder.name
        argv = ["gr00t_finetune.py", *flags_of(**flags, output_dir=str(out), cache_dir=str(tmp_path / "cache"))]
        assert run_script(g, argv, monkeypatch) == 0
        (run,) = [path.parent for path in out.rglob("metrics.jsonl")]
        found.append(timeless(run))
    assert found[0] == found[1] and len(found[0]) >= 2


def test_recordings_as_lerobot_makes_them_are_read_frame_by_frame(tmp_path, monkeypatch):
    """AV1, a keyframe every second frame, 640 x 480, two cameras; the oracle decodes whole files."""
    import av

    monkeypatch.setitem(SIZES, "front", (480, 640))
    monkeypatch.setitem(SIZES, "wrist", (480, 640))
    monkeypatch.setattr("test_lerobot_v3.encode", partial(encode, codec="libsvtav1", options=dict(preset="12", g="2")))
    root = write_v3(tmp_path / "robot")
    for camera, shots in zip(SIZES, cached(read(root), list(range(5)), tmp_path / "cache")):
        for number, inside in enumerate(CUTS[camera]):
            with av.open(str(root / f"videos/observation.images.{camera}/chunk-000/file-{number:03d}.mp4")) as file:
                whole = iter([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
            for e in inside:
                first = sum(LENGTHS[:e])
                assert all((next(whole) == shot).all() for shot in shots[first : first + LENGTHS[e]])


def test_a_thousand_episodes_with_gaps_keep_their_order(tmp_path):
    root, kept = write_v3(tmp_path / "robot", kind="image"), [e for e in range(1200) if e % 7]
    columns = {name: np.repeat(kept, 2) for name in ("episode_index", "task_index")}
    vectors = pa.array(list(np.repeat(kept, 2)[:, None] * np.ones(8)), pa.list_(pa.float64()))
    columns |= {"observation.state": vectors, "action": vectors, "timestamp": np.tile([0.0, 0.1], len(kept))}
    columns["task_index"] %= 2
    table, (file, *others) = pa.table(columns), sorted((root / "data").rglob("*.parquet"))
    pq.write_table(table, file, row_group_size=500)
    entries = [{"episode_index": e, "length": 2, "tasks": [TASKS[e % 2]], "data/chunk_index": 1} for e in kept]
    entries = [entry | {"data/file_index": 0} for entry in entries]
    meta, other = sorted((root / "meta/episodes").rglob("*.parquet"))
    pq.write_table(pa.Table.from_pylist(entries), meta)
    for path in (*others, other):
        path.unlink()
    found = lerobot.read_episodes(root, "task", lambda text: None)
    assert found.ids == kept and (found.columns["action"][:, 0] == np.repeat(kept, 2)).all()
    assert (found.starts == np.arange(0, 2 * len(kept) + 1, 2)).all()


@shared
def test_lerobots_reader_agrees(tmp_path):
    modules = [
        f"{package}.datasets.lerobot_dataset" for package in ("lerobot", "ledataset")
    ]  # the reader alone: the second
    if not (found := [name for name in modules if importlib.util.find_spec(name.partition(".")[0])]):
        pytest.skip("neither lerobot nor lerobot-dataset is installed")
    reader = importlib.import_module(found[0])
    theirs = reader.LeRobotDataset("nobody/fetch", root=V30, video_backend="pyav")
    ours = lerobot.read_episodes(V30, "human.task_description", lambda text: None)
    (path,) = cache_frames(ours, ["front"], list(range(120)), tmp_path, 0)
    assert theirs.num_frames == ours.starts[-1]
    for row in (0, 16, 17, 2000, 3010, 3011, 3012, 3458):  # the second video begins at row 3011
        item, shot = theirs[row], np.load(path, mmap_mode="r")[row]
        assert (item["action"].numpy() == ours.columns["action"][row]).all()
        assert item["task"] == ours.tasks[int(ours.columns["task_index"][row, 0])]
        assert (np.abs(255 * item["observation.images.front"].permute(1, 2, 0).numpy() - shot) <= 1).all()


# ---- what does not fit -----------------------------------------------------------------------------------------------


def rewrite(folder: Path, file: str, change) -> None:
    """Another version of a parquet file: change(rows) of a list of dicts."""
    path = folder / file
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


EPISODES, FRONT = "meta/episodes/chunk-000/file-000.parquet", "videos/observation.images.front"
FAULTS = {
    "no episodes": (lambda f: shutil.rmtree(f / "meta/episodes"), "lists no episode"),
    "no tasks": (lambda f: (f / "meta/tasks.parquet").unlink(), "tasks.parquet cannot be read"),
    "truncated episodes": (lambda f: (f / EPISODES).write_bytes(b"PAR1x"), "cannot be read"),
    "no length": (lambda f: rewrite(f, EPISODES, lambda r: [row.pop("length") for row in r]), "no column 'length'"),
    "null length": (lambda f: rewrite(f, EPISODES, lambda r: r[0].update(length=None)), "length None"),
    "negative file": (
        lambda f: rewrite(f, EPISODES, lambda r: r[0].update({"data/file_index": -1})),
        "data/file_index",
    ),
    "nan time": (
        lambda f: rewrite(f, EPISODES, lambda r: r[0].update({f"{FRONT}/to_timestamp": float("nan")})),
        "to_timestamp",
    ),
    "no such file": (lambda f: rewrite(f, EPISODES, lambda r: r[0].update({"data/file_index": 7})), "file-007.parquet"),
    "other length": (lambda f: rewrite(f, EPISODES, lambda r: r[1].update(length=11)), "has 12 rows"),
    "twice": (lambda f: shutil.copy(f / EPISODES, f / "meta/episodes/chunk-000/file-009.parquet"), "twice"),
    "rows apart": (
        lambda f: rewrite(f, "data/chunk-001/file-000.parquet", lambda r: r.insert(20, r.pop(0))),
        "do not follow each other",
    ),
    "number for a task": (
        lambda f: pq.write_table(pa.table({"task_index": [0], "task": [1]}), f / "meta/tasks.parquet"),
        "task 1",
    ),
    "video gone": (lambda f: (f / FRONT / "chunk-000/file-001.mp4").unlink(), "1 of 2 files are"),
    "video cut": (lambda f: encode(f / FRONT / "chunk-000/file-001.mp4", pictures("front", 3)), "has 0 frames"),
    "video moved": (
        lambda f: rewrite(f, EPISODES, lambda r: r[1].update({f"{FRONT}/from_timestamp": 0.9})),
        "has 10 frames for an episode of 12 rows",
    ),
    "no video": (lambda f: (f / FRONT / "chunk-000/file-001.mp4").write_bytes(b"x"), "cannot be decoded"),
    "pattern of v2": (
        lambda f: (f / "meta/info.json").write_text(
            (f / "meta/info.json").read_text().replace("data/chunk-{chunk_index", "data/chunk-{episode_chunk")
        ),
        "must stay inside the folder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_v3_folders_end_in_one_line(three, tmp_path, capsys, fault):
    copy, (change, message) = Path(shutil.copytree(three, tmp_path / "copy")), FAULTS[fault]
    change(copy)
    with pytest.raises(SystemExit) as stop:
        cached(read(copy), [0, 1, 2, 3, 4], tmp_path / "cache")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    left = list((tmp_path / "cache").glob("*"))
    assert not [path for path in left if path.name.startswith(".tmp")]


@pytest.mark.parametrize(
    "cell, message",
    [
        ({"bytes": b"nothing", "path": None}, "cannot be decoded"),
        ({"bytes": None, "path": "images/0.png"}, "cannot be decoded"),
        (None, "cannot be decoded"),
        (png(np.zeros((32, 48), np.uint8)), "mode L"),
        (png(np.zeros((32, 48), np.uint16)), "mode I;16"),
    ],
)
def test_images_that_are_none_end_in_one_line(tmp_path, capsys, cell, message):
    folder = write_v2(tmp_path / "robot", kind="image")
    key = "observation.images.front"
    rewrite(folder, "data/episode_000001.parquet", lambda rows: rows[3].update({key: cell}))
    with pytest.raises(SystemExit) as stop:
        cached(read(folder), [1], tmp_path / "cache")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


# ---- the frame cache -------------------------------------------------------------------------------------------------


def test_only_the_episodes_that_are_used_are_decoded(three, tmp_path, monkeypatch):
    opened = []
    whole = frames.frames_of
    monkeypatch.setattr(frames, "frames_of", lambda clip, column: opened.append(clip) or whole(clip, column))
    episodes = read(three)
    cache_frames(episodes, ["front"], [3], tmp_path, 0)
    assert set(opened) == {episodes.recorded[3].clips["observation.images.front"]}


def test_a_full_disk_is_noticed_before_a_frame_is_decoded(three, tmp_path, monkeypatch, capsys):
    need = sum(LENGTHS) * 16 * 16 * 3 * 2  # both cameras
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(frames.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - need + 1, need - 1))
    with pytest.raises(SystemExit) as stop:
        cache_frames(read(three), EYES.video, [0, 1, 2, 3, 4], tmp_path / "cache", 16)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not list((tmp_path / "cache").iterdir())
    assert "need 5.99e-05 GB" in error and "--cache-dir" in error and "--cache-side" in error
    monkeypatch.setattr(frames.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - need, need))
    cache_frames(read(three), EYES.video, [0, 1, 2, 3, 4], tmp_path / "cache", 16)
    assert "39 frames of camera 'wrist'" in capsys.readouterr().out  # what is going on, and how large it gets
    cache_frames(read(three), EYES.video, [0, 1, 2, 3, 4], tmp_path / "cache", 16)
    assert capsys.readouterr().out == ""


def test_a_disk_that_fills_up_meanwhile_is_one_line(three, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames.os, "posix_fallocate", full)
    with pytest.raises(SystemExit):
        cache_frames(read(three), ["front"], [0], tmp_path / "cache", 0)
    assert "No space left on device" in capsys.readouterr().err and not list((tmp_path / "cache").iterdir())


def test_a_cache_folder_that_cannot_be_is_one_line(three, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        cache_frames(read(three), ["front"], [0], tmp_path / "file", 0)
    assert "--cache-dir" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(three, tmp_path):
    import fcntl

    dead, alive = tmp_path / ".tmp-1-robot.npy", tmp_path / ".tmp-2-robot.npy"
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache_frames(read(three), ["front"], [0], tmp_path, 0)
        assert not dead.exists() and alive.exists()


def test_unequal_cameras_are_refused_with_the_cure(three, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cache_frames(read(three), EYES.video, [0], tmp_path, 256)
    error = capsys.readouterr().err
    assert "front 32 x 48, wrist 48 x 48" in error and "--cache-side 32 makes them equal" in error
    assert not list(tmp_path.iterdir())
    assert len({np.load(path).shape for path in cache_frames(read(three), EYES.video, [0], tmp_path, 32)}) == 1


def test_few_samples_need_few_episodes(three):
    data, args = load(three, EYES, max_samples=3)
    held, ends = g.hold_out(data, args), np.cumsum(LENGTHS)
    assert {e.number for e in held.episodes} == set(np.searchsorted(ends, held.rows, "right"))
    assert len(held.episodes) <= 3 and len(held.rows) == 3


def test_a_data_set_that_is_not_drawn_from_needs_no_frames(two, three, tmp_path):
    data, _ = load([two, three], EYES)
    data.open_frames([e for e in data.episodes if e.part == 1], tmp_path, 16)
    assert len(list(tmp_path.iterdir())) == 2 and data.frames(len(data.end) - 1).shape == (2, 16, 16, 3)
