"""Whether this machine can draw without a screen."""

import functools
import subprocess
import sys

CODE = """
from common.robot.video import no_renderer
why = no_renderer()
assert not why, why
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='0.1'/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(mujoco.MjData(model))
assert renderer.render().shape == (32, 32, 3)
"""


@functools.cache
def gl_missing() -> str:
    """Empty if a frame can be drawn, else the reason; asked in another process, a driver may take its process along."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["crashed"])[-1]
