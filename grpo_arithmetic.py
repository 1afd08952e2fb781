"""GRPO on integer arithmetic: a language model learns from rewards it can verify.

    prompt      Calculate: 7 * 8 =            P prompts a step, G completions of each, B = P * G rows
    reward      r_i = +1 if the number that the completion starts with is right, else -1
    advantage   A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4)
    objective   minimise  mean over tokens of  -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta * KL_k3(policy || ref)
                w = exp(logp - logp_old) is the probability ratio, one per token (DeepSeekMath, arXiv 2402.03300)

Every line of the algorithm that is an equation carries it: grep for "eq:".
Dims: P prompts, G completions per prompt, B = P * G rows, b of them in this process, T completion tokens, V vocabulary.
Left out on purpose: vLLM (the generation loop is here), LoRA, rewards from a model.

    uv run python grpo_arithmetic.py --beta 0.1                              # bundled model, laptop CPU, < 5 minutes
    uv run python grpo_arithmetic.py --model-name Qwen/Qwen2-0.5B-Instruct   # the same on a GPU
    uv run torchrun --nproc-per-node 8 grpo_arithmetic.py --model-name ...   # data parallel

Equations next to symbols, metrics and results: docs/grpo_arithmetic.md.
"""

import common.stop  # noqa: F401, first: Ctrl-C is heard while the rest is imported

import math
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import Count, Fraction, Natural, NonNegative, Positive, Several, Share, Temperature, Text, fail, parse
from common.language import checks, lm, probe, watch
from common.language.data import read_problems
from common.language.decode import Decoder, inverse_cdf, pad_right, sampling_noise
from common.language.lm import LMArgs, Policy, Reference
from common.language.numbers import MARKS, format_reward, marked, read_number
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
    dataset_type: Literal["arithmetic", "small_numbers"] = "arithmetic"
    """arithmetic: operands 0-20; small_numbers: 0-10"""
    n_samples: Count | None = None
    """number of different training problems; default: 100, below 50 M parameters 1000, or all there are"""
    exclude_eval: bool = True  # keep the problems of the evaluation set out of the training problems
    min_num: int | None = None  # smallest operand; default: that of the data set type
    max_num: int | None = None  # largest operand; default: that of the data set type
    operations: str = "+-*"  # operations to draw from, any of + - * /
    fresh: bool = False  # draw new problems at every step instead of n_samples fixed ones
    rewards: tuple[str, ...] = ("binary",)
    """reward functions to add up: binary, partial_credit, rich, rich_exponential, length, and whether an answer is
    marked: tag (<answer>56</answer>), boxed (\\boxed{56}), hashes (#### 56)"""
    reward_weights: tuple[float, ...] | None = None  # weight of each reward, in their order; default: 1 each

    # rollout
    batch_size: Count = 256  # completions per step B, over all processes
    num_generations: Several = 16
    """completions per prompt G, each compared with the others; 4 to 64 are usual"""
    temperature: Temperature = 0.7
    """sampling temperature, 0.5 to 1.5; every log-prob is that of the tempered distribution"""
    max_completion_length: Count = 16  # new tokens at most

    # update
    epochs: Count | None = None
    """passes over the training problems; steps = epochs * (n_samples // prompts per step); default: 50, if small 12"""
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


def resolve(args: Args, config, excluded: set[str]) -> Args:
    """Fills the defaults that depend on other flags or on the size of the model; all of them here."""
    small = lm.count_parameters(args, config) < 50e6
    low, high = {"arithmetic": (0, 20), "small_numbers": (0, 10)}[args.dataset_type]
    defaults = {"min_num": low, "max_num": high, "reward_weights": (1.0,) * len(args.rewards)}
    defaults |= {"epochs": 12 if small else 50, "learning_rate": 3e-4 if small else 5e-6}
    defaults["eval_batch_size"] = 1600 if small else 128
    defaults["exp_name"] = f"grpo_{args.dataset_type}_b{args.batch_size}_g{args.num_generations}"
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    checks.operands(args, OPERATION_NAMES)
    if args.n_samples is None:
        problems = draw_unique(stream(0, "count"), level_of(args), 1000 if small else 100, excluded)
        args = replace(args, n_samples=len(problems))
    return args


def check(args: Args, world: World, excluded: set[str]) -> None:
    """Every wrong combination of flags ends here, before a model is loaded, in one line."""
    checks.flags(args, world, REWARDS)
    P, level = args.batch_size // args.num_generations, level_of(args)
    needed = P if args.fresh else args.n_samples
    if (found := len(draw_unique(stream(0, "count"), level, needed, excluded))) < needed:
        kinds = f"{level.low} to {level.high} with {' '.join(level.operations)}"
        held_out = ", besides those of the evaluation (--no-exclude-eval keeps them)" if args.exclude_eval else ""
        fail(f"{needed} training problems, but only {found} different problems exist for {kinds}{held_out}")
    if P > needed:
        most = needed * args.num_generations
        fail(f"{P} prompts per step of only {needed} problems; lower --batch-size to {most} or raise --n-samples")


# ---- 2. Task: problems, answers, rewards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    operation: str = ""
    difficulty: str = ""
    operands: tuple[int, int] | None = None


@dataclass(frozen=True)
class Level:
    """A range of problems: operands low..high inclusive, operations."""

    low: int
    high: int
    operations: str = "+-*"


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


def draw_unique(rng: np.random.Generator, level: Level, n: int, exclude=frozenset()) -> list[Problem]:
    """n problems with different prompts, none in `exclude`; fewer where 10,000 draws in a row find no other one."""
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < n and misses < 10_000:
        problem = draw_problem(rng, level)
        misses += 1
        if problem.prompt not in exclude and problem.prompt not in problems:
            problems[problem.prompt], misses = problem, 0
    return list(problems.values())


# The standard evaluation: five bands, 200 problems, duplicates allowed.
EVAL_BANDS = {
    "very_easy": (30, Level(0, 5, "+")),
    "easy": (40, Level(0, 10)),
    "medium": (50, Level(0, 20)),
    "hard": (40, Level(10, 50)),
    "very_hard": (40, Level(20, 100, "+-*/")),
}
OPERATION_NAMES = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


def draw_bands(rng: np.random.Generator) -> list[Problem]:
    """200 problems in the proportions of the standard evaluation, shuffled."""
    problems = [draw_problem(rng, level, band) for band, (n, level) in EVAL_BANDS.items() for _ in range(n)]
    return [problems[i] for i in rng.permutation(len(problems))]


def load_problems(source: str) -> list[Problem]:
    """A JSONL file or a hub data set with columns prompt, answer and optionally difficulty, metadata.operation."""
    return [Problem(*row) for row in read_problems("--eval-dataset", source)]


def level_of(args: Args) -> Level:
    return Level(args.min_num, args.max_num, args.operations)


def draw_batch(pool: list[Problem], step: int, num_prompts: int, seed: int, level: int = 0) -> list[Problem]:
    """Batch number `step` over `pool`: a new permutation every epoch, the incomplete last batch of each dropped."""
    epoch, i = divmod(step, len(pool) // num_prompts)
    order = stream(seed, "order", level, epoch).permutation(len(pool))
    return [pool[j] for j in order[i * num_prompts : (i + 1) * num_prompts]]


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


def distance(completion: str, problem: Problem) -> int | None:
    """How far the completion's integer is from the right one; None if either is no integer."""
    given, right = extract_answer(completion), problem.answer
    integer = r"-?[0-9]{1,18}"
    return abs(int(given) - int(right)) if re.fullmatch(integer, given) and re.fullmatch(integer, right) else None


def is_correct(completion: str, problem: Problem) -> bool:
    return (given := extract_answer(completion)) == problem.answer and given != ""


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
            row = {"prompt": p.prompt, "completion": text, "extracted_answer": extract_answer(text)}
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
        row = {"prompt": p.prompt, "expected": p.answer, "greedy": best, "sample": answers[0]}
        row |= {"extracted_answer": extract_answer(answers[0]), "accuracy": right.mean(), "difficulty": p.difficulty}
        table.append(row)
    return eval_metrics(problems, sampled, greedy, trained_prompts, EVAL_BANDS, OPERATION_NAMES), table


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


def train(run: Run, policy: Policy, args: Args, eval_problems: list[Problem], excluded: set[str]) -> None:
    world, level, B, G = run.world, level_of(args), args.batch_size, args.num_generations
    P = B // G  # prompts per step
    own, mine = world.share(P), world.share(B)  # this process's prompts and completions
    pool = []
    if not args.fresh:
        pool = draw_unique(stream(args.seed, "problems"), level, args.n_samples, excluded)
    trained = {p.prompt for p in pool}
    # picks the best checkpoint and stops early, so that the evaluation set itself selects nothing
    known = trained | {p.prompt for p in eval_problems}
    validation = [p for p in draw_bands(stream(0, "validation problems")) if p.prompt not in known]
    steps_per_epoch = max(args.n_samples // P, 1)
    total_steps = args.epochs * steps_per_epoch

    reference = Reference(policy, args, world, token_logprobs) if args.beta != 0 else None
    adam = {"lr": args.learning_rate, "betas": (0.9, 0.999), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(policy.model.parameters(), **adam)
    # everything besides weights, optimizer and generators that the next step depends on
    state = {"num_tokens": 0, "skipped_steps": 0, "fresh_prompts": [], "base": {}, "last": {}}
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
            if args.fresh:
                problems = draw_unique(stream(args.seed, "fresh", step), level, P, excluded)
                state["fresh_prompts"] += [p.prompt for p in problems if p.prompt not in trained]
                trained.update(p.prompt for p in problems)
            else:
                problems = draw_batch(pool, step, P, args.seed)
            key, sample_ids = stream_seed(args.seed, "sampling"), range(step * B + mine.start, step * B + mine.stop)
            roll = rollout(policy, problems[own], G, args.temperature, key, sample_ids, args)

            # ---- 2. reward every completion, over all processes ----
            rows = world.gather(roll.rows(args.rewards))  # B
        parts = watch.reward_parts(rows, args.rewards)  # (B, functions), NaN where a function gave no number
        rewards = parts @ torch.tensor(args.reward_weights)  # (B,)  eq: r_i = sum_k w_k r_ik

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
            right, _ = sample_answers(policy, pool, 4, args.temperature, args, world, "training problems")
            metrics["final_train_accuracy"] = state["last"]["final_train_accuracy"] = float(right.mean())
        shown = {"reward": metrics["train/reward"], "kl": metrics.get("train/kl")}
        run.end_step(done, metrics, state, optimizer, policy.save, **shown, eval=state["last"]["arithmetic_eval"])
    if run.stopped:
        return
    run.finish(watch.outcome(run, state, done))


def main(args: Args) -> None:
    run = Run(__file__, args)
    args = lm.start_of(run)
    # everything that can be wrong is found before the weights are read
    tokenizer, config = lm.load_tokenizer(args)
    problems = load_problems(args.eval_dataset)
    excluded = {p.prompt for p in problems} if args.exclude_eval else set()
    args = resolve(args, config, excluded)
    if not args.eval_only:
        check(args, run.world, excluded)
    numbers = {int(x) for x in np.linspace(args.min_num, args.max_num, 1000)}  # every operand, or a thousand of them
    asked = [make_problem(a, op, a) for a in numbers for op in args.operations if op != "/" or a]
    asked += [*problems, *draw_bands(stream(0, "validation problems"))]
    longest = checks.context(args, config, tokenizer, [p.prompt for p in asked])
    model = lm.load_model(args, run.world.device, run.checkpoint)
    args = lm.with_micro_batches(args, model, longest, run.world.size)
    probe.check(model, args, longest)
    with run.open(args):
        policy = Policy(model, tokenizer, args, run.world, token_logprobs, run.say)
        if args.eval_only:
            watch.report(run, *evaluate(policy, problems, set(), args, run.world))
        else:
            train(run, policy, args, problems, excluded)
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main(parse(Args, __doc__))
