"""GRPO on a mixture of verifiable tasks: the trainer of grpo_arithmetic.py, with more than one kind of problem.

    prompt      Is 7 less than 8? Answer yes or no:            P prompts a step, G completions of each, B = P * G rows
    reward      r_i = +1 if the answer that the task's parser finds in the completion is right, else -1
    advantage   A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4)
    objective   minimise  mean over tokens of  -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta * KL_k3(policy || ref)
                w = exp(logp - logp_old) is the probability ratio, one per token (DeepSeekMath, arXiv 2402.03300)

A task is a function that draws a problem, and a parser of its answers: see TASKS. diff grpo_arithmetic.py grpo_mixed.py
shows what a mixture changes, and what is only here: curricula, and refilling groups without spread (dynamic sampling).
Every line of the algorithm that is an equation carries it: grep for "eq:".
Dims: P prompts, G completions per prompt, B = P * G rows, b of them in this process, T completion tokens, V vocabulary.
Left out on purpose: vLLM (the generation loop is here), LoRA, rewards from a model.

    uv run python grpo_mixed.py                                              # bundled model, laptop CPU, < 5 minutes
    uv run python grpo_mixed.py --tasks arithmetic letters binary --proportions 0.4 0.3 0.3
    uv run python grpo_mixed.py --tasks arithmetic --curriculum three_stage --refill 2

Equations next to symbols, metrics and results: docs/grpo_mixed.md.
"""

import common.stop  # noqa: F401, first: Ctrl-C is heard while the rest is imported

import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval

from common.cli import Count, Fraction, Natural, NonNegative, Positive, Several, Share, Temperature, Text, fail, parse
from common.language import checks, gym, lm, probe, watch
from common.language.data import WordProblem, read_problems, read_rows
from common.language.decode import Decoder, inverse_cdf, pad_right, sampling_noise
from common.language.lm import LMArgs, Policy, Reference
from common.language.numbers import MARKS, final_number, format_reward, marked, read_number
from common.language.stats import Sums, with_means
from common.language.watch import clip_metrics, eval_metrics
from common.log import watched
from common.parallel import World, clip_gradients, sum_gradients
from common.run import Run, RunArgs
from common.streams import stream, stream_seed

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args(LMArgs, RunArgs):
    tags: tuple[str, ...] = ("grpo", "canonical")

    # task
    dataset_type: Literal["mixed", "small_numbers"] = "mixed"  # mixed: numbers 0-20; small_numbers: 0-10
    tasks: tuple[str, ...] = ("arithmetic", "words", "comparison")
    """tasks of the mixture: arithmetic, words, letters, comparison, binary, word_problems, and of reasoning-gym (an
    extra) rg:chain_sum, rg:countdown, ..."""
    proportions: tuple[Annotated[float, Interval(ge=1e-3, le=1e3)], ...] | None = None
    """share of each task, in their order; default: 2 for the first, 1 for each other"""
    sampling: Literal["proportional", "balanced", "adaptive"] = "proportional"
    """shares of a step: as given, equal, or as given times p (1 - p), p being the task's solve rate so far"""
    word_problems: Text = "openai/gsm8k/main"
    """JSONL file or hub id (owner/name or owner/name/config) with columns question and answer, for word_problems"""
    n_samples: Count | None = None  # number of training problems of all tasks; default: 150, below 50 M parameters 1000
    exclude_eval: bool = True  # keep the problems of the evaluation set out of the training problems
    min_num: int | None = None  # smallest operand; default: that of the data set type
    max_num: int | None = None  # largest operand; default: that of the data set type
    operations: str = "+-*"  # operations to draw from, any of + - * /
    fresh: bool = False  # draw new problems at every step instead of n_samples fixed ones
    curriculum: Literal["none", "tasks", "three_stage", "progressive", "dynamic"] = "none"
    """change the tasks or their difficulty during training, see CURRICULA"""
    rewards: tuple[str, ...] = ("binary",)
    """reward functions to add up: binary, partial_credit, rich, rich_exponential, length, score (a verifier's,
    0 to 1), and whether an answer is marked: tag (<answer>56</answer>), boxed (\\boxed{56}), hashes (#### 56)"""
    reward_weights: tuple[float, ...] | None = None  # weight of each reward, in their order; default: 1 each

    # rollout
    batch_size: Count = 240  # completions per step B, over all processes
    num_generations: Several = 16
    """completions per prompt G, each compared with the others; 4 to 64 are usual"""
    temperature: Temperature = 0.7
    """sampling temperature, 0.5 to 1.5; every log-prob is that of the tempered distribution"""
    max_completion_length: Count = 16  # new tokens at most
    refill: Natural = 0
    """replace groups without spread by other problems' groups, up to so many times a step (dynamic sampling)"""

    # update
    epochs: Count | None = None
    """passes over the training problems; steps = epochs * (n_samples // prompts per step); default: 50, if small 6"""
    learning_rate: NonNegative | None = None  # peak AdamW learning rate; default: 5e-6, below 50 M parameters 3e-4
    warmup_ratio: Share = 0.1
    """share of the steps in which the learning rate rises, 0 to 1; then it falls to zero in a line"""
    weight_decay: NonNegative = 0.01  # AdamW weight decay
    max_grad_norm: NonNegative = 1.0  # gradient norm to clip to, 0: never
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = "grpo"
    """loss of a token and how losses are averaged, see grpo_loss"""
    importance: Literal["token", "sequence"] = "token"  # a probability ratio per token, or one per completion (GSPO)
    beta: NonNegative = 0.1  # weight of the KL penalty, 0 (no reference model) to 0.2
    kl_gradient: Literal["k3", "reverse"] = "k3"
    """k3: forget nothing the reference does, KL(ref || policy); reverse: do nothing it does not, KL(policy || ref)"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """what advantages are divided by: std of the group, of the batch, or nothing"""
    baseline: Literal["group", "others"] = "group"  # mean reward to compare with: the group's, or the others' (RLOO)
    normalize_rewards: bool = False  # normalise each reward function in its group before they are summed (GDPO)
    top_entropy: Share = 1.0  # train this share of the step's tokens, those of highest entropy; 0.2 is usual
    epsilon: Fraction = 0.2
    """lower clip range of the ratio, and the upper one unless epsilon_high is given"""
    epsilon_high: Positive | None = None  # upper clip range, DAPO: 0.28; of cispo the largest ratio, default 5
    num_iterations: Count = 1  # optimizer steps on each batch; 1 to 4 are usual
    mask_truncated_completions: bool = False  # leave completions without an end token out of the loss

    # evaluation
    eval_dataset: Text = str(lm.ASSETS / "arithmetic_eval.jsonl")
    """JSONL file or hub id with columns prompt and answer, such as morgan/arithmetic_eval"""
    eval_every: Natural = 50  # steps between evaluations, 0: only before and after
    eval_samples: Count = 16  # samples per problem k, for the sampled accuracy and pass@k
    eval_temperature: NonNegative = 0.7  # temperature of these samples, 0: greedy
    early_stopping_patience: Count | None = None
    """stop after this many evaluations without a better validation accuracy"""
    task_eval_problems: Count = 100  # held-out problems of each task, as far as so many exist


def resolve(args: Args, config) -> Args:
    """Fills the defaults that depend on other flags or on the size of the model; all of them here."""
    small = lm.count_parameters(args, config) < 50e6
    low, high = {"mixed": (0, 20), "small_numbers": (0, 10)}[args.dataset_type]
    defaults = {"min_num": low, "max_num": high, "reward_weights": (1.0,) * len(args.rewards)}
    defaults |= {"proportions": (2.0,) + (1.0,) * (len(args.tasks) - 1), "n_samples": 1000 if small else 150}
    defaults |= {"epochs": 6 if small else 50, "learning_rate": 3e-4 if small else 5e-6}
    defaults["eval_batch_size"] = 1600 if small else 128
    defaults["exp_name"] = f"grpo_{args.dataset_type}_b{args.batch_size}_g{args.num_generations}"
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    gym_tasks = gym.add_tasks(TASKS, args.tasks, lambda question, answer, score: Problem(question, answer, score=score))
    checks.mixture(args, TASKS, WITHOUT_NUMBERS + gym_tasks)
    checks.operands(args, OPERATION_NAMES, different=True)
    return args


def check(args: Args, world: World) -> None:
    """Every wrong combination of flags ends here, before a model is loaded, in one line."""
    checks.flags(args, world, REWARDS)
    if (P := args.batch_size // args.num_generations) > args.n_samples:
        fail(f"{P} prompts per step of only {args.n_samples} training problems; raise --n-samples")


# ---- 2. Task: problems, answers, rewards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    operation: str = ""
    difficulty: str = ""
    operands: tuple[int, int] | None = None
    task: str = "arithmetic"
    score: Callable[[str], float] | None = None  # a library's verifier of answers, 0 to 1


@dataclass(frozen=True)
class Level:
    """A range of problems: numbers low..high inclusive, operations, the first few tasks or all, their shares."""

    low: int
    high: int
    operations: str = "+-*"
    first: int | None = None
    shares: dict[str, float] | None = None
    word_problems: str = ""


def make_problem(a: int, op: str, b: int, difficulty: str = "") -> Problem:
    """7, "*", 8 -> "Calculate: 7 * 8 = " with answer "56". Divisions are exact: a becomes a multiple of b."""
    if op == "/":
        a = a // b * b
    result = {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a // b
    return Problem(f"Calculate: {a} {op} {b} = ", str(result), op, difficulty, (a, b))


def draw_problem(rng: np.random.Generator, level: Level, difficulty: str = "") -> Problem:
    while True:
        a, b = rng.integers(level.low, level.high + 1, size=2).tolist()
        op = str(rng.choice(list(level.operations)))
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
    small, large = sorted((level.low + rng.choice(level.high - level.low + 1, 2, replace=False)).tolist())
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
    form, problems = "Question: {}\nThink step by step, then write #### and the number.\nAnswer: ", []
    for number, row in read_rows("--word-problems", source, WordProblem, splits=("train",)):
        unread = f"--word-problems '{source}', row {number}: no number after the last #### in {row.answer[-80:]!r}"
        problems.append(Problem(form.format(row.question), final_number(row.answer) or fail(unread)))
    return problems


def draw_word_problem(rng: np.random.Generator, level: Level) -> Problem:
    problems = load_word_problems(level.word_problems)
    return problems[rng.integers(len(problems))]


EVAL_BANDS = ("very_easy", "easy", "medium", "hard", "very_hard")  # of the standard evaluation
OPERATION_NAMES = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


def load_problems(source: str) -> list[Problem]:
    """A JSONL file or a hub data set with columns prompt, answer and optionally difficulty, metadata.operation."""
    return [Problem(*row) for row in read_problems("--eval-dataset", source)]


# Curricula: (share of training at which the level starts, level). The dynamic one moves by reward instead.
CURRICULA = {
    "tasks": [(0.0, Level(0, 20, first=1)), (0.2, Level(0, 20, first=2)), (0.4, Level(0, 20))],
    "three_stage": [(0.0, Level(0, 10, "+")), (0.2, Level(0, 10)), (0.5, Level(0, 20))],
    "progressive": [(0.0, Level(0, 5, "+")), (0.25, Level(0, 10, "+-")), (0.5, Level(0, 15)), (0.75, Level(0, 20))],
    "dynamic": [(0.0, Level(0, 5)), (0.0, Level(0, 7)), (0.0, Level(0, 10)), (0.0, Level(5, 15)), (0.0, Level(10, 20))],
}


def levels_of(args: Args) -> list[Level]:
    whole = [(0.0, Level(args.min_num, args.max_num, args.operations))]
    levels = [level for _, level in CURRICULA.get(args.curriculum, whole)]
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
    fail(f"task {task!r}: no problem like {first.prompt!r} in the {split} split; widen the numbers")


def draw_mixture(rng: np.random.Generator, level: Level, n: int, excluded: set[str]) -> list[Problem]:
    """n training problems, shuffled: each task has its share to within one problem, exactly so on average."""
    points = (rng.random() + np.arange(n)) / n * (1 - 1e-9)
    tasks = np.searchsorted(np.cumsum(list(level.shares.values())), points, side="right")
    return [draw_from(rng, list(level.shares)[i], level, "train", excluded) for i in rng.permutation(tasks)]


def draw_held_out(args: Args, split: str, n: int, excluded: set[str]) -> list[Problem]:
    """Up to n different problems of each task, the same in every run with these numbers."""
    (level,), problems = levels_of(replace(args, curriculum="none")), []
    for task in args.tasks:
        rng = stream(0, f"{split} problems: {task}")
        draws = {p.prompt: p for p in (draw_from(rng, task, level, split, excluded) for _ in range(4 * n))}
        problems += [replace(p, difficulty="held out") for p in draws.values()][:n]
    return problems


def next_level(curriculum: str, level: int, progress: float, recent_rewards: list[float]) -> int:
    """The level of the coming step. progress: share of the training done, 0 to 1; recent_rewards: of this level."""
    if curriculum == "none":
        return 0
    if curriculum != "dynamic":
        return max(i for i, (start, _) in enumerate(CURRICULA[curriculum]) if progress >= start)
    mean = sum(recent_rewards[-10:]) / 10 if len(recent_rewards) >= 10 else 0.5  # too few to judge: stay
    step = (mean > 0.7) - (mean < 0.3)
    return min(max(level + step, 0), len(CURRICULA["dynamic"]) - 1)


def draw_batch(pool: list[Problem], step: int, num_prompts: int, seed: int, level: int = 0) -> list[Problem]:
    """Batch number `step` over `pool`: a new permutation every epoch, the incomplete last batch of each dropped."""
    epoch, i = divmod(step, len(pool) // num_prompts)
    order = stream(seed, "order", level, epoch).permutation(len(pool))
    return [pool[j] for j in order[i * num_prompts : (i + 1) * num_prompts]]


def draw_more(rng, args: Args, pool: list[Problem], level: Level, n: int, excluded: set[str]) -> list[Problem]:
    """n problems at random, each task with its share: new ones with --fresh, else from different places of the pool."""
    if args.fresh:
        return draw_mixture(rng, level, n, excluded)
    size = Counter(p.task for p in pool)
    weights = np.array([level.shares[p.task] / size[p.task] for p in pool])
    return [pool[i] for i in rng.choice(len(pool), n, replace=False, p=weights / weights.sum())]


def extract_answer(completion: str) -> str:
    """The answer in a completion: what it marks as such, else the integer it starts with, else its first word, else "".

    What follows the integer is not looked at: 5 is read from "5.7" and "5 * 3 = 15" too, see docs/grpo_arithmetic.md.
    One function for reward, train accuracy and evaluation. It must be given the completion only, never the prompt.

    >>> extract_answer(" 56. Next"), extract_answer("-3"), extract_answer("I think 56"), extract_answer("")
    ('56', '-3', 'I', '')
    """
    if (found := marked(completion)) is not None:  # <answer>56</answer>, \boxed{56}, #### 56; as numbers: 56.0, $56
        return read_number(found) or found
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


# task -> (draws a problem, finds the answer in a completion). Your own task is two functions and a line here.
TASKS = {
    "arithmetic": (draw_problem, extract_answer),
    "words": (draw_words, extract_answer),
    "letters": (draw_letters, extract_answer),
    "comparison": (draw_comparison, yes_or_no),
    "binary": (draw_binary, binary_numeral),
    "word_problems": (draw_word_problem, final_number),
}
WITHOUT_NUMBERS = ("words", "letters", "binary", "word_problems")  # tasks in which a level's range changes nothing


def parse_answer(completion: str, problem: Problem) -> str:
    return TASKS[problem.task][1](completion)


def distance(completion: str, problem: Problem) -> int | None:
    """How far the completion's integer is from the right one; None if either is no integer."""
    given, right = parse_answer(completion, problem), problem.answer
    integer = r"-?[0-9]{1,18}" if problem.task != "binary" else "(?!)"
    return abs(int(given) - int(right)) if re.fullmatch(integer, given) and re.fullmatch(integer, right) else None


def is_correct(completion: str, problem: Problem) -> bool:
    given = parse_answer(completion, problem)
    return given != "" and (problem.score(given) == 1 if problem.score else given == problem.answer)


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


def graded_reward(completion: str, problem: Problem, score) -> float:
    """1 where the answer is right, -1 where it is no integer, else the score of its distance."""
    d = distance(completion, problem)
    return binary_reward(completion, problem) if d is None or is_correct(completion, problem) else score(d)


def length_reward(completion: str, problem: Problem) -> float:
    """0 up to 20 characters, then falling as a square to -0.5 at 100."""
    return -0.5 * min(max((len(completion) - 20) / 80, 0.0), 1.0) ** 2


RICH_STEPS = [(0, 1.0), (1, 0.7), (2, 0.4), (5, 0.1), (10, -0.2)]  # (up to this distance, reward)
REWARDS = {
    "binary": binary_reward,
    "partial_credit": partial_credit_reward,
    "rich": partial(graded_reward, score=lambda d: next((r for limit, r in RICH_STEPS if d <= limit), -0.5)),
    "rich_exponential": partial(graded_reward, score=lambda d: [1.0, 0.8, 0.5][d] if d <= 2 else 0.7**d),
    "length": length_reward,
    "score": gym.score,
} | {mark: partial(format_reward, mark=mark) for mark in MARKS}

# ---- 3. Algorithm ----------------------------------------------------------------------------------------------------


def group_advantages(rewards, num_generations: int, scale_rewards: str = "group", baseline: str = "group"):
    """Advantage of each completion over the others of its prompt.

    rewards: (B,) with the G completions of a prompt in consecutive rows -> (B,) float32 or float64.
    scale_rewards: "group" (GRPO), "batch" (Lite PPO, arXiv 2508.08221) or "none" (Dr. GRPO, arXiv 2503.20783).
    A completion whose reward is NaN or infinite is no part of its group: its advantage is 0.
    """
    G = num_generations
    groups, n, silent = with_means(rewards.view(-1, G))  # (P, G), (P, 1) rewards of the group, (P, G) bool
    centred = groups - groups.mean(1, keepdim=True)  # eq: A_i = r_i - mean_group(r)
    if baseline == "others":  # eq: A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean)   (RLOO, arXiv 2402.14740)
        centred = centred * n / (n - 1)
    if scale_rewards == "group":
        std = groups.std(1, keepdim=True) * ((G - 1) / (n - 1)).sqrt()  # over n - 1
        centred = centred / (std + 1e-4)  # eq: A_i / (std_group(r) + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (rewards[rewards.isfinite()].std() + 1e-4)  # eq: A_i / (std_batch(r) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be group, batch or none, not {scale_rewards!r}")
    return centred.masked_fill(silent, 0.0).reshape(-1)


def advantages_of(rewards: torch.Tensor, parts: torch.Tensor, args: Args) -> torch.Tensor:
    """rewards (B,), parts (B, functions) of which they are the weighted sum -> (B,), normalised after or before it."""
    if not args.normalize_rewards:
        return group_advantages(rewards, args.num_generations, args.scale_rewards, args.baseline)
    # eq: s_i = sum_k w_k (r_ik - mean_group(r_k)) / (std_group(r_k) + 1e-4)               (GDPO, arXiv 2601.05242)
    normal = torch.stack([group_advantages(part, args.num_generations) for part in parts.T], 1)  # (B, functions)
    sums = (normal @ torch.tensor(args.reward_weights)).masked_fill(~rewards.isfinite(), torch.nan)
    return group_advantages(sums, len(sums))  # eq: A_i = (s_i - mean_batch(s)) / (std_batch(s) + 1e-4)


def completion_mask(completion_ids: torch.Tensor, eos_ids: list[int]) -> torch.Tensor:
    """(B, T) ids -> (B, T) bool: True up to and including the first end token.

    The end token is trained, what follows it is not. Never computed from the padding id, which is often an end id too.
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))  # (B, T)
    ended_before = is_eos.cumsum(1) - is_eos.long()  # number of end tokens strictly before t
    return ended_before == 0


def tempered(logits: torch.Tensor, temperature: float, vocab_size: int | None) -> torch.Tensor:
    """(..., V) logits -> (..., vocab_size) of what is sampled and trained: over T, no ids beyond the tokenizer."""
    logits = logits[..., :vocab_size]
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return logits / temperature if temperature > 0 else logits  # eq: pi_T(a) = softmax(logits / T)_a


def token_logprobs(
    model, prompt_ids, prompt_lengths, completion_ids, mask, *, temperature, vocab_size=None, share_prompt=None, H=True
):
    """Log-prob of every completion token under the tempered policy.

    prompt_ids (P, L) padded on the right, prompt_lengths (P,), completion_ids (B, T), mask (B, T) bool whose True part
    is a prefix of each row; rows of one prompt are consecutive. share_prompt: see hidden_before.
    Returns logprobs (B, T) float32, 0 where masked, and if H entropies (B, T), so too, without gradient, else None.
    """
    hidden = lm.hidden_before(model, prompt_ids, prompt_lengths, completion_ids, mask, share_prompt)  # (N, d)
    temper = partial(tempered, temperature=temperature, vocab_size=vocab_size)
    where = mask.nonzero(as_tuple=True)
    found = lm.head_logprobs(model, hidden, completion_ids[where], temper, H)  # (N,), (N,)
    return tuple(x if x is None else x.new_zeros(mask.shape).index_put(where, x) for x in found)


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
    importance="token",
    kl_gradient="k3",
    max_completion_length,
    num_loss_tokens=None,
    num_sequences=None,
    trained=None,
):
    """The GRPO loss of a micro-batch, as part of the mean over the whole optimizer step.

    logprobs, old_logprobs, ref_logprobs (B, T) (ref None when beta == 0), advantages (B,), mask (B, T).
    num_sequences, num_loss_tokens: B and number of True mask entries of the whole step; default: of this call. With
    them the losses of micro-batches add up to that of the full batch, except for bnpo, whose token mean is over the
    micro-batch by definition. trained (B, T) bool: tokens that the policy term trains, default all; the KL keeps all.
    Returns loss () and metrics, detached scalars: kl and clip ratios are token sums over num_loss_tokens (they add up
    too), low_min and high_max are extremes over rows.
    """
    mask = mask.to(logprobs.dtype)  # (B, T)
    A, row_tokens = advantages[:, None], mask.sum(1).clamp(min=1.0)  # (B, 1), (B,)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    # masked entries may hold anything, also values whose exp overflows: 0 * inf would be NaN
    log_w = (logprobs - old_logprobs).masked_fill(mask == 0, 0.0)
    if importance == "sequence":  # eq: w_i = exp(1/n_i sum_t log w_it)                  (GSPO, arXiv 2507.18071)
        log_w = (log_w.sum(1) / row_tokens)[:, None].expand_as(mask)
    ratio = torch.exp(log_w)  # eq: w = pi(a) / pi_old(a)
    if loss_type == "cispo":  # eq: -stop_gradient(min(w, eps_max)) A log pi(a)                (arXiv 2506.13585)
        low, high = -math.inf, 5.0 if epsilon_high is None else epsilon_high
        token_loss = -ratio.clamp(max=high).detach() * A * logprobs.masked_fill(mask == 0, 0.0)
    elif loss_type == "sapo":  # eq: -4/tau sigmoid(tau (w - 1)) A, tau = 1 if A > 0 else 1.05 (arXiv 2511.20347)
        low, high, tau = -math.inf, math.inf, 1 + 0.05 * (A <= 0).to(A.dtype)
        token_loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    else:
        token_loss = -torch.minimum(ratio * A, ratio.clamp(low, high) * A)  # eq: -min(w A, clip(w, low, high) A)
    if trained is not None:
        token_loss = token_loss * trained
    if beta != 0:
        log_ratio = (ref_logprobs - logprobs).masked_fill(mask == 0, 0.0)
        kl = torch.expm1(log_ratio) - log_ratio  # eq: k3 = exp(ref - logp) - (ref - logp) - 1 >= 0
        # eq: E grad k3 = grad KL(ref || pi), E grad(w k3) = grad KL(pi || ref): one value, two gradients
        weight = {"k3": 1.0, "reverse": ratio}[kl_gradient]
        token_loss = token_loss + beta * weight * kl  # inside the token loss: averaged exactly as the policy term is

    B = num_sequences or len(mask)
    tokens = mask.sum() if num_loss_tokens is None else num_loss_tokens
    tokens = torch.as_tensor(tokens, dtype=mask.dtype, device=mask.device).clamp(min=1.0)
    row_sum = (token_loss * mask).sum(1)  # (B,)
    if loss_type in ("grpo", "sapo"):  # eq: L = 1/B sum_i 1/n_i sum_t l_it                   (arXiv 2402.03300)
        loss = (row_sum / row_tokens).sum() / B
    elif loss_type == "bnpo":  # eq: L = sum_it l_it / sum_i n_i, both over this micro-batch
        loss = row_sum.sum() / mask.sum().clamp(min=1.0) * (len(mask) / B)
    elif loss_type in ("dapo", "cispo"):  # eq: L = sum_it l_it / N, N = tokens of the step   (arXiv 2503.14476)
        loss = row_sum.sum() / tokens
    elif loss_type == "dr_grpo":  # eq: L = sum_it l_it / (B * max_completion_length)         (arXiv 2503.20783)
        loss = row_sum.sum() / (B * max_completion_length)
    else:
        raise ValueError(f"loss_type must be grpo, bnpo, dr_grpo, dapo, cispo or sapo, not {loss_type!r}")
    metrics = clip_metrics((ratio < low) & (A < 0), (ratio > high) & (A > 0), mask, tokens)
    return loss, metrics | ({"kl": (kl.detach() * mask).sum() / tokens} if beta != 0 else {})


def learning_rate_at(step: int, total: int, args: Args) -> float:
    """Learning rate of step number `step` (from 0) of `total`: up in a line, then down to zero."""
    warmup = math.ceil(total * args.warmup_ratio)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * (1 - (step - warmup) / max(total - warmup, 1))


def update(policy, reference, optimizer, roll, advantages, args: Args, world: World) -> dict[str, float]:
    """num_iterations optimizer steps on a rollout, with its advantages (b,). Returns metrics over all processes."""
    mask = roll.mask & roll.ended[:, None] if args.mask_truncated_completions else roll.mask  # (b, T)
    num_loss_tokens = world.total(mask.sum().float())  # over all processes
    prompt_ids, prompt_lengths = pad_right(roll.prompts, policy.pad_id, policy.device)  # (P, L), (P,)
    parts = lm.micro_batches(len(roll.prompts), args.num_generations, args.micro_batch_size)

    names = ("loss_type", "importance", "beta", "kl_gradient", "epsilon", "epsilon_high", "max_completion_length")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"num_loss_tokens": num_loss_tokens, "num_sequences": args.batch_size}  # of the whole step

    def logprobs_under(model, prompts, rows, H=True):
        packed = prompt_ids[prompts], prompt_lengths[prompts], roll.ids[rows], mask[rows]
        with policy.autocast():
            return model.token_logprobs(*packed, temperature=args.temperature, H=H, **policy.scoring)

    ref_logprobs, old_logprobs = [None] * len(parts), []
    if reference is not None:
        with torch.no_grad(), reference.loaded() as model:
            ref_logprobs = [logprobs_under(model, *part, H=False)[0] for part in parts]
    sums, skipped, parameters = Sums(), 0, list(policy.model.parameters())
    policy.model.train(args.gradient_checkpointing)  # transformers recomputes in train mode only; dropout is off anyway
    trained = [None] * len(parts)
    if args.top_entropy < 1 and num_loss_tokens > 0:  # eq: H_it >= quantile_{1 - rho}(H) of the step (arXiv 2506.01939)
        with torch.no_grad():
            H = [logprobs_under(policy.model, *part)[1] for part in parts]  # of the policy that sampled
        own = torch.cat([h[mask[rows]] for h, (_, rows) in zip(H, parts)]).tolist()
        least = torch.tensor(world.gather(own)).quantile(1 - args.top_entropy).item()
        trained = [h >= least for h in H]
    for iteration in range(args.num_iterations):
        for i, (prompts, rows) in enumerate(parts):
            logprobs, entropy = logprobs_under(policy.model, prompts, rows)  # (m, T), (m, T)
            if iteration == 0:
                old_logprobs.append(logprobs.detach())  # weights as they were when sampling: ratio 1 on this pass
                gap = (old_logprobs[i] - roll.logprobs[rows]).abs() * mask[rows]
                sums.add({"sampling_logp_difference/mean": gap.sum() / num_loss_tokens.clamp(min=1)})
                sums.add({"sampling_logp_difference/max": gap.max()})
            given = logprobs, old_logprobs[i], ref_logprobs[i], advantages[rows], mask[rows]
            loss, metrics = grpo_loss(*given, **settings, trained=trained[i])
            loss.backward()
            metrics |= {"loss": loss.detach(), "entropy": entropy.sum() / num_loss_tokens.clamp(min=1)}
            sums.add(metrics, passes=args.num_iterations)
        sum_gradients(parameters, world)
        grad_norm = clip_gradients(parameters, args.max_grad_norm)
        if torch.isfinite(grad_norm) and num_loss_tokens > 0:
            optimizer.step()
        else:  # AdamW would decay the weights and shift its moments even at gradient zero
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    policy.refresh()
    return sums.totals(world) | {"grad_norm": grad_norm.item(), "skipped": skipped}


# ---- 4. Rollout ------------------------------------------------------------------------------------------------------


def sample_tokens(logits, uniform, temperature, vocab_size=None):
    """logits (B, V), uniform (B,) in [0, 1) -> tokens (B,), their tempered log-probs (B,). Temperature 0 is greedy.

    Inverse CDF over the full distribution: no top-k, top-p or repetition penalty, so what is sampled is what is scored.
    """
    logp = F.log_softmax(tempered(logits, temperature, vocab_size), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logp.argmax(-1)
    else:
        tokens = inverse_cdf(logp.exp(), uniform)  # eq: a = min { a : sum_{b <= a} pi(b) > u }
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate(
    model,
    prompts,
    *,
    num_generations,
    max_new_tokens,
    temperature,
    stop_ids,
    pad_id,
    noise=None,
    vocab_size=None,
    decoder=None,
):
    """Samples num_generations completions of each prompt.

    prompts: P lists of token ids; noise (B, max_new_tokens) from sampling_noise, None: from torch's generator.
    Returns ids (B, T) int64 with pad_id after the end, mask (B, T) bool up to and including the first end token, and
    logprobs (B, T) float32 of the sampled tokens, 0 where masked; B = P * num_generations, T <= max_new_tokens.
    """
    decoder = decoder or Decoder(model)
    sample = (sample_tokens, temperature, vocab_size)
    rows = decoder.prefill(prompts, num_generations, max_new_tokens, noise, stop_ids, pad_id, *sample)
    B = alive = len(prompts) * num_generations
    n = 1  # tokens sampled
    check_every = 1 if model.device.type == "cpu" else 8  # asking a GPU how many rows have ended stalls it
    while n < max_new_tokens:
        if n % check_every == 0:
            chosen = (~rows.finished).nonzero()[:, 0]
            if len(chosen) == 0:
                break
            if 2 * len(chosen) <= alive:  # half the rows have ended: go on with the others alone
                rows, alive = decoder.keep(rows, chosen), len(chosen)
        decoder.step(rows, *sample)
        n += 1
    ids, logprobs = rows.ids[:B, :n].clone(), rows.logprobs[:B, :n]  # a decoder's own buffers serve the next call
    mask = completion_mask(ids, stop_ids)
    return ids, mask, logprobs * mask


@dataclass
class Rollout:
    """G completions of each of some prompts, in consecutive rows: all that sampling knows of them, computed once."""

    problems: list[Problem]  # (b,) of each row
    prompts: list[list[int]]  # token ids of each prompt
    texts: list[str]  # (b,)
    correct: list[bool]  # (b,)
    ids: torch.Tensor  # (b, T)
    mask: torch.Tensor  # (b, T) bool, up to and including the first end token
    logprobs: torch.Tensor  # (b, T) float32
    ended: torch.Tensor  # (b,) bool, whether there is one

    def rows(self, rewards: tuple[str, ...]) -> list[dict]:
        """What completions.jsonl shows, metrics are made of, and the other processes hear."""
        G, found = len(self.texts) // len(self.prompts), []
        ended, tokens = self.ended.tolist(), self.mask.sum(1).tolist()
        for i, (p, text) in enumerate(zip(self.problems, self.texts)):
            row = {"prompt": p.prompt, "completion": text, "extracted_answer": parse_answer(text, p), "task": p.task}
            row |= {"expected": p.answer, "is_correct": self.correct[i], "ended": ended[i]}
            row |= {"tokens": tokens[i], "prompt_tokens": len(self.prompts[i // G])}
            found.append(row | {name: REWARDS[name](text, p) for name in rewards})
        return found


def rollout(policy: Policy, problems, num_generations, temperature, key: int, sample_ids, args: Args) -> Rollout:
    """num_generations completions of each problem; key and sample_ids (b,): see sampling_noise."""
    prompts, T = policy.encode([p.prompt for p in problems]), args.max_completion_length
    options = {"num_generations": num_generations, "max_new_tokens": T, "temperature": temperature} | policy.sampling
    with policy.autocast():
        ids, mask, logprobs = generate(policy.sampler, prompts, noise=sampling_noise(key, sample_ids, T), **options)
    problems = [p for p in problems for _ in range(num_generations)]
    texts = policy.texts(ids, mask)
    correct = [is_correct(text, p) for text, p in zip(texts, problems)]
    ended = torch.isin(ids, torch.tensor(policy.stop_ids, device=ids.device)).any(1)
    return Rollout(problems, prompts, texts, correct, ids, mask, logprobs, ended)


# ---- 5. Evaluate -----------------------------------------------------------------------------------------------------


def sample_answers(policy: Policy, problems, samples: int, temperature, args: Args, world: World, name="evaluation"):
    """k completions of each problem, with one noise in all runs and steps -> correct (N, k), N lists of k texts."""
    key = stream_seed(0, name)  # of the evaluation, not of the run
    mine, size = range(world.rank, len(problems), world.size), max(args.eval_batch_size // samples, 1)
    results = []
    chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
    for chunk in watched(chunks, name):
        sample_ids = [i * samples + k for i in chunk for k in range(samples)]
        roll = rollout(policy, [problems[i] for i in chunk], samples, temperature, key, sample_ids, args)
        results += zip(
            chunk, np.reshape(roll.correct, (-1, samples)).tolist(), np.reshape(roll.texts, (-1, samples)).tolist()
        )
    results = sorted(world.gather(results))
    return np.array([correct for _, correct, _ in results], dtype=float), [texts for *_, texts in results]


def evaluate(policy: Policy, problems, trained_prompts, args: Args, world: World):
    """The standard evaluation: k samples at --eval-temperature, and greedy. Returns metrics and a table of answers."""
    ways = [(args.eval_samples, args.eval_temperature), (1, 0.0)]
    (sampled, texts), (greedy, greedy_texts) = (sample_answers(policy, problems, k, t, args, world) for k, t in ways)
    table = []
    for p, answers, (best, *_), right in zip(problems, texts, greedy_texts, sampled):
        row = {"prompt": p.prompt, "expected": p.answer, "greedy": best, "sample": answers[0], "task": p.task}
        row |= {"extracted_answer": parse_answer(answers[0], p), "accuracy": right.mean(), "difficulty": p.difficulty}
        table.append(row)
    N = sum(p.difficulty != "held out" for p in problems)  # the standard evaluation comes first
    metrics = eval_metrics(problems[:N], sampled[:N], greedy[:N], trained_prompts, EVAL_BANDS, OPERATION_NAMES)
    for task in args.tasks:
        held_out = np.array([p.difficulty == "held out" and p.task == task for p in problems])
        metrics |= watch.accuracy(f"eval_{task}_accuracy", sampled[held_out].mean(1))
        metrics[f"eval_{task}_greedy"] = greedy[held_out].mean()
    return metrics, table


def measure(run: Run, policy: Policy, problems, validation, trained_prompts, state, args: Args, step: int) -> dict:
    """The standard evaluation, and the validation accuracy: it picks the best step and may end the run."""
    with run.clock("eval"):
        metrics, table = evaluate(policy, problems, trained_prompts, args, run.world)
        right, _ = sample_answers(policy, validation, 4, args.eval_temperature, args, run.world, "validation")
        metrics["validation_accuracy"] = right.mean()
    if step > 0:  # the best trained weights: the base model is no candidate
        run.is_best(step, metrics["validation_accuracy"])
        (metrics["best_validation_accuracy"],) = run.best["score"]
        waited = (step - run.best["step"]) // max(args.eval_every, 1)  # evaluations
        if args.early_stopping_patience is not None and waited >= args.early_stopping_patience:
            run.end(f"stopped early: {waited} evaluations without a better validation accuracy")
    state["base"], state["last"] = state["base"] or metrics, metrics
    run.table("evaluation", step, table)
    return metrics | {"time/eval_s": run.seconds["eval"]}


# ---- 6. Train --------------------------------------------------------------------------------------------------------


def draw_step(run: Run, step: int, pools, levels, state, args: Args, excluded) -> tuple[Level, list, list[Problem]]:
    """The level of this step, which depends on `state` and is remembered there, its pool, and P problems."""
    number = next_level(args.curriculum, state["level"], step / run.total, state["recent_rewards"])
    if number != state["level"]:
        run.say(f"step {step}: curriculum level {state['level']} -> {number}, {levels[number]}")
        state.update(level=number, level_start=step, recent_rewards=[])
    level, pool = with_shares(args, levels[number], state["solve_rates"]), [] if args.fresh else pools[number]
    P = args.batch_size // args.num_generations
    if args.fresh or args.sampling != "proportional":
        return level, pool, draw_more(stream(args.seed, "fresh", step), args, pool, level, P, excluded)
    return level, pool, draw_batch(pool, step - state["level_start"], P, args.seed, number)


def train(run: Run, policy: Policy, args: Args, eval_problems, pools, validation, excluded: set[str]) -> None:
    world, B, G = run.world, args.batch_size, args.num_generations
    P = B // G  # prompts per step
    own, mine = world.share(P), world.share(B)  # this process's prompts and completions
    levels, trained = levels_of(args), {p.prompt for pool in pools for p in pool}
    steps_per_epoch = max(args.n_samples // P, 1)
    total_steps = args.epochs * steps_per_epoch

    reference = Reference(policy, args, world, token_logprobs) if args.beta != 0 else None
    adam = {"lr": args.learning_rate, "betas": (0.9, 0.999), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(policy.model.parameters(), **adam)
    # everything besides weights, optimizer and generators that the next step depends on
    state = {"num_tokens": 0, "skipped_steps": 0, "fresh_prompts": [], "base": {}, "last": {}}
    state |= {"level": 0, "level_start": 0, "recent_rewards": [], "solve_rates": {}}
    state = run.resume(state, optimizer)
    trained.update(state["fresh_prompts"])
    evaluation = partial(measure, run, policy, eval_problems, validation, trained, state, args)

    run.say(
        f"{run.folder}\n{P} prompts x {G} generations = {B} completions a step on {world.size} x {world.device}; "
        f"{args.epochs} epochs of {args.n_samples} problems / {P} = {total_steps} steps, rate {args.learning_rate}"
    )
    if not state["base"]:
        run.write(0, evaluation(0))
        run.say(f"before training: arithmetic_eval {watch.with_interval(state['base'], 'arithmetic_eval')}")
    done = run.first
    for step in run.steps(total_steps):
        # ---- 1. sample G completions of P problems; each process its share ----
        with run.clock("generation"):
            level, pool, problems = draw_step(run, step, pools, levels, state, args, excluded)
            key, sample_ids = stream_seed(args.seed, "sampling"), range(step * B + mine.start, step * B + mine.stop)
            roll = rollout(policy, problems[own], G, args.temperature, key, sample_ids, args)

            # ---- 2. reward every completion, over all processes; groups without spread teach nothing: refill them ----
            first_rows, refilled = [], 0
            for attempt in range(args.refill + 1):
                rows = world.gather(roll.rows(args.rewards))  # B
                parts = watch.reward_parts(rows, args.rewards)  # (B, functions), NaN where a function gave no number
                rewards = parts @ torch.tensor(args.reward_weights)  # (B,)  eq: r_i = sum_k w_k r_ik
                first_rows = first_rows or rows
                dull = [i for i, group in enumerate(group_advantages(rewards, G).view(P, G)) if not group.any()]
                if attempt == args.refill or not dull:
                    break
                refilled += len(dull)
                rng = stream(args.seed, "refill", attempt, step)
                for i, problem in zip(dull, draw_more(rng, args, pool, level, len(dull), excluded)):
                    problems[i] = problem
                if places := [i - own.start for i in dull if own.start <= i < own.stop]:
                    ids = [sample_ids[i * G + j] for i in places for j in range(G)]
                    drawn = [problems[own][i] for i in places]
                    key = stream_seed(args.seed, "refill sampling", attempt)
                    new = rollout(policy, drawn, G, args.temperature, key, ids, args)
                    roll = lm.replace_groups(roll, new, places)
            if args.fresh:
                state["fresh_prompts"] += [p.prompt for p in problems if p.prompt not in trained]
                trained.update(p.prompt for p in problems)

        # ---- 3. compare each with its group ----
        advantages = advantages_of(rewards, parts, args)  # (B,)

        # ---- 4. num_iterations optimizer steps, micro-batch by micro-batch ----
        learning_rate = learning_rate_at(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with run.clock("update"):
            metrics = update(policy, reference, optimizer, roll, advantages[mine].to(world.device), args, world)

        # ---- 5. log, evaluate, save, stop ----
        done = step + 1
        state["num_tokens"] += sum(row["tokens"] + row["prompt_tokens"] for row in rows)
        state["skipped_steps"] += metrics["skipped"]
        metrics |= {"learning_rate": learning_rate, "epoch": done / steps_per_epoch}
        metrics |= {name: state[name] for name in ("num_tokens", "skipped_steps")}
        state["recent_rewards"] = [*state["recent_rewards"], rewards.nanmean().nan_to_num().item()][-10:]
        rates = state["solve_rates"]  # as first drawn: refilling picks what is neither easy nor hopeless
        for task, solved in watch.solved_by_task(first_rows).items():
            rates[task] = 0.9 * rates.get(task, solved) + 0.1 * solved  # eq: p_k <- 0.9 p_k + 0.1 share of right ones
            metrics |= {f"{task}/accuracy": solved, f"{task}/solve_rate": rates[task]}
        metrics |= {"refilled_groups": refilled, "refilled_completions": refilled * G}
        metrics |= watch.task_metrics(rows, rewards, level.shares, G) | {"curriculum_level": state["level"]}
        metrics |= watch.reward_metrics(rewards, parts, args.rewards, G) | watch.completion_metrics(rows)
        metrics = {f"train/{name}": float(value) for name, value in metrics.items()}
        run.warn(done, watch.alarms(metrics, policy.low_precision))
        metrics |= {f"time/{name}_s": seconds for name, seconds in run.seconds.items()}
        metrics |= {"time/step_s": run.seconds.total(), "time/decode_fallbacks": policy.decoder.fallbacks}
        evaluating = run.due(done, args.eval_every)
        table = watch.scored(rows, rewards, advantages, args.log_completions)
        run.table("completions", done, table, upload=done == 1 or evaluating)
        if evaluating:
            metrics |= evaluation(done)
        if run.due(done, every=0) and not args.fresh:
            right, _ = sample_answers(policy, pools[-1], 4, args.temperature, args, world, "training problems")
            metrics["final_train_accuracy"] = state["last"]["final_train_accuracy"] = float(right.mean())
        shown = {"reward": metrics["train/reward"], "kl": metrics.get("train/kl")}
        run.end_step(done, metrics, state, optimizer, policy.save, **shown, eval=state["last"]["arithmetic_eval"])
    if run.stopped:
        return
    for name in (f"eval_{task}_accuracy" for task in args.tasks):
        run.say(f"{name} {watch.with_interval(state['base'], name)} -> {watch.with_interval(state['last'], name)}")
    run.finish(watch.outcome(run, state, done))


def main(args: Args) -> None:
    run = Run(__file__, args)
    args = lm.start_of(run)
    # everything that can be wrong is found before the weights are read
    tokenizer, config = lm.load_tokenizer(args)
    problems = load_problems(args.eval_dataset)
    excluded = {p.prompt for p in problems} if args.exclude_eval else set()
    args = resolve(args, config)
    if not args.eval_only:
        check(args, run.world)
    problems += draw_held_out(args, "eval", args.task_eval_problems, excluded)
    validation, levels, pools = draw_held_out(args, "validation", 40, excluded), levels_of(args), []
    for i, level in enumerate([] if args.eval_only or args.fresh else levels):
        pools.append(draw_mixture(stream(args.seed, "problems", i), level, args.n_samples, excluded))
    asked, rng = sum(pools, [*problems, *validation]), stream(0, "lengths")
    if args.fresh:  # all it can draw, as far as lengths go; word problems have any length, so each counts
        kinds = [(task, level) for level in levels for task in level.shares]
        asked += [
            TASKS[t][0](rng, level) for t, level in kinds for _ in range(500 if t.startswith(gym.PREFIX) else 5000)
        ]
        asked += load_word_problems(args.word_problems) if "word_problems" in args.tasks else []
    longest = checks.context(args, config, tokenizer, [p.prompt for p in asked])
    model = lm.load_model(args, run.world.device, run.checkpoint)
    args = lm.with_micro_batches(args, model, longest, run.world.size)
    probe.check(model, args, longest)
    with run.open(args):
        policy = Policy(model, tokenizer, args, run.world, token_logprobs, run.say)
        if args.eval_only:
            watch.report(run, *evaluate(policy, problems, set(), args, run.world))
        else:
            train(run, policy, args, problems, pools, validation, excluded)
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main(parse(Args, __doc__))
