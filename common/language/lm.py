"""Language models to train: flags, loading, packed training rows, the policy that learns and samples, its reference.

Speed and memory. What is sampled, rewarded and learnt stands in the scripts.
"""

import copy
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from common.checkpoint import find_checkpoint, gathered
from common.cli import Count, Natural, Text, fail
from common.language import chat, pretrained
from common.language.decode import Decoder, GraphDecoder, additive
from common.language.fused import fuse
from common.parallel import World, refresh, shard
from common.run import Run

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TINY_MODEL = str(ASSETS / "tiny-qwen2")


@dataclass
class LMArgs:
    """Flags of scripts for language models: what is loaded, and what costs time or memory without changing a result."""

    # run
    log_completions: Natural = 32  # completions a step in completions.jsonl (whole groups first)

    # model
    model_name: Text = TINY_MODEL
    """hub id or folder of a causal language model; default: the bundled 1.6 M parameter Qwen2"""
    init_from: Text | None = None
    """run folder or checkpoint whose weights to start from (a new run: optimizer and reference start afresh)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute precision over fp32 weights; auto: bfloat16 autocast on a GPU, float32 on a CPU"""
    chat: bool = False  # prompts as messages, through the tokenizer's chat template
    system_prompt: Text | None = None  # with --chat: instructions before every prompt
    thinking: bool = False  # with --chat: let a model that has a switch for it think before it answers
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """attention of the training rows; default: sdpa on a GPU, eager on a CPU (faster there for short rows)"""

    # speed and memory
    decode: Literal["auto", "eager", "graph", "compile"] = "auto"
    """decode steps: op by op, captured as CUDA graphs, or compiled and captured; auto: graph on a GPU, else eager"""
    compile: bool = False  # torch.compile the transformer layers and the head of the update
    share_prompt: bool | None = None
    """train on one row per prompt with all its completions; default: when that row has at most 1024 tokens"""
    micro_batch_size: Count | None = None
    """completions per forward and backward pass in a process; changes memory, not the objective (bnpo excepted);
    default: what has at most 16384 tokens, of models above 5e8 parameters fewer"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    low_memory_reference: bool = False
    """keep the reference weights on the CPU and swap them in, instead of a second model on the device"""
    fsdp: bool = False  # shard weights, gradients and optimizer state over the processes of torchrun
    eval_batch_size: Count | None = None
    """completions per generation batch in evaluation; default: 1600, above 50 M parameters 128"""


def start_of(run: Run) -> LMArgs:
    """The run's flags, in which --init-from has become the --model-name that it stands for."""
    args = run.args
    if args.init_from and not run.checkpoint:
        if args.model_name != TINY_MODEL:
            fail("--init-from says where the weights come from: leave out --model-name")
        return replace(args, model_name=str(find_checkpoint(args.init_from, best=True)))
    return args


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(args: LMArgs):
    """Tokenizer and config only: every check on flags, lengths and the model's folder comes before weights are read."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its retries are no news: a model that cannot be had ends in one line
    name = args.model_name
    config, model = pretrained.check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what is missing, damaged or asks for code of its own raises whatever its reader raises
        fail(f"the tokenizer of '{name}' cannot be read ({pretrained.reason(error)})")
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # it is optional
        generation = GenerationConfig.from_model_config(config)
    size = len(model.get_input_embeddings().weight)
    pretrained.check_tokens(name, tokenizer, size, stop_token_ids(generation, tokenizer))
    chat.check(tokenizer, args)
    return tokenizer, config.get_text_config()


def count_parameters(args: LMArgs, config) -> int:
    """Without loading the weights."""
    return sum(p.numel() for p in pretrained.outline(args.model_name, config).parameters())


def load_model(args: LMArgs, device: torch.device, folder: Path | None = None):
    """fp32 master weights of --model-name, or of a checkpoint's folder.

    Dropout is off for good, so that sampling, old, new and reference log-probs agree.
    """
    if args.attn_implementation == "flash_attention_2":
        if args.dtype == "float32" or device.type == "cpu":
            fail("--attn-implementation flash_attention_2 needs a GPU and bfloat16; sdpa and eager run everywhere")
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            fail("flash-attn is not installed: `uv sync --extra flash` (needs nvcc), or --attn-implementation sdpa")
    attention = args.attn_implementation or ("sdpa" if device.type == "cuda" else "eager")
    name = str(folder or args.model_name)
    if folder:
        pretrained.check_folder(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, **pretrained.SAFE)
        model = model.to("cpu" if args.fsdp else device)  # the whole of it may be more than a GPU holds
    except Exception as error:  # a missing, damaged or foreign weight file raises whatever its reader raises
        fail(f"the weights of '{name}' cannot be loaded: {pretrained.reason(error)}")
    pretrained.check_names(name, info)
    if broken := [key for key, p in model.named_parameters() if not p.isfinite().all()]:
        fail(f"'{name}' has weights that are no finite numbers: {pretrained.some(broken)}; take an earlier checkpoint")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def stop_token_ids(generation: GenerationConfig, tokenizer) -> list[int]:
    """Every id that ends a completion: those of the model's generation config (often several) and the tokenizer's."""
    ids = generation.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def encode(tokenizer, texts: list[str], args: LMArgs | None = None) -> list[list[int]]:
    """Ids of prompts as the model is to continue them: without the end token that some tokenizers put behind a text,
    and with one beginning where the text brings its own. With args.chat through the template, which brings both."""
    if args and args.chat:
        rendered = [chat.render(tokenizer, text, args) for text in texts]
        return tokenizer(rendered, add_special_tokens=False).input_ids
    bare, framed = (tokenizer("1", add_special_tokens=special).input_ids for special in (False, True))
    before = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    after = len(framed) - before - len(bare)
    rows = [row[: len(row) - after] for row in tokenizer(texts).input_ids]
    return [row[before:] if before and row[:before] == row[before : 2 * before] else row for row in rows]


# ---- packed training rows --------------------------------------------------------------------------------------------


def hidden_before(model, prompt_ids, prompt_lengths, completion_ids, mask, share_prompt: bool | None = None):
    """The last hidden state at the position before every token under the mask, from which it is predicted.

    prompt_ids (P, L) padded on the right, prompt_lengths (P,), completion_ids (B, T), mask (B, T) bool whose True part
    is a prefix of each row, N of it in all; rows of one prompt are consecutive. Returns (N, d).

    Two layouts with equal results. Plain: a row is [prompt | completion]. Shared: a row is
    [prompt | completion 1 | ... | completion G]; each completion sees the prompt and itself, and its positions start
    where the prompt ends, so the prompt is computed once a group. For short answers that is most of the work.
    """
    (B, T), P, device = completion_ids.shape, len(prompt_ids), completion_ids.device
    lengths = mask.sum(1)  # (B,)
    if share_prompt is None:
        share_prompt = int(prompt_lengths.max() + lengths.view(P, -1).sum(1).max()) <= 1024
    if not share_prompt:
        prompt_ids = prompt_ids.repeat_interleave(B // P, 0)
        prompt_lengths = prompt_lengths.repeat_interleave(B // P)
    R = len(prompt_ids)  # rows of the forward pass
    g = B // R  # completions per row

    # the last token of a completion predicts nothing that is trained: it is not fed
    fed = (lengths - 1).clamp(min=0).view(R, g)
    offset = (prompt_lengths[:, None] + fed.cumsum(1) - fed).view(B, 1)  # column of each completion's first token
    S = int((prompt_lengths + fed.sum(1)).max())
    t = torch.arange(T, device=device)
    row = torch.arange(R, device=device).repeat_interleave(g)[:, None].expand(B, T)  # (B, T) row of each completion
    # where there is a token to feed: a mask as an index would ask the device for its size at every use
    given = (t < fed.view(B, 1)).nonzero(as_tuple=True)
    place = row[given], (offset + t)[given]

    column = torch.arange(S, device=device)
    in_prompt = column < prompt_lengths[:, None]  # (R, S)
    input_ids = F.pad(prompt_ids, (0, max(S - prompt_ids.shape[1], 0)))[:, :S] * in_prompt
    input_ids[place] = completion_ids[given]
    if g == 1:  # plain rows are causal and padded on the right: neither mask nor positions are needed
        layout = {}
    else:
        position = torch.where(in_prompt, column, 0)
        segment = torch.where(in_prompt, 0, -1)  # 0 prompt, 1..G completions, -1 padding
        own_position = prompt_lengths.repeat_interleave(g)[:, None] + t
        own_segment = (torch.arange(B, device=device) % g + 1)[:, None].expand(B, T)
        position[place], segment[place] = own_position[given], own_segment[given]
        query, key = segment[:, :, None], segment[:, None, :]
        visible = ((key == 0) | (key == query)) & (column[None, :] <= column[:, None])  # (R, S, S)
        # padding attends to something, so that no row of the softmax is empty
        low = torch.is_autocast_enabled(device.type)  # then each layer would cast the mask
        dtype = torch.get_autocast_dtype(device.type) if low else model.dtype
        layout = {"attention_mask": additive(visible, dtype)[:, None], "position_ids": position}

    hidden = model.base_model(input_ids=input_ids, use_cache=False, **layout).last_hidden_state  # (R, S, d)
    # token 0 is predicted at the prompt's last position, token t at the position of token t - 1
    source = torch.where(t == 0, prompt_lengths.repeat_interleave(g)[:, None] - 1, offset + t - 1)  # (B, T)
    given = mask.nonzero(as_tuple=True)
    return hidden[row[given], source[given]]


def chunk_logprobs(head, h, y, temper, entropy: bool):
    """h (n, d), y (n,) -> what head_logprobs says of them, through (n, V) logits."""
    logp = F.log_softmax(temper(head(h)), dim=-1)
    with torch.no_grad():  # eq: H = -sum_a pi(a) log pi(a)
        H = -(logp.exp() * logp).sum(-1) if entropy else None
    return logp.gather(-1, y[:, None])[:, 0], H


def in_blocks(score, head, h, y, temper, entropy: bool, n: int = 1024):
    """score(head, h, y, temper, entropy) of n rows at a time, the last of them filled up: one shape for a compiler.

    Few passes over (n, V) instead of ten. For any number of rows at once, torch 2.11 is not done after a minute.
    """
    missing = -len(y) % n
    h, y = F.pad(h, (0, 0, 0, missing)), F.pad(y, (0, missing))
    parts = [score(head, a, b, temper, entropy) for a, b in zip(h.split(n), y.split(n))]
    return tuple(torch.cat(x)[: len(y) - missing] if x[0] is not None else None for x in zip(*parts))


def head_logprobs(model, hidden, targets, temper, entropy: bool = True, chunk: int = 4096):
    """hidden (N, d), targets (N,) -> log-probs (N,) float32, entropies (N,) float32 without gradient, or None.

    temper: raw logits (n, V) -> those of the distribution in question. The head runs in chunks, recomputed in the
    backward pass, so that (N, V) never exists as a whole. An entropy costs as many passes over (n, V) as all the rest.
    """
    score, head = getattr(model, "chunk_logprobs", chunk_logprobs), model.get_output_embeddings()
    if len(targets) <= chunk:
        return score(head, hidden, targets, temper, entropy)
    pairs = zip(hidden.split(chunk), targets.split(chunk))
    parts = [recompute(score, head, h, y, temper, entropy, use_reentrant=False) for h, y in pairs]
    return tuple(torch.cat(found) if found[0] is not None else None for found in zip(*parts))


def micro_batches(num_prompts: int, G: int, size: int | None) -> list[tuple[slice, slice]]:
    """Pairs (slice of prompts, slice of their completions) of `size` completions each; size >= G keeps groups whole."""
    if size is None or size >= G:
        n = num_prompts if size is None else size // G
        ends = [(i, min(i + n, num_prompts)) for i in range(0, num_prompts, n)]
        return [(slice(i, j), slice(i * G, j * G)) for i, j in ends]
    return [(slice(i // G, i // G + 1), slice(i, i + size)) for i in range(0, num_prompts * G, size)]


def with_micro_batches(args, model, longest: int, num_processes: int):
    """args with a --micro-batch-size: what so many tokens hold, in passes of equal size, of whole groups if one fits.

    longest: tokens of the longest prompt. What could be asked counts, not what was: every process makes as many passes
    as the others, at every step. Activations take about layers * (34 hidden + 8 intermediate sizes) bytes a token.
    """
    if args.micro_batch_size is not None:
        return args
    # eq: 6 N n = 48 TFLOP, a tenth of a second of a large GPU: more tokens n at once would be no faster
    tokens = min(16_384, 8e12 / sum(p.numel() for p in model.parameters()))
    G, T, masked = args.num_generations, args.max_completion_length, args.attn_implementation != "flash_attention_2"
    shared = masked and (longest + G * T <= 1024 if args.share_prompt is None else args.share_prompt)
    group, groups = longest + G * T if shared else G * (longest + T), args.batch_size // G // num_processes
    if group > tokens:
        size = max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n * (longest + T) <= tokens))
    else:
        passes = math.ceil(groups / (tokens // group))
        size = math.ceil(groups / passes) * G
    return replace(args, micro_batch_size=size)


def replace_groups(roll, new, groups: list[int]):
    """A rollout with the completions of some of its prompts taken from `new`; the shorter ones end in 0."""
    T, G = max(roll.ids.shape[1], new.ids.shape[1]), len(roll.texts) // len(roll.prompts)
    rows, changed = [group * G + j for group in groups for j in range(G)], {}
    for name, old in vars(roll).items():
        given, places = getattr(new, name), groups if name == "prompts" else rows
        if isinstance(old, torch.Tensor):
            old, given = (F.pad(x, (0, T - x.shape[1])) if x.dim() == 2 else x for x in (old, given))
            changed[name] = old.index_copy(0, torch.tensor(places, device=old.device), given)
        else:
            chosen = dict(zip(places, given))
            changed[name] = [chosen.get(i, value) for i, value in enumerate(old)]
    return replace(roll, **changed)


# ---- policy and reference --------------------------------------------------------------------------------------------


def in_low_precision(args: LMArgs, device: torch.device) -> bool:
    """Whether matrix products are bfloat16's, over fp32 weights."""
    return args.dtype == "bfloat16" or (args.dtype == "auto" and device.type != "cpu")


def decode_mode(args: LMArgs, device: torch.device) -> str:
    """--decode, with `auto` decided."""
    return args.decode if args.decode != "auto" else "graph" if device.type == "cuda" else "eager"


def decoder_layers(model) -> torch.nn.ModuleList:
    """The transformer layers, whatever the architecture calls them."""
    return next(module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList))


def prepare(model, args: LMArgs, world: World, token_logprobs):
    """Makes model.token_logprobs(...) of the script's function, and shards or compiles the model as the flags say."""
    model.token_logprobs = MethodType(token_logprobs, model)
    if args.fsdp:  # only token_logprobs gathers embedding and head
        low = in_low_precision(args, world.device)
        policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if low else {}
        shard(model, decoder_layers(model), world, methods=["token_logprobs"], **policy)
    if args.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)  # rows are never of one length
        model.chunk_logprobs = partial(in_blocks, torch.compile(chunk_logprobs, dynamic=False))
    return model


def sampling_copy(model, device: torch.device, dtype: torch.dtype | None):
    """The policy that samples: weights in `dtype`, but buffers as they are. Rotary frequencies in bfloat16 would turn
    the tokens at position 300 by up to 0.3 rad and double the gap to the trainer's log-probs."""
    copied = copy.deepcopy(model).to(device, dtype).requires_grad_(False)
    for low, full in zip(copied.buffers(), model.buffers()):
        low.data = full.to(device, copy=True)
    return copied


class Policy:
    """A language model that learns, and what samples from it.

    model: fp32 weights, perhaps sharded; model.token_logprobs is the script's. sampler: the same model or, in low
    precision and wherever else it must be another, a copy that `refresh` brings up to date after every update.
    """

    def __init__(self, model, tokenizer, args: LMArgs, world: World, token_logprobs, say=print):
        self.args, self.tokenizer, self.device = args, tokenizer, world.device
        self.low_precision = low = in_low_precision(args, world.device)
        if low:  # what autocast leaves in fp32, such as rotary angles, is to be exact
            torch.set_float32_matmul_precision("highest")
        self.sampler, decode = model, decode_mode(args, world.device)
        if low or decode != "eager" or args.compile or args.fsdp:
            self.sampler = fuse(sampling_copy(model, self.device, torch.bfloat16 if low else None), say)
        if args.attn_implementation == "flash_attention_2":  # a cache with a position per row needs a mask
            self.sampler.set_attn_implementation("sdpa")
        graphs = decode != "eager"
        self.decoder = GraphDecoder(self.sampler, decode == "compile", say) if graphs else Decoder(self.sampler)
        if args.decode == "graph" and self.device.type != "cuda":
            say("--decode graph: no CUDA graphs on a CPU; steps run uncaptured, see time/decode_fallbacks")
        self.model = prepare(model, args, world, token_logprobs)
        self.stop_ids = sorted({*stop_token_ids(model.generation_config, tokenizer), *chat.ends(tokenizer, args)})
        if args.chat:
            say(f"prompts as the model reads them: {chat.render(tokenizer, '...', args)!r}")
        self.pad_id = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        share_prompt = False if args.attn_implementation == "flash_attention_2" else args.share_prompt  # it has no mask
        # what `generate` has to know besides prompts, lengths, temperature and noise
        self.sampling = {"stop_ids": self.stop_ids, "pad_id": self.pad_id, "vocab_size": len(tokenizer)}
        self.sampling["decoder"] = self.decoder
        # what token_logprobs has to know besides rows and temperature
        self.scoring = {"vocab_size": len(tokenizer), "share_prompt": share_prompt}

    def autocast(self):
        """Around everything that the model or the sampler computes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return encode(self.tokenizer, texts, self.args)

    def texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """(B, T) ids -> what rewards, accuracies, evaluation and tables all see: the text up to the first end token."""
        rows = [row[m].tolist() for row, m in zip(ids.cpu(), mask.cpu())]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def refresh(self) -> None:
        """Gives the sampler the weights as they are now."""
        if self.sampler is not self.model:
            refresh(self.sampler, self.model)

    def save(self, folder: Path | None) -> None:
        """Writes a folder that from_pretrained reads; every process calls it, one of them with a folder."""
        own = {name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]}  # a tied weight once
        tensors = {name: x for name, x in self.model.state_dict().items() if name in own}
        weights = gathered(tensors, keep=folder is not None)
        if folder is not None:
            self.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)


@contextmanager
def swapped(model, weights: list[torch.Tensor]):
    """Runs the block with `weights` (CPU tensors) in the model: the low-memory reference. In place, both ways."""

    def swap():
        for p, w in zip(model.parameters(), weights):
            held = p.detach().clone()  # on the device: what crosses over starts and ends in pinned memory
            p.data.copy_(w)
            w.copy_(held)

    swap()
    try:
        yield model
    finally:
        swap()


class Reference:
    """--model-name as it was before the first step: a second model, or its weights on the CPU."""

    def __init__(self, policy: Policy, args: LMArgs, world: World, token_logprobs):
        self.weights = None
        if args.low_memory_reference:
            self.model = policy.model
            self.weights = [p.detach() for p in load_model(args, torch.device("cpu")).parameters()]
            if world.device.type == "cuda":
                self.weights = [w.pin_memory() for w in self.weights]
        else:
            frozen = load_model(args, world.device).requires_grad_(False)
            self.model = prepare(frozen, args, world, token_logprobs)

    def loaded(self):
        """A context in which the model has the reference's weights: `with reference.loaded() as model`."""
        return nullcontext(self.model) if self.weights is None else swapped(self.model, self.weights)
