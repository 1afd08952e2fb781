"""What can be wrong with the flags of the GRPO scripts: each in one line, before a weight is read."""

from common.cli import fail
from common.language import lm
from common.parallel import World


def flags(args, world: World, rewards) -> None:
    """What every run of a script needs: batch, groups and processes divide, rewards exist."""
    if unknown := set(args.rewards) - set(rewards):
        fail(f"unknown reward {sorted(unknown)[0]!r}; known: {', '.join(rewards)}")
    if not args.rewards or len(args.reward_weights) != len(args.rewards):
        fail(f"{len(args.reward_weights)} --reward-weights for {len(args.rewards)} --rewards; give one each")
    if len(set(args.rewards)) < len(args.rewards):
        fail(f"--rewards {' '.join(args.rewards)}: each once; --reward-weights makes one count more")
    if not any(args.reward_weights):
        fail("--reward-weights 0 for every reward: no completion would be better than another")
    if args.kl_gradient != "k3" and args.beta == 0:
        fail(f"--kl-gradient {args.kl_gradient} has nothing to change at --beta 0: raise --beta, or leave it out")
    if args.normalize_rewards and (len(args.rewards) < 2 or (args.scale_rewards, args.baseline) != ("group", "group")):
        fail("--normalize-rewards needs several --rewards, and leaves --scale-rewards and --baseline at group")
    B, G, micro = args.batch_size, args.num_generations, args.micro_batch_size
    if B < G or B % G:
        fail(f"--batch-size {B} is not a multiple of --num-generations {G}; try --batch-size {max(B // G, 1) * G}")
    if B // G % world.size:
        fail(f"{B // G} prompts per step ({B} / {G}) cannot be shared by {world.size} processes: take a multiple")
    if micro is not None and micro % G and G % micro:
        fail(f"--micro-batch-size {micro} must divide --num-generations {G} or be a multiple of it")
    if args.low_memory_reference and args.beta == 0:
        fail("--low-memory-reference has nothing to keep at --beta 0, which needs no reference: leave it out")
    if args.early_stopping_patience is not None and not args.eval_every:
        fail("--early-stopping-patience counts evaluations, of which --eval-every 0 leaves none: raise it")
    if args.fsdp and (args.compile or args.low_memory_reference or args.attn_implementation == "flash_attention_2"):
        fail("--fsdp goes with neither --compile, --low-memory-reference (it is sharded anyway) nor flash_attention_2")
    if args.fsdp and world.size == 1:
        fail("--fsdp shards over processes: start it with `uv run torchrun --nproc-per-node N`, or leave it out")


def operands(args, operations, different: bool = False) -> None:
    """Problems of these numbers and operations exist, and can be drawn in no time. different: of two numbers."""
    if not args.operations or set(args.operations) - set(operations):
        fail(f"--operations {args.operations!r}: any of {' '.join(operations)} without blanks, such as '+-*'")
    low, high = args.min_num, args.max_num
    if low > high - different:
        fail(f"--min-num {low} must {'be below' if different else 'not be above'} --max-num {high}")
    if max(-low, high) >= 10**9:
        fail(f"--min-num {low} --max-num {high}: operands have at most 9 digits")
    if set(args.operations) == {"/"} and low == high == 0:
        fail("--operations / with operands of 0 only: nothing can be divided by 0; raise --max-num")
    if (args.n_samples or 0) > 100_000 and not args.fresh:
        fail(f"--n-samples {args.n_samples}: at most 100000 are drawn beforehand; --fresh draws new ones at every step")


def mixture(args, tasks, without_numbers) -> None:
    """Tasks exist and have shares; no flag is without effect. without_numbers: tasks that have neither range nor op."""
    if unknown := [task for task in args.tasks if task not in tasks]:
        fail(f"unknown task {unknown[0]!r}; known: {', '.join(tasks)}")
    if not args.tasks or len(set(args.tasks)) < len(args.tasks):
        fail("--tasks needs at least one task, each once")
    if len(args.proportions) != len(args.tasks):
        fail(f"--proportions needs {len(args.tasks)} numbers, one for each of --tasks {' '.join(args.tasks)}")
    if args.task_eval_problems > 10_000:
        fail(f"--task-eval-problems {args.task_eval_problems}: at most 10000 are drawn")
    numbers = (args.min_num, args.max_num, args.operations) != (0, 20, "+-*")
    idle, curriculum = set(args.tasks) <= set(without_numbers), f"--curriculum {args.curriculum}"
    equal = args.proportions != (2.0,) + (1.0,) * (len(args.tasks) - 1)
    flags = "--dataset-type, --min-num, --max-num and --operations"
    contradictions = {
        f"{curriculum} sets the numbers itself: leave out {flags}": args.curriculum != "none" and numbers,
        f"{flags} change none of --tasks {' '.join(args.tasks)}: leave them out": idle and numbers,
        f"{curriculum} changes none of --tasks {' '.join(args.tasks)}": idle
        and args.curriculum not in ("none", "tasks"),
        f"{curriculum} adds task after task and needs several --tasks": args.curriculum == "tasks"
        and len(args.tasks) == 1,
        f"--sampling {args.sampling} needs several --tasks": args.sampling != "proportional" and len(args.tasks) == 1,
        "--sampling balanced makes equal shares: leave out --proportions": args.sampling == "balanced" and equal,
        "--word-problems is read for the task word_problems only: add it to --tasks": "word_problems" not in args.tasks
        and args.word_problems != type(args).word_problems,
    }
    for text, found in contradictions.items():
        if found:
            fail(text)


def context(args, config, tokenizer, prompts: list[str]) -> int:
    """Each of these, all that a run can ask, has tokens and fits with its completion; returns the longest's tokens."""
    prompts = list(dict.fromkeys(prompts))
    lengths, new_tokens = list(map(len, lm.encode(tokenizer, prompts, args))), args.max_completion_length
    if 0 in lengths:
        fail(f"the prompt {prompts[lengths.index(0)]!r} has no tokens; a model needs at least one to start from")
    longest = max(lengths)
    need, room = longest + new_tokens, getattr(config, "max_position_embeddings", None)
    if room and need > room:
        fits = f"at most {room - longest} new tokens fit" if longest < room else "it does not fit even without one"
        fail(
            f"prompts of up to {longest} tokens and --max-completion-length {new_tokens} exceed the model's context of "
            f"{room}: {prompts[lengths.index(longest)][:80]!r}; {fits}"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and need > window:
        fail(
            f"{need} tokens exceed the model's sliding attention window of {window}, which generation does not support"
        )
    return longest
