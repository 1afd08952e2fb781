"""The command line: a dataclass whose fields are flags, and one line for whatever is wrong with it."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import threading
import time
import tokenize
from typing import Annotated, NoReturn, NotRequired, get_type_hints

import annotated_types
import pydantic
import tyro
from tqdm import tqdm
from typing_extensions import TypedDict

# Bounds of a field stand beside it, as its type: `beta: NonNegative = 0.1`. NaN and infinity fit none.
Count = Annotated[int, annotated_types.Ge(1)]
Natural = Annotated[int, annotated_types.Ge(0)]
Several = Annotated[int, annotated_types.Ge(2)]
Positive = Annotated[float, annotated_types.Gt(0)]
NonNegative = Annotated[float, annotated_types.Ge(0)]
Temperature = Annotated[float, annotated_types.Interval(ge=0.01, le=100)]
Share = Annotated[float, annotated_types.Interval(ge=0, le=1)]
Partial = Annotated[float, annotated_types.Interval(ge=0, lt=1)]
Fraction = Annotated[float, annotated_types.Interval(gt=0, lt=1)]
Seed = Annotated[int, annotated_types.Interval(ge=0, lt=2**63)]
Threads = Annotated[int, annotated_types.Interval(ge=1, le=1024)]
Text = Annotated[str, annotated_types.MinLen(1)]
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^\w[\w.+=-]*$", max_length=100)]  # a part of a folder's name


class Refused(Exception):
    """What `fail` raises in a thread: the thread that waits for it says it, once however many noticed."""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2: what is wrong and the nearest thing that works."""
    message = " ".join(message.split())
    if threading.current_thread() is not threading.main_thread():
        raise Refused(message)
    if os.environ.get("RANK", "0") != "0":  # torchrun: what all processes notice the first one says, and all end
        time.sleep(5)
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    sys.exit(2)


def flag(name: str) -> str:
    """num_envs -> --num-envs"""
    return "--" + name.replace("_", "-")


def in_words(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong: `weights[1] -2.0: must be positive`."""
    first = error.errors(include_url=False)[0]
    kind, limits, place = first["type"], first.get("ctx", {}), ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    rule = {
        "greater_than_equal": "must not be negative"
        if limits.get("ge") == 0
        else f"must be at least {limits.get('ge')}",
        "greater_than": "must be positive" if limits.get("gt") == 0 else f"must be above {limits.get('gt')}",
        "less_than_equal": f"must be at most {limits.get('le')}",
        "less_than": f"must be below {limits.get('lt')}",
        "string_too_short": "must not be empty",
        "extra_forbidden": "is unknown",
        "missing": "is missing",
    }.get(kind, first["msg"].replace("Input should be", "must be").replace("String should", "must"))
    shown = "" if kind in ("extra_forbidden", "missing", "json_invalid") else f" {repr(first['input'])[:80]}"
    return f"{place}{shown}: {rule}".removeprefix(": ")


def schema_of(config_class):
    """A dataclass's fields, their types and bounds, for pydantic: what is None by default may be missing, no other."""
    hints, fields = get_type_hints(config_class, include_extras=True), dataclasses.fields(config_class)
    kinds = {f.name: NotRequired[hints[f.name]] if f.default is None else hints[f.name] for f in fields}
    schema = TypedDict(config_class.__name__, kinds)
    schema.__pydantic_config__ = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return schema


@functools.cache
def described_fields(config_class) -> dict[str, tuple[str, str]]:
    """field -> (group, help) of a dataclass and its bases, read from their sources.

    The help is the comment behind a field or, where that is too long for the line, the string below it. A comment on a
    line of its own begins a group. What a class redefines stays in its group and keeps its help unless it brings one.
    """
    found: dict[str, tuple[str, str]] = {}
    for base in reversed([c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(base))
        comments = {}  # line -> (whether it has the line for itself, text)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = not token.line[: token.start[1]].strip(), token.string[2:]
        body, latest = ast.parse(source).body[0].body, "options"
        groups = {line: text for line, (alone, text) in comments.items() if alone}
        for field, below in zip(body, [*body[1:], None]):
            if isinstance(field, ast.AnnAssign):
                latest = next((groups[line] for line in sorted(groups, reverse=True) if line < field.lineno), latest)
                group, text = found.get(field.target.id, (latest, ""))
                if isinstance(below, ast.Expr):
                    text = " ".join(below.value.value.split())
                found[field.target.id] = group, comments.get(field.end_lineno, (False, text))[1]
    return found


def parse(config_class, description: str):
    """Command line -> dataclass instance; --help lists the flags by group. Wrong: one line, exit code 2."""
    hints, groups = get_type_hints(config_class, include_extras=True), {}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, (group, text) in described_fields(config_class).items():
        annotated = Annotated[hints[name], tyro.conf.arg(help=text)]
        groups.setdefault(group, []).append((name, annotated, dataclasses.field(default=defaults[name])))
    names = [title.split(":")[0].replace(" ", "_") for title in groups]
    parts = [(name, dataclasses.make_dataclass("Group", fields)) for name, fields in zip(names, groups.values())]
    flags = dataclasses.make_dataclass("Flags", [(n, k, dataclasses.field(default_factory=k)) for n, k in parts])
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            given = tyro.cli(tyro.conf.OmitArgPrefixes[flags], description=description)
    except BrokenPipeError:  # `--help | head`: nobody reads on, nor may the last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box around the message, its title in the top line
        lines = [line for line in captured.getvalue().splitlines() if not line.startswith("╭")]
        fail(re.sub(r"[╰╯│─╶╴]+", " ", " ".join(lines)))
    values = {name: value for part, _ in parts for name, value in vars(getattr(given, part)).items()}
    try:
        return config_class(**pydantic.TypeAdapter(schema_of(config_class)).validate_python(values))
    except pydantic.ValidationError as error:
        name, _, rest = in_words(error).partition(" ")
        fail(f"{flag(name)} {rest}")
