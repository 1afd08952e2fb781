"""GRPO on a mixture of verifiable tasks: the trainer of grpo_arithmetic.py, with more than one kind of problem.

    prompt      Is 7 less than 8? Answer yes or no:            P prompts a step, G completions of each, B = P * G rows
    reward      r_i = +1 if the answer that the task's parser finds in the completion is right, else -1
    advantage   A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4)
    objective   minimise  mean over tokens of  -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta * KL_k3(policy || reference)
                w = exp(logp - logp_old) is the probability ratio, one per token (DeepSeekMath, arXiv 2402.03300)

Every line of the algorithm that is an equation carries it: grep for "eq:".

A task is a function that draws a problem, and a parser of its answers: see TASKS. diff grpo_arithmetic.py grpo_mixed.py
shows what a mixture changes: tasks and their shares, a split by prompt, accuracies by task.

Left out on purpose: vLLM (the generation loop is here), LoRA, chat templates, rewards from a model.

Dims: P prompts, G completions per prompt, B = P * G rows, T completion tokens, V vocabulary, d hidden size.

    uv run python grpo_mixed.py                                              # bundled model, laptop CPU, < 5 minutes
    uv run python grpo_mixed.py --model-name Qwen/Qwen2-0.5B-Instruct        # the same on a GPU
    uv run python grpo_mixed.py --tasks arithmetic letters binary --proportions 0.4 0.3 0.3

Equations next to symbols, metrics and results: docs/grpo_mixed.md.
"""

import copy
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.utils import logging as transformers_logging

from common import plot
from common.checkpoint import atomic_folder, find_checkpoint, gathered, link, load_state, prune, save_state
from common.log import Logger
from common.run import (
    StopSignal,
    World,
    close_world,
    create_run,
    fail,
    parse,
    read_config,
    seed_everything,
    setup_world,
    write_config,
)

SCRIPT = "grpo_mixed"
ASSETS = Path(__file__).resolve().parent / "assets"
TINY_MODEL = str(ASSETS / "tiny-qwen2")

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str | None = None
    """name of the run; default: grpo_{dataset_type}_b{batch_size}_g{num_generations}"""
    seed: int = 42
    """seed of problems, their order and the sampling noise"""
    tags: tuple[str, ...] = ("grpo", "canonical")
    """wandb tags"""
    output_dir: str = "runs"
    """parent of the run folder"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute precision over fp32 weights; auto: bfloat16 autocast on a GPU, float32 on a CPU"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account"""
    resume: str | None = None
    """run folder (or one of its checkpoints) to continue, bit-exactly, with the settings it was started with"""
    init_from: str | None = None
    """run folder or checkpoint whose weights to start from (a new run: optimizer, schedule and reference start afresh)"""
    eval_only: bool = False
    """measure --model-name (any model folder or hub id) or --init-from, and stop"""
    save_every: int = 50
    """steps between checkpoints, 0: only at the end"""
    keep: int = 2
    """newest checkpoints to keep, besides the best"""
    log_completions: int = 32
    """completions a step in completions.jsonl (whole groups first)"""

    # task
    dataset_type: Literal["mixed", "small_numbers"] = "mixed"
    """mixed: numbers 0-20; small_numbers: 0-10"""
    tasks: tuple[str, ...] = ("arithmetic", "words", "comparison")
    """tasks of the mixture: arithmetic, words, letters, comparison, binary, word_problems"""
    proportions: tuple[float, ...] | None = None
    """share of each task, in their order; default: 2 for the first, 1 for each other"""
    sampling: Literal["proportional", "balanced", "adaptive"] = "proportional"
    """shares of a step: as given, equal, or as given times p (1 - p), p being the task's solve rate so far"""
    word_problems: str = "openai/gsm8k"
    """JSONL file or hub id with columns question and answer, for the task word_problems"""
    n_samples: int | None = None
    """number of training problems of all tasks; default: 150, below 50 M parameters 1000"""
    exclude_eval: bool = True
    """keep the problems of the evaluation set out of the training problems"""
    min_num: int | None = None
    """smallest operand; default: that of the data set type"""
    max_num: int | None = None
    """largest operand; default: that of the data set type"""
    operations: str = "+-*"
    """operations to draw from, any of + - * /"""
    op_weights: tuple[float, ...] | None = None
    """weight of each operation, in their order; default: uniform"""
    fresh: bool = False
    """draw new problems at every step instead of n_samples fixed ones"""
    curriculum: Literal["none", "tasks", "three_stage", "progressive", "dynamic"] = "none"
    """change the tasks or their difficulty during training, see CURRICULA"""
    rewards: tuple[str, ...] = ("binary",)
    """reward functions to add up: binary, partial_credit, rich, rich_exponential, length"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each reward, in their order; default: 1 each"""

    # model
    model_name: str = TINY_MODEL
    """hub id or folder of a causal language model; default: the bundled 1.6 M parameter Qwen2"""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """attention of the training rows; default: sdpa on a GPU, eager on a CPU (faster there for short rows)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile the transformer layers of the update (not yet run on a GPU)"""
    fsdp: bool = False
    """shard weights, gradients and optimizer state over the processes of torchrun (not yet run on GPUs)"""

    # rollout
    batch_size: int = 240
    """completions per step B, over all processes"""
    num_generations: int = 16
    """completions per prompt G, 2 to 64"""
    temperature: float = 0.7
    """sampling temperature in (0, 2]; every log-prob is that of the tempered distribution"""
    max_completion_length: int = 16
    """new tokens at most"""
    decode: Literal["eager", "graph", "compile"] = "eager"
    """decode steps: op by op, as captured CUDA graphs, or compiled and captured (the last two not yet run on a GPU)"""
    race: bool = False
    """sample by an exponential race, which --decode compile fuses into one pass, not by the inverse CDF"""

    # update
    epochs: int | None = None
    """passes over the training problems; steps = epochs * (n_samples // prompts per step); default: 50, small models 6"""
    learning_rate: float | None = None
    """peak AdamW learning rate; default: 5e-6, below 50 M parameters 3e-4"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """after the warm-up: to zero in a line, in a cosine, or not at all"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises, 0 to 1"""
    weight_decay: float = 0.01
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm to clip to"""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """how token losses are averaged, see grpo_loss"""
    beta: float = 0.1
    """weight of the KL penalty, 0 (no reference model) to 0.2"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """what advantages are divided by: std of the group, of the batch, or nothing"""
    epsilon: float = 0.2
    """lower clip range of the ratio, and the upper one unless epsilon_high is given"""
    epsilon_high: float | None = None
    """upper clip range of the ratio; 0.28 is DAPO's clip-higher"""
    delta: float | None = None
    """two-sided clip: cap of the ratio where the advantage is negative, above 1 + epsilon; 4 is INTELLECT-2's"""
    num_iterations: int = 1
    """optimizer steps on each batch of completions, 1 to 4"""
    refill: int = 0
    """replace groups without spread by other problems' groups, up to so many times a step (dynamic sampling)"""
    mask_truncated_completions: bool = False
    """leave completions without an end token out of the loss"""
    micro_batch_size: int | None = None
    """completions per forward and backward pass in a process; changes memory, not the objective (bnpo excepted)"""
    share_prompt: bool | None = None
    """train on one row per prompt with all its completions; default: when that row has at most 1024 tokens"""
    low_memory_reference: bool = False
    """keep the reference weights on the CPU and swap them in, instead of a second model on the device"""

    # evaluation
    eval_dataset: str = str(ASSETS / "arithmetic_eval.jsonl")
    """JSONL file or hub id with columns prompt and answer, such as morgan/arithmetic_eval"""
    eval_every: int = 50
    """steps between evaluations, 0: only before and after"""
    eval_samples: int = 16
    """samples per problem k, for the sampled accuracy and pass@k"""
    eval_temperature: float = 0.7
    """temperature of these samples"""
    task_eval_problems: int = 100
    """held-out problems of each task, as far as so many exist"""
    eval_batch_size: int = 1600
    """completions per generation batch in evaluation"""
    early_stopping_patience: int | None = None
    """stop after this many evaluations without a better validation accuracy"""


# ---- 2. Task: problems, answers, rewards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    operation: str = ""
    difficulty: str = ""
    operands: tuple[int, int] | None = None
    task: str = "arithmetic"


@dataclass(frozen=True)
class Level:
    """A range of problems: numbers low..high inclusive, operations with weights, the first few tasks or all, shares."""

    low: int
    high: int
    operations: str = "+-*"
    weights: tuple[float, ...] | None = None
    first: int | None = None
    shares: dict[str, float] | None = None
    word_problems: str = ""


def make_problem(a: int, op: str, b: int, difficulty: str = "") -> Problem:
    """7, "*", 8 -> "Calculate: 7 * 8 = " with answer "56". Divisions are exact: a becomes the multiple of b below it."""
    if op == "/":
        a = a // b * b
    result = {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a // b
    return Problem(f"Calculate: {a} {op} {b} = ", str(result), op, difficulty, (a, b))


def draw_problem(rng: np.random.Generator, level: Level, difficulty: str = "") -> Problem:
    while True:
        a, b = rng.integers(level.low, level.high + 1, size=2).tolist()
        weights = level.weights and np.array(level.weights) / sum(level.weights)
        op = str(rng.choice(list(level.operations), p=weights))
        if not (op == "/" and b == 0):
            return make_problem(a, op, b, difficulty)


WORDS = """apple cat dog star book tree fish bird lamp river stone cloud green seven happy letter window garden house
water bread sugar chair table horse mouse tiger zebra lemon melon onion paper pencil ship train plane road bridge hill
moon sun rain snow wind fire gold iron silver king queen child mother father sister music song drum violin""".split()


def draw_words(rng: np.random.Generator, level: Level) -> Problem:
    """One to ten words: one word repeated, or drawn one by one."""
    n = int(rng.integers(1, 11))
    words = [str(rng.choice(WORDS))] * n if rng.random() < 0.5 else rng.choice(WORDS, n).tolist()
    return Problem(f"Count the words: {' '.join(words)}. Answer: ", str(n))


def draw_letters(rng: np.random.Generator, level: Level) -> Problem:
    word = str(rng.choice(WORDS))
    return Problem(f"Count the letters: {word}. Answer: ", str(len(word)))


def draw_comparison(rng: np.random.Generator, level: Level) -> Problem:
    """Every relation holds as often as not, so that a fixed answer is right half the time."""
    relation = str(rng.choice(["greater than", "less than", "equal to"], p=[0.4, 0.4, 0.2]))
    answer = str(rng.choice(["yes", "no"]))
    small, large = sorted(rng.choice(np.arange(level.low, level.high + 1), 2, replace=False).tolist())
    a, b = (large, small) if (relation == "greater than") == (answer == "yes") else (small, large)
    if relation == "equal to" and answer == "yes" or relation != "equal to" and answer == "no" and rng.random() < 0.2:
        a = b
    return Problem(f"Is {a} {relation} {b}? Answer yes or no: ", answer, f"{relation}: {answer}")


def draw_binary(rng: np.random.Generator, level: Level) -> Problem:
    n = int(rng.integers(0, 32))
    return Problem(f"Convert {n} to binary: ", f"{n:b}")


@cache
def load_word_problems(source: str) -> list[Problem]:
    """Questions whose solution ends in "#### number", as GSM8K's do."""
    form = "Question: {}\nThink step by step, then write #### and the number.\nAnswer: "
    rows = read_rows("--word-problems", source, ("question", "answer"), splits=("train",))
    return [Problem(form.format(row["question"]), final_number(str(row["answer"]))) for row in rows]


def draw_word_problem(rng: np.random.Generator, level: Level) -> Problem:
    problems = load_word_problems(level.word_problems)
    return problems[rng.integers(len(problems))]


# The standard evaluation: five bands, 200 problems, duplicates allowed.
EVAL_BANDS = {
    "very_easy": (30, Level(0, 5, "+")),
    "easy": (40, Level(0, 10)),
    "medium": (50, Level(0, 20)),
    "hard": (40, Level(10, 50)),
    "very_hard": (40, Level(20, 100, "+-*/")),
}
OPERATION_NAMES = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


def read_rows(flag: str, source: str, columns: tuple[str, ...], splits: tuple[str, ...] = ("test",)) -> list[dict]:
    """Rows of a JSONL file or of a hub data set (the first of `splits` that it has, else its first) with these columns."""
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


def load_problems(source: str) -> list[Problem]:
    """Reads a JSONL file or a hub data set with columns prompt, answer and optionally difficulty, metadata.operation."""
    return [
        Problem(
            str(row["prompt"]),
            str(row["answer"]),
            str((row.get("metadata") or {}).get("operation", "")),
            str(row.get("difficulty") or ""),
        )
        for row in read_rows("--eval-dataset", source, ("prompt", "answer"))
    ]


# Curricula: (share of training at which the level starts, level). The dynamic one moves by reward instead.
CURRICULA = {
    "tasks": [(0.0, Level(0, 20, first=1)), (0.2, Level(0, 20, first=2)), (0.4, Level(0, 20))],
    "three_stage": [(0.0, Level(0, 10, "+")), (0.2, Level(0, 10)), (0.5, Level(0, 20))],
    "progressive": [(0.0, Level(0, 5, "+")), (0.25, Level(0, 10, "+-")), (0.5, Level(0, 15)), (0.75, Level(0, 20))],
    "dynamic": [(0.0, Level(0, 5)), (0.0, Level(0, 7)), (0.0, Level(0, 10)), (0.0, Level(5, 15)), (0.0, Level(10, 20))],
}


def levels_of(args: Args) -> list[Level]:
    levels = [Level(args.min_num, args.max_num, args.operations, args.op_weights)]
    if args.curriculum != "none":
        levels = [level for _, level in CURRICULA[args.curriculum]]
    return [with_shares(args, replace(level, word_problems=args.word_problems), {}) for level in levels]


def with_shares(args: Args, level: Level, solve_rates: dict[str, float]) -> Level:
    """The level with each task's share of a step. solve_rates: of the tasks seen so far, 0 to 1."""
    tasks, shares = args.tasks[: level.first], np.array(args.proportions[: level.first])
    if args.sampling == "balanced":
        shares = np.ones(len(tasks))
    elif args.sampling == "adaptive":  # a group teaches by its spread; the floor keeps forgotten tasks in sight
        p = np.array([solve_rates.get(task, 0.5) for task in tasks])
        shares = shares * np.maximum(p * (1 - p), 0.05)  # eq: share_k ~ proportion_k * max(p_k (1 - p_k), 0.05)
    return replace(level, shares=dict(zip(tasks, (shares / shares.sum()).tolist())))


def split_of(prompt: str) -> str:
    """train, validation or eval (5 : 1 : 2), by the prompt alone: no task, seed or run can mix them."""
    byte = hashlib.md5(prompt.encode(), usedforsecurity=False).digest()[-1]
    return ["eval", "eval", "validation", *["train"] * 5][byte % 8]


def draw_from(rng: np.random.Generator, task: str, level: Level, split: str, excluded: set[str]) -> Problem:
    """A problem of the split. Drawn again within its kind, so that no split shifts the balance of a task."""
    first = problem = TASKS[task][0](rng, level)
    for _ in range(10_000):
        fits = split_of(problem.prompt) == split and problem.prompt not in excluded
        if fits and problem.operation == first.operation:
            return replace(problem, task=task)
        problem = TASKS[task][0](rng, level)
    numbers = f"numbers {level.low} to {level.high}"
    fail(f"task {task!r}, {numbers}: no problem like {first.prompt!r} in the {split} split; widen the numbers")


def draw_mixture(rng: np.random.Generator, level: Level, n: int, excluded: set[str]) -> list[Problem]:
    """n training problems, shuffled: each task has its share to within one problem, exactly so on average."""
    points = (rng.random() + np.arange(n)) / n * (1 - 1e-9)
    tasks = np.searchsorted(np.cumsum(list(level.shares.values())), points, side="right")
    return [draw_from(rng, list(level.shares)[i], level, "train", excluded) for i in rng.permutation(tasks)]


def draw_held_out(args: Args, split: str, n: int, excluded: set[str]) -> list[Problem]:
    """Up to n different problems of each task, the same in every run with these numbers."""
    (level,), problems = levels_of(replace(args, curriculum="none")), []
    for task in args.tasks:
        rng = np.random.default_rng([2025, *task.encode()])
        draws = {p.prompt: p for p in (draw_from(rng, task, level, split, excluded) for _ in range(4 * n))}
        problems += [replace(p, difficulty="held out") for p in draws.values()][:n]
    return problems


def next_level(curriculum: str, level: int, progress: float, recent_rewards: list[float]) -> int:
    """The level of the coming step. progress: share of the training done, 0 to 1; recent_rewards: of this level."""
    if curriculum == "dynamic":
        if len(recent_rewards) < 10:
            return level
        mean = sum(recent_rewards[-10:]) / 10
        return (
            min(level + 1, len(CURRICULA["dynamic"]) - 1) if mean > 0.7 else max(level - 1, 0) if mean < 0.3 else level
        )
    if curriculum == "none":
        return 0
    return max(i for i, (start, _) in enumerate(CURRICULA[curriculum]) if progress >= start)


def draw_batch(pool: list[Problem], step: int, num_prompts: int, seed: list[int]) -> list[Problem]:
    """Batch number `step` over `pool`: a new permutation every epoch, the incomplete last batch of each dropped."""
    epoch, i = divmod(step, len(pool) // num_prompts)
    order = np.random.default_rng([*seed, epoch]).permutation(len(pool))
    return [pool[j] for j in order[i * num_prompts : (i + 1) * num_prompts]]


def draw_more(rng, args: Args, pool: list[Problem], level: Level, n: int, excluded: set[str]) -> list[Problem]:
    """n problems at random, each task with its share: new ones with --fresh, else from different places of the pool."""
    if args.fresh:
        return draw_mixture(rng, level, n, excluded)
    size = Counter(p.task for p in pool)
    weights = np.array([level.shares[p.task] / size[p.task] for p in pool])
    return [pool[i] for i in rng.choice(len(pool), n, replace=False, p=weights / weights.sum())]


def extract_answer(completion: str) -> str:
    """The answer in a completion: the integer it starts with, else its first word, else "".

    One function for reward, train accuracy and evaluation. It must be given the completion only, never the prompt.

    >>> extract_answer(" 56. Next"), extract_answer("-3"), extract_answer("I think 56"), extract_answer("")
    ('56', '-3', 'I', '')
    """
    text = completion.strip()
    number = re.match(r"-?[0-9]+", text)
    return number.group() if number else text.split()[0] if text else ""


def yes_or_no(completion: str) -> str:
    """The yes or no that the completion starts with, a word of its own and without the other one after it; else ""."""
    text = completion.strip()
    start = re.match(r"([Yy][Ee][Ss]|[Nn][Oo])(?![\w'’-])", text)
    other = start and {"yes": "no", "no": "yes"}[start[0].lower()]
    return "" if not start or re.search(rf"\b{other}\b", text.lower()) else start[0].lower()


def binary_numeral(completion: str) -> str:
    """The binary numeral that the completion starts with, no digit, letter or fraction following; else ""."""
    numeral = re.match(r"[01]+(?!\w|[.,]\d)", completion.strip())
    return numeral[0] if numeral else ""


def final_number(completion: str) -> str:
    """The integer after the last "####", without thousands separators; "" if there is none."""
    text = completion.rpartition("####")[2] if "####" in completion else ""
    number = re.match(r"\s*(-?[0-9][0-9,]*)(?!\w|\.\d)", text)
    return number[1].replace(",", "") if number else ""


# task -> (draws a problem, finds the answer in a completion). Your own task is two functions and a line here.
TASKS = {
    "arithmetic": (draw_problem, extract_answer),
    "words": (draw_words, extract_answer),
    "letters": (draw_letters, extract_answer),
    "comparison": (draw_comparison, yes_or_no),
    "binary": (draw_binary, binary_numeral),
    "word_problems": (draw_word_problem, final_number),
}


def parse_answer(completion: str, problem: Problem) -> str:
    return TASKS[problem.task][1](completion)


def distance(completion: str, problem: Problem) -> int | None:
    """How far the completion's integer is from the right one; None if either is no integer."""
    given, right = parse_answer(completion, problem), problem.answer
    integer = r"-?[0-9]{1,18}"
    integer = "(?!)" if problem.task == "binary" else integer
    return abs(int(given) - int(right)) if re.fullmatch(integer, given) and re.fullmatch(integer, right) else None


def is_correct(completion: str, problem: Problem) -> bool:
    return parse_answer(completion, problem) == problem.answer


def binary_reward(completion: str, problem: Problem) -> float:
    return 1.0 if is_correct(completion, problem) else -1.0


def partial_credit_reward(completion: str, problem: Problem) -> float:
    """+1 right, less when near; a number that another operation would give is half forgiven."""
    d = distance(completion, problem)
    if is_correct(completion, problem) or d is None:
        return binary_reward(completion, problem)
    if d <= 5:
        return 0.5 if d <= 1 else 0.25
    a, b = problem.operands or (None, None)
    others = {a + b, a - b, a * b} if problem.operands else set()
    return -0.5 if int(extract_answer(completion)) in others else -1.0


def rich_reward(completion: str, problem: Problem) -> float:
    """Stepped by distance: 0: 1, 1: 0.7, 2: 0.4, 3-5: 0.1, 6-10: -0.2, more: -0.5; not an integer: -1."""
    d = distance(completion, problem)
    if is_correct(completion, problem) or d is None:
        return binary_reward(completion, problem)
    return next((r for limit, r in [(0, 1.0), (1, 0.7), (2, 0.4), (5, 0.1), (10, -0.2)] if d <= limit), -0.5)


def rich_exponential_reward(completion: str, problem: Problem) -> float:
    """By distance d: 1, 0.8, 0.5, then 0.7^d; not an integer: -1."""
    d = distance(completion, problem)
    if is_correct(completion, problem) or d is None:
        return binary_reward(completion, problem)
    return [1.0, 0.8, 0.5][d] if d <= 2 else 0.7**d


def length_reward(completion: str, problem: Problem) -> float:
    """0 up to 20 characters, then falling as a square to -0.5 at 100."""
    return -0.5 * min(max((len(completion) - 20) / 80, 0.0), 1.0) ** 2


REWARDS = {
    "binary": binary_reward,
    "partial_credit": partial_credit_reward,
    "rich": rich_reward,
    "rich_exponential": rich_exponential_reward,
    "length": length_reward,
}

# ---- 3. Model --------------------------------------------------------------------------------------------------------


def load_tokenizer(args: Args):
    """Tokenizer and config only: every check on flags and lengths comes before the weights are read."""
    try:
        config = AutoConfig.from_pretrained(args.model_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    except (OSError, ValueError) as error:
        fail(
            f"no causal language model '{args.model_name}': neither a model folder nor on the hub, or the hub cannot be "
            f"reached ({type(error).__name__}); leave --model-name out for the bundled model, which needs no network"
        )
    return tokenizer, config.get_text_config()


def load_model(args: Args, device: torch.device):
    """fp32 master weights. Dropout is off for good, so that sampling, old, new and reference log-probs agree."""
    if args.attn_implementation == "flash_attention_2":
        if args.dtype == "float32" or device.type == "cpu":
            fail("--attn-implementation flash_attention_2 needs a GPU and bfloat16; sdpa and eager run everywhere")
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            fail("flash-attn is not installed: `uv sync --extra flash` (needs nvcc), or --attn-implementation sdpa")
    attention = args.attn_implementation or ("sdpa" if device.type == "cuda" else "eager")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name, dtype=torch.float32, attn_implementation=attention
        ).to("cpu" if args.fsdp else device)  # the whole of it may be more than a GPU holds; shards move there
    except Exception as error:  # a missing, damaged or foreign weight file raises whatever its reader raises
        fail(f"the weights of '{args.model_name}' cannot be loaded: {type(error).__name__}: {error}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    check_head(model)
    return model


def check_head(model) -> None:
    """The loss applies the output head to hidden states itself; refuse models that do more than that to get logits."""
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours.float(), theirs.float(), atol=1e-3, rtol=1e-3):
        fail(
            f"{type(model).__name__} scales or caps its logits after the output head; this trainer does not support that"
        )


def stop_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: those of the model's generation config (often several) and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def autocast(args: Args, device: torch.device):
    if args.dtype == "float32" or (args.dtype == "auto" and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def swapped(model, weights: list[torch.Tensor]):
    """Runs the block with `weights` (CPU tensors) in the model: the low-memory reference. In place, both ways."""

    def swap():
        for p, w in zip(model.parameters(), weights):
            held = p.detach().to("cpu", copy=True)
            p.data.copy_(w)
            w.copy_(held)

    swap()
    try:
        yield model
    finally:
        swap()


def decoder_layers(model) -> torch.nn.ModuleList:
    """The transformer layers, whatever the architecture calls them."""
    return next(module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList))


def shard(model, args: Args, world: World) -> None:
    """FSDP2: each process keeps a part of every weight, gradient and moment; a layer is gathered while it computes.

    The gradients that backward leaves are means over the processes. Only token_logprobs gathers embedding and head.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    exact = isinstance(autocast(args, world.device), nullcontext)
    options = {} if exact else {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*decoder_layers(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options), reshard_after_forward=True)
    model.token_logprobs = MethodType(token_logprobs, model)
    register_fsdp_forward_method(model, "token_logprobs")


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, num_generations: int, scale_rewards: str = "group") -> torch.Tensor:
    """Advantage of each completion over the others of its prompt.

    rewards: (B,) with the G completions of a prompt in consecutive rows -> (B,) float32 or float64.
    scale_rewards: "group" (GRPO), "batch" (Lite PPO, arXiv 2508.08221) or "none" (Dr. GRPO, arXiv 2503.20783).
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    centred = groups - groups.mean(1, keepdim=True)  # eq: A_i = r_i - mean_group(r)
    # rounding must not make a tiny spread out of equal rewards, which dividing by the std would blow up
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)
    if scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)  # eq: A_i / (std_group(r) + 1e-4), std over n - 1
    elif scale_rewards == "batch":
        centred = centred / (rewards.std() + 1e-4)  # eq: A_i / (std_batch(r) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be group, batch or none, not {scale_rewards!r}")
    return centred.reshape(-1)


def completion_mask(completion_ids: torch.Tensor, eos_ids: list[int]) -> torch.Tensor:
    """(B, T) ids -> (B, T) bool: True up to and including the first end token.

    The end token is trained, what follows it is not. Never computed from the padding id, which is often an end id too.
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))  # (B, T)
    ended_before = is_eos.cumsum(1) - is_eos.long()  # number of end tokens strictly before t
    return ended_before == 0


def tempered(logits: torch.Tensor, temperature: float, vocab_size: int | None) -> torch.Tensor:
    """(..., V) logits of the distribution that is sampled and trained: divided by T, ids beyond the tokenizer at -inf."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if temperature > 0:
        logits = logits / temperature  # eq: pi_T(a) = softmax(logits / T)_a
    if vocab_size is not None and vocab_size < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.arange(vocab_size, logits.shape[-1], device=logits.device), -torch.inf)
    return logits


def head_logprobs(model, hidden, targets, temperature, vocab_size=None, chunk=4096):
    """hidden (N, d), targets (N,) -> log-probs (N,) float32, entropies (N,) float32 without gradient.

    The head runs in chunks that are recomputed in the backward pass, so that (N, V) never exists as a whole.
    """

    def one_chunk(h, y):
        logits = tempered(model.get_output_embeddings()(h), temperature, vocab_size)  # (n, V)
        logp = F.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)  # eq: H = -sum_a pi(a) log pi(a)
        return logp.gather(-1, y[:, None])[:, 0], entropy

    if len(targets) <= chunk:
        return one_chunk(hidden, targets)
    parts = [recompute(one_chunk, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def token_logprobs(
    model, prompt_ids, prompt_lengths, completion_ids, mask, *, temperature, vocab_size=None, share_prompt=None
):
    """Log-prob of every completion token under the tempered policy.

    prompt_ids (P, L) padded on the right, prompt_lengths (P,), completion_ids (B, T), mask (B, T) bool whose True part
    is a prefix of each row; rows of one prompt are consecutive.
    Returns logprobs (B, T) float32, 0 where masked, and entropy (B, T) float32, 0 where masked, without gradient.

    Two layouts with equal results. Plain: a row is [prompt | completion]. Shared: a row is
    [prompt | completion 1 | ... | completion G]; each completion sees the prompt and itself, and its positions start
    where the prompt ends, so the prompt is computed once a group. For short answers that is most of the work.
    """
    (B, T), P, device = completion_ids.shape, len(prompt_ids), completion_ids.device
    lengths = mask.sum(1)  # (B,)
    if share_prompt is None:
        share_prompt = int(prompt_lengths.max()) + int(lengths.view(P, -1).sum(1).max()) <= 1024
    if not share_prompt:
        prompt_ids = prompt_ids.repeat_interleave(B // P, 0)
        prompt_lengths = prompt_lengths.repeat_interleave(B // P)
    R = len(prompt_ids)  # rows of the forward pass
    g = B // R  # completions per row

    # the last token of a completion predicts nothing that is trained: it is not fed
    fed = (lengths - 1).clamp(min=0).view(R, g)
    offset = (prompt_lengths[:, None] + fed.cumsum(1) - fed).view(
        B, 1
    )  # (B, 1) column of each completion's first token
    S = int((prompt_lengths + fed.sum(1)).max())
    t = torch.arange(T, device=device)
    is_fed = t < fed.view(B, 1)  # (B, T)
    row = torch.arange(R, device=device).repeat_interleave(g)[:, None].expand(B, T)  # (B, T) row of each completion

    column = torch.arange(S, device=device)
    in_prompt = column < prompt_lengths[:, None]  # (R, S)
    input_ids = F.pad(prompt_ids, (0, max(S - prompt_ids.shape[1], 0)))[:, :S] * in_prompt
    input_ids[row[is_fed], (offset + t)[is_fed]] = completion_ids[is_fed]
    if g == 1:  # plain rows are causal and padded on the right: neither mask nor positions are needed
        layout = {}
    else:
        position = torch.where(in_prompt, column, 0)
        segment = torch.where(in_prompt, 0, -1)  # 0 prompt, 1..G completions, -1 padding
        own_position = prompt_lengths.repeat_interleave(g)[:, None] + t
        own_segment = (torch.arange(B, device=device) % g + 1)[:, None].expand(B, T)
        position[row[is_fed], (offset + t)[is_fed]] = own_position[is_fed]
        segment[row[is_fed], (offset + t)[is_fed]] = own_segment[is_fed]
        query, key = segment[:, :, None], segment[:, None, :]
        visible = ((key == 0) | (key == query)) & (column[None, :] <= column[:, None])  # (R, S, S)
        # padding attends to something, so that no row of the softmax is empty
        layout = {"attention_mask": additive(visible, model.dtype)[:, None], "position_ids": position}

    hidden = model.base_model(input_ids=input_ids, use_cache=False, **layout).last_hidden_state  # (R, S, d)
    # token 0 is predicted at the prompt's last position, token t at the position of token t - 1
    source = torch.where(t == 0, prompt_lengths.repeat_interleave(g)[:, None] - 1, offset + t - 1)  # (B, T)
    logp, H = head_logprobs(model, hidden[row[mask], source[mask]], completion_ids[mask], temperature, vocab_size)
    logprobs = logp.new_zeros(B, T).index_put((mask.nonzero(as_tuple=True)), logp)
    entropy = H.new_zeros(B, T).index_put((mask.nonzero(as_tuple=True)), H)
    return logprobs, entropy


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean attention mask -> 0 / lowest number, which every attention implementation takes."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    *,
    loss_type,
    beta,
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    max_completion_length,
    num_loss_tokens=None,
    num_sequences=None,
):
    """The GRPO loss of a micro-batch, as part of the mean over the whole optimizer step.

    logprobs, old_logprobs, ref_logprobs (B, T) (ref None when beta == 0), advantages (B,), mask (B, T).
    num_sequences, num_loss_tokens: B and number of True mask entries of the whole step, over micro-batches and
    processes; default: of this call. With them the losses of micro-batches add up to that of the full batch, except for
    bnpo, whose token mean is over the micro-batch by definition (at one micro-batch it equals dapo).
    Returns loss () and metrics, a dict of detached scalars: kl and clip ratios are token sums over num_loss_tokens
    (they add up too), low_min and high_max are extremes over rows.
    """
    mask = mask.to(logprobs.dtype)  # (B, T)
    A = advantages[:, None]  # (B, 1)
    eps_low, eps_high = epsilon, epsilon if epsilon_high is None else epsilon_high
    # masked entries may hold anything, also values whose exp overflows: 0 * inf would be NaN
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(mask == 0, 0.0))  # eq: w = pi(a) / pi_old(a)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)  # two-sided clip, arXiv 2505.07291
    token_loss = -torch.minimum(unclipped * A, clipped * A)  # eq: -min(w A, clip(w, 1 - eps_low, 1 + eps_high) A)
    if beta != 0:
        log_ratio = (ref_logprobs - logprobs).masked_fill(mask == 0, 0.0)
        kl = torch.expm1(log_ratio) - log_ratio  # eq: k3 = exp(ref - logp) - (ref - logp) - 1 >= 0
        token_loss = token_loss + beta * kl  # inside the token loss: averaged exactly as the policy term is

    B = num_sequences or len(mask)
    tokens = mask.sum() if num_loss_tokens is None else num_loss_tokens
    tokens = torch.as_tensor(tokens, dtype=mask.dtype, device=mask.device).clamp(min=1.0)
    row_sum, row_tokens = (token_loss * mask).sum(1), mask.sum(1)  # (B,), (B,)
    if loss_type == "grpo":  # eq: L = 1/B sum_i 1/n_i sum_t l_it                             (arXiv 2402.03300)
        loss = (row_sum / row_tokens.clamp(min=1.0)).sum() / B
    elif loss_type == "bnpo":  # eq: L = sum_it l_it / sum_i n_i, both over this micro-batch
        loss = row_sum.sum() / row_tokens.sum().clamp(min=1.0) * (len(mask) / B)
    elif loss_type == "dapo":  # eq: L = sum_it l_it / N, N = tokens of the whole step        (arXiv 2503.14476)
        loss = row_sum.sum() / tokens
    elif loss_type == "dr_grpo":  # eq: L = sum_it l_it / (B * max_completion_length)         (arXiv 2503.20783)
        loss = row_sum.sum() / (B * max_completion_length)
    else:
        raise ValueError(f"loss_type must be grpo, bnpo, dr_grpo or dapo, not {loss_type!r}")

    with torch.no_grad():
        low = ((unclipped < 1 - eps_low) & (A < 0)) * mask  # tokens whose gradient the clip has stopped
        high = ((unclipped > 1 + eps_high) & (A > 0)) * mask
        metrics = {
            "clip_ratio/low_mean": low.sum() / tokens,
            "clip_ratio/high_mean": high.sum() / tokens,
            "clip_ratio/region_mean": (low + high).sum() / tokens,
            "clip_ratio/low_min": (low.sum(1) / row_tokens.clamp(min=1.0)).min(),
            "clip_ratio/high_max": (high.sum(1) / row_tokens.clamp(min=1.0)).max(),
        }
        if beta != 0:
            metrics["kl"] = (kl * mask).sum() / tokens
    return loss, metrics


# ---- 5. Rollout ------------------------------------------------------------------------------------------------------


def sampling_noise(seed: list[int], sample_ids, length: int) -> torch.Tensor:
    """Uniform numbers (B, length) in [0, 1), a function of (seed, sample id, position) alone.

    A completion therefore does not depend on the batch, the process or the order it was sampled in.
    """
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    rows = [np.random.Generator(np.random.Philox(key=[key, i])).random(length, dtype=np.float32) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


def race_times(uniform: torch.Tensor, size: int) -> torch.Tensor:
    """uniform (B,) -> (B, size) exponential variables, each a hash of its row's number and its token.

    Elementwise, so a compiler computes them where they are used. 32 bits in int64, by C. Wellons' multipliers.
    """

    def mix(x):
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x ^ (x >> 15)

    row = mix((uniform * 2**24).long() + 1)[:, None]  # all 24 bits that a float32 in [0, 1) from a generator has
    u = (mix(row + torch.arange(size, device=uniform.device)).float() + 0.5) / 2**32  # small ones, which win, are fine
    return -torch.log1p(-u)  # eq: e = -log(1 - u) ~ Exp(1); infinite where u rounds to 1: never first


def sample_tokens(logits, uniform, temperature, vocab_size=None, race=False):
    """logits (B, V), uniform (B,) in [0, 1) -> tokens (B,), their tempered log-probs (B,). Temperature 0 is greedy.

    Inverse CDF over the full distribution: no top-k, top-p or repetition penalty, whatever the model's own
    generation config asks for, so what is sampled is what the loss scores. race: the same distribution by another use
    of the number, in one pass without a running sum.
    """
    if race and temperature > 0:
        z = tempered(logits, temperature, vocab_size)  # (B, V)
        tokens = (z - race_times(uniform, z.shape[-1]).log()).argmax(-1)  # eq: a = argmin_v e_v / pi(v), e_v ~ Exp(1)
        return tokens, z.gather(-1, tokens[:, None])[:, 0] - z.logsumexp(-1)
    logp = F.log_softmax(tempered(logits, temperature, vocab_size), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)  # eq: a = min { a : sum_{b <= a} pi(b) > u }
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=(vocab_size or logits.shape[-1]) - 1)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


class RowCacheLayer(CacheLayerMixin):
    """Preallocated keys and values (B, heads, capacity, head_dim) in which every row has its own next position.

    Rows of different prompt lengths need no padding on the left: row i writes column position[i], whatever the others
    do. `rows` and `position` are shared by all layers.
    """

    is_sliding = False

    def __init__(self, keys, values, rows, position):
        super().__init__()
        self.keys, self.values, self.rows, self.position, self.is_initialized = keys, values, rows, position, True

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[self.rows, :, self.position] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, self.position] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def get_seq_length(self):
        return self.keys.shape[2] - 1  # only asked for where positions and mask are not given, and here both are

    def get_mask_sizes(self, query_length):
        return self.keys.shape[2], 0

    def get_max_length(self):
        return self.keys.shape[2]


@dataclass
class DecodeState:
    """What a decode step reads and writes: the b rows still in the batch of B completions, C columns of cache.

    A step changes these tensors in place and never their shapes: it is a fixed sequence of kernels on fixed addresses,
    which is what CUDA-graph capture asks for.
    """

    token: torch.Tensor  # (b,) sampled last, fed next
    position: torch.Tensor  # (b,) its column in the cache
    finished: torch.Tensor  # (b,) bool
    output: torch.Tensor  # (b,) which completion the row is
    keys: list[torch.Tensor]  # of each layer, (b, heads, C, head_dim)
    values: list[torch.Tensor]
    t: torch.Tensor  # (1,) index of the token that is sampled next; a scalar index would be asked for by the host
    noise: torch.Tensor  # (B, T)
    ids: torch.Tensor  # (B, T)
    logprobs: torch.Tensor  # (B, T)

    def __post_init__(self):
        rows = torch.arange(len(self.token), device=self.token.device)
        layers = [RowCacheLayer(k, v, rows, self.position) for k, v in zip(self.keys, self.values)]
        self.cache = Cache(layers=layers)

    def rows(self, chosen, columns=None):
        """The state of some rows; with slices a view, with indices a copy."""
        columns = slice(columns)
        small = {name: getattr(self, name)[chosen] for name in ("token", "position", "finished", "output")}
        keys, values = ([x[chosen][:, :, columns] for x in caches] for caches in (self.keys, self.values))
        return replace(self, keys=keys, values=values, **small)


def append_tokens(logits, s: DecodeState, temperature, stop_ids, pad_id, vocab_size, race=False) -> None:
    """Samples the next token of every row from logits (b, V) and writes it down."""
    uniform = s.noise[s.output, s.t] if temperature > 0 else None
    tokens, logp = sample_tokens(logits, uniform, temperature, vocab_size, race)
    s.token.copy_(torch.where(s.finished, pad_id, tokens))
    s.ids[s.output, s.t] = s.token
    s.logprobs[s.output, s.t] = torch.where(s.finished, 0.0, logp.float())
    for stop_id in stop_ids:
        s.finished |= tokens == stop_id
    s.t += 1


def decode_step(model, s: DecodeState, *sampling) -> None:
    """Feeds the last token of every row and appends the next one."""
    visible = torch.arange(s.keys[0].shape[2], device=s.token.device) <= s.position[:, None]  # (b, C)
    hidden = model.base_model(
        input_ids=s.token[:, None],
        attention_mask=additive(visible, model.dtype)[:, None, None],  # (b, 1, 1, C)
        position_ids=s.position[:, None],
        past_key_values=s.cache,
        use_cache=True,
    ).last_hidden_state  # (b, 1, d)
    s.position += 1
    append_tokens(model.get_output_embeddings()(hidden[:, 0]), s, *sampling)


# The fast path of --decode graph and compile, from here to pad_right, computes what decode_step computes: a first
# reading can skip it.


def packed_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention in which the query heads of a KV head are rows of one product, so that the cache is not repeated.

    query (B, H, S, D), key and value (B, K, C, D), mask (B, 1, 1, C) for S = 1 or None for causal -> (B, S, H, D).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("packed_attention has neither capped scores nor attention sinks")
    B, H, S, D = query.shape
    K = key.shape[1]
    if attention_mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=H > K)
    else:
        query = query.reshape(B, K, H // K, D)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(B, H, S, D).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def decode_bucket(rows: int, columns: int) -> tuple[int, int]:
    """The shape whose graph serves a batch: rows 8, 12, 16, 24, 32, 48, ..., so that at most a third is padding, columns
    in multiples of 64.

    >>> decode_bucket(256, 40), decode_bucket(130, 65), decode_bucket(1, 64)
    ((256, 64), (192, 128), (8, 64))
    """
    power = 1 << (max(rows, 8) - 1).bit_length()  # the power of two at or above
    return power * 3 // 4 if 8 < rows <= power * 3 // 4 else power, -(-columns // 64) * 64


class Decoder:
    """Decode steps on buffers that stay where they are, one captured CUDA graph per bucket and sampling settings.

    model: its weights may change in place, never move. fallbacks: steps that ran without graph and compilation, because
    the device has no graphs or a capture failed; `say` tells why.
    """

    def __init__(self, model, compiled: bool, say=print):
        self.model, self.compiled, self.say = model, compiled, say
        self.step = torch.compile(decode_step, dynamic=False, fullgraph=True) if compiled else decode_step
        self.size, self.fallbacks = (0, 0, 0), 0  # rows, columns and tokens that there is room for; none yet
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # buckets; beyond it is an error, not a silent return to eager

    def place(self, s: DecodeState) -> DecodeState:
        """Copies a state into the buffers, its rows padded to the bucket. They grow, and graphs go, if it has no room."""
        n, C, (B, T) = len(s.token), s.keys[0].shape[2], s.ids.shape
        need = (*decode_bucket(n, C), T)
        if any(a > b for a, b in zip(need, self.size)):
            self.graphs, self.pool = {}, None  # the graphs hold the old addresses
            self.size = R, columns, length = tuple(map(max, need, self.size))
            self.buffers = DecodeState(
                *(x.new_zeros(R) for x in (s.token, s.position, s.finished, s.output)),
                *([x.new_zeros(R, x.shape[1], columns, x.shape[3]) for x in xs] for xs in (s.keys, s.values)),
                s.t.clone(),
                *(x.new_zeros(R + 1, length) for x in (s.noise, s.ids, s.logprobs)),  # padding writes to the last row
            )
        own = self.buffers
        if s.ids is not own.ids:  # a new batch, not what is left of one
            own.t.copy_(s.t)
            own.noise[:B, :T], own.ids[:B, :T], own.logprobs[:B, :T] = s.noise, s.ids, s.logprobs
        view = own.rows(slice(need[0]))
        for name, padding in {"token": 0, "position": 0, "finished": True, "output": self.size[0]}.items():
            getattr(view, name)[:n], getattr(view, name)[n:] = getattr(s, name), padding
        for buffer, new in zip(view.keys + view.values, s.keys + s.values):
            buffer[:n, :, :C], buffer[:n, :, C:] = new, 0  # nothing of an earlier batch, be it not a number
        return view

    def advance(self, s: DecodeState, columns: int, *sampling) -> None:
        """One decode step of a placed state whose rows fill at most `columns` columns of the cache."""
        rows, columns = decode_bucket(len(s.token), columns)
        key = (rows, columns, *sampling)
        with torch.autocast(s.token.device.type, enabled=False):  # one dtype throughout; casts would move
            if key not in self.graphs:
                view = self.buffers.rows(slice(rows), columns)
                plain = partial(decode_step, self.model, view, *sampling)
                changed = (view.token, view.position, view.finished, view.t)
                before = [x.clone() for x in changed]

                def undo():
                    for x, value in zip(changed, before):
                        x.copy_(value)

                try:
                    fast = self.capture(partial(self.step, self.model, view, *sampling), undo)
                except Exception as error:  # whatever the compiler or CUDA raises
                    undo()
                    fast = None
                    self.say(f"decode bucket {rows} x {columns} runs uncaptured: {str(error).splitlines()[0]}")
                self.graphs[key] = (fast or plain, fast is None)
            run, is_fallback = self.graphs[key]
            run()
            self.fallbacks += is_fallback

    def capture(self, step, undo):
        """step() as a CUDA graph: returns what replays it, or None where there are no graphs. undo() takes a step back."""
        if self.buffers.token.device.type != "cuda":
            if not self.compiled:
                return None
            step()
            undo()
            return step
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # no two graphs run at once: they share their memory
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles; libraries make their workspaces, which must not be part of a graph
                step()
                undo()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL's thread goes on
            step()
        return graph.replay


def pad_right(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (N, L) ids padded on the right, (N,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


@torch.no_grad()
def generate(
    model, prompts, *, num_generations, max_new_tokens, temperature, stop_ids, pad_id, noise=None, vocab_size=None,
    race=False, decoder=None,
):  # fmt: skip
    """Samples num_generations completions of each prompt.

    prompts: P lists of token ids; noise (B, max_new_tokens) from sampling_noise, None at temperature 0; decoder: a
    Decoder of this model for --decode graph and compile, None for decode steps op by op.
    Returns ids (B, T) int64 with pad_id after the end, mask (B, T) bool up to and including the first end token, and
    logprobs (B, T) float32 of the sampled tokens, 0 where masked; B = P * num_generations, T <= max_new_tokens.
    """
    device = model.device
    distinct = list(dict.fromkeys(map(tuple, prompts)))  # each distinct prompt is prefilled once
    which = torch.tensor([distinct.index(tuple(p)) for p in prompts], device=device).repeat_interleave(num_generations)
    prompt_ids, lengths = pad_right([list(p) for p in distinct], pad_id, device)  # (P', L), (P',)
    L, B, T = prompt_ids.shape[1], len(which), max_new_tokens
    sampling = (temperature, tuple(stop_ids), pad_id, vocab_size, race)

    # prefill: padding on the right is never seen by a causal model, and is overwritten column by column below
    cache = DynamicCache(config=model.config)
    hidden = model.base_model(input_ids=prompt_ids, past_key_values=cache, use_cache=True).last_hidden_state
    last = hidden[torch.arange(len(distinct), device=device), lengths - 1]  # (P', d)

    # expand: B rows of preallocated cache, row i continues at its own position
    def expand(prefilled):  # (P', heads, L, head_dim) -> (B, heads, L + T, head_dim)
        out = prefilled.new_zeros(B, prefilled.shape[1], L + T, prefilled.shape[3])
        out[:, :, :L] = prefilled[which]
        return out

    state = DecodeState(
        token=torch.zeros(B, dtype=torch.long, device=device),
        position=lengths[which],
        finished=torch.zeros(B, dtype=torch.bool, device=device),
        output=torch.arange(B, device=device),
        keys=[expand(layer.keys) for layer in cache.layers],
        values=[expand(layer.values) for layer in cache.layers],
        t=torch.zeros(1, dtype=torch.long, device=device),
        noise=noise.to(device) if temperature > 0 else torch.zeros(B, T, device=device),
        ids=torch.full((B, T), pad_id, device=device),
        logprobs=torch.zeros(B, T, device=device),
    )
    append_tokens(model.get_output_embeddings()(last)[which], state, *sampling)
    alive, n = B, 1  # rows in the batch, padding not counted; tokens sampled
    state = decoder.place(state) if decoder else state
    check_every = 1 if device.type == "cpu" else 8  # asking a GPU how many rows have ended stalls it
    while n < T:
        if n % check_every == 0:
            chosen = (~state.finished).nonzero()[:, 0]
            if len(chosen) == 0:
                break
            if 2 * len(chosen) <= alive:  # half the rows have ended: go on with the others alone
                state, alive = state.rows(chosen), len(chosen)
                state = decoder.place(state) if decoder else state
        if decoder:
            decoder.advance(state, L + n, *sampling)
        else:
            decode_step(model, state, *sampling)
        n += 1
    ids, logprobs = state.ids[:B, :n].clone(), state.logprobs[:B, :n]  # the decoder's own buffers serve the next call
    mask = completion_mask(ids, stop_ids)
    return ids, mask, logprobs * mask


def replace_rows(old: torch.Tensor, new: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """old (B, T), new (b, T') -> (B, max(T, T')) with `new` in these rows, and zeros where either was shorter."""
    T = max(old.shape[1], new.shape[1])
    out = F.pad(old, (0, T - old.shape[1]))
    out[rows] = F.pad(new, (0, T - new.shape[1]))
    return out


def decode(tokenizer, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """(B, T) ids -> what rewards, train accuracy, evaluation and tables all see: the text up to the first end token."""
    return tokenizer.batch_decode([row[m].tolist() for row, m in zip(ids.cpu(), mask.cpu())], skip_special_tokens=True)


# ---- 6. Evaluate -----------------------------------------------------------------------------------------------------


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion correct / n."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, correct / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one (unbiased, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)  # eq: 1 - C(n - c, k) / C(n, k)


def sample_answers(model, tokenizer, problems, *, samples, temperature, args, world, seed=0, **sampling):
    """k completions of each problem -> correct (N, k) float array, completions N lists of k texts. On every process.

    The noise is that of the evaluation, not of the run: all runs and all steps are measured with the same draws.
    """
    mine = range(world.rank, len(problems), world.size)
    per_batch = max(args.eval_batch_size // samples, 1)
    results = []
    for start in range(0, len(mine), per_batch):
        chunk = mine[start : start + per_batch]
        prompts = tokenizer([problems[i].prompt for i in chunk]).input_ids
        sample_ids = [i * samples + k for i in chunk for k in range(samples)]
        noise = sampling_noise([1, seed], sample_ids, args.max_completion_length) if temperature > 0 else None
        with autocast(args, world.device):
            ids, mask, _ = generate(
                model,
                prompts,
                num_generations=samples,
                max_new_tokens=args.max_completion_length,
                temperature=temperature,
                noise=noise,
                **sampling,
            )
        texts = decode(tokenizer, ids, mask)
        results += [(i, texts[j * samples : (j + 1) * samples]) for j, i in enumerate(chunk)]
    results = sorted(world.gather(results))
    correct = [[float(is_correct(text, problems[i])) for text in texts] for i, texts in results]
    return np.array(correct), [texts for _, texts in results]


def eval_metrics(problems, sampled, greedy, trained_prompts) -> dict[str, float]:
    """Accuracies of the standard evaluation. sampled (N, k) and greedy (N, 1): 1.0 where the answer is right.

    Intervals take each problem as one observation, however many samples it got: problems are what was drawn.
    """
    N, k = sampled.shape
    mean = sampled.mean(1)  # (N,)
    low, high = wilson(mean.sum(), N)
    metrics = {
        "arithmetic_eval": mean.mean(),
        "arithmetic_eval_low": low,
        "arithmetic_eval_high": high,
        "arithmetic_eval_correct": int(sampled.sum()),
        "arithmetic_eval_total": N * k,
        "arithmetic_eval_greedy": greedy.mean(),
    }
    for j in [j for j in (4, 16, 64) if 1 < j <= k]:
        metrics[f"arithmetic_eval_pass@{j}"] = np.mean([pass_at_k(k, int(c), j) for c in sampled.sum(1)])
    unseen = np.array([p.prompt not in trained_prompts for p in problems])
    groups = {"arithmetic_eval_unseen": unseen}
    groups |= {f"eval_{band}_accuracy": [p.difficulty == band for p in problems] for band in EVAL_BANDS}
    groups |= {f"eval_{name}_accuracy": [p.operation == op for p in problems] for op, name in OPERATION_NAMES.items()}
    for name, members in groups.items():
        chosen = mean[np.array(members)]
        if len(chosen):
            low, high = wilson(chosen.sum(), len(chosen))
            metrics |= {name: chosen.mean(), f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(chosen)}
    return {name: float(value) for name, value in metrics.items()}


def task_metrics(problems, sampled, greedy) -> dict[str, float]:
    """Accuracies on the held-out problems of each task, as in eval_metrics."""
    metrics, mean = {}, sampled.mean(1)  # (N,)
    for task in dict.fromkeys(p.task for p in problems):
        mine = np.array([p.task == task for p in problems])
        name, n, (low, high) = f"eval_{task}_accuracy", mine.sum(), wilson(mean[mine].sum(), mine.sum())
        metrics |= {name: mean[mine].mean(), f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}
        metrics[f"eval_{task}_greedy"] = greedy[mine].mean()
    return {name: float(value) for name, value in metrics.items()}


def evaluate(model, tokenizer, problems, trained_prompts, args, world, **sampling):
    """The standard evaluation: k samples at --eval-temperature, and greedy. Returns metrics and a table of answers."""
    sampled, texts = sample_answers(
        model, tokenizer, problems, samples=args.eval_samples, temperature=args.eval_temperature,
        args=args, world=world, **sampling,
    )  # fmt: skip
    greedy, greedy_texts = sample_answers(
        model, tokenizer, problems, samples=1, temperature=0.0, args=args, world=world, **sampling
    )
    table = [
        {
            "prompt": p.prompt,
            "expected": p.answer,
            "greedy": greedy_texts[i][0],
            "sample": texts[i][0],
            "extracted_answer": parse_answer(texts[i][0], p),
            "accuracy": sampled[i].mean(),
            "difficulty": p.difficulty,
            "task": p.task,
        }
        for i, p in enumerate(problems)
    ]
    N = sum(p.difficulty != "held out" for p in problems)  # the standard evaluation comes first
    metrics = eval_metrics(problems[:N], sampled[:N], greedy[:N], trained_prompts)
    return metrics | task_metrics(problems[N:], sampled[N:], greedy[N:]), table


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


def resolve(args: Args, config) -> Args:
    """Fills the defaults that depend on other flags or on the size of the model; all of them here."""
    try:
        with torch.device("meta"):  # shapes without weights
            small = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) < 50e6
    except ValueError:
        fail(f"'{args.model_name}' is a {config.model_type} model, not a causal language model")
    low, high = {"mixed": (0, 20), "small_numbers": (0, 10)}[args.dataset_type]
    defaults = {
        "exp_name": f"grpo_{args.dataset_type}_b{args.batch_size}_g{args.num_generations}",
        "min_num": low,
        "max_num": high,
        "reward_weights": (1.0,) * len(args.rewards),
        "proportions": (2.0,) + (1.0,) * (len(args.tasks) - 1),
        "n_samples": 1000 if small else 150,
        "epochs": 6 if small else 50,
        "learning_rate": 3e-4 if small else 5e-6,
    }
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def check_evaluation(args: Args) -> None:
    if args.eval_samples < 1 or args.max_completion_length < 1:
        fail("--eval-samples and --max-completion-length must be at least 1")
    if args.eval_temperature < 0:
        fail("--eval-temperature must not be negative; 0 is greedy")


def check_problems(args: Args) -> None:
    if not args.operations or set(args.operations) - set(OPERATION_NAMES):
        fail(f"--operations {args.operations!r}: any of + - * / without blanks, such as '+-*'")
    weights = args.op_weights
    if weights is not None and (len(weights) != len(args.operations) or min(weights) < 0 or sum(weights) <= 0):
        fail(f"--op-weights needs {len(args.operations)} weights, none negative and not all 0, for '{args.operations}'")
    if args.min_num >= args.max_num:
        fail(f"--min-num {args.min_num} must be below --max-num {args.max_num}")
    if unknown := [task for task in args.tasks if task not in TASKS]:
        fail(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if not args.tasks or len(set(args.tasks)) < len(args.tasks) or args.task_eval_problems < 1:
        fail("--tasks needs at least one task, each once, and --task-eval-problems at least 1")
    if len(args.proportions) != len(args.tasks) or min(args.proportions) <= 0:
        fail(f"--proportions needs {len(args.tasks)} numbers above 0, one for each of --tasks {' '.join(args.tasks)}")


def check_training(args: Args, world: World) -> None:
    """Every wrong combination of flags ends here, before a model is loaded, in one line."""
    B, G = args.batch_size, args.num_generations
    if G < 2:
        fail(f"--num-generations {G}: a completion is compared with the others of its prompt, so at least 2 are needed")
    if B < G or B % G:
        fail(f"--batch-size {B} is not a multiple of --num-generations {G}; try --batch-size {max(B // G, 1) * G}")
    P = B // G
    if P % world.size:
        fail(f"{P} prompts per step ({B} / {G}) cannot be shared by {world.size} processes; make it a multiple of them")
    if args.temperature <= 0:
        fail(
            "--temperature 0 makes all completions of a prompt equal, so nothing can be learnt from them; 0.7 is usual"
        )
    micro = args.micro_batch_size
    if micro is not None and (micro < 1 or (micro % G and G % micro)):
        fail(f"--micro-batch-size {micro} must divide --num-generations {G} or be a multiple of it")
    if min(args.epochs, args.num_iterations, args.n_samples) < 1 or args.refill < 0:
        fail("--epochs, --num-iterations and --n-samples must be at least 1, and --refill at least 0")
    if args.delta is not None and args.delta <= 1 + args.epsilon:
        fail(f"--delta {args.delta} must be above 1 + epsilon = {1 + args.epsilon}, or it replaces the ordinary clip")
    if args.fsdp and (args.compile or args.low_memory_reference or args.attn_implementation == "flash_attention_2"):
        fail("--fsdp goes with neither --compile, --low-memory-reference (it is sharded anyway) nor flash_attention_2")
    if args.fsdp and world.size == 1:
        fail("--fsdp shards over processes: start it with `uv run torchrun --nproc-per-node N`, or leave it out")
    if unknown := set(args.rewards) - set(REWARDS):
        fail(f"unknown reward {sorted(unknown)[0]!r}; known: {', '.join(REWARDS)}")
    if not args.rewards or len(args.reward_weights) != len(args.rewards):
        fail(f"{len(args.reward_weights)} --reward-weights for {len(args.rewards)} --rewards; give one each")
    if P > args.n_samples:
        fail(f"{P} prompts per step of only {args.n_samples} training problems; raise --n-samples")


def check_lengths(args: Args, tokenizer, config, problems: list[Problem]) -> None:
    longest = max(len(tokenizer(p.prompt).input_ids) for p in problems)
    need, room = longest + args.max_completion_length, getattr(config, "max_position_embeddings", None)
    if room and need > room:
        fail(
            f"prompts of up to {longest} tokens and --max-completion-length {args.max_completion_length} exceed the "
            f"model's context of {room}; at most {room - longest} new tokens fit"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and need > window:
        fail(
            f"{need} tokens exceed the model's sliding attention window of {window}, which generation does not support"
        )


def learning_rate_at(step: int, total: int, args: Args) -> float:
    """Learning rate of step number `step` (from 0) of `total`."""
    warmup = math.ceil(total * args.warmup_ratio)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return (
        args.learning_rate
        * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[args.lr_schedule]
    )


def micro_batches(num_prompts: int, G: int, size: int | None) -> list[tuple[slice, slice]]:
    """Pairs (slice of prompts, slice of their completions) of `size` completions each; size >= G keeps groups whole."""
    if size is None or size >= G:
        n = num_prompts if size is None else size // G
        ends = [(i, min(i + n, num_prompts)) for i in range(0, num_prompts, n)]
        return [(slice(i, j), slice(i * G, j * G)) for i, j in ends]
    return [(slice(i // G, i // G + 1), slice(i, i + size)) for i in range(0, num_prompts * G, size)]


def alarms(metrics: dict) -> dict[str, str]:
    """What looks broken in a step's metrics, in plain words."""
    found = {}
    if metrics["train/frac_reward_zero_std"] == 1:
        found["equal rewards"] = (
            f"all completions of every prompt earned the same reward ({metrics['train/reward']:.2f} on average): "
            "nothing to learn from this step. Raise the temperature, or look at completions.jsonl"
        )
    if metrics.get("train/kl", 0.0) > 5:
        found["kl"] = (
            f"KL to the reference is {metrics['train/kl']:.1f} nats a token: the policy is leaving its language. "
            "Lower --learning-rate or raise --beta"
        )
    if metrics["train/completions/clipped_ratio"] == 1:
        found["truncated"] = (
            "every completion was cut at --max-completion-length before it ended. Allow more tokens, or check that the "
            "model's end token is right"
        )
    if metrics["train/skipped"]:
        found["skipped"] = (
            "the loss or gradient was not finite or no token was left to train: weights left as they were"
        )
    if metrics["train/entropy"] < 0.01:
        found["entropy"] = (
            "entropy is below 0.01 nats a token: the policy has become deterministic and stopped exploring"
        )
    return found


def main(args: Args) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its retries are no news: a model that cannot be had ends in one line
    stop = StopSignal()
    world = setup_world(args.device)

    # ---- setup: everything that can be wrong is found before the weights are read ----
    checkpoint = None
    if args.resume:
        free = {"resume", "device", "track", "wandb_mode"}  # may differ from the run's own settings
        if given := [k for k, v in asdict(args).items() if k not in free and v != asdict(Args())[k]]:
            fail(
                f"--resume continues with the run's own settings; drop --{given[0].replace('_', '-')} or use --init-from"
            )
        checkpoint = find_checkpoint(args.resume)
        run_dir = checkpoint.parent.parent
        args = replace(read_config(run_dir, Args), **{k: getattr(args, k) for k in free})
    elif args.init_from:
        best = Path(args.init_from) / "best"
        args = replace(args, model_name=str(find_checkpoint(str(best if best.exists() else args.init_from))))
    tokenizer, config = load_tokenizer(args)
    eval_problems = load_problems(args.eval_dataset)
    excluded = {p.prompt for p in eval_problems} if args.exclude_eval else set()
    args = resolve(args, config)
    check_evaluation(args)
    check_problems(args)
    if not args.eval_only:
        check_training(args, world)
    levels = levels_of(args)
    eval_problems += draw_held_out(args, "eval", args.task_eval_problems, excluded)
    draws = [p for level in levels for p in draw_mixture(np.random.default_rng(0), level, 200, excluded)]
    check_lengths(args, tokenizer, config, eval_problems + draws)

    seed_everything(args.seed)
    model = load_model(replace(args, model_name=str(checkpoint)) if checkpoint else args, world.device)
    if not checkpoint:
        parts = world.gather(
            [str(create_run(__file__, args.exp_name, args.seed, args.output_dir))] if world.main else []
        )
        run_dir = Path(parts[0])
        if world.main:
            write_config(run_dir, args, world)
    logger = Logger(
        run_dir, asdict(args), track=args.track, wandb_mode=args.wandb_mode, tags=args.tags, enabled=world.main
    )
    exit_code = 1  # unless the end is reached
    try:
        exit_code = run(args, world, stop, logger, run_dir, checkpoint, model, tokenizer, eval_problems, levels)
    finally:
        logger.finish(exit_code)
        close_world(world)
    sys.exit(exit_code)


def run(args, world, stop, logger, run_dir, checkpoint, model, tokenizer, eval_problems, levels) -> int:
    B, G = args.batch_size, args.num_generations
    P = B // G  # prompts per step
    local_P, local_B = P // world.size, B // world.size
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    device = world.device

    # the policy that samples: on a GPU a bfloat16 copy of the fp32 masters, refreshed in place after every update
    low_precision = not isinstance(autocast(args, device), nullcontext)
    sampler, decoder = model, None
    if low_precision or args.decode != "eager" or args.compile or args.fsdp:
        sampler = copy.deepcopy(model).to(device, torch.bfloat16 if low_precision else None).requires_grad_(False)
    if args.attn_implementation == "flash_attention_2":
        sampler.set_attn_implementation("sdpa")  # a cache with a position per row needs a mask, which flash-attn lacks
    if args.decode != "eager":
        sampler.set_attn_implementation("packed")
        decoder = Decoder(sampler, args.decode == "compile", logger.say)
        if args.decode == "graph" and device.type != "cuda":
            logger.say("--decode graph: no CUDA graphs on a CPU; steps run uncaptured, see time/decode_fallbacks")
    sampling = {"stop_ids": stop_ids, "pad_id": pad_id, "vocab_size": len(tokenizer)}
    sampling |= {"race": args.race, "decoder": decoder}

    if args.eval_only:
        metrics, table = evaluate(sampler, tokenizer, eval_problems, set(), args, world, **sampling)
        logger.log(0, metrics)
        logger.table("evaluation", 0, table)
        for name, value in metrics.items():
            if not name.endswith(("_low", "_high", "_n")):
                interval = (
                    f"  [{metrics[name + '_low']:.3f}, {metrics[name + '_high']:.3f}]"
                    if name + "_low" in metrics
                    else ""
                )
                logger.say(f"{name:32s} {value:.3f}{interval}")
        logger.say(f"evaluated {args.model_name}; answers in {run_dir}/evaluation.jsonl")
        return 0

    excluded = {p.prompt for p in eval_problems} if args.exclude_eval else set()
    pools = []
    for i, level in enumerate(levels):
        pools.append(draw_mixture(np.random.default_rng([args.seed, i]), level, args.n_samples, excluded))
    trained_prompts = set() if args.fresh else {p.prompt for pool in pools for p in pool}
    # picks the best checkpoint and stops early, so that the evaluation set itself selects nothing
    validation = draw_held_out(args, "validation", 40, excluded)
    steps_per_epoch = max(args.n_samples // P, 1)
    total_steps = args.epochs * steps_per_epoch

    # the reference is the model as it was before the first step, also in a resumed run
    reference = initial_weights = None
    if args.beta != 0:
        start_model = (
            load_model(args, torch.device("cpu") if args.low_memory_reference else device) if checkpoint else model
        )
        if args.low_memory_reference:
            initial_weights = [p.detach().to("cpu", copy=True) for p in start_model.parameters()]
        else:
            reference = (start_model if checkpoint else copy.deepcopy(model)).requires_grad_(False)
    for network in filter(None, (model, reference)):
        if args.fsdp:
            shard(network, args, world)
        if args.compile:
            for layer in decoder_layers(network):
                layer.compile(dynamic=True)  # rows are never of one length
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )

    # everything besides weights, optimizer and RNG that the next step depends on
    state = {
        "script": SCRIPT, "step": 0, "level": 0, "level_start": 0, "recent_rewards": [], "num_tokens": 0,
        "skipped_steps": 0, "best": None, "best_step": 0, "evals_without_gain": 0, "base": None, "last": None,
        "fresh_prompts": [], "elapsed": 0.0, "solve_rates": {},
    }  # fmt: skip
    if checkpoint:
        state = load_state(checkpoint, optimizer, SCRIPT)
        trained_prompts |= set(state["fresh_prompts"])
        logger.truncate(state["step"], state["elapsed"])

    def save(step: int) -> None:
        weights = moments = None
        if args.fsdp:  # all processes gather, the first one writes; parameters() has a tied weight once
            weights = gathered({name: p.detach() for name, p in model.named_parameters()}, world.main)
            moments = {i: gathered(slots, world.main) for i, slots in optimizer.state_dict()["state"].items()}
        if world.main:
            fresh = sorted(trained_prompts) if args.fresh else []
            state.update(step=step, elapsed=logger.elapsed, fresh_prompts=fresh)
            folder = run_dir / "checkpoints" / f"step-{step:06d}"
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                save_state(temporary, optimizer, state, moments)
            link(run_dir, "last", folder)
            if state["best_step"] == step:
                link(run_dir, "best", folder)
            prune(run_dir, args.keep)

    def measure(step: int) -> dict[str, float]:
        """The standard evaluation and the validation accuracy; remembers the best step."""
        start = time.time()
        metrics, table = evaluate(sampler, tokenizer, eval_problems, trained_prompts, args, world, **sampling)
        right, _ = sample_answers(
            sampler, tokenizer, validation, samples=4, temperature=args.eval_temperature, args=args, world=world,
            seed=1, **sampling,
        )  # fmt: skip
        metrics["validation_accuracy"] = right.mean()
        if step > 0:  # the best trained weights: the base model is no candidate
            better = state["best"] is None or metrics["validation_accuracy"] > state["best"]
            if better:
                state.update(best=metrics["validation_accuracy"], best_step=step)
            state["evals_without_gain"] = 0 if better else state["evals_without_gain"] + 1
            metrics["best_validation_accuracy"] = state["best"]
        state["base"], state["last"] = state["base"] or metrics, metrics
        logger.table("evaluation", step, table)
        return metrics | {"time/eval_s": time.time() - start}

    def sample(problems: list[Problem], sample_ids):
        """G completions of each problem: ids, mask, log-probs (rows, T) and texts."""
        prompts = tokenizer([p.prompt for p in problems]).input_ids
        noise = sampling_noise([0, args.seed], sample_ids, args.max_completion_length)
        with autocast(args, device):
            ids, mask, logprobs = generate(
                sampler, prompts, num_generations=G, max_new_tokens=args.max_completion_length,
                temperature=args.temperature, noise=noise, **sampling,
            )  # fmt: skip
        return ids, mask, logprobs, decode(tokenizer, ids, mask)

    slices = micro_batches(local_P, G, args.micro_batch_size)
    logger.say(
        f"{run_dir}\n{sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {device}, "
        f"learning rate {args.learning_rate:g}, beta {args.beta:g}, loss {args.loss_type}\n"
        f"{P} prompts x {G} generations = {B} completions a step in {len(slices) * world.size} micro-batches; "
        f"{len(pools[0])} problems / {P} = {steps_per_epoch} steps an epoch x {args.epochs} epochs = {total_steps} steps"
    )
    if state["step"] == 0 and state["base"] is None:
        metrics = measure(0)
        logger.log(0, metrics)
        logger.say(
            f"before training: arithmetic_eval {metrics['arithmetic_eval']:.3f} "
            f"[{metrics['arithmetic_eval_low']:.3f}, {metrics['arithmetic_eval_high']:.3f}], "
            f"greedy {metrics['arithmetic_eval_greedy']:.3f}"
        )
    logger.progress(total_steps, state["step"])
    alarmed: dict[str, int] = {}
    step = state["step"]
    while step < total_steps:
        step_start = time.time()

        # ---- 1. sample: each process its share of the prompts ----
        level = next_level(args.curriculum, state["level"], step / total_steps, state["recent_rewards"])
        if level != state["level"]:
            logger.say(f"step {step}: curriculum level {state['level']} -> {level}, {levels[level]}")
            state.update(level=level, level_start=step, recent_rewards=[])
        levels[level] = with_shares(args, levels[level], state["solve_rates"])
        if args.fresh or args.sampling != "proportional":
            rng = np.random.default_rng([args.seed, 2, step])
            problems = draw_more(rng, args, pools[level], levels[level], P, excluded)
        else:
            problems = draw_batch(pools[level], step - state["level_start"], P, [args.seed, 1, level])
        mine = problems[world.rank * local_P : (world.rank + 1) * local_P]
        first = step * B + world.rank * local_B
        ids, mask, sampled_logprobs, texts = sample(mine, range(first, first + local_B))

        # ---- 2. rewards, over the completions of all processes; groups without spread teach nothing: refill them ----
        refilled = 0
        for attempt in range(args.refill + 1):
            row_problems = [p for p in mine for _ in range(G)]  # row i belongs to prompt i // G, here and everywhere
            parts = [[REWARDS[name](text, p) for name in args.rewards] for text, p in zip(texts, row_problems)]
            reward_parts = torch.tensor(world.gather(parts))  # (B, functions)
            rewards = reward_parts @ torch.tensor(args.reward_weights)  # (B,)
            if attempt == 0:  # the tasks' solve rates, before refilling picks what is neither easy nor hopeless
                solved = [(p.task, is_correct(text, p)) for text, p in zip(texts, row_problems)]
                solved = world.gather(solved)
            dull = [i for i, group in enumerate(rewards.view(P, G)) if group.amax() == group.amin()]
            if attempt == args.refill or not dull:
                break
            rng = np.random.default_rng([args.seed, 3 + attempt, step])
            for i, problem in zip(dull, draw_more(rng, args, pools[level], levels[level], len(dull), excluded)):
                problems[i] = problem
            refilled += len(dull)
            mine = problems[world.rank * local_P : (world.rank + 1) * local_P]
            own = [i - world.rank * local_P for i in dull if i // local_P == world.rank]
            rows = [i * G + j for i in own for j in range(G)]
            if own:
                # far from the ids of all steps, so that no noise is used twice
                *new, new_texts = sample([mine[i] for i in own], [first + row + (attempt + 1) * 2**40 for row in rows])
                old = (ids, mask, sampled_logprobs)
                ids, mask, sampled_logprobs = (replace_rows(a, b, rows) for a, b in zip(old, new))
                texts = [new_texts[rows.index(row)] if row in rows else text for row, text in enumerate(texts)]
        if args.fresh:
            trained_prompts.update(p.prompt for p in problems)
        generation_s = time.time() - step_start

        # ---- 3. advantages and update ----
        update_start = time.time()
        advantages = group_advantages(rewards, G, args.scale_rewards)  # (B,)
        my_advantages = advantages[world.rank * local_B : (world.rank + 1) * local_B].to(device)
        ended = torch.isin(ids, torch.tensor(stop_ids, device=device)).any(1)  # (local_B,)
        loss_mask = mask & ended[:, None] if args.mask_truncated_completions else mask  # (local_B, T)

        prompt_ids, prompt_lengths = pad_right(tokenizer([p.prompt for p in mine]).input_ids, pad_id, device)
        num_loss_tokens = loss_mask.sum().float()
        world.all_sum([num_loss_tokens])

        def logprobs_of(policy, prompts_slice, rows_slice):
            logprobs_under = policy.token_logprobs if args.fsdp else partial(token_logprobs, policy)
            with autocast(args, device):
                return logprobs_under(
                    prompt_ids[prompts_slice], prompt_lengths[prompts_slice], ids[rows_slice],
                    loss_mask[rows_slice], temperature=args.temperature, vocab_size=len(tokenizer),
                    share_prompt=False if args.attn_implementation == "flash_attention_2" else args.share_prompt,
                )  # fmt: skip

        ref_logprobs = [None] * len(slices)
        if args.beta != 0:
            with torch.no_grad(), swapped(model, initial_weights) if initial_weights else nullcontext(reference) as ref:
                ref_logprobs = [logprobs_of(ref, *s)[0] for s in slices]
        old_logprobs: list[torch.Tensor] = []
        sums: Counter = Counter()  # of means over the step: micro-batches, processes and iterations add up
        extremes = {"clip_ratio/low_min": math.inf, "clip_ratio/high_max": 0.0}
        gap_max, skipped = 0.0, 0
        learning_rate = learning_rate_at(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        model.train(args.gradient_checkpointing)  # transformers recomputes in train mode only; dropout is off anyway
        for iteration in range(args.num_iterations):
            for i, (prompts_slice, rows_slice) in enumerate(slices):
                logprobs, entropy = logprobs_of(model, prompts_slice, rows_slice)  # (b, T), (b, T)
                if iteration == 0:
                    old_logprobs.append(logprobs.detach())  # weights as they were when sampling: ratio 1 on this pass
                    gap = (logprobs.detach() - sampled_logprobs[rows_slice]).abs() * loss_mask[rows_slice]
                    sums["sampling_logp_difference/mean"] += gap.sum() / num_loss_tokens.clamp(min=1)
                    gap_max = max(gap_max, gap.max().item())
                loss, metrics = grpo_loss(
                    logprobs, old_logprobs[i], ref_logprobs[i], my_advantages[rows_slice], loss_mask[rows_slice],
                    loss_type=args.loss_type, beta=args.beta, epsilon=args.epsilon, epsilon_high=args.epsilon_high,
                    delta=args.delta, max_completion_length=args.max_completion_length,
                    num_loss_tokens=num_loss_tokens, num_sequences=B,
                )  # fmt: skip
                (loss * world.size if args.fsdp else loss).backward()  # FSDP takes means over processes, we take sums
                metrics |= {"loss": loss.detach(), "entropy": entropy.sum() / num_loss_tokens.clamp(min=1)}
                for name, value in metrics.items():
                    if name in extremes:
                        extremes[name] = (min if name.endswith("min") else max)(extremes[name], value.item())
                    else:
                        sums[name] += value / args.num_iterations
            if not args.fsdp:  # whose backward pass has done it
                world.all_sum([p.grad for p in model.parameters() if p.grad is not None])
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            grad_norm = grad_norm.full_tensor() if args.fsdp else grad_norm
            if torch.isfinite(grad_norm) and num_loss_tokens > 0:
                optimizer.step()
            else:  # AdamW would decay the weights and shift its moments even at gradient zero
                skipped += 1
            optimizer.zero_grad(set_to_none=True)
        model.eval()
        if sampler is not model:
            with torch.no_grad():  # in place: captured graphs and caches keep their addresses
                for low, full in zip(sampler.parameters(), model.parameters()):
                    low.copy_(full.to(low.dtype).full_tensor() if args.fsdp else full)
        update_s = time.time() - update_start

        # ---- 4. log ----
        step += 1
        names = list(sums)
        totals = torch.stack([torch.as_tensor(sums[name], device=device, dtype=torch.float32) for name in names])
        stop_now = torch.tensor(float(stop.number is not None), device=device)
        world.all_sum([totals, stop_now])
        correct = [is_correct(text, p) for text, p in zip(texts, row_problems)]
        lengths, finished, correct, gaps, lows, highs = (
            world.gather(x)
            for x in (mask.sum(1).tolist(), ended.tolist(), correct, [gap_max], *([v] for v in extremes.values()))
        )
        groups = rewards.view(P, G)
        state["skipped_steps"] += skipped
        state["num_tokens"] += sum(lengths) + G * sum(len(tokenizer(p.prompt).input_ids) for p in problems)
        state["recent_rewards"] = [*state["recent_rewards"], rewards.mean().item()][-10:]
        terminated = [n for n, done in zip(lengths, finished) if done] or [0]
        metrics = dict(zip(names, totals.tolist())) | {
            "sampling_logp_difference/max": max(gaps),
            "clip_ratio/low_min": min(lows),
            "clip_ratio/high_max": max(highs),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "epoch": step / steps_per_epoch,
            "num_tokens": state["num_tokens"],
            "reward": rewards.mean(),
            "reward_std": rewards.std(),
            "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
            "accuracy": np.mean(correct),
            "completions/mean_length": np.mean(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/mean_terminated_length": np.mean(terminated),
            "completions/min_terminated_length": min(terminated),
            "completions/max_terminated_length": max(terminated),
            "completions/clipped_ratio": 1 - np.mean(finished),
            "refilled_groups": refilled,
            "refilled_completions": refilled * G,
            "curriculum_level": state["level"],
            "skipped": skipped,
            "skipped_steps": state["skipped_steps"],
        }
        for name, column in zip(args.rewards, reward_parts.T):
            metrics |= {f"rewards/{name}/mean": column.mean(), f"rewards/{name}/std": column.std()}
        for task, share in levels[level].shares.items():
            groups_of = torch.tensor([p.task == task for p in problems])  # (P,)
            metrics |= {f"{task}/share": share, f"{task}/groups": groups_of.sum()}
            if right := [ok for name, ok in solved if name == task]:
                rate = 0.9 * state["solve_rates"].get(task, np.mean(right)) + 0.1 * np.mean(right)
                state["solve_rates"][task] = float(rate)
                metrics |= {f"{task}/accuracy": np.mean(right), f"{task}/solve_rate": rate}
            if groups_of.any():
                own = groups[groups_of]  # (P', G)
                metrics[f"{task}/reward"] = own.mean()
                metrics[f"{task}/frac_reward_zero_std"] = (own.amax(1) == own.amin(1)).float().mean()
        metrics = {f"train/{name}": float(value) for name, value in metrics.items()}
        for kind, text in alarms(metrics).items():
            if step - alarmed.get(kind, -50) >= 50:  # say it, do not shout it
                alarmed[kind] = step
                logger.say(f"warning, step {step}: {text}")
        metrics |= {
            "time/generation_s": generation_s,
            "time/update_s": update_s,
            "time/step_s": time.time() - step_start,
            "time/decode_fallbacks": decoder.fallbacks if decoder else 0,
        }
        shown = range(min(args.log_completions, local_B))
        evaluating = (args.eval_every and step % args.eval_every == 0) or step == total_steps
        logger.table(
            "completions",
            step,
            [
                {
                    "prompt": row_problems[i].prompt,
                    "completion": texts[i],
                    "task": row_problems[i].task,
                    "extracted_answer": parse_answer(texts[i], row_problems[i]),
                    "expected": row_problems[i].answer,
                    "is_correct": is_correct(texts[i], row_problems[i]),
                    "reward": rewards[i],
                    **{name: parts[i][j] for j, name in enumerate(args.rewards)},
                    "advantage": advantages[i],
                }
                for i in shown
            ],
            upload=step == 1 or evaluating,
        )

        # ---- 5. evaluate, save, stop ----
        if evaluating:
            metrics |= measure(step)
        logger.log(step, metrics)
        logger.advance(
            reward=metrics["train/reward"], kl=metrics.get("train/kl"), eval=state["last"]["arithmetic_eval"]
        )
        stopped = bool(stop_now)
        patience = args.early_stopping_patience
        early = evaluating and patience is not None and state["evals_without_gain"] >= patience
        due = args.save_every and step % args.save_every == 0
        if due or stopped or early or step == total_steps or (evaluating and state["best_step"] == step):
            save(step)
        if stopped:
            logger.say(f"stopped at step {step}; continue with: uv run python {SCRIPT}.py --resume {run_dir}")
            return stop.exit_code
        if early:
            logger.say(f"stopped early at step {step}: {patience} evaluations without a better validation accuracy")
            break

    # ---- the end: what came out of it, and where it is ----
    fixed = ""
    if not args.fresh:
        right, _ = sample_answers(
            sampler, tokenizer, pools[-1], samples=4, temperature=args.temperature, args=args, world=world, seed=2,
            **sampling,
        )  # fmt: skip
        logger.log(step, {"final_train_accuracy": right.mean()})
        fixed = f"train accuracy {right.mean():.3f}, "
    if world.main:
        logger.finish()  # closes the bar
        figures = plot.draw([run_dir], SCRIPT, run_dir)
        base, last = state["base"], state["last"]
        for name in (f"eval_{task}_accuracy" for task in args.tasks):
            interval = f"[{last[name + '_low']:.3f}, {last[name + '_high']:.3f}]"
            print(f"{name} {base[name]:.3f} -> {last[name]:.3f} {interval} ({last[name + '_n']:.0f} held-out problems)")
        print(
            f"arithmetic_eval {base['arithmetic_eval']:.3f} [{base['arithmetic_eval_low']:.3f}, "
            f"{base['arithmetic_eval_high']:.3f}] -> {last['arithmetic_eval']:.3f} [{last['arithmetic_eval_low']:.3f}, "
            f"{last['arithmetic_eval_high']:.3f}] (held out, {args.eval_samples} samples at T {args.eval_temperature:g}), "
            f"{fixed}best step {state['best_step']}, {step} steps in {logger.elapsed:.0f} s\n"
            f"figures {', '.join(str(f) for f in figures)}; samples {run_dir}/completions.jsonl; model {run_dir}/best"
        )
    return 0


if __name__ == "__main__":
    main(parse(Args, __doc__))
