"""Broken files and folders, by hand: runs to continue and to start from, policies, language models, data.

What is broken is a copy of something that `make_runs` and `starting_points` have made: `{here}/copy`
in the words of a case, from `{stock}`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.wrong_flags import LANGUAGE, SCRIPTS, Case

TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2 - 3],
    "[]": lambda text: b"[]",
    "null": lambda text: b"null",
    "a word": lambda text: b'"word"',
    "no text": lambda text: b"\xff\xfe\x00\x01",
}
LINES: dict[str, Callable[[bytes], bytes]] = {
    "half a line before whole ones": lambda text: text[: text.index(b"\n") // 2] + b"\n" + text,
    "a list in a line": lambda text: b"[]\n" + text,
    "null in a line": lambda text: b"null\n" + text,
    "no text": TEXTS["no text"],
}
NO_LENGTH = {"a row without length": lambda text: text.replace(b'"length"', b'"long"', 1)}
NO_STEP = {"a row without step": lambda text: b"{}\n" + text}
HERE = {"null": None, "a list": [[]], "a word": "word", "negative": -1.5}
WRONG = HERE | {"gone": ...}


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def put(path: Path, keys: str, value) -> None:
    """Sets (or with ... removes) an entry of a JSON file, such as args/seed."""
    whole = json.loads(path.read_text())
    *parents, last = keys.split("/")
    entry = whole
    for key in parents:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    path.write_text(json.dumps(whole))


def put_tensors(path: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(path)), path)


def spoilt(source: str, files: dict[str, list[tuple[str, Callable[[Path], object]]]]) -> Iterator[tuple[str, Callable]]:
    """For each file (a pattern) of a copy of {stock}/source, in {here}/copy, each way to spoil it: (name, spoil)."""

    def spoil(pattern: str, change: Callable, stock: Path, here: Path) -> None:
        shutil.copytree(stock / source, here / "copy", symlinks=True)
        change(sorted((here / "copy").glob(pattern))[0])

    for pattern, ways in files.items():
        yield from ((f"{pattern}: {name}", partial(spoil, pattern, change)) for name, change in ways)


def texts(ways: dict = TEXTS) -> list:
    return [(name, partial(rewrite, change=change)) for name, change in ways.items()]


def entries(*keys: str, wrong: dict = WRONG) -> list:
    return [(f"{key} {name}", partial(put, keys=key, value=value)) for key in keys for name, value in wrong.items()]


GONE = ("gone", lambda path: path.unlink())
TENSORS = [  # of the optimizer
    ("another shape", lambda d: {k: v.reshape(-1)[:1].copy() if "exp_avg" in k else v for k, v in d.items()}),
    ("transposed moments", lambda d: {k: v.T.copy() if "exp_avg" in k and v.ndim == 2 else v for k, v in d.items()}),
    ("no moments", lambda d: {k: v for k, v in d.items() if "exp_avg" not in k}),
    ("one moment gone", lambda d: {k: v for k, v in d.items() if k != next(k for k in d if "exp_avg_sq" in k)}),
    ("one too many", lambda d: d | {"optimizer.9999.exp_avg": np.zeros(3, np.float32)}),
    ("integers", lambda d: {k: v.astype(np.int32) if "exp_avg" in k else v for k, v in d.items()}),
    ("no generator", lambda d: {k: v for k, v in d.items() if "rng" not in k}),
]
DAMAGED = [GONE, *((name, partial(rewrite, change=TEXTS[name])) for name in ("empty", "half", "no text"))]
OPTIMIZER = [(name, partial(put_tensors, change=change)) for name, change in TENSORS] + DAMAGED


def dangling(checkpoints: Path) -> None:
    best = checkpoints.with_name("best")
    best.unlink(missing_ok=True)
    best.symlink_to("checkpoints/step-000000777")


def folder_cases(stock: Path) -> Iterator[Case]:
    """Runs to continue or to start from, policies, language models, demonstrations, problems."""
    for script in SCRIPTS:
        (optimizer,) = {p.relative_to(stock / script / "last") for p in (stock / script / "last").rglob("trainer.saf*")}
        (state,) = {p.relative_to(stock / script / "last") for p in (stock / script / "last").rglob("trainer.json")}
        tables = [path.name for path in (stock / script).glob("*.jsonl") if path.name != "metrics.jsonl"]
        newest = os.readlink(stock / script / "last")
        files = {
            "config.json": [GONE, *texts(), *entries("args", "args/seed", "args/device", "args/keep")]
            + entries("args/unknown", wrong={"new": 1})
            + entries("args/data_config", wrong={"new": []}),
            f"{newest}/{state}": [GONE, *texts(), *entries("step", "elapsed", "rng", "script", "rng/numpy")]
            + entries("best", wrong={name: value for name, value in WRONG.items() if value is not None}),
            "metrics.jsonl": texts(LINES | NO_STEP),
        } | {table: texts(LINES) for table in tables}
        for name, spoil in spoilt(script, files):
            yield Case(script, "run folders", ["--resume", "{here}/copy"], True, spoil, name)
        weights = {f"{newest}/{optimizer}": OPTIMIZER, f"{newest}/model.safetensors": DAMAGED}
        for name, spoil in spoilt(script, weights):
            yield Case(script, "run folders", ["--resume", "{here}/copy"], True, spoil, name, loads=True)
    for script in [*LANGUAGE, "ppo_fetch"]:
        yield from starts(script, "--init-from", script)
    for script, *extra in (["ppo_gr00t"], ["gr00t_finetune", "--eval-only"]):
        yield from starts(script, "--model-path", "gr00t_finetune", *extra)
        yield from policies(script, *extra)
    for number, case in enumerate(language_models()):
        yield Case(LANGUAGE[number % 2], "language models", ["--model-name", "{here}/copy"], **case)
    yield from demonstrations()
    yield from problems()


def starts(script: str, flag: str, source: str, *extra: str) -> Iterator[Case]:
    """Runs to start from whose best checkpoint, or any, is gone."""
    ways = [("best dangles", dangling), ("gone", shutil.rmtree)]
    for name, spoil in spoilt(source, {"checkpoints": [*ways, ("a file", lambda p: (shutil.rmtree(p), p.touch()))]}):
        yield Case(script, "starts", [flag, "{here}/copy", *extra], spoil=spoil, name=name)


PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('mark').touch()\nX = None\n"


def policies(script: str, *extra: str) -> Iterator[Case]:
    """A GR00T with broken files."""
    metadata, tag = "experiment_cfg/metadata.json", "new_embodiment"
    state = f"{tag}/statistics/state"
    key = "gripper_position"
    files = {
        "config.json": [GONE, *texts(), *entries("action_head_cfg", "backbone_cfg", "action_dim", "action_horizon")],
        metadata: [
            GONE,
            *texts(),
            *entries(tag, f"{tag}/statistics", state, f"{tag}/modalities", f"{state}/{key}/mean"),
        ]
        + entries(f"{state}/{key}/min", wrong={"short": [0.0], "words": ["a", "b", "c"], "NaN": [float("nan")] * 3}),
        "**/trainer.json": [*texts(), *entries("args", wrong={"null": None, "a list": []})],
        "model.safetensors": DAMAGED,
    }
    for name, spoil in spoilt("gr00t", files):
        words = ["--model-path", "{here}/copy", *extra]
        yield Case(script, "policies", words, spoil=spoil, name=name, loads="safetensors" in name)


def language_models() -> Iterator[dict]:
    def pickled(weights: Path) -> None:
        import torch
        from safetensors.torch import load_file as load

        torch.save(load(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()

    def adapter(config: Path) -> None:
        config.unlink()
        (config.parent / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    def outside(weights: Path) -> None:
        names = list(load_file(weights))
        weights.rename(weights.parent.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
        (weights.parent / "model.safetensors.index.json").write_text(json.dumps(index))

    def own_code(config: Path) -> None:
        (config.parent / "payload.py").write_text(PAYLOAD)
        put(config, "model_type", "payload")
        put(config, "auto_map", {"AutoConfig": "payload.X", "AutoModelForCausalLM": "payload.X"})

    def without(weights: Path, part: str) -> None:
        put_tensors(weights, lambda tensors: {k: v for k, v in tensors.items() if part not in k})

    weights = [
        *DAMAGED, ("pickled", pickled), ("outside its folder", outside),
        ("a layer gone", partial(without, part="layers.1.")), ("a tensor gone", partial(without, part="0.mlp.up_proj")),
        ("one too many", lambda path: put_tensors(path, lambda d: d | {"model.more": np.zeros(3, np.float32)})),
        ("integers", lambda path: put_tensors(path, lambda d: {k: v.astype(np.int8) for k, v in d.items()})),
        ("another shape", lambda path: put_tensors(path, lambda d: d | {"model.norm.weight": np.zeros(3, np.float32)})),
    ]  # fmt: skip
    numbers = {"a word": "word", "negative": -1, "0": 0}
    files = {
        "config.json": [GONE, *texts(), ("an adapter's", adapter), ("auto_map", own_code)]
        + entries("model_type", wrong={"gone": ..., "null": None, "unknown": "nonsense", "of images": "vit"})
        + entries("hidden_size", "num_hidden_layers", "vocab_size", wrong=numbers)
        + entries("max_position_embeddings", wrong={"a word": "word", "4": 4}),
        "tokenizer.json": [GONE, *texts()],
        "tokenizer_config.json": [*texts()],
        "generation_config.json": texts() + entries("eos_token_id", wrong={"beyond": 99999, "a word": "word"}),
        "model.safetensors": weights,
    }
    for name, spoil in spoilt("lm", files):
        yield dict(spoil=spoil, name=name, loads="safetensors" in name)


def demonstrations() -> Iterator[Case]:
    """LeRobot data sets for gr00t_finetune.py."""
    bad_paths = [
        "../{episode_index}.parquet",
        "/etc/passwd",
        "{episode_chunk.__class__}",
        "{nonsense}",
        "{",
        "data",
        "",
    ]
    bad_paths += ["data/{episode_index:0999999999d}.parquet", "data/{episode_index!r:>9999999}", 3, None]
    first = "data/*/episode_000000.parquet"
    files = {
        "meta/info.json": [GONE, *texts(), *entries("features", "data_path", "codebase_version", "chunks_size")]
        + entries("fps", wrong=HERE)
        + entries("data_path", wrong={f"{path!r}": path for path in bad_paths})
        + entries("features/action", wrong=WRONG)
        + entries("codebase_version", wrong={"v9": "v9.0"}),
        "meta/modality.json": [*texts(), *entries("state", "action", "state/gripper_position", wrong=WRONG)]
        + entries("state/gripper_position/end", wrong={"a word": "x", "negative": -1, "beyond": 999, "null": None}),
        "meta/episodes.jsonl": [GONE, *texts(TEXTS | LINES | NO_LENGTH)],
        "meta/tasks.jsonl": [GONE, *texts(TEXTS | LINES)],
        "meta/stats.json": [*texts(), *entries("observation.state", "observation.state/mean", wrong=HERE)],
        first: DAMAGED + [("another episode", lambda path: shutil.copy(path.with_stem("episode_000001"), path))],
    }
    for name, spoil in spoilt("demos", files):
        words = ["--dataset-path", "{here}/copy"]
        yield Case("gr00t_finetune", "demonstrations", words, spoil=spoil, name=name)


ROW = {"prompt": "Calculate: 1 + 1 = ", "answer": "2"}
BAD_ROWS = {
    **{f"answer {x!r}": ROW | {"answer": x} for x in ("1,000", 3.5, None, float("nan"), [2], True, " 5", "")},
    **{f"prompt {x!r}": ROW | {"prompt": x} for x in (None, 7, "", "a\0b", [], " ")},
    **{"no answer": {"prompt": "1"}, "no prompt": {"answer": "1"}, "a list": [1], "null": None, "a word": "word"},
    "metadata a list": ROW | {"metadata": [1]},
}
BAD_GOLDS = ["no number at all", "#### ", "#### apples", "#### 1.2.3", "#### 12/0", None, 7, "", []]


def problems() -> Iterator[Case]:
    """Evaluation sets and word problems for the GRPO scripts."""

    def write(text: bytes, stock: Path, here: Path) -> None:
        (here / "rows.jsonl").write_bytes(text)

    good = json.dumps(ROW).encode() + b"\n"
    files = {name: good + json.dumps(row).encode() + b"\n" for name, row in BAD_ROWS.items()}
    files |= {name: change(good * 3) for name, change in (LINES | TEXTS).items()}
    files["a key twice"] = good + b'{"prompt": "1 + 1", "answer": "2", "answer": "3"}\n'
    for script in LANGUAGE:
        for name, text in files.items():
            words = ["--eval-dataset", "{here}/rows.jsonl"]
            yield Case(script, "problems", words, spoil=partial(write, text), name=name)
    for gold in BAD_GOLDS:
        text = b"".join(json.dumps({"question": "How many?", "answer": a}).encode() + b"\n" for a in ("#### 2", gold))
        words = ["--tasks", "word_problems", "--word-problems", "{here}/rows.jsonl"]
        yield Case("grpo_mixed", "problems", words, spoil=partial(write, text), name=f"word problem {gold!r}")
