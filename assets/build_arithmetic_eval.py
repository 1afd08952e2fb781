"""Builds assets/arithmetic_eval.jsonl: the 200 problems, in five bands, of the standard evaluation.

uv run python assets/build_arithmetic_eval.py
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from grpo_arithmetic import EVAL_BANDS, draw_bands  # noqa: E402

SEED = 2025


def rows() -> list[dict]:
    lines = []
    for index, p in enumerate(draw_bands(np.random.default_rng(SEED))):
        level = EVAL_BANDS[p.difficulty][1]
        a, b = int(p.prompt.split()[1]), p.operands[1]  # a division's prompt shows the multiple of b
        metadata = {
            "a": a, "b": b, "operation": p.operation, "result": int(p.answer), "difficulty": p.difficulty,
            "number_range": f"{level.low}-{level.high}",
        }  # fmt: skip
        lines.append(
            {"index": index, "prompt": p.prompt, "answer": p.answer, "difficulty": p.difficulty, "metadata": metadata}
        )
    return lines


def text() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    (HERE / "arithmetic_eval.jsonl").write_text(text())
