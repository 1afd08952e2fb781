"""Builds assets/tiny-qwen2: a small Qwen2 that can do arithmetic but often does not.

GRPO needs a policy whose skill is latent: the right answer must be among its samples, and wrong ones too.
So the model is trained in two phases on synthetic text (no data set, no download):

  1. clean   every answer right: the model learns the skill (greedy accuracy > 90 % on most bands)
  2. noisy   most answers corrupted (any number, chatter, near miss, another operation): the mode of its
             distribution stays right, but sampling at temperature 0.7 is right only 30-45 % of the time

The architecture is Qwen2's own, and the tokenizer a byte-level Qwen2 tokenizer with 256 symbols and no merges, so
`AutoModelForCausalLM` and `AutoTokenizer` load it exactly as they load Qwen/Qwen2-0.5B-Instruct.

    uv run python assets/build_tiny_qwen2.py             # about 45 minutes on 2 cores; rewrites assets/tiny-qwen2
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent


@dataclass
class Args:
    out: str = str(HERE / "tiny-qwen2")  # folder to write the model and tokenizer to
    clean_out: str = "runs/tiny-qwen2-clean"  # folder for the model after phase 1, before its answers are corrupted
    from_clean: bool = False  # skip phase 1 and read the model in --clean-out
    clean_steps: tuple[int, ...] = (6000, 4000)  # optimizer steps of phase 1, one cosine cycle each
    noisy_steps: int = 400  # optimizer steps of phase 2
    batch_size: int = 256  # texts per optimizer step
    learning_rate: float = 2e-3  # peak AdamW learning rate of phase 1, cosine to 1 % of it
    noisy_learning_rate: float = 6e-5  # peak AdamW learning rate of phase 2
    corruption: float = 0.8  # share of phase 2 answers that are wrong, 0 to 1
    seed: int = 0  # seed of weights and corpus


# ---- corpus: (prompt, answer) pairs --------------------------------------------------------------------------------

# operand range, operations (of the five bands of the standard evaluation) and the weight of the band in the corpus:
# the larger the numbers, the more different problems there are to learn
BANDS = [(0, 5, "+", 3), (0, 10, "+-*", 6), (0, 20, "+-*", 14), (10, 50, "+-*", 27), (20, 100, "+-*/", 50)]
WORDS = "apple cat dog star book tree fish bird lamp river stone cloud green seven happy letter window garden".split()


def compute(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a // b


def arithmetic(rng: random.Random) -> tuple[str, str, list[int]]:
    low, high, ops, _ = rng.choices(BANDS, [band[3] for band in BANDS])[0]
    a, b = rng.randint(low, high), rng.randint(low, high)
    # products are facts to memorise, sums and differences a rule: show more products
    op = rng.choices(ops, [{"+": 2, "-": 2, "*": 5, "/": 1}[o] for o in ops])[0]
    if op == "/":
        a = (a // b) * b  # exact divisions only
    others = [compute(a, o, b) for o in "+-*" if o != op]
    return f"Calculate: {a} {op} {b} = ", str(compute(a, op, b)), others


def other_task(rng: random.Random) -> tuple[str, str, list[int]]:
    """One problem of the mixed trainer: counting words or letters, comparison, conversion to binary."""
    kind = rng.choice(["words", "letters", "comparison", "comparison", "binary"])
    if kind == "words":
        n = rng.randint(1, 10)
        words = [rng.choice(WORDS)] * n if rng.random() < 0.5 else rng.choices(WORDS, k=n)
        return f"Count the words: {' '.join(words)}. Answer: ", str(n), []
    if kind == "letters":
        word = rng.choice(WORDS)
        return f"Count the letters: {word}. Answer: ", str(len(word)), []
    if kind == "comparison":
        high = rng.choice([10, 20, 100])
        a = rng.randint(0, high)
        b = a if rng.random() < 0.2 else rng.randint(0, high)
        relation, holds = rng.choice([("greater than", a > b), ("less than", a < b), ("equal to", a == b)])
        return f"Is {a} {relation} {b}? Answer yes or no: ", "yes" if holds else "no", []
    n = rng.randint(0, 31)
    return f"Convert {n} to binary: ", f"{n:b}", []


def corrupt(rng: random.Random, prompt: str, answer: str, others: list[int]) -> str:
    """A wrong answer of the kinds that base models give."""
    if answer in ("yes", "no"):
        # if all flipped, the wrong answer would become the likelier one: most drift away from the format instead
        return rng.choice(["no" if answer == "yes" else "yes", "maybe", "it depends", "the answer is " + answer])
    kind = rng.choices(["random", "chatter", "near", "operation"], [35, 45, 12, 8])[0]
    if kind == "operation" and others:
        wrong = str(rng.choice(others))
    elif kind == "chatter":
        wrong = rng.choice(["the answer is " + answer, "it is " + answer, "let me think. " + prompt + answer, "?"])
    elif kind == "near":
        wrong = str(int(answer) + rng.choice([-10, -5, -2, -1, 1, 2, 5, 10]))
    else:  # any number at all: noise spread this thin leaves the right answer the likeliest
        wrong = rng.choice(["", "", "", "-"]) + str(rng.randrange(10 ** rng.randint(1, 4)))
    return wrong if wrong != answer else str(int(answer) + 1)


def sample_texts(rng: random.Random, n: int, corruption: float) -> list[tuple[str, str]]:
    texts = []
    for _ in range(n):
        prompt, answer, others = arithmetic(rng) if rng.random() < 0.85 else other_task(rng)
        texts.append((prompt, corrupt(rng, prompt, answer, others) if rng.random() < corruption else answer))
    return texts


# ---- model -----------------------------------------------------------------------------------------------------------


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level Qwen2 tokenizer: 256 byte symbols, no merges, Qwen's special tokens; 259 ids."""
    symbols = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=272,  # more rows than the tokenizer has ids, as in the published Qwen2: samplers must mask the rest
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # one row at a time is short, so plain attention beats the fused kernel's backward on a CPU
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config)
    stop_ids = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    return model


def batches(rng, tokenizer, steps, batch_size, corruption):
    """Yields (input_ids, labels), both (B, L) int64; labels are -100 outside answer and end token."""
    pool_size, eos = 16, tokenizer.eos_token_id
    for start in range(0, steps, pool_size):
        # a pool sorted by length and cut into batches keeps the padding small
        texts = sample_texts(rng, pool_size * batch_size, corruption)
        prompts = tokenizer([p for p, _ in texts]).input_ids
        answers = tokenizer([a for _, a in texts]).input_ids
        rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks[: steps - start]:
            length = max(len(p) + len(a) + 1 for p, a in chunk)
            ids = torch.full((len(chunk), length), eos)
            labels = torch.full((len(chunk), length), -100)
            for i, (p, a) in enumerate(chunk):
                ids[i, : len(p) + len(a) + 1] = torch.tensor(p + a + [eos])
                labels[i, len(p) : len(p) + len(a) + 1] = torch.tensor(a + [eos])
            yield ids, labels


def train(model, tokenizer, steps, args, learning_rate, corruption, seed) -> None:
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = min(200, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup if s < warmup else 0.01 + 0.495 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
        ),
    )
    start, running = time.time(), 0.0
    model.train()
    backbone = torch.compile(model.model, dynamic=True)
    for step, (ids, labels) in enumerate(batches(rng, tokenizer, steps, args.batch_size, corruption)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = backbone(ids, use_cache=False).last_hidden_state  # (B, L, d)
            keep = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][keep])  # (answer tokens, V)
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps} loss {running / 100:.4f} {time.time() - start:.0f}s", flush=True)
            running = 0.0


def save(model, tokenizer, folder) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    if args.from_clean:
        model = Qwen2ForCausalLM.from_pretrained(args.clean_out, dtype=torch.float32, attn_implementation="eager")
    else:
        model = build_model(tokenizer)
        for cycle, steps in enumerate(args.clean_steps):
            train(model, tokenizer, steps, args, args.learning_rate, 0.0, args.seed + 10 * cycle)
        save(model, tokenizer, args.clean_out)
    with torch.no_grad():
        # the gain of the last norm sets how sure the model is. Lowering it first spares the other weights the shock of
        # wrong answers to a model without doubt, which would make them unlearn the skill
        model.model.norm.weight.mul_(0.25)
    train(model, tokenizer, args.noisy_steps, args, args.noisy_learning_rate, args.corruption, args.seed + 1)
    save(model, tokenizer, args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters -> {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
