"""A headless Chromium that a test can look and click with: DevTools messages through two pipes, no driver, no package.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --disable-dev-shm-usage --no-first-run".split()
)


class Browser:
    """One window. Errors and warnings of its page are in `said`."""

    def __init__(self, profile: Path):
        (there, self.out), (self.back, answers) = os.pipe(), os.pipe()

        def take_three_and_four():  # where Chromium listens and answers
            one, two = os.dup(there), os.dup(answers)  # which may stand at 3 or 4 themselves
            os.dup2(one, 3)
            os.dup2(two, 4)

        command = [FOUND, *FLAGS, f"--user-data-dir={profile}", "--window-size=1400,1000", "about:blank"]
        kept = (there, answers, 3, 4)
        self.process = subprocess.Popen(
            command, pass_fds=kept, preexec_fn=take_three_and_four, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(there)
        os.close(answers)
        self.number, self.session, self.rest, self.said = 0, None, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def message(self) -> dict:
        while b"\0" not in self.rest:
            some = os.read(self.back, 1 << 20)
            assert some, "the browser has gone"
            self.rest += some
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Network.requestWillBeSent"):
                self.said.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def do(self, script: str):
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path) -> None:
        """Opens a report and waits until it is drawn."""
        self.said.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.do(
            "new Promise((done, late) => { const start = Date.now(); (function look() {"
            "if (document.body && document.body.dataset.ready) done(); else if (Date.now() - start > 30000) late();"
            "else setTimeout(look, 20) })() })"
        )

    def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=1, clickCount=clicks)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        os.close(self.out)
        os.close(self.back)
