"""The road of docs/so101.md, measured: a synthetic SO-101 recording (LeRobot v3.0, six joints, two 640 x 480 cameras in
AV1) is read, cached, trained on for a moment by the tiny model, served, and asked for actions over the socket.

    uv run --extra serve python benchmarks/so101.py --episodes 10 --seconds 10

What does not depend on the size of the model is measured, for as many frames as asked; a table comes out at the end.
"""

import json
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.cli import Count, parse
from common.robot import serve
from common.robot.frames import cache_frames
from common.robot.lerobot import read_episodes
from common.robot.policy import Policy

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
CAMERAS = ("front", "wrist")
TASK = "put the pen into the cup"


@dataclass
class Args:
    episodes: Count = 10  # recorded
    seconds: Count = 10  # of each, at 30 frames a second
    steps: Count = 50  # optimizer steps of the tiny model
    load: Count = 30  # seconds of requests
    clients: Count = 2  # that ask at once
    codec: str = "libsvtav1"  # LeRobot's; libx264 is quicker to make


def film(file: Path, rows: int, codec: str, seed: int) -> None:
    """A drifting scene with camera noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 256, (30, 40 + rows // 16 + 1, 3)), np.ones((16, 16, 1))).astype(np.int16)
    noise = rng.integers(-4, 5, (8, 480, 640, 3), dtype=np.int16)
    options = {"preset": "12", "crf": "30", "g": "2"} if codec == "libsvtav1" else {"crf": "23", "g": "2"}
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 480, 640, "yuv420p"
        for t in range(rows):
            shot = (scene[:, t : t + 640] + noise[t % 8]).clip(0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(shot, format="rgb24")))
        out.mux(stream.encode())


def record(root: Path, args: Args) -> None:
    """A LeRobot v3.0 folder, an episode a video file."""
    rows, names = 30 * args.seconds, [f"{joint}.pos" for joint in JOINTS]
    vector = {"dtype": "float32", "shape": [6], "names": names}
    features = {"observation.state": vector, "action": vector, "task_index": {"dtype": "int64", "shape": [1]}}
    for camera in CAMERAS:
        channels = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
        features[f"observation.images.{camera}"] = channels
    info = dict(codebase_version="v3.0", robot_type="so101_follower", fps=30, chunks_size=1000, features=features)
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info |= dict(data_path=f"data/{place}.parquet", video_path=f"videos/{{video_key}}/{place}.mp4")
    tables, entries = [], []
    for e in range(args.episodes):
        t = np.arange(rows)[:, None] / 30 + e
        state = (60 * np.sin(t * np.linspace(0.3, 1.1, 6))).astype(np.float32)
        columns = {"observation.state": list(state), "action": list(np.roll(state, -3, axis=0))}
        columns |= {"episode_index": np.full(rows, e), "task_index": np.zeros(rows, np.int64)}
        tables.append(pa.table(columns))
        entry = {"episode_index": e, "length": rows, "data/chunk_index": 0, "data/file_index": 0}
        for camera in CAMERAS:
            key = f"videos/observation.images.{camera}"
            times = {"from_timestamp": 0.0, "to_timestamp": rows / 30}
            entry |= {f"{key}/{n}": v for n, v in ({"chunk_index": 0, "file_index": e} | times).items()}
            film(root / key / f"chunk-000/file-{e:03d}.mp4", rows, args.codec, e)
        entries.append(entry)
    for file, table in (
        ("data/chunk-000/file-000", pa.concat_tables(tables)),
        ("meta/episodes/chunk-000/file-000", pa.Table.from_pylist(entries)),
        ("meta/tasks", pa.table({"task_index": [0], "task": [TASK]})),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / f"{file}.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))


def train(folder: Path, out: Path, steps: int) -> dict:
    """A run of the tiny model; its last line of metrics."""
    import gr00t_finetune as g

    flags = f"--dataset-path {folder} --data-config so100_dualcam --max-steps {steps} --batch-size 16 --eval-batches 1"
    flags += f" --eval-trajs 1 --denoising-sweep 4 --cache-dir {out / 'cache'} --output-dir {out}"
    sys.argv = ["gr00t_finetune.py", *flags.split()]
    try:
        g.main(parse(g.Args, ""))
    except SystemExit as stop:
        assert not stop.code, stop.code
    (run,) = (out / "gr00t_finetune").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"run": run} | {k: v for line in lines for k, v in line.items()}


def look(rng: np.random.Generator) -> dict:
    """An observation as the robot's computer sends it: raw 640 x 480 frames."""
    frames = {f"video.{c}": rng.integers(0, 256, (1, 480, 640, 3), dtype=np.uint8) for c in CAMERAS}
    state = {"state.single_arm": rng.normal(size=(1, 5)), "state.gripper": rng.normal(size=(1, 1))}
    return frames | state | {"annotation.human.task_description": [TASK]}


def load(policy: Policy, seconds: int, clients: int) -> np.ndarray:
    """Milliseconds of each answered request, from clients that ask again at once."""
    import zmq

    socket, took = serve.listen("127.0.0.1", 0), []
    server = threading.Thread(target=serve.serve, args=(policy, socket), daemon=True)
    server.start()

    def client(who: int) -> None:
        own = zmq.Context.instance().socket(zmq.REQ)
        own.connect(socket.last_endpoint.decode())
        message = serve.pack({"endpoint": "get_action", "data": look(np.random.default_rng(who))})
        while time.perf_counter() < end:
            start = time.perf_counter()
            own.send(message)
            reply = serve.unpack(own.recv())
            assert "error" not in reply, reply
            took.append(1000 * (time.perf_counter() - start))

    end = time.perf_counter() + seconds
    threads = [threading.Thread(target=client, args=(who,)) for who in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.array(took)


def main(args: Args) -> None:
    rows = []

    def timed(what: str, function, *given):
        start = time.perf_counter()
        result = function(*given)
        rows.append((what, f"{time.perf_counter() - start:.1f} s"))
        return result

    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "so101", Path(place) / "out"
        frames = 30 * args.seconds * args.episodes * len(CAMERAS)
        timed(f"make {args.episodes} episodes, {frames:,} frames, {args.codec}: not on the road", record, folder, args)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        rows.append(("the recording on disk", f"{size / 1e6:.0f} MB, {size / frames / 1e3:.1f} kB a frame"))
        episodes = timed("read all rows", read_episodes, folder, None, lambda text: None, CAMERAS)
        start = time.perf_counter()
        cache_frames(episodes, CAMERAS, list(range(args.episodes)), out / "cache", 256)
        took = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (out / "cache").iterdir())
        rows.append(
            ("cache all frames at 256 x 256", f"{took:.1f} s, {frames / took:.0f} frames/s, {size / 1e9:.2f} GB")
        )
        found = train(folder, out, args.steps)
        rows.append((f"{args.steps} steps of the tiny model", f"{found['time/samples_per_s']:.0f} samples/s"))
        policy = timed("load the policy", Policy.from_pretrained, found["run"])
        rng = np.random.default_rng(0)
        took = load(policy, args.load, args.clients)
        p50, p99 = np.percentile(took, [50, 99])
        rate = f"{len(took) / args.load:.1f} requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        rows.append((f"{args.load} s of {args.clients} clients with two raw frames each", rate))
        start = time.perf_counter()
        for _ in range(20):
            policy.get_action(look(rng))
        rows.append(("get_action in this process", f"{50 * (time.perf_counter() - start):.0f} ms"))
    rows.append(("memory at most", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"))
    print("\n".join(f"| {what} | {number} |" for what, number in rows))


if __name__ == "__main__":
    main(parse(Args, __doc__))
