"""Frames of recorded episodes, decoded once into a memory-mapped file a camera.

What fits stays in the page cache, shared by workers and processes. How much disk it needs is looked for first.

    paths = cache_frames(episodes, ["front", "wrist"], use, cache_dir, side)
    frames = np.load(paths[0], mmap_mode="r")      (rows of the episodes at positions `use`, height, width, 3) uint8
"""

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import fail
from common.robot.lerobot import Clip, Episodes, in_threads
from common.robot.transforms import shrink


def video_frames(clip: Clip) -> Iterator[np.ndarray]:
    """RGB frames (height, width, 3) of a video between two times.

    Row i of an episode shows frame i of its clip: recorded time stamps may begin a frame late.
    """
    import av

    try:
        with av.open(str(clip.file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            half = 0.5 / float(stream.average_rate or 30)
            if clip.start > 1:  # a second early: a decoder may land on the keyframe behind the one asked for
                container.seek(int((clip.start - 1) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if clip.end < math.inf and frame.time >= clip.end - half:
                    break
                if clip.end == math.inf or frame.time >= clip.start - half:
                    if frame.format.name.startswith("gray"):
                        fail(f"{clip.file} has one channel: depth is not trained on")
                    yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        fail(f"{clip.file} cannot be decoded: {error}")


def stored_images(clip: Clip, column: str) -> Iterator[np.ndarray]:
    """RGB images (height, width, 3) in rows of a parquet file, PNG or JPEG in each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    where, end = f"{clip.file}: column '{column}'", 0
    try:
        with pq.ParquetFile(clip.file) as file:
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if start >= clip.end or end <= clip.start:
                    continue
                table = file.read_row_group(group, columns=[column])
                first, last = max(clip.start - start, 0), min(clip.end, end) - start
                for cell in table[column].slice(first, last - first).to_pylist():
                    image = Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell))
                    if image.mode not in ("RGB", "RGBA", "P"):
                        fail(f"{where} has images of mode {image.mode}: three colours are trained on")
                    yield np.asarray(image.convert("RGB"))
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException, Image.DecompressionBombError) as error:
        fail(f"{where} cannot be decoded: {str(error).partition(chr(10))[0]}")


def frames_of(clip: Clip, column: str) -> Iterator[np.ndarray]:
    return stored_images(clip, column) if clip.file.suffix == ".parquet" else video_frames(clip)


def sweep(folder: Path) -> None:
    """Removes the half-written files of killed runs: those that nobody holds locked."""
    for path in folder.glob(".tmp-*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def cache_frames(
    episodes: Episodes, videos: Iterable[str], use: list[int], cache_dir: Path, side: int, reduce=shrink, way: str = ""
) -> list[Path]:
    """A file of frames for each camera, of the episodes at positions `use`, shrunk to `side`; what exists is kept.

    reduce(frame, side): how they are shrunk; way: its name, so that what was shrunk otherwise is not taken for it.
    """
    paths, jobs, shapes, ways = [], [], {}, [way] * bool(way)
    for video in videos if use else ():
        column = episodes.modality["video"][video]
        clips = [episodes.recorded[e].clips[column] for e in use]
        first = next(frames_of(clips[0], column), None)
        if first is None:
            fail(f"{clips[0].file} has no frames where episode {episodes.ids[use[0]]} should be")
        shapes[video] = reduce(first, side).shape
        stats = {file: file.stat() for file in {clip.file for clip in clips}}
        facts = [(*map(str, clip), stats[clip.file].st_size, stats[clip.file].st_mtime_ns) for clip in clips]
        digest = hashlib.sha256(json.dumps([side, column, facts, *ways]).encode()).hexdigest()[:16]
        paths.append(cache_dir / f"{episodes.path.name}-{video}-{digest}.npy")
        if not paths[-1].exists():
            jobs.append((video, column, clips, paths[-1]))
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{video} {h} x {w}" for video, (h, w, _) in shapes.items())
        least = min(chain(*(shape[:2] for shape in shapes.values())))
        fail(
            f"the cameras of {episodes.path} differ in size ({sizes}) and one crop is for all: --cache-side {least} "
            "makes them equal"
        )
    lengths = [episodes.recorded[e].length for e in use]
    need = make_room(cache_dir, len(jobs) * sum(lengths) * math.prod(next(iter(shapes.values()), ())))
    for video, column, clips, target in jobs:
        print(
            f"{sum(lengths):,} frames of camera '{video}' are decoded into {target} ({need / len(jobs) / 1e9:.2g} GB)"
        )
        write(target, (sum(lengths), *shapes[video]), column, clips, lengths, partial(reduce, side=side))
    return paths


def make_room(cache_dir: Path, need: int) -> int:
    """Checks that so many bytes can be written, before a full disk ends the run in a bus error; returns them."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        sweep(cache_dir)
        free = shutil.disk_usage(cache_dir).free
    except OSError as error:
        fail(f"--cache-dir {cache_dir}: {error.strerror}; give a folder that can be written")
    if need > free:
        fail(
            f"the frames need {need / 1e9:.3g} GB in {cache_dir}, where {free / 1e9:.3g} GB are free: give --cache-dir "
            "a larger disk, a smaller --cache-side, or fewer frames with --max-samples"
        )
    return need


def write(target: Path, shape: tuple, column: str, clips: list[Clip], lengths: list[int], reduce: Callable) -> None:
    """Decodes on threads, an episode each, into a temporary file that is renamed once it is whole."""
    temporary, starts = target.with_name(f".tmp-{os.getpid()}-{target.name}"), np.r_[0, np.cumsum(lengths)]
    try:
        with temporary.open("wb") as lock, tqdm(total=shape[0], desc=f"caching {column}", disable=None) as bar:
            fcntl.flock(lock, fcntl.LOCK_EX)
            out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(lock.fileno(), 0, temporary.stat().st_size)

            def fill(n: int) -> None:
                count = 0
                for frame in frames_of(clips[n], column):
                    if count < lengths[n]:
                        frame = reduce(frame)
                        if frame.shape != shape[1:]:
                            fail(f"{clips[n].file} is {frame.shape[:2]}, the first episode is {shape[1:3]}")
                        out[starts[n] + count] = frame
                    count += 1
                if count != lengths[n]:
                    fail(f"{clips[n].file} has {count} frames for an episode of {lengths[n]} rows")
                bar.update(count)

            in_threads(fill, range(len(clips)), min(os.cpu_count() or 1, 8))
            out.flush()
            temporary.rename(target)
    except OSError as error:
        fail(f"{temporary} cannot be written: {error.strerror or error}")
    finally:
        temporary.unlink(missing_ok=True)  # a broken video leaves nothing behind
