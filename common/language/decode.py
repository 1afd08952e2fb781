"""What feeds tokens: decode steps of a causal language model on a KV cache in which every row has its own position.

How a token is drawn from logits is the caller's: `sample(logits, uniform, *settings)` gets logits (b, V) and numbers in
[0, 1) (b,), and returns tokens (b,) and their log-probs (b,). In a script

    rows = decoder.prefill(prompts, num_generations, max_new_tokens, noise, stop_ids, pad_id, sample, *settings)
    while ...:
        rows = decoder.keep(rows, chosen)      # go on with some of the rows
        decoder.step(rows, sample, *settings)  # feed the last token of each, sample the next

`Decoder` runs op by op. `GraphDecoder` computes the same on buffers that never move, as captured CUDA graphs.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


def pad_right(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (N, L) ids padded on the right, (N,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean attention mask -> 0 / lowest number, which every attention implementation takes."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def sampling_noise(key: int, sample_ids, length: int) -> torch.Tensor:
    """Uniform numbers (B, length) in [0, 1), a function of (key, sample id, position) alone; key: a stream_seed.

    A completion therefore does not depend on the batch, the process or the order it was sampled in.
    """
    keys = [[key % 2**64, i] for i in sample_ids]
    rows = [np.random.Generator(np.random.Philox(key=k)).random(length, dtype=np.float32) for k in keys]
    return torch.from_numpy(np.stack(rows))


def first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """cdf (B, n), target (B, 1) -> (B, 1) the first index whose running sum is above the target."""
    return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)


def inverse_cdf(p: torch.Tensor, uniform: torch.Tensor, block: int = 128) -> torch.Tensor:
    """p (B, V) probabilities, uniform (B,) in [0, 1) -> ids (B,).

    Of more than 64 blocks first the block of 128 ids, then the id in it: a running sum over 150,000 numbers is slow on
    a GPU, and torch 2.11 fails to compile it for a batch of 256 (pytorch#180221).
    """
    if p.shape[-1] <= 64 * block:
        cdf = p.cumsum(-1)  # eq: a = min { a : sum_{b <= a} p(b) > u }
        return first_above(cdf, uniform[:, None] * cdf[:, -1:])[:, 0]
    blocks = F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block))  # (B, V / block, block)
    mass = blocks.sum(-1)  # (B, V / block)
    cdf = mass.cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    chosen = first_above(cdf, target)  # (B, 1)
    rest = target - (cdf.gather(-1, chosen) - mass.gather(-1, chosen))  # (B, 1) what is left of it in the block
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block))[:, 0].cumsum(-1)  # (B, block)
    # what rounding adds or takes must not lead to an id of probability 0 at either end of the block
    rest = rest.clamp(min=0).minimum(inside[:, -1:] * (1 - 2**-23))
    return (chosen * block + first_above(inside, rest))[:, 0].clamp(max=p.shape[-1] - 1)


class RowCacheLayer(CacheLayerMixin):
    """Preallocated keys and values (b, heads, capacity, head_dim) in which every row has its own next position.

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
class Rows:
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
    stop_ids: tuple[int, ...]
    pad_id: int
    filled: int = 0  # columns of the cache that hold something in some row

    def __post_init__(self):
        rows = torch.arange(len(self.token), device=self.token.device)
        layers = [RowCacheLayer(k, v, rows, self.position) for k, v in zip(self.keys, self.values)]
        self.cache = Cache(layers=layers)

    def append(self, tokens, logprobs) -> None:
        """Writes the next token of every row down, and marks the rows that it ends."""
        self.token.copy_(torch.where(self.finished, self.pad_id, tokens))
        self.ids[self.output, self.t] = self.token
        self.logprobs[self.output, self.t] = torch.where(self.finished, 0.0, logprobs.float())
        for stop_id in self.stop_ids:
            self.finished |= tokens == stop_id
        self.t += 1

    def pick(self, chosen, columns: int | None = None) -> "Rows":
        """Some of the rows, with the first so many columns; with a slice a view, with indices a copy."""
        small = {name: getattr(self, name)[chosen] for name in ("token", "position", "finished", "output")}
        keys, values = ([x[chosen][:, :, slice(columns)] for x in caches] for caches in (self.keys, self.values))
        return replace(self, keys=keys, values=values, **small)


def feed(model, rows: Rows, sample, *settings) -> None:
    """Feeds the last token of every row, and appends the next one."""
    visible = torch.arange(rows.keys[0].shape[2], device=rows.token.device) <= rows.position[:, None]  # (b, C)
    hidden = model.base_model(
        input_ids=rows.token[:, None],
        attention_mask=additive(visible, model.dtype)[:, None, None],  # (b, 1, 1, C)
        position_ids=rows.position[:, None],
        past_key_values=rows.cache,
        use_cache=True,
    ).last_hidden_state  # (b, 1, d)
    rows.position += 1
    logits, uniform = model.get_output_embeddings()(hidden[:, 0]), rows.noise[rows.output, rows.t]  # (b, V), (b,)
    rows.append(*sample(logits, uniform, *settings))


class Decoder:
    """Decode steps op by op, on tensors of the batch's own shape."""

    def __init__(self, model):
        self.model, self.fallbacks = model, 0  # steps that were to be captured and were not: see GraphDecoder

    def prefill(self, prompts, num_generations, max_new_tokens, noise, stop_ids, pad_id, sample, *settings) -> Rows:
        """Computes every distinct prompt once, gives each of its completions a row, and appends their first tokens.

        prompts: lists of token ids; noise (B, T), or None: from torch's generator.
        """
        model, device, T = self.model, self.model.device, max_new_tokens
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([number[tuple(p)] for p in prompts], device=device).repeat_interleave(num_generations)
        prompt_ids, lengths = pad_right([list(p) for p in number], pad_id, device)  # (P', L), (P',)
        L, B = prompt_ids.shape[1], len(which)

        # padding on the right is never seen by a causal model, and is overwritten column by column later
        cache = DynamicCache(config=model.config)
        hidden = model.base_model(input_ids=prompt_ids, past_key_values=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(lengths), device=device), lengths - 1]  # (P', d)

        def expand(prefilled):  # (P', heads, L, head_dim) -> (B, heads, L + T, head_dim)
            out = prefilled.new_zeros(B, prefilled.shape[1], L + T, prefilled.shape[3])
            out[:, :, :L] = prefilled[which]
            return out

        rows = Rows(
            token=torch.zeros(B, dtype=torch.long, device=device),
            position=lengths[which],
            finished=torch.zeros(B, dtype=torch.bool, device=device),
            output=torch.arange(B, device=device),
            keys=[expand(layer.keys) for layer in cache.layers],
            values=[expand(layer.values) for layer in cache.layers],
            t=torch.zeros(1, dtype=torch.long, device=device),
            noise=torch.rand(B, T, device=device) if noise is None else noise.to(device),
            ids=torch.full((B, T), pad_id, device=device),
            logprobs=torch.zeros(B, T, device=device),
            stop_ids=tuple(stop_ids),
            pad_id=pad_id,
            filled=L,
        )
        rows.append(*sample(model.get_output_embeddings()(last)[which], rows.noise[:, 0], *settings))
        return rows

    def keep(self, rows: Rows, chosen: torch.Tensor) -> Rows:
        """The batch goes on with the chosen rows alone."""
        return rows.pick(chosen)

    def step(self, rows: Rows, sample, *settings) -> None:
        """Feeds the last token of every row, and appends the next one."""
        feed(self.model, rows, sample, *settings)


# ---- the fast path: the same steps, captured -------------------------------------------------------------------------


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


def bucket(rows: int, columns: int) -> tuple[int, int]:
    """The shape whose graph serves a batch: rows 8, 12, 16, 24, 32, 48, ..., so that at most a third is padding;
    columns in multiples of 64.

    >>> bucket(256, 40), bucket(130, 65), bucket(1, 64)
    ((256, 64), (192, 128), (8, 64))
    """
    power = 1 << (max(rows, 8) - 1).bit_length()  # the power of two at or above
    return power * 3 // 4 if 8 < rows <= power * 3 // 4 else power, -(-columns // 64) * 64


class GraphDecoder(Decoder):
    """Decode steps on buffers that stay where they are, one captured CUDA graph per shape and way of sampling.

    model: its weights may change in place, never move; its attention becomes "packed". fallbacks: steps without graph
    and compilation, because the device has no graphs or a capture failed; `say` tells why.
    """

    def __init__(self, model, compiled: bool, say=print):
        super().__init__(model)
        model.set_attn_implementation("packed")
        self.compiled, self.say = compiled, say
        self.feed = torch.compile(feed, dynamic=False, fullgraph=True) if compiled else feed
        self.size = (0, 0, 0)  # rows, columns and tokens that there is room for; none yet
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # shapes; beyond it is an error, not a silent return to eager

    def prefill(self, *args) -> Rows:
        return self.place(super().prefill(*args))

    def keep(self, rows: Rows, chosen: torch.Tensor) -> Rows:
        return self.place(rows.pick(chosen))

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the steps that serve so many: their bucket.

        A compiled decoder has few, for each costs half a minute: all rows that there is room for, a quarter or a
        sixteenth of them, with all columns or a quarter.
        """
        if not self.compiled:
            return bucket(rows, columns)
        R, C, _ = self.size
        return min(n for n in (R, R // 4, R // 16) if n >= rows), min(n for n in (C, -(-C // 256) * 64) if n >= columns)

    def place(self, s: Rows) -> Rows:
        """Copies rows into the buffers, padded to the bucket. They grow, and the graphs go, if there is no room."""
        n, C, (B, T) = len(s.token), s.keys[0].shape[2], s.ids.shape
        need = (*bucket(n, C), T)
        if any(a > b for a, b in zip(need, self.size)):
            self.graphs, self.pool = {}, None  # the graphs hold the old addresses
            self.size = R, columns, length = tuple(map(max, need, self.size))
            self.buffers = Rows(
                *(x.new_zeros(R) for x in (s.token, s.position, s.finished, s.output)),
                *([x.new_zeros(R, x.shape[1], columns, x.shape[3]) for x in xs] for xs in (s.keys, s.values)),
                s.t.clone(),
                *(x.new_zeros(R + 1, length) for x in (s.noise, s.ids, s.logprobs)),  # padding writes to the last row
                s.stop_ids,
                s.pad_id,
            )
        own = self.buffers
        if s.ids is not own.ids:  # a new batch, not what is left of one
            own.t.copy_(s.t)
            own.stop_ids, own.pad_id = s.stop_ids, s.pad_id
            own.noise[:B, :T], own.ids[:B, :T], own.logprobs[:B, :T] = s.noise, s.ids, s.logprobs
        view = own.pick(slice(self.shape(n, C)[0]))
        view.filled = s.filled
        for name, padding in {"token": 0, "position": 0, "finished": True, "output": self.size[0]}.items():
            getattr(view, name)[:n], getattr(view, name)[n:] = getattr(s, name), padding
        for buffer, new in zip(view.keys + view.values, s.keys + s.values):
            buffer[:n, :, :C], buffer[:n, :, C:] = new, 0  # nothing of an earlier batch, be it not a number
        return view

    def step(self, rows: Rows, sample, *settings) -> None:
        rows.filled += 1
        n, columns = self.shape(len(rows.token), rows.filled)
        key = (n, columns, rows.stop_ids, rows.pad_id, sample, *settings)
        with torch.autocast(rows.token.device.type, enabled=False):  # one dtype throughout; casts would move
            if key not in self.graphs:
                self.graphs[key] = self.record(self.buffers.pick(slice(n), columns), sample, *settings)
            replay, is_fallback, _ = self.graphs[key]
            replay()
            self.fallbacks += is_fallback

    def record(self, view: Rows, sample, *settings) -> tuple:
        """What replays a step on this view of the buffers, whether without graph and compilation, and the view."""
        changed = (view.token, view.position, view.finished, view.t)
        before = [x.clone() for x in changed]

        def undo():
            for x, value in zip(changed, before):
                x.copy_(value)

        try:
            fast = self.capture(partial(self.feed, self.model, view, sample, *settings), undo)
        except Exception as error:  # whatever the compiler or CUDA raises
            undo()
            fast = None
            shape = f"{len(view.token)} x {view.keys[0].shape[2]}"
            self.say(f"decode bucket {shape} runs uncaptured: {str(error).splitlines()[0]}")
        return fast or partial(feed, self.model, view, sample, *settings), fast is None, view  # a graph owns nothing

    def capture(self, step, undo):
        """step() as a CUDA graph: returns what replays it, None where there are no graphs. undo() takes a step back."""
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
