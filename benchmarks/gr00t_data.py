"""Items per second of gr00t_finetune.py's data beside a loader that reopens parquet file and video for every item.

    uv run python benchmarks/gr00t_data.py                                        # assets/fetch_demos
    uv run python benchmarks/gr00t_data.py --dataset-path DIR --data-config fourier_gr1_arms_only --size 224

Both loaders apply the same transforms to the same frames, one at a time, in one thread; "read" leaves the image
transforms out. With --train the tiny model's training step is timed too: the loader's workers have to outrun it.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gr00t_finetune as g
from common.cli import parse
from common.parallel import World
from common.robot import lerobot
from common.robot.demonstrations import prepared
from common.robot.gr00t_n15 import GR00T
from common.robot.interface import model_tokenizer
from common.robot.transforms import HORIZON, encode, transform_images
from common.streams import stream


@dataclass
class Args:
    dataset_path: str = "assets/fetch_demos"  # LeRobot v2 folder
    data_config: str = "fetch"  # name in common/robot/data_configs.py
    size: int = 64  # side of the model's images
    items: int = 40  # items of the loader that reopens; the cached one makes ten times as many
    workers: int = 2  # worker processes of the batch test
    batch_size: int = 16  # samples of a batch
    train: bool = False  # also time a training step of the tiny model


def reopened(data, row: int) -> tuple[dict, np.ndarray]:
    """What a loader without memory does: the episode's parquet file and its video up to the frame, for one item."""
    import av

    episodes = data.sets[0]
    e = int(np.searchsorted(episodes.starts, row, side="right")) - 1
    frame, recorded = row - int(episodes.starts[e]), episodes.recorded[e]
    widths = {name: rows.shape[1] for name, rows in episodes.columns.items()}
    columns = lerobot.read_columns(recorded.data, widths)
    rows = np.minimum(frame + np.arange(HORIZON), len(next(iter(columns.values()))) - 1)
    raw = {}
    for kind, at in (("state", [frame]), ("action", rows)):
        keys = getattr(data.config, kind)
        where = {key: episodes.modality[kind][key] for key in keys}
        raw[kind] = {key: columns[w["column"]][at, w["start"] : w["end"]] for key, w in where.items()}
        raw[kind] = encode(kind, raw[kind], data.config, data.metadata)
    views = []
    for video in data.config.video:
        with av.open(str(recorded.clips[episodes.modality["video"][video]].file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            container.seek(int(frame / stream.average_rate / stream.time_base), stream=stream)  # the keyframe before
            for picture in container.decode(stream):
                if round(float(picture.pts * stream.time_base * stream.average_rate)) >= frame:
                    break
            views.append(picture.to_ndarray(format="rgb24"))
    return raw, np.stack(views)


def rate(function, rows: np.ndarray) -> float:
    """Items per second of CPU time, which other programs on the machine do not change much."""
    function(int(rows[0]))  # files opened, code loaded
    start = time.process_time()
    for row in rows:
        function(int(row))
    return len(rows) / (time.process_time() - start)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        settings = g.Args(dataset_path=(args.dataset_path,), data_config=args.data_config, cache_dir=cache)
        settings = g.resolve(g.replace(settings, batch_size=args.batch_size, max_steps=10_000))
        settings, data, _ = g.read_data(settings, g.find_stored(settings), lambda text: None)
        start = time.perf_counter()
        data.open_frames(data.episodes, Path(cache), settings.cache_side)
        print(f"{len(data.end):,} frames decoded into the cache in {time.perf_counter() - start:.1f} s, once")
        model = GR00T.toy(g.FRESH["tiny"]())
        data.interface.prepare(model.config, model_tokenizer(model.config), data.instructions)
        data.interface.image_size = args.size
        samples = g.Samples(data, model.config)
        rng = np.random.default_rng(0)
        few, many = (rng.integers(0, len(data.end), n) for n in (args.items, 10 * args.items))
        for row in few[:5]:  # the same pictures
            assert (reopened(data, int(row))[1] == data.frames(int(row))).all(), f"row {row}: another frame"

        def item(row: int) -> None:
            samples[g.Plan(np.array([row]), np.array([row]), augment=True)]

        def reopened_item(row: int) -> None:
            transform_images(reopened(data, row)[1], args.size, stream(0, "training", row))

        def read(row: int) -> None:
            data.frames(row), data.state[row], data.actions(np.array([row]))

        for name, ours, theirs in (
            ("read", read, lambda row: reopened(data, row)),
            ("whole item", item, reopened_item),
        ):
            a, b = rate(ours, many), rate(theirs, few)
            print(f"{name:12s} cached {a:9.0f} items/s   reopening {b:7.0f} items/s   ratio {a / b:7.1f}")

        order = g.Order(data, np.arange(len(data.end)), settings)
        plans = g.plans(order, data, settings, World(0, 1, torch.device("cpu")), 0)
        batches = prepared(samples, plans, args.workers, torch.device("cpu"))
        for _ in range(10):
            next(batches)
        start = time.perf_counter()
        for _ in range(30):
            batch = next(batches)
        loaded = 30 * args.batch_size / (time.perf_counter() - start)
        print(f"{args.workers} workers: {loaded:.0f} samples/s in batches of {args.batch_size}")
        del batches
        if args.train:
            if args.size != model.config.image_size:
                print(f"the tiny model has images of {model.config.image_size}: give --size {model.config.image_size}")
                return
            model.set_trainable(True, True, True, True)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            batch, times = g.to_device(batch, torch.device("cpu")), []
            for _ in range(5):
                start = time.perf_counter()
                g.flow_matching_loss(model, batch, batch["noise"], batch["t"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.perf_counter() - start)
            trained = args.batch_size / np.median(times)
            print(
                f"tiny model trains {trained:.0f} samples/s with {settings.noises_per_sample} noises each on one thread; "
                f"the loader makes {loaded / trained:.1f} times as many"
            )


if __name__ == "__main__":
    main(parse(Args, __doc__))
