"""JSON that is read from disk, through declared schemas: what does not fit ends in one line, wherever it came from."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.cli import fail, in_words

Object = dict[str, Any]


def read_json(path: Path, schema, hint: str = "", optional: bool = False):
    """What is in a JSON file, as `schema`: a pydantic model, a dataclass, a TypedDict or a type such as `Object`.

    Missing (unless `optional`: then None), no JSON, or other types than declared: exit code 2. hint: what should be
    there, or what to do.
    """
    if optional and not path.exists():
        return None
    try:
        return TypeAdapter(schema).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fail(f"'{path}' cannot be read: {reason(error)}; {hint}")


def reason(error: OSError | ValidationError) -> str:
    return in_words(error) if isinstance(error, ValidationError) else error.strerror or str(error)
