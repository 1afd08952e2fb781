"""A run's metrics against the health table of its script's page: the table there is the only list of ranges."""

import math
import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
END = r"(?=$|[,;:.] |[,;:]$| and | in the second half)"  # what may follow a range; other words are conditions on it
START = r"(?:^|[,;] |\bthen |\bfalls |\b(?P<only>mean|success) )"
Range = tuple[float, float]
VERDICTS = ["looks broken", "out of range", "in range", ""]  # in the order in which they are shown


def table(script: str) -> list[tuple[str, str, str]]:
    """(names as on the page, healthy, broken) of every line of the metrics table; nothing for an unknown script."""
    page = DOCS / f"{script}.md"
    section = page.read_text().split("## 5. Metrics")[-1].split("\n## ")[0] if page.exists() else ""
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return [(row[0], row[2], row[3]) for row in cells if len(row) == 4]


def names_of(cell: str, logged: list[str]) -> list[str]:
    """The logged metrics that a cell names; `<task>` stands for any word."""
    patterns = [re.sub(r"<\w+>", "[^/]+", re.escape(name)) for name in re.findall(r"`([^`]+)`", cell)]
    return [name for name in logged if any(re.fullmatch(p, name) for p in patterns if p != "[^/]+_low")]


def precise(text: str, low_precision: bool) -> str:
    """`below 1e-4 in fp32, 0.05 in bfloat16` as it is for one of the two; without the second, nothing is said of it."""
    half = rf"below {NUMBER} in fp32(?:, {NUMBER} in bfloat16)?"
    return re.sub(half, lambda m: f"below {m[2 if low_precision else 1]}" if m[1 + low_precision] else "", text)


def healthy_range(text: str, name: str) -> Range | None:
    """The range a cell states without a condition: `0`, `below 0.5`, `0 at step 1, then below 0.5`, `0.1 to 0.3`."""
    if re.fullmatch(NUMBER, text):
        return float(text), float(text)
    for form in (rf"{START}(?P<side>below|above) {NUMBER}{END}", rf"^{NUMBER} to {NUMBER}{END}"):
        if found := re.search(form, text):
            groups = found.groupdict()
            if groups.get("only") and groups["only"] not in name:
                return None  # of the other metrics of this line
            if "side" not in groups:
                return float(found[1]), float(found[2])
            limit = float(found[3])
            return (-math.inf, limit) if groups["side"] == "below" else (limit, math.inf)
    return None


def broken_range(text: str) -> Range | None:
    """Of what broken looks like: `above 5: …`, `below 0: …`, `1: …`."""
    if found := re.match(rf"(below|above) {NUMBER}{END}", text):
        limit = float(found[2])
        return (
            (-math.inf, np.nextafter(limit, -math.inf))
            if found[1] == "below"
            else (np.nextafter(limit, math.inf), math.inf)
        )
    found = re.match(rf"{NUMBER}:", text)
    return (float(found[1]), float(found[1])) if found else None


def verdict(values: np.ndarray, healthy: str, broken: str, name: str) -> tuple[str, float | None]:
    """("in range", "out of range", "looks broken" or "", share of the values in the range).

    Judged is the mean of the last quarter of what was logged; a trend (rises, falls) against that of the first.
    """
    quarter = max(1, len(values) // 4)
    first, last = values[:quarter].mean(), values[-quarter:].mean()
    within, bad = healthy_range(healthy, name), broken_range(broken)
    share = None if within is None else float(((values >= within[0]) & (values <= within[1])).mean())
    if bad and bad[0] <= last <= bad[1] and not (within and within[0] <= last <= within[1]):
        return "looks broken", share
    if within:
        return "in range" if within[0] <= last <= within[1] else "out of range", share
    trend = re.match(r"(?:does not |none )?(rises|falls?)\b(?! late)", healthy)
    if trend is None or len(values) < 2:
        return "", None
    up = (trend[1] == "rises") != healthy.startswith(("does not", "none"))
    return "in range" if (last >= first if up else last <= first) else "out of range", None


def judge(script: str, metrics: dict[str, list[float]], low_precision: bool) -> list[dict]:
    """A line for every logged metric of which the page says what is healthy or broken. metrics: what was logged."""
    found = {}
    for cell, healthy, broken in table(script):
        for name in names_of(cell, list(metrics)) if healthy or broken else ():
            values = np.array(metrics[name], dtype=float)
            says, within = verdict(values, precise(healthy, low_precision), broken, name)
            line = {"metric": name, "verdict": says, "last quarter": float(values[-max(1, len(values) // 4) :].mean())}
            line |= {"min": float(values.min()), "max": float(values.max()), "share in range": within}
            found.setdefault(
                name, line | {"healthy": healthy.replace("`", ""), "broken looks like": broken.replace("`", "")}
            )
    return sorted(found.values(), key=lambda line: VERDICTS.index(line["verdict"]))
