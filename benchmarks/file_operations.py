"""What a run does to files, one operation after the other: a run can be killed before each, or photographed.

An operation is seen where Python tells of it (audit events), where it writes through a file of its own or a handle, and
where safetensors writes; libraries that write files themselves are seen when those are renamed or removed.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.short_runs import Outcome, forked

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# audit event -> positions of the path and of the folder's handle among its arguments
EVENTS = {"os.rename": (1, 3), "os.remove": (0, 1), "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.symlink": (1, 2)}
EVENTS |= {"os.link": (1, 3), "os.truncate": (0, None), "open": (0, None)}


@dataclass
class Point:
    """An operation: its number, what is done to which file, and whether half of the write has happened."""

    number: int
    kind: str
    path: str
    half: bool = False

    def photo(self, album: Path) -> Path:
        return album / f"{self.number}{'-half' if self.half else ''}"

    def __str__(self) -> str:
        return f"{'in the middle of' if self.half else 'before'} {self.number}: {self.kind} {self.path}"


class Watch:
    """Calls `at(point, half)` at each operation under `root`, for the rest of this process. Where a write is about to
    happen, it is called a second time; half() then does half of it."""

    def __init__(self, root: Path, at: Callable):
        self.root, self.at, self.count, self.busy = str(root.resolve()), at, 0, False
        sys.addaudithook(self.hook)
        io.open = builtins.open = partial(self.open, open)
        os.write = partial(self.write_handle, os.write)
        shutil._USE_CP_SENDFILE = False  # a copy then writes as everybody does
        for module in ("safetensors.torch", "safetensors.numpy"):
            __import__(module)
            library = sys.modules[module]
            library.serialize_file = partial(self.serialize_file, library.serialize_file)

    def seen(self, kind: str, path, half: Callable | None = None, folder: int | None = None) -> None:
        """Tells of an operation. half: see `at`; afterwards half of the write has happened."""
        if isinstance(path, int) or self.busy:  # a handle that is opened a second time
            return
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and folder >= 0 else os.getcwd()
        path = os.path.join(base, os.fsdecode(path))
        if path.startswith(self.root + "/"):
            self.busy = True  # what `at` does is no operation of the run
            path = path.removeprefix(self.root + "/")
            self.at(Point(self.count, kind, path), None)
            if half:
                self.at(Point(self.count, kind, path, half=True), half)
            self.count, self.busy = self.count + 1, False

    def hook(self, event: str, args: tuple) -> None:
        if event in EVENTS and (event != "open" or args[2] & WRITES):
            path, folder = EVENTS[event]
            self.seen(event, args[path], folder=None if folder is None else args[folder])

    def open(self, plain_open, file, *args, **kwargs):
        opened = plain_open(file, *args, **kwargs)
        if not isinstance(file, int) and opened.writable():
            opened.write = partial(self.write, opened.write, opened, file)
        return opened

    def write(self, writer, file, path, data) -> int:
        cut = 0

        def half() -> None:
            nonlocal cut
            cut = len(data) // 2
            writer(data[:cut])
            file.flush()

        self.seen("write", path, half)
        return cut + writer(data[cut:])

    def write_handle(self, writer, handle: int, data) -> int:
        cut = 0

        def half() -> None:
            nonlocal cut
            cut = writer(handle, data[: len(data) // 2])

        self.seen("write", os.readlink(f"/proc/self/fd/{handle}"), half)
        return cut + writer(handle, data[cut:])

    def serialize_file(self, writer, tensors, filename, metadata=None) -> None:
        def half() -> None:
            writer(tensors, filename, metadata)
            os.truncate(filename, os.path.getsize(filename) // 2)

        self.seen("write", filename, half)
        writer(tensors, filename, metadata)


def photographed(call: Callable, root: Path, album: Path) -> tuple[list[Point], Outcome]:
    """Does call() in a fork. Returns every point; its photo in `album` is what `root` was there."""
    shutil.rmtree(album, ignore_errors=True)
    album.mkdir(parents=True)
    (album / "points").touch()

    def at(point: Point, half: Callable | None) -> None:
        if half:
            half()
        if root.exists():
            shutil.copytree(root, point.photo(album), symlinks=True)
        with open(album / "points", "a") as log:
            log.write(json.dumps(vars(point)) + "\n")

    def watched() -> None:
        Watch(root, at)
        call()

    outcome = forked(watched)
    return [Point(**json.loads(line)) for line in (album / "points").read_text().splitlines()], outcome


def killed(call: Callable, root: Path, point: Point) -> None:
    """Does call() in a fork that is killed at `point`."""

    def at(here: Point, half: Callable | None) -> None:
        if (here.number, here.half) == (point.number, point.half):
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        Watch(root, at)
        call()

    outcome = forked(doomed)
    assert outcome.code == -signal.SIGKILL, f"{point} was not reached: {outcome.err[-500:]}"


def restore(photo: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    if photo.exists():
        shutil.copytree(photo, root, symlinks=True)
