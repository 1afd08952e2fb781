"""Ctrl-C and SIGTERM, from the first import to the last line, each answered by one line and the shell's exit code.

Scripts import this before anything slow. A signal ends the program at once, but for the training loop: there the first
one lets the step end with a checkpoint, and a second one does not wait.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

received: int | None = None  # number of the first signal
patient = False  # in the loop: it looks at `received` after every step
opened = False  # something has to be closed on the way out


def receive(number: int, frame) -> None:
    global received
    first, received = received is None, received or number
    if patient and first:
        return
    for each in (signal.SIGINT, signal.SIGTERM):  # a third one is for whoever hangs while closing
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped: {signal.Signals(number).name}", file=sys.stderr, flush=True)
    if not opened:
        os._exit(128 + number)
    raise SystemExit(128 + number)


def listen() -> None:
    global received
    received = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)


@contextlib.contextmanager
def patience():
    """Around the loop."""
    global patient
    patient = True
    try:
        yield
    finally:
        patient = False


main = getattr(sys.modules["__main__"], "__file__", None)
if main and Path(main).resolve().parent == Path(__file__).resolve().parent.parent:  # not where a script is imported
    listen()
