"""Where the numbers, tables and videos of a run go besides its folder. A tracker is a class with these methods:

log(step, numbers) · table(name, step, rows) · finish(exit_code) · Weights & Biases also has checkpoint(folder)

What a tracker writes stays inside the output folder unless its own environment variable names another place.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from common.cli import fail

PROJECT = "groundup"
ROWS = 100  # of a table that TensorBoard shows as text


def chosen(args) -> str:
    """The name of the tracker that the flags ask for; --track is --tracker wandb. Not installed: exit code 2."""
    name = "wandb" if args.track and args.tracker == "none" else args.tracker
    if args.track and name != "wandb":
        fail(f"--track is --tracker wandb, but --tracker is {name}: name one of them")
    if args.track_checkpoints and name != "wandb":
        fail(f"--track-checkpoints is for Weights & Biases, but --tracker is {name}: add --tracker wandb")
    if name != "none" and find_spec(name) is None:
        extra = "" if name == "wandb" else f" --extra {name}"
        fail(f"--tracker {name}: the package {name} is not installed; uv sync{extra} installs it, none does without it")
    return name


def is_video(value) -> bool:
    return isinstance(value, str) and value.endswith(".mp4")


class Wandb:
    """Weights & Biases: offline it needs no account, and `wandb sync` uploads what waits in the run folder."""

    def __init__(self, run_dir: Path, config: dict):
        import wandb

        # keeps wandb's own files inside the run folder, those that wait for an upload too
        os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run_dir.name,
            dir=str(run_dir),
            config=config,
            tags=list(config.get("tags", ())) or None,
            mode=config.get("wandb_mode", "offline"),
            id=run_dir.name,  # a resumed run goes on where it was
            resume="allow",
        )
        # the step is a metric of its own: mixing explicit and implicit wandb steps drops rows
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")

    def log(self, step: int, numbers: dict) -> None:
        self.run.log(numbers | {"global_step": step})

    def table(self, name: str, step: int, rows: list[dict]) -> None:
        columns = list(rows[0])
        cells = [
            [self.wandb.Video(v, format="mp4") if is_video(v := row.get(c)) else v for c in columns] for row in rows
        ]
        # a wandb table is frozen once logged: a fresh object each time, under one stable name
        self.log(step, {name: self.wandb.Table(columns=columns, data=cells)})

    def checkpoint(self, folder: Path) -> None:
        artifact = self.wandb.Artifact(f"{self.run.id}-checkpoint", type="model")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact, aliases=["latest", folder.name])

    def finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class Trackio:
    """A dashboard on one's own machine, without an account, of all runs in the output folder."""

    def __init__(self, run_dir: Path, config: dict):
        os.environ.setdefault("TRACKIO_DIR", str(run_dir.resolve().parent.parent / "trackio"))  # read at the import
        import trackio

        self.trackio = trackio
        trackio.init(project=PROJECT, name=run_dir.name, config=config, resume="allow", embed=False)

    def log(self, step: int, numbers: dict) -> None:
        self.trackio.log(numbers, step=step)

    def table(self, name: str, step: int, rows: list[dict]) -> None:
        """Videos are media of their own: its tables hold numbers and texts."""
        texts = [{k: v for k, v in row.items() if not is_video(v)} for row in rows]
        columns = list(texts[0])
        table = self.trackio.Table(columns=columns, data=[[row.get(c) for c in columns] for row in texts])
        films = {v: f"{name}/{k}" for row in rows for k, v in row.items() if is_video(v)}
        self.log(step, {name: table} | {k: self.trackio.Video(v, format="mp4") for v, k in films.items()})

    def finish(self, exit_code: int) -> None:
        self.trackio.finish()


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))
        self.writer.add_text("config", as_markdown([{"flag": k, "value": v} for k, v in config.items()]))

    def log(self, step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, step: int, rows: list[dict]) -> None:
        self.writer.add_text(name, as_markdown(rows[:ROWS]), step)

    def finish(self, exit_code: int) -> None:
        self.writer.close()


def as_markdown(rows: list[dict]) -> str:
    """A table; texts in it are shown as they are, whatever they hold."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    escapes = str.maketrans({"|": "\\|", "<": "&lt;", "&": "&amp;", "\n": "↵"})
    return "\n".join(f"| {' | '.join(str(cell).translate(escapes) for cell in line)} |" for line in lines)


TRACKERS = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}
