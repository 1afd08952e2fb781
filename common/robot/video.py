"""Videos without a screen: the renderer's choice, an mp4, and a run that goes on where there is none."""

import os
import sys
from collections.abc import Callable
from ctypes import util
from pathlib import Path

import numpy as np


def no_renderer() -> str:
    """Picks the off-screen renderer, before the first frame. Returns why there is none, or nothing."""
    if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
        found = next((name for name in ("EGL", "OSMesa") if util.find_library(name)), None)
        if found is None:
            return "neither EGL nor OSMesa is installed (Debian: apt-get install libegl1 libgl1 libgl1-mesa-dri)"
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = found.lower()
    return ""


def write_mp4(path: Path, frames: np.ndarray, fps: int, beside: Path | None = None) -> None:
    """frames (F, h, w, 3) uint8; on their left those of the file `beside`, if it is there and another."""
    import imageio
    from imageio.v3 import imread

    if beside and beside.exists() and beside != path:
        frames = np.concatenate([imread(beside)[: len(frames)], frames], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, frames, fps=fps, macro_block_size=1)


class Stopped(Exception):
    """By Ctrl-C or SIGTERM."""


class Videos:
    """A run's videos and their table. What is missing for them is said once, and training goes on."""

    def __init__(self, run, wanted: bool):
        self.run, self.off = run, "" if wanted and run.world.main else "not wanted"

    def film(self, step: int, record: Callable[..., list[dict]], *args) -> None:
        """record(path, *args) writes an mp4 and returns a row of the table for each episode in it."""
        if self.off:
            return
        self.off, path = no_renderer(), self.run.folder / "videos" / f"step-{step * self.run.unit:09d}.mp4"
        try:
            rows = [] if self.off else record(path, *args)
            own = {"global_step": step * self.run.unit, "video": str(path)}
            self.run.table("video_table", step, [own | row for row in rows])
        except Stopped:  # this one is left out
            pass
        except Exception as error:  # whatever a graphics driver throws must not end a training run
            self.off = f"{type(error).__name__}: {error}"
        if self.off:
            self.run.say(f"video is off, training is not: {self.off}")
