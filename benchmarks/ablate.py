"""Ablations of the GRPO scripts: one thing changed at a time, several seeds, every curve kept.

    uv run python benchmarks/ablate.py --list                                  # the grids and their settings
    uv run python benchmarks/ablate.py --grid beta                             # runs what is not there yet
    uv run python benchmarks/ablate.py --plot                                  # every figure and table, from the curves

A run is the script in a process of its own (one thread), and its curve one line of docs/results/ablations/<grid>.jsonl,
written when the run has ended: kill this program at any time and start it again, and it goes on with the next run. A run
that another grid has already made (the same script, flags, edits and seed) is read from there.

Settings are compared on a validation set: 170 problems of the evaluation's bands that are in neither the training
problems nor `arithmetic_eval`. The evaluation is reported beside it and picks nothing.

Some settings are no flags but edits: pairs (old text, new text) applied to a temporary copy of the script, each of which
must occur exactly once. That is how the pages' ablations are meant to be done: one change in one place of one file.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.stats import wilson
from grpo_arithmetic import EVAL_BANDS, draw_problem, extract_answer, load_problems

RESULTS = ROOT / "docs" / "results" / "ablations"
CLAIMS = ROOT / "docs" / "origin_claims.md"
EVAL_FILE = ROOT / "assets" / "arithmetic_eval.jsonl"
STEPS = 60
CURVE = [
    "reward",
    "accuracy",
    "kl",
    "entropy",
    "frac_reward_zero_std",
    "completions/mean_length",
    "refilled_completions",
    "sampling_logp_difference/mean",
    "clip_ratio/region_mean",
    "comparison/accuracy",
    "comparison/share",
]  # of every step
TASK_METRIC = r"eval_(arithmetic|words|letters|comparison|binary|word_problems)_(accuracy|accuracy_n|greedy)"
# two-sided 95 % quantiles of Student's t, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# ---- 1. Grids --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One thing to try: flags on top of BASE, edits of the script, or supervised texts before GRPO."""

    name: str
    flags: dict = field(default_factory=dict)
    edits: tuple[tuple[str, str], ...] = ()
    script: str = "grpo_arithmetic.py"
    sft_epochs: int = 0  # passes over 500 right texts of 0-10 before GRPO starts


# 60 steps of 256 completions on problems that are new at every step: no setting wins or loses by memorising
BASE = {
    "fresh": True, "n_samples": 16, "epochs": STEPS, "batch_size": 256, "num_generations": 16,
    "eval_every": 20, "eval_samples": 4, "save_every": 0, "log_completions": 1, "keep": 1,
    # the defaults of the bundled model, written out so that equal runs have equal flags
    "beta": 0.1, "loss_type": "grpo", "scale_rewards": "group", "temperature": 0.7, "num_iterations": 1,
    "learning_rate": 3e-4, "rewards": "binary", "max_completion_length": 16,
}  # fmt: skip
SHORT = {"epochs": 40, "eval_every": 40}
# a real pretrained model (assets/get_smollm2.py): 20 steps of 64 completions, evaluated before and after
REAL = {
    "model_name": "assets/smollm2-135m", "n_samples": 8, "epochs": 20, "batch_size": 64, "num_generations": 8,
    "max_completion_length": 8, "learning_rate": 2e-5, "eval_every": 0, "eval_samples": 2,
}  # fmt: skip


def fixed(n: int, steps: int) -> dict:
    """Flags for `steps` steps over n fixed training problems, 16 prompts a step."""
    return {"fresh": False, "n_samples": n, "epochs": round(steps / (n // 16)), "eval_every": steps // 3}


def cut(characters: str) -> tuple[tuple[str, str], ...]:
    """The research code's reward: it looks at what stands so many characters into the completion."""
    old = "    return 1.0 if is_correct(completion, problem) else -1.0"
    return ((old, old.replace("is_correct(completion,", f"is_correct(completion[{characters}:],")),)


def generations(G: int) -> Setting:
    return Setting(str(G), {"num_generations": G, "n_samples": 256 // G})


def real(name: str, edits=(), **flags) -> Setting:
    return Setting(name, REAL | flags, edits)


def mixture(name, tasks=("arithmetic", "words", "comparison"), proportions=(2, 1, 1), **flags) -> Setting:
    flags |= {"tasks": tasks, "proportions": proportions, "task_eval_problems": 100}
    return Setting(name, flags, script="grpo_mixed.py")


def page_edits() -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """(name, edits) of the diffs on docs/grpo_mixed.md: the lines taken out and the lines put in."""
    section = (ROOT / "docs" / "grpo_mixed.md").read_text().split("## 7.")[1].split("## 8.")[0]
    found = re.findall(r"^\*\*(\d+)\. .*?```diff\n(.*?)```", section, re.M | re.S)
    text = {sign: [re.findall(rf"^\{sign}(?!\{sign})(.*)", block, re.M) for _, block in found] for sign in "-+"}
    pairs = zip(found, text["-"], text["+"])
    return [(f"ablation {number}", (("\n".join(out), "\n".join(put)),)) for (number, _), out, put in pairs]


PAGE = {"epochs": 30, "eval_every": 0}  # of the page's ablations: short
PAGE_FLAGS = {
    5: {"sampling": "adaptive"},
    7: {"importance": "sequence", "num_iterations": 2},
}  # what their text asks for

# grid -> what it asks, the setting the others are compared with (first), the settings
GRIDS: dict[str, tuple[str, list[Setting]]] = {
    "beta": (
        "How strong must the KL penalty be? (grpo; dr_grpo: without division by the std)",
        [
            Setting(f"{loss} {beta:g}", {"loss_type": loss, "scale_rewards": scale, "beta": beta})
            for loss, scale in (("grpo", "group"), ("dr_grpo", "none"))
            for beta in (0.1, 0.0, 0.01, 0.04, 0.2)
        ],
    ),
    "misaligned": (
        "Does the research code's cut (the reward reads the completion from character len(prompt) on) give its curves: "
        "reward up, evaluation down? The bundled model answers in 3 characters and stops, so that nothing stands where the "
        "cut looks; one character on, 1 % of its samples are right by chance (40 tokens a completion)",
        [
            Setting("aligned", {"max_completion_length": 40}),
            Setting("cut at 1", {"max_completion_length": 40}, cut("1")),
            Setting("cut at len(prompt)", {"max_completion_length": 40}, cut("len(problem.prompt)")),
            Setting("cut at 14", {"max_completion_length": 40}, cut("14")),
        ],
    ),
    "misaligned_longer": (
        "The aligned reward and the cut at one character, over 180 steps",
        [
            Setting("aligned", {"epochs": 180, "eval_every": 60}),
            Setting("cut at 1", {"max_completion_length": 40, "epochs": 180, "eval_every": 60}, cut("1")),
        ],
    ),
    "generations": (
        "How many completions per prompt, at 256 completions a step?",
        [generations(G) for G in (16, 2, 4, 8, 32, 64)],
    ),
    "loss_type": (
        "Which average of the token losses? (bnpo in 4 micro-batches: in one it equals dapo)",
        [
            Setting("grpo"),
            Setting("bnpo", {"loss_type": "bnpo", "micro_batch_size": 64}),
            Setting("dapo", {"loss_type": "dapo"}),
            Setting("dr_grpo", {"loss_type": "dr_grpo"}),
        ],
    ),
    "objective": (
        "Which objective, over 40 steps of 4 updates each? (with one update GSPO and SAPO are grpo, and CISPO is dapo)",
        [
            Setting(name, {"num_iterations": 4, "importance": "token"} | SHORT | flags)
            for name, flags in {
                "grpo": {},
                "dapo": {"loss_type": "dapo"},
                "GSPO": {"importance": "sequence"},
                "CISPO": {"loss_type": "cispo"},
                "SAPO": {"loss_type": "sapo"},
                "RLOO": {"baseline": "others", "scale_rewards": "none"},
                "top entropy 0.2": {"top_entropy": 0.2},
            }.items()
        ],
    ),
    "kl_gradient": (
        "Which gradient of the KL, over 40 steps? (k3: that of KL(ref || policy); reverse: that of KL(policy || ref))",
        [
            Setting(gradient, {"kl_gradient": gradient} | SHORT) for gradient in ("k3", "reverse")
        ],
    ),
    "kl_gradient_strong": (
        "The same with a weight of 0.4 in place of 0.1",
        [Setting(gradient, {"kl_gradient": gradient, "beta": 0.4} | SHORT) for gradient in ("k3", "reverse")],
    ),
    "several_rewards": (
        "Two rewards over 40 steps: their sum, or each normalised in its group before (GDPO)",
        [
            Setting("sum", {"rewards": ("binary", "partial_credit")} | SHORT),
            Setting("GDPO", {"rewards": ("binary", "partial_credit"), "normalize_rewards": True} | SHORT),
        ],
    ),
    "scale_rewards": (
        "What are advantages divided by?",
        [Setting("group"), *(Setting(s, {"scale_rewards": s}) for s in ("batch", "none"))],
    ),
    "n_problems": (
        "How many training problems, over 180 steps?",
        [
            Setting("fresh", {"epochs": 180, "eval_every": 60}),
            *(Setting(str(n), fixed(n, 180)) for n in (16, 100, 480, 960)),
        ],
    ),
    "temperature": (
        "At which temperature to sample? (evaluation always at 0.7)",
        [Setting("0.7"), *(Setting(f"{t:g}", {"temperature": t}) for t in (0.5, 0.9, 1.0, 1.2))],
    ),
    "reward_shape": (
        "Does partial credit help?",
        [Setting("binary"), *(Setting(r, {"rewards": r}) for r in ("partial_credit", "rich", "rich_exponential"))],
    ),
    "curriculum": (
        "Do levels of growing difficulty help? (960 fixed problems, or what a level has)",
        [
            mixture("uniform", ("arithmetic",), (1,), **fixed(960, STEPS)),
            *(
                mixture(c, ("arithmetic",), (1,), **fixed(960, STEPS), curriculum=c)
                for c in ("three_stage", "progressive", "dynamic")
            ),
        ],
    ),
    "learning_rate": (
        "Which learning rate?",
        [Setting("3e-4"), *(Setting(lr, {"learning_rate": float(lr)}) for lr in ("3e-5", "1e-4", "1e-3", "3e-3"))],
    ),
    "num_iterations": (
        "How many optimizer steps on each batch of completions?",
        [Setting("1"), *(Setting(str(n), {"num_iterations": n}) for n in (2, 3, 4))],
    ),
    "sft": (
        "Supervised fine-tuning first? 500 right texts of 0-10, 3 passes of 32: 48 steps more",
        [
            Setting("grpo"),
            Setting("sft alone", {"epochs": 1, "learning_rate": 1e-12, "eval_every": 0}, sft_epochs=3),
            Setting("sft, then grpo", sft_epochs=3),
            Setting("grpo, 108 steps", {"epochs": 108, "eval_every": 36}),
        ],
    ),
    "mixture": (
        "Arithmetic alone against mixtures, at equal steps and completions (validation: arithmetic problems)",
        [
            mixture("arithmetic alone", ("arithmetic",), (1,)),
            mixture("50 / 25 / 25"),
            mixture("25 / 25 / 50 comparison", proportions=(1, 1, 2)),
            mixture("balanced", sampling="balanced"),
            mixture("adaptive", sampling="adaptive"),
            mixture("refill 2", refill=2),
            mixture("tasks one by one", curriculum="tasks"),
        ],
    ),
    "page": (
        "The ten ablations of docs/grpo_mixed.md, 30 steps; 5 and 7 are compared with their own flags unedited",
        [
            mixture("unedited", **PAGE),
            *(mixture(f"unedited, flags of {n}", **PAGE, **flags) for n, flags in PAGE_FLAGS.items()),
            *(
                replace(mixture(name, **PAGE, **PAGE_FLAGS.get(i, {})), edits=edits)
                for i, (name, edits) in enumerate(page_edits(), 1)
            ),
        ],
    ),
    "smollm2_learning_rate": (
        "SmolLM2-135M-Instruct, 20 steps: which learning rate?",
        [real("2e-5"), *(real(lr, learning_rate=float(lr)) for lr in ("5e-6", "1e-4"))],
    ),
    "smollm2_beta": (
        "SmolLM2-135M-Instruct, 20 steps: does it need a KL penalty, and with which gradient?",
        [real("k3 0.1"), real("0", beta=0.0), real("reverse 0.1", kl_gradient="reverse")],
    ),
    "smollm2_misaligned": (
        "SmolLM2-135M-Instruct, 20 steps of at most 16 tokens: the research code's cut on a model that goes on talking, so "
        "that something stands where it looks",
        [
            real("aligned", max_completion_length=16),
            real("cut at len(prompt)", cut("len(problem.prompt)"), max_completion_length=16),
        ],
    ),
}  # fmt: skip

# ---- 2. One run ------------------------------------------------------------------------------------------------------


def draw_validation() -> list:
    """170 different problems of the bands in their proportions, none in the evaluation.

    The easiest band is left out: it has 36 problems in all, and most of them are in the evaluation.
    """
    taken = {p.prompt for p in load_problems(str(EVAL_FILE))}
    rng, problems = np.random.default_rng(77), []
    for band, (n, level) in list(EVAL_BANDS.items())[1:]:
        while n:
            problem = draw_problem(rng, level, band)
            if problem.prompt not in taken:
                taken.add(problem.prompt)
                problems.append(problem)
                n -= 1
    return problems


def write_problems(path: Path) -> set[str]:
    """Evaluation and validation problems in one file for --eval-dataset, so that no run trains on either.

    Returns the prompts of the validation.
    """
    validation = draw_validation()
    rows = [
        {"prompt": p.prompt, "answer": p.answer, "difficulty": p.difficulty, "metadata": {"operation": p.operation}}
        for p in load_problems(str(EVAL_FILE)) + validation
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {p.prompt for p in validation}


def words_of(setting: Setting, seed: int) -> list[str]:
    """The script's own command line."""
    words = []
    for name, value in (BASE | setting.flags).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            words += [flag, *(map(str, value) if isinstance(value, (tuple, list)) else [str(value)])]
    return [*words, "--seed", str(seed)]


def key_of(setting: Setting, seed: int) -> str:
    """What makes two runs the same run."""
    flags = sorted((k, str(v)) for k, v in (BASE | setting.flags).items())
    return json.dumps([setting.script, flags, setting.edits, setting.sft_epochs, seed])


def edited(script: str, edits) -> str:
    """The script's text with the edits applied; each old text must occur exactly once."""
    text = (ROOT / script).read_text()
    for old, new in edits:
        if text.count(old) != 1:
            sys.exit(
                f"error: an edit of {script} finds its place {text.count(old)} times instead of once: {old[:70]!r}"
            )
        text = text.replace(old, new)
    return text


def workspace(folder: Path, setting: Setting) -> Path:
    """A folder with the (edited) script beside links to what it imports; its path."""
    for name in ("assets", "common", *(p.name for p in ROOT.glob("*.py") if p.name != setting.script)):
        (folder / name).symlink_to(ROOT / name)
    (folder / setting.script).write_text(edited(setting.script, setting.edits))
    return folder / setting.script


def commit(script: str) -> str:
    """The last commit that touched what a run is made of; "-dirty" if the working tree differs from it there."""
    paths = [script, "common", "assets", "benchmarks/ablate.py"]
    out = subprocess.run(["git", "log", "-1", "--format=%h", "--", *paths], cwd=ROOT, capture_output=True, text=True)
    clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *paths], cwd=ROOT).returncode == 0
    return (out.stdout.strip() or "unknown") + ("" if clean else "-dirty")


def run(setting: Setting, seed: int, prefix: list[str], threads: int) -> dict:
    """Trains one setting with one seed in a process of its own. Returns the row to keep."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        validation = write_problems(folder / "problems.jsonl")
        script = workspace(folder, setting)
        words = words_of(setting, seed)
        command = [*prefix, sys.executable, str(script), *words]
        command += ["--eval-dataset", str(folder / "problems.jsonl"), "--output-dir", str(folder / "runs")]
        start = time.time()
        if setting.sft_epochs:
            start_from = str(folder / "sft")
            supervised = [*prefix, sys.executable, __file__, "--sft-out", start_from, "--seeds", str(seed)]
            check(subprocess.run([*supervised, "--sft-epochs", str(setting.sft_epochs)], capture_output=True,
                                 text=True, env=environment), setting)  # fmt: skip
            command += ["--model-name", start_from]
        check(subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder), setting)
        (run_dir,) = (folder / "runs" / script.stem).iterdir()
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        answers = [json.loads(line) for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]
    return {
        "setting": setting.name,
        "seed": seed,
        "key": key_of(setting, seed),
        "command": f"python {setting.script} " + " ".join(words),
        "edits": setting.edits,
        "sft_epochs": setting.sft_epochs,
        "commit": commit(setting.script),
        "seconds": round(time.time() - start, 1),
        "curve": curve_of(metrics),
        "evaluations": evaluations_of(metrics, answers, validation),
    }


def check(done: subprocess.CompletedProcess, setting: Setting) -> None:
    if done.returncode:
        raise RuntimeError(f"setting {setting.name!r} ended with code {done.returncode}:\n{done.stderr[-3000:]}")


def short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def curve_of(metrics: list[dict]) -> dict[str, list]:
    """Columns of the training metrics, one entry a step."""
    rows = [row for row in metrics if "train/reward" in row]
    return {"step": [row["step"] for row in rows]} | {
        name: [short(row[f"train/{name}"]) for row in rows] for name in CURVE if f"train/{name}" in rows[0]
    }


def evaluations_of(metrics: list[dict], answers: list[dict], validation: set[str]) -> list[dict]:
    """One entry an evaluation: sampled and greedy accuracy on both problem sets, and the tasks of the mixed script."""
    found, standard = [], {p.prompt for p in load_problems(str(EVAL_FILE))}
    for row in metrics:
        if "arithmetic_eval" not in row:
            continue
        entry = {"step": row["step"]}
        for name, prompts in (("validation", validation), ("eval", standard)):
            mine = [a for a in answers if a["step"] == row["step"] and a["prompt"] in prompts]
            entry[f"{name}_k"] = round(sum(a["accuracy"] for a in mine), 4)  # of n problems, by their mean over samples
            entry[f"{name}_n"] = len(mine)
            entry[f"{name}_greedy_k"] = sum(extract_answer(a["greedy"]) == a["expected"] for a in mine)
        texts = [a["sample"].strip() for a in answers if a["step"] == row["step"]]
        entry["number_first"] = sum(bool(re.match(r"[-+]?\d", text)) for text in texts)  # of validation_n + eval_n
        entry["number_alone"] = sum(bool(re.fullmatch(r"[-+]?\d+", text)) for text in texts)
        tasks = {k: short(v) for k, v in row.items() if re.fullmatch(TASK_METRIC, k)}
        yes = [a["accuracy"] for a in answers if a["step"] == row["step"] and a["expected"] == "yes"]
        tasks |= {"comparison_yes": short(float(np.mean(yes)))} if yes else {}
        found.append(entry | tasks)
    return found


def supervised(
    out: str, seed: int, epochs: int, n: int = 500, batch_size: int = 32, learning_rate: float = 1e-4
) -> None:
    """SFT of the bundled model on n right texts of operands 0-10, none of them in the problems that are kept out.

    The texts are drawn with replacement, as the research code's: 363 different ones exist.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.language.lm import TINY_MODEL
    from grpo_arithmetic import Level

    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    held_out = {p.prompt for p in load_problems(str(EVAL_FILE)) + draw_validation()}
    texts = []
    while len(texts) < n:
        problem = draw_problem(rng, Level(0, 10))
        texts += [problem] if problem.prompt not in held_out else []
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    eos = tokenizer.eos_token_id
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            chosen = [texts[i] for i in order[start : start + batch_size]]
            rows = [(tokenizer(p.prompt).input_ids, [*tokenizer(p.answer).input_ids, eos]) for p in chosen]
            length = max(len(p) + len(a) for p, a in rows)
            ids = torch.full((len(rows), length), eos)
            labels = torch.full((len(rows), length), -100)  # loss on answer and end token only
            for i, (p, a) in enumerate(rows):
                ids[i, : len(p) + len(a)] = torch.tensor(p + a)
                labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
            logits = model(input_ids=ids).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---- 3. The rows that are there, figures and tables ------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The finished runs in a file; half a line at its end, from a kill, is cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    if not text.endswith("\n") and text:
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return [json.loads(line) for line in text.splitlines()]


def append_row(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    read_rows(path)  # repairs the end
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def all_rows() -> dict[str, dict]:
    """Key -> row, over all grids."""
    return {row["key"]: row for path in sorted(RESULTS.glob("*.jsonl")) for row in read_rows(path)}


def interval(values: list[float]) -> float:
    """Half width of the 95 % confidence interval of the mean of a few independent runs (Student's t); nan below two."""
    n = len(values)
    return STUDENT[min(n - 1, 9)] * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else float("nan")


def spread(values: list[float], signed: bool = False) -> str:
    mean, half = np.mean(values), interval(values)
    return (f"{mean:+.3f}" if signed else f"{mean:.3f}") + (f" ± {half:.3f}" if np.isfinite(half) else "")


def accuracy(row: dict, name: str, at: int = -1) -> float:
    evaluation = row["evaluations"][at]
    return evaluation[f"{name}_k"] / evaluation[f"{name}_n"]


def table(grid: str, found: dict[str, list[dict]], survivors: set[tuple[str, str]]) -> str:
    """Markdown: means over seeds with their 95 % intervals, and the difference to the first setting, seed by seed."""
    question, settings = GRIDS[grid]
    base = {row["seed"]: row for row in found.get(settings[0].name, [])}
    lines = [
        f"### {grid}\n",
        question + "\n",
        "| setting | n | validation | difference, seed by seed | greedy | `arithmetic_eval` | train accuracy | reward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        rows = found.get(setting.name, [])
        if not rows:
            lines.append(f"| {setting.name} | 0 | not run | | | | | |")
            continue
        pairs = [accuracy(r, "validation") - accuracy(base[r["seed"]], "validation") for r in rows if r["seed"] in base]
        mark = "**" if (grid, setting.name) in survivors else ""
        greedy = [r["evaluations"][-1]["validation_greedy_k"] / r["evaluations"][-1]["validation_n"] for r in rows]
        first, last = (
            np.mean([np.mean(r["curve"]["reward"][part]) for r in rows]) for part in (slice(10), slice(-10, None))
        )
        cells = [
            setting.name,
            str(len(rows)),
            spread([accuracy(r, "validation") for r in rows]),
            "" if setting is settings[0] or not pairs else f"{mark}{spread(pairs, signed=True)}{mark}",
            f"{np.mean(greedy):.3f}",
            spread([accuracy(r, "eval") for r in rows]),
            f"{np.mean([np.mean(r['curve']['accuracy'][-10:]) for r in rows]):.3f}",
            f"{first:.2f} → {last:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + task_table(grid, found) + format_table(grid, found)


def format_table(grid: str, found: dict[str, list[dict]]) -> str:
    """Of a pretrained model: how many answers begin with a number, and how many are one and nothing else."""
    if not grid.startswith("smollm2"):
        return ""
    lines = ["", "| samples, of all seeds | begin with a number | are a number alone |", "|---|---|---|"]
    before = next(rows[:1] for rows in found.values() if rows)  # the same model in all runs
    for name, rows, at in (("base model", before, 0), *((name, rows, -1) for name, rows in found.items() if rows)):
        ends = [row["evaluations"][at] for row in rows]
        n = sum(e["validation_n"] + e["eval_n"] for e in ends)
        cells = [f"{sum(e[key] for e in ends) / n:.3f}" for key in ("number_first", "number_alone")]
        lines += [f"| {name} (n {n}) | " + " | ".join(cells) + " |"]
    return "\n".join(lines) + "\n"


def task_table(grid: str, found: dict[str, list[dict]]) -> str:
    """Held-out accuracy of every task, before and after, and the completions that refilling cost; "" without tasks."""
    rows = [r for rows in found.values() for r in rows]
    names = list(
        dict.fromkeys(
            k
            for r in rows
            for k in r["evaluations"][-1]
            if re.fullmatch(TASK_METRIC.replace("(accuracy|accuracy_n|greedy)", "accuracy"), k)
        )
    )
    if not names:
        return ""
    lines = ["| held-out accuracy | " + " | ".join(n.split("_")[1] for n in names) + " | refilled completions a step |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    before = {n: next(r["evaluations"][0][n] for r in rows if n in r["evaluations"][0]) for n in names}
    lines += ["| base model | " + " | ".join(f"{before[n]:.3f}" for n in names) + " | |"]
    for name, mine in found.items():
        cells = [[r["evaluations"][-1][n] for r in mine if n in r["evaluations"][-1]] for n in names]
        cost = [np.mean(r["curve"].get("refilled_completions", [0])) for r in mine] or [0]
        lines += [f"| {name} | " + " | ".join(spread(c) if c else "" for c in cells) + f" | {np.mean(cost):.0f} |"]
    return "\n".join(["", *lines]) + "\n"


def styles(names: list[str]) -> dict[str, dict]:
    """A colour for every setting; of many two-word names (grpo 0.1, dr_grpo 0.1) the first word picks the line."""
    if len(names) <= 7 or any(name.count(" ") != 1 for name in names):
        return {name: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"} for i, name in enumerate(names)}
    first, second = ([*dict.fromkeys(name.split()[k] for name in names)] for k in (0, 1))
    of = {name: (first.index(name.split()[0]), second.index(name.split()[1])) for name in names}
    return {name: {"color": f"C{j}", "linestyle": ("-", "--", ":")[i % 3]} for name, (i, j) in of.items()}


def draw(grid: str, found: dict[str, list[dict]], out: Path) -> None:
    """Reward and validation accuracy against the step, mean of the seeds, and where every seed ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: rows for name, rows in found.items() if rows}
    style = styles(list(found))
    fig, axes = plt.subplots(1, 3, figsize=(15, max(3.9, 0.32 * len(found) + 1.4)))
    for row, (name, rows) in enumerate(found.items()):
        n = len(rows)
        reward = [(r["curve"]["step"], smooth(r["curve"]["reward"])) for r in rows]
        steps = [[e["step"] for e in r["evaluations"]] for r in rows]
        validation = [(xs, [accuracy(r, "validation", j) for j in range(len(xs))]) for xs, r in zip(steps, rows)]
        for ax, curves in zip(axes, (reward, validation)):
            shortest = min(len(xs) for xs, _ in curves)
            mean = np.mean([ys[:shortest] for _, ys in curves], axis=0)
            ax.plot(curves[0][0][:shortest], mean, **style[name], linewidth=1.8)
        ends = [ys[-1] for _, ys in validation]
        color = style[name]["color"]
        axes[2].plot(ends, [row] * n, "o", color=color, markersize=4, alpha=0.5)
        axes[2].errorbar([np.mean(ends)], [row], xerr=np.nan_to_num([interval(ends)]), color=color, fmt="|", capsize=3)
        axes[2].plot([], [], **style[name], linewidth=1.8, label=f"{name} ({n})")
    for ax, label in zip(axes, ("train reward, mean of 5 steps", "validation accuracy", "setting")):
        ax.set_xlabel("training step", fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.grid(alpha=0.3)
    axes[2].set_xlabel("validation accuracy at the end", fontsize=9)
    axes[2].set_yticks(range(len(found)), list(found), fontsize=8)
    axes[2].invert_yaxis()
    axes[2].legend(fontsize=7, title="setting (seeds)", title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    key = "curves: mean of the seeds; points: seeds, bar: 95 % interval of their mean (Student's t)"
    text = textwrap.fill(f"{grid}: {GRIDS[grid][0]} | {key}", 200)
    fig.text(0.5, 0.005, text, ha="center", fontsize=7, color="0.35")
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.savefig(out, dpi=100)
    plt.close(fig)


HEAD = """# Ablations

{runs} runs, made by `uv run python benchmarks/ablate.py --grid GRID`, drawn by `uv run python benchmarks/ablate.py --plot`.
Every line of the JSONL files beside this page is one run: command, commit, seed, edits of the script, curve, counts.

n: number of seeds. Accuracies are means over seeds of the sampled accuracy (T 0.7, 4 samples a problem) after the last
step, ± half the 95 % interval over seeds (Student's t): they say how far another seed might be. Another set of problems
adds its own error, ± 0.07 at 170 problems, which the seed-by-seed difference to the first setting does not have: all
runs answer the same problems with the same noise. A difference whose interval holds 0 is no evidence, and of {tests}
comparisons two or three intervals leave 0 out by chance: **bold** are the {survivors} that survive Holm's correction over
all of them, which are those of the grids that [origin_claims.md](../../origin_claims.md) judges. They are not
independent: nine grids share the three runs they compare with. Train accuracy: mean of the last 10 steps; reward: mean
of the first 10 steps → of the last 10.

Validation: {problems} problems that are neither in training nor in `arithmetic_eval`; settings are compared on it.
The grids on SmolLM2-135M are a family of their own: five comparisons, corrected together.
Base model: {base}. Unless a setting says otherwise: {steps} steps of 16 prompts × 16 completions, new problems
at every step, bundled model, one CPU core.
"""


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    """Mean of the last `width` values."""
    return np.array([np.mean(values[max(i - width + 1, 0) : i + 1]) for i in range(len(values))])


def evidence(grid: str, found: dict[str, list[dict]]) -> str:
    """One line for docs/origin_claims.md: validation accuracy of every setting, and the difference to the first one."""
    first = GRIDS[grid][1][0].name
    base = {r["seed"]: accuracy(r, "validation") for r in found[first]}
    parts = []
    for name, rows in ((name, rows) for name, rows in found.items() if rows):
        pairs = [accuracy(r, "validation") - base[r["seed"]] for r in rows if r["seed"] in base]
        against = f"{spread(pairs, signed=True)}, " if name != first and pairs else ""
        parts.append(f"{name}: {np.mean([accuracy(r, 'validation') for r in rows]):.3f} ({against}n {len(rows)})")
    incomplete = min(map(len, found.values())) < 3
    rest = f"; to be continued: `uv run python benchmarks/ablate.py --grid {grid}`" if incomplete else ""
    return ("; ".join(parts) or "no run yet") + rest


def found_of(grid: str, rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Setting -> its runs. A grid whose script has since changed its flags keeps the runs that its file names so."""
    found = {}
    own = sorted(read_rows(RESULTS / f"{grid}.jsonl"), key=lambda r: r["seed"])
    for setting in GRIDS[grid][1]:
        prefix = key_of(setting, 0)[: -len("0]")]
        mine = [r for k, r in sorted(rows.items()) if k == f"{prefix}{r['seed']}]"]
        found[setting.name] = mine or [r for r in own if r["setting"] == setting.name]
    return found


def student_p(t: float, df: int) -> float:
    """Two-sided p-value of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = np.arctan(abs(t) / np.sqrt(df))
    term, total, first = 1.0, 0.0, 1 if df % 2 else 0
    for k in range(first, df - 1, 2):
        term = term * (np.cos(angle) if k == 1 else 1.0) if k <= 1 else term * np.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 1 - (2 / np.pi * (angle + np.sin(angle) * total) if df % 2 else np.sin(angle) * total)


def comparisons(rows: dict[str, dict], pretrained: bool = False) -> list[tuple[str, str, float]]:
    """(grid, setting, p) of every difference to a grid's first setting that has two seeds, smallest p first.

    Of the grids that docs/origin_claims.md names: its claims are the family that is corrected together, those about the
    bundled model and those about the pretrained one each by themselves.
    """
    out, text = [], CLAIMS.read_text()
    for grid in (g for g in GRIDS if g.startswith("smollm2") == pretrained and (f"[{g}](" in text or f"`{g}`" in text)):
        found = found_of(grid, rows)
        first = next(iter(found))
        base = {r["seed"]: accuracy(r, "validation") for r in found[first]}
        for name, mine in found.items():
            pairs = [accuracy(r, "validation") - base[r["seed"]] for r in mine if r["seed"] in base]
            if name != first and len(pairs) > 1:
                t = np.mean(pairs) / (np.std(pairs, ddof=1) / np.sqrt(len(pairs)))
                out.append((grid, name, student_p(t, len(pairs) - 1)))
    return sorted(out, key=lambda x: x[2])


def holm(tests: list[tuple[str, str, float]], level: float = 0.05) -> set[tuple[str, str]]:
    """(grid, setting) of those that survive Holm's correction over all of them."""
    kept = set()
    for i, (grid, name, p) in enumerate(tests):
        if p * (len(tests) - i) >= level:
            break
        kept.add((grid, name))
    return kept


def pages(grids: list[str]) -> tuple[str, str]:
    """The text of README.md with all tables, and that of docs/origin_claims.md with its numbers."""
    rows, parts, lines = all_rows(), [], CLAIMS.read_text().splitlines()
    tests = comparisons(rows)
    survivors, of_pretrained = holm(tests), holm(comparisons(rows, pretrained=True))
    for grid in grids:
        found = found_of(grid, rows)
        if sum(map(bool, found.values())) > 1:
            parts.append(table(grid, found, survivors | of_pretrained) + f"\n![{grid}]({grid}.png)\n")
        link = f"| [{grid}](results/ablations/README.md): "
        lines = [x.partition(link)[0] + link + evidence(grid, found) + " |" if link in x else x for x in lines]
    before = next(r["evaluations"][0] for r in rows.values() if not r["sft_epochs"])
    k, n = before["validation_k"], before["validation_n"]
    base = "validation {:.3f} [{:.3f}, {:.3f}]".format(k / n, *wilson(k, n))
    head = HEAD.format(runs=len(rows), problems=n, base=base, steps=STEPS, tests=len(tests), survivors=len(survivors))
    return "\n".join([head, *parts]), "\n".join(lines) + "\n"


def plot(grids: list[str]) -> None:
    """Writes <grid>.png for every grid with something to compare, README.md with all tables, and the claims' numbers."""
    rows = all_rows()
    for grid in grids:
        found = found_of(grid, rows)
        if sum(map(bool, found.values())) > 1:
            draw(grid, found, RESULTS / f"{grid}.png")
    readme, claims = pages(grids)
    (RESULTS / "README.md").write_text(readme)
    CLAIMS.write_text(claims)
    print(f"{len(rows)} runs -> {RESULTS.relative_to(ROOT)}/README.md")


# ---- 4. Main ---------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    grid: tuple[str, ...] = ()  # grids to run, one after another; all: every one
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of every setting
    threads: int = 1  # CPU threads of a run
    prefix: str = ""  # command to put before each run, such as "taskset -c 1" or "srun -n 1"
    plot: bool = False  # remake the figures and the tables from the curves
    list: bool = False  # print grids, settings and how many runs there are
    sft_out: str | None = None  # (used by the program itself) write the supervised model here and stop
    sft_epochs: int = 3  # (used by the program itself) passes over the supervised texts


def main(args: Args) -> None:
    if args.sft_out:
        return supervised(args.sft_out, args.seeds[0], args.sft_epochs)
    grids = list(GRIDS) if "all" in args.grid else list(args.grid)
    if unknown := set(grids) - set(GRIDS):
        sys.exit(f"error: unknown grid {sorted(unknown)[0]!r}; known: {', '.join(GRIDS)}, all")
    for _, settings in (GRIDS[g] for g in grids):
        for setting in settings:
            edited(setting.script, setting.edits)  # all edits find their place, or nothing starts
    failed = 0
    for grid in grids:
        for seed in args.seeds:  # all settings of one seed first: a table of one seed is a first answer
            for setting in GRIDS[grid][1]:
                if key_of(setting, seed) in all_rows():
                    continue
                try:
                    row = run(setting, seed, args.prefix.split(), args.threads)
                except RuntimeError as error:  # the other runs are none the worse for it
                    failed += 1
                    print(f"error: {grid}: {error}", file=sys.stderr, flush=True)
                    continue
                append_row(RESULTS / f"{grid}.jsonl", row)
                print(
                    f"{grid}: {setting.name}, seed {seed}: validation {accuracy(row, 'validation', 0):.3f} -> "
                    f"{accuracy(row, 'validation'):.3f}, eval {accuracy(row, 'eval'):.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )
    if args.list:
        rows = all_rows()
        for grid, (question, settings) in GRIDS.items():
            print(f"{grid}: {question}")
            for s in settings:
                done = sum(key_of(s, seed) in rows for seed in args.seeds)
                changed = " ".join(f"{k}={v}" for k, v in s.flags.items()) + (" + edit" if s.edits else "")
                print(f"    {s.name:24s} {done}/{len(args.seeds)} runs   {changed}")
    if args.plot:
        plot(list(GRIDS))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
