"""Rows of a data set: from a JSONL file, or from the hub."""

import json
from pathlib import Path

from common.cli import fail


def read_rows(flag: str, source: str, columns: tuple[str, ...], splits: tuple[str, ...] = ("test",)) -> list[dict]:
    """Rows of a JSONL file or a hub data set (the first of `splits` that it has, else its first) with these columns."""
    hint = f"; a JSONL file with the columns {' and '.join(columns)} works without a network"
    if source.endswith((".jsonl", ".json")) or Path(source).exists():
        try:
            rows = [json.loads(line) for line in Path(source).read_text().split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            fail(f"{flag} '{source}' cannot be read as JSONL: {error}{hint}")
    else:
        import datasets

        try:
            found = datasets.load_dataset(source)
        except Exception as error:  # the library raises a dozen kinds; each means the data are not to be had
            reason = f"is neither a file nor a data set that can be downloaded ({type(error).__name__})"
            fail(f"{flag} '{source}' {reason}{hint}")
        rows = list(found[next((split for split in splits if split in found), next(iter(found)))])
    if not rows or not all(isinstance(row, dict) for row in rows):
        fail(f"{flag} '{source}' holds no problems: one JSON object a line is expected")
    for column in columns:
        if missing := sum(column not in row for row in rows):
            fail(f"{flag} '{source}': column '{column}' is missing in {missing} of {len(rows)} rows")
    return rows
