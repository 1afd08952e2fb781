"""Whether a model can be trained here: its log-probs are one number, however they are computed."""

import re
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from common.cli import fail
from common.language import lm
from common.language.decode import Decoder, pad_right

TOLERANCE = 1e-3  # nats, in float32


def limits(config: dict) -> set[int]:
    """The numbers of a config at which a model may change what it does: windows, contexts, lengths before scaling."""
    found = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= limits(value)
        elif isinstance(value, int) and re.search("position|window_size|window$|length|context|ctx|seq|chunk", key):
            found.add(value)
    return found


def shapes(config: dict, longest: int, T: int, G: int, widest: float) -> list[tuple]:
    """What to try: (prompt lengths, completions a prompt, tokens a completion, the limit that its rows cross or None).

    A few tokens, where the run crosses none of the config's limits. Else rows that reach over each limit while they are
    decoded, beside short ones, and the run's longest; and G completions side by side, if that makes a row as wide as a
    limit. longest: tokens of the longest prompt; T: of a completion; widest: columns of a shared row at most.
    """
    known, need, width = sorted(n for n in limits(config) if n > 16), longest + T, min(longest + G * T, widest)
    crossed = [n for n in known if n < need]
    found = [((3, 7), 2, 5, None), *(((3, n - 2), 2, 4, n) for n in crossed)]
    if crossed:
        found.append(((3, need - 4), 2, 4, crossed[-1]))
    if any(n < width for n in known):
        t = max(min(T, int(width - 3) // G), 1)
        found.append(((max(int(width) - G * t, 3),), G, t, None))
    return found


def log_probs(model, lengths, G: int, T: int, generator) -> dict:
    """Ways to compute the log-probs (B, T) of random completions of random prompts: name -> function."""
    device, size = model.device, len(model.get_input_embeddings().weight)
    prompts = [torch.randint(size, (n,), generator=generator).tolist() for n in lengths]
    ids = torch.randint(size, (len(prompts) * G, T), generator=generator).to(device)
    prompt_ids, prompt_lengths = pad_right(prompts, 0, device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def of(logits, tokens):
        return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def rows(share_prompt: bool):
        hidden = lm.hidden_before(model, prompt_ids, prompt_lengths, ids, mask, share_prompt)
        return of(model.get_output_embeddings()(hidden), ids.flatten()).view(ids.shape)

    def own():
        pairs = zip(prompts, ids.split(G))
        whole = [(torch.cat([ids.new_tensor(prompt).expand(G, -1), own], 1), own) for prompt, own in pairs]
        return torch.cat([of(model(input_ids=x, use_cache=False).logits[:, -T - 1 : -1], y) for x, y in whole])

    def decoded():
        columns = iter(ids.T)

        def forced(logits, uniform):
            tokens = next(columns)
            return tokens, of(logits, tokens)

        decoder = Decoder(model)
        state = decoder.prefill(prompts, G, T, torch.zeros(ids.shape), [], 0, forced)
        for _ in range(T - 1):
            decoder.step(state, forced)
        return state.logprobs

    names = ("plain rows", "its own logits", "decoded rows", "shared rows")
    return dict(zip(names, (partial(rows, False), own, decoded, partial(rows, True))))


@contextmanager
def exact_products():
    """float32 products are float32's: in TF32, which a GPU is set up with, every model is 0.002 nats from itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@exact_products()
def check(model, args, longest: int) -> None:
    """Refuses a model whose plain training rows, shared ones or decoding do not give the log-probs of its own logits.

    On random tokens, in float32, at the lengths of a run whose longest prompt has `longest` tokens; see `shapes`.
    """
    usual, G = model.config._attn_implementation, min(args.num_generations, args.micro_batch_size or np.inf)
    trained = "sdpa" if usual == "flash_attention_2" else usual  # it has no float32
    shared = G > 1 and args.share_prompt is not False and trained == usual and not args.eval_only
    decode = lm.decode_mode(args, model.device)
    widest = 0 if not shared else 1024 if args.share_prompt is None else np.inf  # as hidden_before decides
    generator = torch.Generator().manual_seed(0)
    tried = shapes(model.config.to_dict(), longest, args.max_completion_length, G, widest)
    for case, (*sizes, limit) in enumerate(tried):
        ways = log_probs(model, *sizes, generator)
        if case > 0:
            del ways["its own logits"]  # of the whole vocabulary at every token: a few are enough
            if limit is None:
                del ways["decoded rows"]
        if not shared:
            del ways["shared rows"]
        found = {}
        for way, compute in ways.items():
            attention = "packed" if way == "decoded rows" and decode != "eager" else trained
            if attention != usual:
                model.set_attn_implementation(attention)
            try:
                found[way] = compute()
                gap = (found[way] - found["plain rows"]).abs().max().item()
                wrong = "" if gap < TOLERANCE else f"differ from plain ones by {gap:.2g} nats"
            except Exception as error:  # a model that takes no mask, positions or cache raises whatever it runs into
                wrong = f"end in {type(error).__name__}: {str(error)[:200]}"
            if attention != usual:
                model.set_attn_implementation(usual)
            if not wrong:
                continue
            hints = {
                "it scales or caps its logits after the output head": way == "its own logits",
                "--share-prompt False trains it": way == "shared rows",
                f"prompts and completions of up to {limit} tokens together work": limit is not None,
                "--decode eager may do": attention == "packed",
                "models like qwen2, llama or gpt2 keep keys and values of every token, and can be trained": True,
            }
            hint = next(text for text, fits in hints.items() if fits)
            fail(f"{type(model).__name__}: {way} {wrong}, at {max(sizes[0]) + sizes[2]} tokens; {hint}")
