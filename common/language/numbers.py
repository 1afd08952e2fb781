"""The grammar of numbers in free text: one for golds and completions. No number is read in part."""

import fractions
import re

NUMBER = r"[-+]?(?=\.?[0-9])(?:[0-9]+/0*[1-9][0-9]*|(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?!\w)"
UNIT = r"\s?[%$€£¥]?(?:[^\W\d_]|(?<=[^\W\d])[-'’/](?=\w)|[\s.,;:!?…'\"’”()])*"  # words and punctuation
SCALE = r"\b(?:[kKM]|bn|dozens?|hundreds?|thousands?|(?:m|b|tr)illions?|half|halves|thirds?|quarters?|squared|cubed)\b"


def final_number(completion: str) -> str:
    """The number on the line after the last "####", in lowest terms ("$18.00 a day" -> "18", "0.75" -> "3/4"); or ""

    Its unit may follow, nothing that makes it another number ("1, 2", "1,234apples", "8 million"): never read in part.
    """
    line = completion.rpartition("####")[2].strip().partition("\n")[0] if "####" in completion else ""
    line = line.replace("**", " ", 2).strip() if line.startswith("**") else line  # bold
    line = re.sub(r"^([-+]?)\\?[$€£¥] ?", r"\1", line.replace("−", "-"))  # currency
    found = re.fullmatch(f"({NUMBER})({UNIT})", line)
    whole = found and len(found[1]) <= 100 and not any(map(str.isnumeric, found[2])) and not re.search(SCALE, found[2])
    return str(fractions.Fraction(found[1].replace(",", ""))) if whole else ""
