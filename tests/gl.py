"""Whether this machine can draw without a screen."""

import functools
import subprocess
import sys

CODE = """
from common.robot.video import no_renderer
why = no_renderer()
assert not why, why
import gymnasium as gym
from common.robot import fetch
fetch.import_robotics()
env = gym.make("FetchReach-v4", render_mode="rgb_array", width=32, height=32)
env.reset(seed=0)
env.render()
"""


@functools.cache
def gl_missing() -> str:
    """Empty if a frame can be drawn, else the reason; asked in another process, a driver may take its process along."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["crashed"])[-1]
