"""Folders of models and data sets, and tensors in them. What cannot be read ends in one line."""

import re
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.cli import fail
from common.files import reason

ROOT = Path(__file__).resolve().parents[2]


def find_folder(name: str | Path, kind: str, hint: str, patterns: list[str] | None = None) -> Path:
    """A folder, here or in the repository, or the local copy of a hub id, downloaded where there is none.

    name: a path, user/name or user/name@revision. kind: "model" or "dataset". hint: what would work instead.
    patterns: of the files to download; default: all.
    """
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return folder.resolve()
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", str(name)):
        fail(f"'{name}' is not a folder; {hint}")
    from huggingface_hub import snapshot_download

    repository, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository or revision, no permission
        reason = str(error).partition("\n")[0] or type(error).__name__
        fail(f"'{name}' is no folder here and could not be downloaded ({reason}); {hint}")


def read_tensors(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A safetensors file that holds tensors of exactly these names, shapes and dtypes, or the program ends."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        fail(f"'{path}' cannot be read ({error}): missing, truncated or no safetensors file")
    facts = [{(name, tuple(x.shape), x.dtype) for name, x in tensors.items()} for tensors in (found, like)]
    if off := sorted({str(fact[0]) for fact in facts[0] ^ facts[1]}):
        fail(f"'{path}' is another run's: {', '.join(off[:3])} missing, unexpected or of another shape or type")
    return found


def read_lines(path: Path, schema, hint: str = "") -> list:
    """What is in a JSON-lines file, a `schema` a line; blank lines are left out."""
    adapter, found = TypeAdapter(schema), []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        fail(f"'{path}' cannot be read: {reason(error)}; {hint}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(adapter.validate_json(line))
            except ValidationError as error:
                fail(f"'{path}', line {number}: {reason(error)}; {hint}")
    return found
