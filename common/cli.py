"""The command line: a dataclass whose fields are flags, and one line for whatever is wrong with it."""

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
from typing import Annotated, NoReturn, get_type_hints

import tyro


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2: what is wrong and the nearest thing that works."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def flag(name: str) -> str:
    """num_envs -> --num-envs"""
    return "--" + name.replace("_", "-")


def at_least(bound: float, args, *names: str) -> None:
    """Every one of these fields is `bound` or more; None is left alone."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) >= bound:
            rule = "must not be negative" if bound == 0 else f"must be at least {bound}"
            fail(f"{flag(name)} {getattr(args, name)}: {rule}")


def positive(args, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(f"{flag(name)} {getattr(args, name)}: must be positive")


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
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box around the message, its title in the top line
        lines = [line for line in captured.getvalue().splitlines() if not line.startswith("╭")]
        fail(re.sub(r"[╰╯│─╶╴]+", " ", " ".join(lines)))
    return config_class(**{name: value for part, _ in parts for name, value in vars(getattr(given, part)).items()})
