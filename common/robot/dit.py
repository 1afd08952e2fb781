"""The action head of GR00T N1.5 and N1.7: transformer blocks, embodiment layers, velocity of the flow.

Dims: B samples, S backbone tokens, H action horizon, D action dim, E embodiments, F future tokens (N1.7 has none).
`config` is a HeadConfig of gr00t.py. What may look at what is the version's: `cross_masks`.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- transformer blocks ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention: queries from x (B, N, width), keys and values from context (B, M, context_width)."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B R, N, width), context (B, M, context_width) -> (B R, N, width): R rows of x in a row share a context."""
        shape, groups = x.shape, len(context)
        x = x.reshape(groups, -1, x.shape[-1])  # (B, R N, width): queries do not see each other
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N or M, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)  # eq: softmax(q k' / sqrt(head_dim)) v
        return self.to_out(y.transpose(1, 2).flatten(2)).view(shape)


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under the names that the checkpoint gives them."""
    return nn.Sequential(OrderedDict(layers))


def feed_forward(width: int, dropout: float) -> nn.Sequential:
    widen = named(proj=nn.Linear(width, 4 * width), gelu=nn.GELU("tanh"))
    return named(net=nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)))


class AdaLayerNorm(nn.Module):
    """LayerNorm whose scale and shift depend on the flow time."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)  # (B, 1, width) each, in this order
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift


class Block(nn.Module):
    """Pre-norm attention and feed-forward. There is no norm2; the number is part of the checkpoint's names."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float, adaptive: bool):
        super().__init__()
        self.adaptive = adaptive
        self.norm1 = AdaLayerNorm(width) if adaptive else nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, context_width, heads, dropout)
        self.norm3 = nn.LayerNorm(width, eps=1e-5, elementwise_affine=not adaptive)
        self.ff = feed_forward(width, dropout)
        self.final_dropout = nn.Dropout(dropout)  # a second one on top of the attention's own, as in the original

    def forward(self, x: Tensor, context: Tensor | None, temb: Tensor | None, key_mask: Tensor | None) -> Tensor:
        h = self.norm1(x, temb) if self.adaptive else self.norm1(x)
        x = x + self.final_dropout(self.attn1(h, h if context is None else context, key_mask))
        return x + self.ff(self.norm3(x))


class BlockStack(nn.Module):
    """Blocks in a row, optionally keeping only their inputs for the backward pass."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False

    def run(self, block: Block, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class VLSelfAttention(BlockStack):
    """Bidirectional self-attention over all backbone tokens."""

    def __init__(self, config):
        width = config.vl_width
        blocks = [Block(width, width, config.vl_heads, config.vl_dropout, False) for _ in range(config.vl_layers)]
        super().__init__(blocks)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        for block in self.transformer_blocks:
            x = self.run(block, x, None, None, key_mask)
        return x  # (B, S, vl_width)


def cos_sin(bucket: Tensor, half: int, divisor: int) -> tuple[Tensor, Tensor]:
    """Time features, (B, half) each, in float32. eq: f_i = 10000^(-i / divisor); cos(bucket f), sin(bucket f)"""
    f = torch.exp(torch.arange(half, device=bucket.device, dtype=torch.float32) * (-math.log(10000) / divisor))
    angles = bucket[:, None].float() * f  # (B, half)
    return angles.cos(), angles.sin()


class DiT(BlockStack):
    """Even blocks: cross-attention to the VL features. Odd blocks: self-attention among the state and action tokens."""

    def __init__(self, config):
        width = config.width
        contexts = [width if i % 2 else config.vl_width for i in range(config.dit_layers)]
        super().__init__([Block(width, context, config.dit_heads, config.dropout, True) for context in contexts])
        embedder = named(linear_1=nn.Linear(256, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width))
        self.timestep_encoder = named(timestep_embedder=embedder)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, features: Tensor, bucket: Tensor, key_masks: list[Tensor | None]) -> Tensor:
        """key_masks: the VL tokens that the cross-attention blocks may look at, (B, 1, 1, S) each, taken in turns."""
        cos, sin = cos_sin(bucket, 128, 127)
        temb = torch.cat([cos, sin], dim=-1).to(self.proj_out_1.weight.dtype)  # (B, 256)
        temb = self.timestep_encoder(temb)  # (B, width), the same for all blocks
        for i, block in enumerate(self.transformer_blocks):
            context, mask = (None, None) if i % 2 else (features, key_masks[i // 2 % len(key_masks)])
            x = self.run(block, x, context, temb, mask)  # (B, 1 + F + H, width)
        shift, scale = self.proj_out_1(F.silu(temb))[:, None].chunk(2, dim=-1)  # the other way round than in the blocks
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.proj_out_2(x)  # (B, 1 + F + H, hidden_size)


# ---- embodiment-specific layers --------------------------------------------------------------------------------------


class EmbodimentLinear(nn.Module):
    """One Linear per embodiment; each sample uses its own and only that one gets a gradient."""

    def __init__(self, num_embodiments: int, inputs: int, outputs: int):
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(num_embodiments, inputs, outputs))
        self.b = nn.Parameter(torch.zeros(num_embodiments, outputs))

    def forward(self, x: Tensor, embodiment_id: Tensor) -> Tensor:
        """x (B, N, inputs), embodiment_id (B,) or (1,) -> (B, N, outputs)"""
        W = self.W.index_select(0, embodiment_id)  # (B or 1, inputs, outputs)
        b = self.b.index_select(0, embodiment_id)[:, None]  # (B or 1, 1, outputs)
        return (x @ W[0] if len(W) == 1 else torch.bmm(x, W)) + b


class EmbodimentMLP(nn.Module):
    def __init__(self, num_embodiments: int, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.layer1 = EmbodimentLinear(num_embodiments, inputs, hidden)
        self.layer2 = EmbodimentLinear(num_embodiments, hidden, outputs)

    def forward(self, x: Tensor, embodiment_id: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, embodiment_id)), embodiment_id)


class ActionEncoder(nn.Module):
    """Noisy actions and the flow time -> one token per action step."""

    def __init__(self, num_embodiments: int, action_dim: int, width: int):
        super().__init__()
        self.width = width
        self.W1 = EmbodimentLinear(num_embodiments, action_dim, width)
        self.W2 = EmbodimentLinear(num_embodiments, 2 * width, width)
        self.W3 = EmbodimentLinear(num_embodiments, width, width)

    def forward(self, actions: Tensor, bucket: Tensor, embodiment_id: Tensor) -> Tensor:
        a = self.W1(actions, embodiment_id)  # (B, H, width)
        # neither the order nor the divisor are those of the DiT
        cos, sin = cos_sin(bucket, self.width // 2, self.width // 2)
        tau = torch.cat([sin, cos], dim=-1).to(a.dtype)[:, None].expand_as(a)  # (B, H, width), the same for all steps
        z = self.W2(torch.cat([a, tau], dim=-1), embodiment_id)
        return self.W3(F.silu(z), embodiment_id)  # (B, H, width)


class ActionHead(nn.Module):
    """VL features, state and noisy actions -> velocity of the flow from noise to actions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n, width, hidden = config.num_embodiments, config.width, config.hidden_size
        self.model = DiT(config)
        self.state_encoder = EmbodimentMLP(n, config.state_dim, hidden, width)
        self.action_encoder = ActionEncoder(n, config.action_dim, width)
        self.action_decoder = EmbodimentMLP(n, hidden, hidden, config.action_dim)
        if config.num_future_tokens:
            self.future_tokens = nn.Embedding(config.num_future_tokens, width)
        self.vlln = nn.LayerNorm(config.vl_width, eps=1e-5)
        self.vl_self_attention = VLSelfAttention(config)
        self.position_embedding = nn.Embedding(config.max_seq_len, width)
        if config.num_future_tokens:
            nn.init.normal_(self.future_tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.vlln.weight.dtype

    def vl_mask(self, mask: Tensor | None) -> Tensor | None:
        """Which tokens the VL self-attention looks at, (B, 1, 1, S) bool; None: all. mask (B, S): of the backbone."""
        return mask[:, None, None] > 0 if self.config.mask_padding and mask is not None else None

    def cross_masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """The same for the cross-attention blocks of the DiT, which take these masks in turns."""
        raise NotImplementedError

    def process_backbone(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, vl_width) -> (B, S, vl_width): LayerNorm and self-attention over the backbone's tokens."""
        return self.vl_self_attention(self.vlln(features.to(self.dtype)), self.vl_mask(mask))

    def velocity(
        self,
        features: Tensor,
        mask: Tensor | None,
        state: Tensor,
        x_t: Tensor,
        t: Tensor,
        embodiment_id: Tensor,
        state_dropped: Tensor | None = None,
    ) -> Tensor:
        """-> v_pred (B, H, D). t (B,) in float32 or float64: bfloat16 would land in the wrong time bucket.

        features and mask may have B / R rows: each then serves R rows in a row of the rest. state_dropped (B,) bool:
        samples that have to do without their state.
        """
        H = x_t.shape[1]
        bucket = (t * self.config.num_timestep_buckets).long()  # (B,), toward zero
        state_token = self.state_encoder(state.to(self.dtype), embodiment_id)  # (B, 1, width)
        if state_dropped is not None:
            state_token = state_token * ~state_dropped[:, None, None]
        actions = self.action_encoder(x_t.to(self.dtype), bucket, embodiment_id)  # (B, H, width)
        actions = actions + self.position_embedding.weight[:H]
        future = [self.future_tokens.weight] if self.config.num_future_tokens else []
        future = [tokens.expand(len(x_t), -1, -1).to(actions.dtype) for tokens in future]  # (B, F, width)
        tokens = torch.cat([state_token, *future, actions], dim=1)  # (B, 1 + F + H, width)
        out = self.model(tokens, features, bucket, self.cross_masks(mask))  # (B, 1 + F + H, hidden_size)
        return self.action_decoder(out[:, -H:], embodiment_id)  # (B, H, D)
