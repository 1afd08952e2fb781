"""The grammar of numbers in free text: one for golds and completions. No number is read in part."""

import fractions
import re

NUMBER = r"[-+]?(?=\.?[0-9])(?:[0-9]+/0*[1-9][0-9]*|(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?!\w)"
UNIT = r"\s?[%$€£¥]?(?:[^\W\d_]|(?<=[^\W\d])[-'’/](?=\w)|[\s.,;:!?…'\"’”()])*"  # words and punctuation
SCALE = r"\b(?:[kKM]|bn|dozens?|hundreds?|thousands?|(?:m|b|tr)illions?|half|halves|thirds?|quarters?|squared|cubed)\b"


MARKS = {"tag": ("<answer>", "</answer>"), "boxed": ("\\boxed{", "}"), "hashes": ("####", "\n")}


def inside(completion: str, mark: str) -> str | None:
    """What stands in the last <answer>...</answer> or \\boxed{...}, or on the line behind the last ####; else None."""
    begin, end = MARKS[mark]
    _, found, rest = completion.rpartition(begin)
    text, closed, _ = rest.lstrip().partition(end)
    return text.strip() or None if found and (closed or end == "\n") else None


def marked(completion: str) -> str | None:
    """What the completion itself marks as its answer; None where it marks nothing."""
    return next((text for mark in MARKS if (text := inside(completion, mark)) is not None), None)


def format_reward(completion: str, problem, mark: str) -> float:
    """1 where an answer is marked once, and something stands there; else 0. What it is, other rewards judge."""
    return float(completion.count(MARKS[mark][0]) == 1 and bool(inside(completion, mark)))


def final_number(completion: str) -> str:
    """The number on the line after the last "####", or ""."""
    return read_number(inside(completion, "hashes") or "")


def read_number(line: str) -> str:
    """The number that a line is, in lowest terms ("$18.00 a day" -> "18", "0.75" -> "3/4"); or ""

    Its unit may follow, nothing that makes it another number ("1, 2", "1,234apples", "8 million"): never read in part.
    """
    line = line.replace("**", " ", 2).strip() if line.startswith("**") else line  # bold
    line = re.sub(r"^([-+]?)\\?[$€£¥] ?", r"\1", line.replace("−", "-"))  # currency
    found = re.fullmatch(f"({NUMBER})({UNIT})", line)
    whole = found and len(found[1]) <= 100 and not any(map(str.isnumeric, found[2])) and not re.search(SCALE, found[2])
    return str(fractions.Fraction(found[1].replace(",", ""))) if whole else ""
