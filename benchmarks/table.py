"""Tables from a log of benchmarks: every JSON object on a line of its own (a word before it is a column "side") is a row.

    uv run python benchmarks/table.py LOG

Lines that begin with "## " are headings; under each, rows with the same keys make one Markdown table.
"""

import json
import re
import sys


def cell(value) -> str:
    if type(value) in (int, float):
        return f"{value:,}" if type(value) is int else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def tables(lines: list[str]) -> str:
    """Markdown of all tables in a log."""
    heading, found = "", {}  # (heading, columns) -> rows
    for line in lines:
        if line.startswith("## "):
            heading = line.strip()
        elif match := re.fullmatch(r"(?:(\w+) )?(\{.*\})", line.strip()):
            try:
                values = json.loads(match[2])
            except ValueError:
                continue  # a line of something else that has braces
            values = ({"side": match[1]} if match[1] else {}) | values
            found.setdefault((heading, tuple(values)), []).append(values)
    out, last = [], ""
    for (heading, columns), rows in found.items():
        if heading != last:
            out += [heading, ""]
            last = heading
        out += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        out += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows] + [""]
    return "\n".join(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: table.py LOG")
    with open(sys.argv[1]) as log:
        print(tables(log.read().splitlines()))
