"""Rows of a data set, held against declared types: from a JSONL file, or from the hub."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from common.cli import fail, in_words
from common.language.chat import Conversation


def readable(text: str) -> str:
    """A text that a tokenizer takes and a log can hold."""
    if not text.strip():
        raise PydanticCustomError("text", "must not be empty")
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise PydanticCustomError("text", "must be without NUL and without half a character")
    return text


def integer(value: Any) -> str:
    """56 or "56" -> "56": what a completion can equal. No 1,000, 56.0, 007, true."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"0|-?[1-9][0-9]*", text):
        raise PydanticCustomError("integer", 'must be an integer, plainly written, such as 56 or "56"')
    return text


Prompt = Annotated[str, AfterValidator(readable)]


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: Prompt


def conversation(value: Any) -> str:
    """A text, or a list of messages -> a Conversation."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return Conversation(TypeAdapter(list[Message]).validate_python(value, strict=True))
    return TypeAdapter(Prompt).validate_python(value, strict=True)


Messages = Annotated[str, PlainValidator(conversation)]


class Row(BaseModel):
    """Other columns may be there and are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Metadata(Row):
    operation: str | None = None


class EvalRow(Row):
    prompt: Messages
    answer: Annotated[str, BeforeValidator(integer)]
    difficulty: str | None = None
    metadata: Metadata | None = None


class WordProblem(Row):
    question: Prompt
    answer: Prompt


def once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object whose keys are all different."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(found)} comes twice")
    return found


def no_number(name: str):
    raise ValueError(f"{name} is no JSON")


def read_rows(flag: str, source: str, schema: type[Row], splits: tuple[str, ...] = ("test",)) -> list[tuple[int, Any]]:
    """(row number from 1, row as `schema`) of a JSONL file, whose rows are its lines, or of a data set on the hub.

    On the hub: owner/name or owner/name/config, the first of `splits` that it has, else its first. Anything wrong ends
    in one line that names the row.
    """
    columns = " and ".join(name for name, field in schema.model_fields.items() if field.is_required())
    hint = f"; a JSONL file with the columns {columns} works without a network"
    if source.endswith((".jsonl", ".json")) or Path(source).exists():
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            fail(f"{flag} '{source}' cannot be read as JSONL: {error}{hint}")
        rows = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    else:
        import datasets

        name, config = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:]) or None
        try:
            found = datasets.load_dataset(name, config)
        except Exception as error:  # the library raises a dozen kinds; each means the data are not to be had
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            fail(f"{flag} '{source}' is neither a file nor a data set OWNER/NAME[/CONFIG] to be had ({reason}){hint}")
        rows = enumerate(found[next((split for split in splits if split in found), next(iter(found)))], 1)
    checked = []
    for number, row in rows:
        where = f"{flag} '{source}', row {number}"
        try:
            row = json.loads(row, object_pairs_hook=once, parse_constant=no_number) if isinstance(row, str) else row
            if not isinstance(row, dict):
                fail(f"{where} {repr(row)[:80]}: one JSON object a line is expected{hint}")
            checked.append((number, schema.model_validate(row)))
        except ValidationError as error:
            fail(f"{where}: {in_words(error)}{hint}")
        except (ValueError, RecursionError) as error:
            fail(f"{where} cannot be read as JSONL: {error}{hint}")
    if not checked:
        fail(f"{flag} '{source}' holds no problems{hint}")
    return checked


def read_problems(flag: str, source: str) -> list[tuple[str, str, str, str]]:
    """(prompt, answer, operation, difficulty) of each row of an evaluation set; see `read_rows`."""
    rows = [row for _, row in read_rows(flag, source, EvalRow)]
    return [(r.prompt, r.answer, r.metadata and r.metadata.operation or "", r.difficulty or "") for r in rows]
