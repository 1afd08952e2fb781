"""GR00T N1.5: a vision-language backbone and a flow-matching action head. Architecture and checkpoint files only.

    images ── SigLIP tower ── Linear ──┐
    instruction ── token embedding ────┴─ Qwen3 layers ── LayerNorm ── self-attention ──┐ VL features: keys and values
    state ── per-embodiment MLP ─────────┐                                              │
    learned future tokens ───────────────┼─ DiT: even blocks look at the VL features ───┘
    x_t and t ── per-embodiment encoder ─┘   odd blocks at each other ── per-embodiment MLP ── velocity v_pred

Dims: B samples, V camera views, S backbone tokens, H action horizon, D action dim, E embodiments, F future tokens.
Sizes of the published checkpoint: S 294 (one view), H 16, D 32, E 32, F 32, VL features 2048 wide, DiT 1536 wide.

A batch is a dict of tensors; an optional key is in brackets:
    eagle_pixel_values    (B * V, 3, height, width)   in [-1, 1], sample by sample, then view by view; not for "lite"
    eagle_input_ids       (B, S) int64                left-padded; `image_token_index` once per image patch
    eagle_attention_mask  (B, S)                      0 on pad tokens
    state                 (B, 1, state_dim)           normalised, zero-padded
    embodiment_id         (B,) int64                  or (1,): all samples share one, which spares copies of its weights
    [action, action_mask] (B, H, D)                   for the loss (which lives in the scripts)
    [backbone_features, backbone_attention_mask]      outputs of an earlier `model.backbone(batch)`; it is then not run

What the scripts call; loss and sampler are theirs:
    features, mask = model.vl_features(batch)         (B, S, vl_width), (B, S) bool: `backbone`, then `process_backbone`
    v_pred = model.velocity(features, mask, state, x_t, t, embodiment_id)   (B, H, D);  t (B,) float: 0 noise, 1 data
    model.set_trainable(tune_llm=, tune_visual=, tune_projector=, tune_diffusion_model=);  model.train() respects it
    GR00T(config), GR00T.from_pretrained(folder or hub id), model.save_pretrained(folder)

Where the original is matched although one might not: pad tokens are attended to by the VL self-attention and the DiT
(`mask_padding=True` in the config masks them), and weights sit on disk that nothing uses (`lm_head`, the SigLIP
pooling head). The latter are not part of the module: they wait in `model.carried`, on the CPU, to be saved again.
"""

import copy
import dataclasses
import json
import math
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from huggingface_hub import save_torch_state_dict
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.utils import is_flash_attn_2_available
from typing_extensions import TypedDict

from common.cli import NonNegative, Positive, Share, fail, in_words, schema_of
from common.files import Object, read_json
from common.robot.files import find_folder

EMBODIMENTS = {"new_embodiment": 31, "gr1": 24, "oxe_droid": 17, "agibot_genie1": 26}  # tag -> row; 28 more are unnamed

# ---- config ----------------------------------------------------------------------------------------------------------

VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=224)
VISION |= dict(num_channels=3, patch_size=14, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, attention_dropout=0)
TEXT = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, head_dim=128)
TEXT |= dict(num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, attention_bias=False)
TEXT |= dict(attention_dropout=0, vocab_size=151680, max_position_embeddings=40960, tie_word_embeddings=True)
# The published checkpoint does not hold the sizes of its vision-language model; a folder may, as eagle_config.json.
EAGLE = dict(model_type="eagle_2_5_vl", use_pixel_shuffle=False, mlp_connector_layers=1, select_layer=-1)
EAGLE |= dict(force_image_size=224, image_token_index=151669, vision_config=VISION, text_config=TEXT)

# What config.json may say: a width in digits must not hang or exhaust the machine that reads it.
Size = Annotated[int, Interval(ge=1, le=10**7)]
Layers = Annotated[int, Interval(ge=1, le=1000)]


def schema_like(name: str, defaults: dict):
    """A pydantic model whose fields have the kinds of these defaults; keys that are not used here pass."""
    fields = {}
    for key, value in defaults.items():
        kind = type(value) if isinstance(value, bool | str) or value == -1 else NonNegative
        if isinstance(value, int) and value > 1 and key != "rope_theta":
            kind = Layers if key.endswith("layers") else Size
        fields[key] = schema_like(key, value) if isinstance(value, dict) else kind, value
    return create_model(name, __config__=ConfigDict(extra="allow", strict=True, allow_inf_nan=False), **fields)


EagleSizes = schema_like("eagle_config", EAGLE)


@dataclass(frozen=True)
class GR00TConfig:
    """Sizes of the model; the defaults are those of nvidia/GR00T-N1.5-3B."""

    state_dim: Size = 64
    action_dim: Size = 32
    action_horizon: Size = 16
    num_embodiments: Size = 32
    max_seq_len: Size = 1024  # rows of the position table, of which the first action_horizon are used
    num_future_tokens: Size = 32
    hidden_size: Size = 1024  # inner width of the embodiment layers and output width of the DiT
    dit_layers: Layers = 16
    dit_heads: Size = 32
    dit_head_dim: Size = 48
    dropout: Share = 0.2
    vl_layers: Layers = 4
    vl_heads: Size = 32
    vl_head_dim: Size = 64
    vl_dropout: Share = 0.2
    num_timestep_buckets: Size = 1000
    noise_beta_alpha: Positive = 1.5
    noise_beta_beta: Positive = 1.0
    noise_s: Positive = 0.999
    num_inference_timesteps: Size = 4
    select_layer: Layers = 12  # text layers kept, of those in text_config
    eagle: dict = field(default_factory=lambda: EAGLE)
    # above 0: "lite", a table of that many tokens instead of the vision-language model
    instruction_vocab: Annotated[int, Interval(ge=0, le=10**7)] = 0
    mask_padding: bool = False
    source: dict = field(default_factory=dict)  # the config.json this came from: keys not used here are written again

    @property
    def width(self) -> int:
        return self.dit_heads * self.dit_head_dim

    @property
    def vl_width(self) -> int:
        return self.vl_heads * self.vl_head_dim

    @property
    def image_size(self) -> int:
        return self.eagle["vision_config"]["image_size"]

    @property
    def image_token_index(self) -> int:
        return self.eagle["image_token_index"]

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.eagle["vision_config"]["patch_size"]) ** 2

    @classmethod
    def tiny(cls, image_size: int = 64, patch_size: int = 8, vocab_size: int = 272, **changes) -> "GR00TConfig":
        """Every part at toy width. Ids: 256 bytes, 3 Qwen specials, then the image tokens from 259 on."""
        toy = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        vision = VISION | toy | dict(image_size=image_size, patch_size=patch_size)
        text = TEXT | toy | dict(num_key_value_heads=1, head_dim=32, vocab_size=vocab_size)
        eagle = EAGLE | dict(force_image_size=image_size, image_token_index=259, vision_config=vision, text_config=text)
        return cls(**(TOY_HEAD | dict(select_layer=2, eagle=eagle) | changes))

    @classmethod
    def lite(cls, instruction_vocab: int = 272, **changes) -> "GR00TConfig":
        """The same head at toy width; the backbone is a learned table of instruction tokens, there are no images."""
        return cls(**(TOY_HEAD | dict(instruction_vocab=instruction_vocab) | changes))

    def fixed(self) -> dict[str, object]:
        """Places in config.json whose value follows from the architecture and the sizes."""
        dit, vl = "diffusion_model_cfg", "vl_self_attention_cfg"
        head = {f"{stack}.{key}": value for stack in (dit, vl) for key, value in BOTH_STACKS.items()}
        head |= {f"{dit}.norm_type": "ada_norm", f"{dit}.interleave_self_attention": True}
        head |= {"add_pos_embed": True, "use_vlln": True, "input_embedding_dim": self.width}
        head |= {f"{dit}.output_dim": self.hidden_size, f"{dit}.cross_attention_dim": self.vl_width}
        head |= {"backbone_embedding_dim": self.vl_width, "max_action_dim": self.action_dim}
        fixed = {f"action_head_cfg.{key}": value for key, value in head.items()}
        fixed |= {key: getattr(self, key) for key in SAID_TWICE}
        return fixed | {"model_type": "gr00t_n1_5", "backbone_cfg.project_to_dim": None}

    @classmethod
    def from_json(cls, config: dict, eagle: dict | None = None) -> "GR00TConfig":
        """From the checkpoint's config.json and, where there is one, eagle_config.json. Not N1.5: exit code 2."""
        if config.get("type") == "groot" and "action_head_cfg" not in config:
            return cls()  # LeRobot describes its policy, not the network, which is the published one
        values = {name: get(config, place) for name, place in PLACES.items()}
        if absent := [PLACES[name] for name, value in values.items() if value is None and name not in OPTIONAL]:
            fail(f"config.json is not that of a GR00T N1.5 checkpoint, it has no {', '.join(absent)}")
        values = {name: value for name, value in values.items() if value is not None}
        try:
            eagle = EAGLE | (eagle or {})
            EagleSizes.model_validate(eagle)
            eagle |= {key: EAGLE[key] | eagle[key] for key in ("vision_config", "text_config")}
            values = vars(cls()) | values | {"eagle": eagle, "source": config}
            found = cls(**TypeAdapter(schema_of(cls)).validate_python(values))
        except ValidationError as error:
            name, _, rest = in_words(error).partition(" ")
            fail(f"config.json is not that of a GR00T N1.5 checkpoint: {PLACES.get(name, name)} {rest}")
        # the head goes by its own sizes: a configuration derived from the published one may keep that one's above
        kept = {key: getattr(found, key) for key in SAID_TWICE if config.get(key) == getattr(cls, key)}
        wrong = [(place, get(config | kept, place, want), want) for place, want in found.fixed().items()]
        wrong += [(key, found.eagle[key], EAGLE[key]) for key in ("use_pixel_shuffle", "mlp_connector_layers")]
        wrong += [("max_seq_len", found.max_seq_len, max(found.max_seq_len, found.action_horizon))]
        if not found.instruction_vocab:
            wrong += [("text_config.hidden_size", found.eagle["text_config"]["hidden_size"], found.vl_width)]
            vocabulary, side = found.eagle["text_config"]["vocab_size"], min(found.image_size, 4096)
            wrong += [("image_token_index", found.image_token_index, min(found.image_token_index, vocabulary - 1))]
            wrong += [("vision_config.image_size", found.image_size, side)]
            wrong += [("image tokens of a picture", found.tokens_per_image, max(found.tokens_per_image, 1))]
        if wrong := [f"{place} is {got!r}, not {want!r}" for place, got, want in wrong if got != want]:
            fail(f"config.json is not that of GR00T N1.5: {'; '.join(wrong)}. N1, N1.6 and N1.7 are other networks")
        return found

    def to_json(self) -> dict:
        """config.json in the published layout."""
        config = copy.deepcopy(PUBLISHED | self.source)
        for place, value in self.fixed().items():
            put(config, place, value)
        for name, place in PLACES.items():
            default = getattr(GR00TConfig, name)
            if name not in OPTIONAL or getattr(self, name) != default or get(config, place) is not None:
                put(config, place, getattr(self, name))
        return config | dict(action_dim=self.action_dim, action_horizon=self.action_horizon, hidden_size=self.vl_width)


PLACES = {  # field of GR00TConfig -> where config.json has it
    "state_dim": "action_head_cfg.max_state_dim",
    "num_embodiments": "action_head_cfg.max_num_embodiments",
    "num_future_tokens": "action_head_cfg.num_target_vision_tokens",
    "dit_layers": "action_head_cfg.diffusion_model_cfg.num_layers",
    "dit_heads": "action_head_cfg.diffusion_model_cfg.num_attention_heads",
    "dit_head_dim": "action_head_cfg.diffusion_model_cfg.attention_head_dim",
    "dropout": "action_head_cfg.diffusion_model_cfg.dropout",
    "vl_layers": "action_head_cfg.vl_self_attention_cfg.num_layers",
    "vl_heads": "action_head_cfg.vl_self_attention_cfg.num_attention_heads",
    "vl_head_dim": "action_head_cfg.vl_self_attention_cfg.attention_head_dim",
    "vl_dropout": "action_head_cfg.vl_self_attention_cfg.dropout",
    "select_layer": "backbone_cfg.select_layer",
    "instruction_vocab": "backbone_cfg.instruction_vocab",
    "mask_padding": "mask_padding",
}
SAME_NAME = "action_dim action_horizon max_seq_len hidden_size num_timestep_buckets noise_beta_alpha noise_beta_beta"
PLACES |= {name: f"action_head_cfg.{name}" for name in [*SAME_NAME.split(), "noise_s", "num_inference_timesteps"]}
SAID_TWICE = ("action_dim", "action_horizon")  # at the top of config.json too
OPTIONAL = {"num_embodiments", "max_seq_len", "instruction_vocab", "mask_padding"}  # absent from the published file
BOTH_STACKS = {"final_dropout": True, "positional_embeddings": None}
PUBLISHED = {  # keys of the published file that nothing here depends on
    "architectures": ["GR00T_N1_5"],
    "attn_implementation": None,
    "model_dtype": "float32",
    "backbone_cfg": dict(eagle_path="qwen3_1_7B-Siglip2_400M_1mlp_nops", load_bf16=False, reproject_vision=False)
    | dict(tune_llm=False, tune_visual=True, use_flash_attention=True),
    "action_head_cfg": dict(model_dtype="float32", tune_projector=True, tune_diffusion_model=True),
}
TOY_HEAD = dict(hidden_size=64, num_future_tokens=4, dit_layers=4, dit_heads=4, dit_head_dim=16, vl_layers=1)
TOY_HEAD |= dict(vl_heads=4, vl_head_dim=16, max_seq_len=64, dropout=0.0, vl_dropout=0.0)


def get(config: dict, place: str, default=None):
    for key in place.split("."):
        config = config.get(key, default) if isinstance(config, dict) else default
    return config


def put(config: dict, place: str, value) -> None:
    *outer, last = place.split(".")
    for key in outer:
        config = config.setdefault(key, {})
    config[last] = value


# ---- backbone --------------------------------------------------------------------------------------------------------


class EagleBackbone(nn.Module):
    """Images and prompt -> one feature per token: SigLIP, one Linear, the first layers of Qwen3 and its final norm."""

    def __init__(self, config: GR00TConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            fail("--attn-implementation flash_attention_2 needs the flash-attn package; sdpa works everywhere")
        vision = {k: v for k, v in config.eagle["vision_config"].items() if k in VISION}
        text = {k: v for k, v in config.eagle["text_config"].items() if k in TEXT}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 1000000)}
        text["num_hidden_layers"] = config.select_layer
        vision_config = SiglipVisionConfig(**vision, vision_use_head=False, attn_implementation=attn_implementation)
        text_config = Qwen3Config(**text, use_cache=False, attn_implementation=attn_implementation)
        # the nesting gives the tensors the names they have in the published checkpoint
        self.eagle_model = nn.Module()
        self.eagle_model.vision_model = nn.ModuleDict({"vision_model": SiglipVisionModel(vision_config)})
        self.eagle_model.mlp1 = nn.Sequential(nn.Linear(vision_config.hidden_size, text_config.hidden_size))
        self.eagle_model.language_model = nn.ModuleDict({"model": Qwen3Model(text_config)})
        self.image_token_index = config.image_token_index

    @property
    def vision(self) -> SiglipVisionModel:
        return self.eagle_model.vision_model["vision_model"]

    @property
    def text(self) -> Qwen3Model:
        return self.eagle_model.language_model["model"]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> features (B, S, vl_width), mask (B, S) bool. ValueError when images and image tokens do not match."""
        ids, mask = batch["eagle_input_ids"], batch["eagle_attention_mask"].bool()  # (B, S)
        patches = self.vision(pixel_values=batch["eagle_pixel_values"]).last_hidden_state  # (B * V, patches, vision)
        patches = self.eagle_model.mlp1(patches).flatten(0, 1)  # (B * V * patches, text)
        embeds = self.text.embed_tokens(ids)  # (B, S, text)
        is_image = ids == self.image_token_index
        if (expected := int(is_image.sum())) != len(patches):
            raise ValueError(f"the prompts have {expected} image tokens, the images {len(patches)} patches")
        embeds = embeds.masked_scatter(is_image[..., None], patches.to(embeds.dtype))
        # Causal. Positions count pads too, which rotary embeddings do not notice. A pad row sees no key at all, and
        # sdpa gives it zeros, as flash attention does; "eager" does not, which changes what the head reads there.
        features = self.text(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return features, mask

    def restore_buffers(self) -> None:
        """Makes what is computed rather than stored; needed after the modules were built without memory."""
        embeddings, rotary = self.vision.embeddings, self.text.rotary_emb
        device = self.text.norm.weight.device
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings, device=device)[None]
        self.text.rotary_emb = type(rotary)(rotary.config).to(device)


class InstructionTable(nn.Module):
    """The lite backbone: a learned vector per instruction token, in no order, and no images."""

    def __init__(self, config: GR00TConfig):
        super().__init__()
        self.instruction_table = nn.Embedding(config.instruction_vocab, config.vl_width)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.instruction_table(batch["eagle_input_ids"]), batch["eagle_attention_mask"].bool()

    def restore_buffers(self) -> None:
        pass


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

    def __init__(self, config: GR00TConfig):
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

    def __init__(self, config: GR00TConfig):
        width = config.width
        contexts = [width if i % 2 else config.vl_width for i in range(config.dit_layers)]
        super().__init__([Block(width, context, config.dit_heads, config.dropout, True) for context in contexts])
        embedder = named(linear_1=nn.Linear(256, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width))
        self.timestep_encoder = named(timestep_embedder=embedder)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, features: Tensor, bucket: Tensor, key_mask: Tensor | None) -> Tensor:
        cos, sin = cos_sin(bucket, 128, 127)
        temb = torch.cat([cos, sin], dim=-1).to(self.proj_out_1.weight.dtype)  # (B, 256)
        temb = self.timestep_encoder(temb)  # (B, width), the same for all blocks
        for i, block in enumerate(self.transformer_blocks):
            context, mask = (None, None) if i % 2 else (features, key_mask)
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

    def __init__(self, config: GR00TConfig):
        super().__init__()
        self.config = config
        n, width, hidden = config.num_embodiments, config.width, config.hidden_size
        self.model = DiT(config)
        self.state_encoder = EmbodimentMLP(n, config.state_dim, hidden, width)
        self.action_encoder = ActionEncoder(n, config.action_dim, width)
        self.action_decoder = EmbodimentMLP(n, hidden, hidden, config.action_dim)
        self.future_tokens = nn.Embedding(config.num_future_tokens, width)
        self.vlln = nn.LayerNorm(config.vl_width, eps=1e-5)
        self.vl_self_attention = VLSelfAttention(config)
        self.position_embedding = nn.Embedding(config.max_seq_len, width)
        nn.init.normal_(self.future_tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.vlln.weight.dtype

    def key_mask(self, mask: Tensor | None) -> Tensor | None:
        """What attention may look at. The original attends to pad tokens, so a sample depends on its batch."""
        return mask[:, None, None].bool() if self.config.mask_padding and mask is not None else None  # (B, 1, 1, S)

    def process_backbone(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, vl_width) -> (B, S, vl_width): LayerNorm and self-attention over the backbone's tokens."""
        return self.vl_self_attention(self.vlln(features.to(self.dtype)), self.key_mask(mask))

    def velocity(
        self, features: Tensor, mask: Tensor | None, state: Tensor, x_t: Tensor, t: Tensor, embodiment_id: Tensor
    ) -> Tensor:
        """-> v_pred (B, H, D). t (B,) in float32 or float64: bfloat16 would land in the wrong time bucket.

        features and mask may have B / R rows: each then serves R rows in a row of the rest.
        """
        H = x_t.shape[1]
        bucket = (t * self.config.num_timestep_buckets).long()  # (B,), toward zero
        state_token = self.state_encoder(state.to(self.dtype), embodiment_id)  # (B, 1, width)
        future_tokens = self.future_tokens.weight.expand(len(x_t), -1, -1)  # (B, F, width)
        actions = self.action_encoder(x_t.to(self.dtype), bucket, embodiment_id)  # (B, H, width)
        actions = actions + self.position_embedding.weight[:H]
        tokens = torch.cat([state_token, future_tokens.to(actions.dtype), actions], dim=1)  # (B, 1 + F + H, width)
        out = self.model(tokens, features, bucket, self.key_mask(mask))  # (B, 1 + F + H, hidden_size)
        return self.action_decoder(out[:, -H:], embodiment_id)  # (B, H, D)


# ---- the model -------------------------------------------------------------------------------------------------------

GROUPS = {  # flag -> tensors it unfreezes; the rest (vlln, vl_self_attention, future_tokens) always trains
    "tune_llm": ("backbone.eagle_model.language_model.", "backbone.instruction_table."),
    "tune_visual": ("backbone.eagle_model.vision_model.", "backbone.eagle_model.mlp1."),
    "tune_projector": tuple(
        f"action_head.{part}." for part in ("state_encoder", "action_encoder", "action_decoder", "position_embedding")
    ),
    "tune_diffusion_model": ("action_head.model.",),
}


def group_of(name: str) -> str:
    """The flag that unfreezes the tensor (or module) of this name, or "always"."""
    return next((flag for flag, prefixes in GROUPS.items() if f"{name}.".startswith(prefixes)), "always")


class GR00T(nn.Module):
    def __init__(self, config: GR00TConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        lite = config.instruction_vocab > 0
        self.backbone = InstructionTable(config) if lite else EagleBackbone(config, attn_implementation)
        self.action_head = ActionHead(config)
        self.checkpointed = False
        self.carried: dict[str, Tensor] = {}  # stored tensors that nothing computes with, on the CPU
        self.set_trainable()

    @property
    def dtype(self) -> torch.dtype:
        return self.action_head.dtype

    @property
    def device(self) -> torch.device:
        return self.action_head.vlln.weight.device

    # -- forward parts

    def process_backbone(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.action_head.process_backbone(features, mask)

    def vl_features(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> VL features (B, S, vl_width) for `velocity`, mask (B, S). Uses a batch's `backbone_features` if there."""
        if "backbone_features" in batch:
            features, mask = batch["backbone_features"], batch["backbone_attention_mask"]
        else:
            features, mask = self.backbone(batch)
        return self.process_backbone(features, mask), mask

    def velocity(
        self, features: Tensor, mask: Tensor | None, state: Tensor, x_t: Tensor, t: Tensor, embodiment_id: Tensor
    ) -> Tensor:
        return self.action_head.velocity(features, mask, state, x_t, t, embodiment_id)

    # -- what trains

    def set_trainable(self, tune_llm=False, tune_visual=False, tune_projector=True, tune_diffusion_model=True) -> None:
        """Freezes and unfreezes. vlln, VL self-attention and future tokens train under all flags, as in the original.

        "Projector" means the embodiment layers and the position table; the lite model's table follows `tune_llm`.
        """
        flags = (tune_llm, tune_visual, tune_projector, tune_diffusion_model)
        self.flags = dict(zip(GROUPS, flags)) | {"always": True}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.flags[group_of(name)])
        self.train(self.training)

    def train(self, mode: bool = True) -> "GR00T":
        """Frozen parts stay in evaluation mode, which switches the DiT's dropout off when it is frozen."""
        super().train(mode)
        for name, module in self.named_modules():
            if not self.flags[group_of(name)] and not (self.checkpointed and name.startswith("backbone.")):
                module.eval()  # the backbone has no dropout, and transformers checkpoints in training mode only
        return self

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Trades a second forward pass of every block for the memory of its activations."""
        self.action_head.model.gradient_checkpointing = enabled
        self.action_head.vl_self_attention.gradient_checkpointing = enabled
        if isinstance(self.backbone, EagleBackbone):
            for part in (self.backbone.vision, self.backbone.text):
                if enabled:
                    part.gradient_checkpointing_enable({"use_reentrant": False})
                else:
                    part.gradient_checkpointing_disable()
        self.checkpointed = enabled
        self.train(self.training)

    # -- speed

    def compile_head(self, mode: str | None = None) -> None:
        """torch.compile of the action head. `mode` is what it does for the velocity, which runs K times a sample.

        "reduce-overhead" replays CUDA graphs; their outputs must be used up before the next call, as a sampler does.
        """
        head = self.action_head
        head.process_backbone = torch.compile(head.process_backbone)  # read in all K calls: never a graph's output
        head.velocity = torch.compile(head.velocity, mode=mode)

    def units(self) -> list[nn.Module]:
        """What FSDP gathers one after the other; the rest of the model is small but for the token embedding."""
        head, backbone = self.action_head, self.backbone
        units = [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]
        units += [head.state_encoder, head.action_encoder, head.action_decoder]  # with the rows of all embodiments
        if isinstance(backbone, EagleBackbone):
            units += [*backbone.vision.encoder.layers, *backbone.text.layers]
        return [*units, backbone]

    # -- files

    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a checkpoint holds but no output depends on."""
        if self.config.instruction_vocab:
            return {}
        with torch.device("meta"):
            pooling = SiglipMultiheadAttentionPoolingHead(self.backbone.vision.config)
        prefix = "backbone.eagle_model.vision_model.vision_model.head"
        shapes = {f"{prefix}.{name}": tuple(p.shape) for name, p in pooling.named_parameters()}
        return shapes | {LM_HEAD: tuple(self.backbone.text.embed_tokens.weight.shape)}

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a checkpoint."""
        return {name: tuple(p.shape) for name, p in self.state_dict().items()} | self.carried_shapes()

    @classmethod
    def plan(
        cls, path: str | Path, *, mask_padding: bool | None = None, attn_implementation: str = "sdpa"
    ) -> tuple["GR00T", dict[str, tuple[safe_open, str]]]:
        """The model of a checkpoint without its numbers, and where those are: all that can be wrong, in no time."""
        folder = find_folder(path, "model", ELSE, FILES)
        config = read_json(folder / "config.json", Object, HINT)
        config = GR00TConfig.from_json(config, read_json(folder / "eagle_config.json", Object, HINT, optional=True))
        if mask_padding is not None:
            config = dataclasses.replace(config, mask_padding=mask_padding)
        try:
            with torch.device("meta"):  # no memory, no initialisation
                model = cls(config, attn_implementation)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:  # heads that do not divide a width
            fail(f"no model can be built as '{folder}/config.json' says: {error}; {HINT}")
        return model, find_tensors(folder, model.layout())

    @classmethod
    @torch.no_grad()
    def toy(cls, config: GR00TConfig, attn_implementation: str = "sdpa") -> "GR00T":
        """A random model of toy width whose state and positions can be heard: the published scales suit wide rows."""
        model = cls(config, attn_implementation)
        for name, parameter in model.named_parameters():
            if name.endswith(".W"):  # 0.02 suits rows of 2,500 numbers
                parameter.mul_(1 / (0.02 * math.sqrt(parameter.shape[1])))
            elif name.endswith(("position_embedding.weight", "future_tokens.weight")):
                parameter.mul_(0.5 / 0.02)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        backbone_dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = torch.float32,
        mask_padding: bool | None = None,
        attn_implementation: str = "sdpa",
    ) -> "GR00T":
        """Loads a folder or a hub repository, in evaluation mode and with the default tune flags.

        None keeps the file's dtype and padding. The published file is bfloat16, whose head training wants in float32.
        Anything missing, left over or of another shape ends in one line that names it, and exit code 2.
        """
        model, sources = cls.plan(path, mask_padding=mask_padding, attn_implementation=attn_implementation)
        state = {}
        for name in model.state_dict():
            dtype = backbone_dtype if name.startswith("backbone.") else head_dtype
            file, key = sources[name]
            state[name] = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        model.load_state_dict(state, assign=True)
        for name in model.carried_shapes():
            file, key = sources[name]
            model.carried[name] = file.get_tensor(key)  # a view of the file: its pages are read when it is saved
        model.backbone.restore_buffers()
        return model.eval()

    @torch.no_grad()
    def save_pretrained(
        self, folder: str | Path, state: dict[str, Tensor] | None = None, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        """Writes config.json, eagle_config.json unless its sizes are the published ones, and model*.safetensors.

        `state` replaces `self.state_dict()` where a script has added to the modules (LoRA); any other names or shapes
        than those of the configuration raise ValueError, for no loader would take such a file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state is None else state)
        for name, shape in self.carried_shapes().items():
            if name in self.carried:
                state[name] = self.carried[name].clone()  # it may be a view of a file that is about to be replaced
            elif name == LM_HEAD:  # a fresh model: what a language model with tied embeddings would have
                state[name] = state[EMBED].clone()
            else:
                state[name] = torch.zeros(shape, dtype=state[EMBED].dtype)
        with torch.device("meta"):
            layout = GR00T(self.config).layout()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wrong := sorted({name for name, _ in layout.items() ^ shapes.items()}):
            raise ValueError(f"not the tensors of a GR00T checkpoint: {', '.join(wrong)}")
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        files = {"config.json": self.config.to_json() | dict(torch_dtype=dtype)}
        if not self.config.instruction_vocab and self.config.eagle != EAGLE:
            files["eagle_config.json"] = self.config.eagle
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        save_torch_state_dict(dict(sorted(state.items())), folder, max_shard_size=max_shard_bytes)


# ---- checkpoint files ------------------------------------------------------------------------------------------------

EMBED = "backbone.eagle_model.language_model.model.embed_tokens.weight"
LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
FUTURE = "action_head.future_tokens.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}
FILES = ["*.json", "*.safetensors"]  # to download
HINT = "a checkpoint folder has config.json and model*.safetensors"
ELSE = "give a checkpoint folder or a hub id such as nvidia/GR00T-N1.5-3B; the bundled tiny model needs neither"


def find_tensors(folder: Path, layout: dict[str, tuple[int, ...]]) -> dict[str, tuple[safe_open, str]]:
    """Where each tensor of `layout` is: (open file, its name there). Reads headers only, reports all faults at once."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        files = sorted(
            set(read_json(index, TypedDict("Index", {"weight_map": dict[str, str]}), HINT)["weight_map"].values())
        )
        if outside := [file for file in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)]:
            fail(f"'{index}' names '{outside[0][:80]}': weights lie in files of this folder, called ….safetensors")
        if absent := [file for file in files if not (folder / file).exists()]:
            fail(f"'{folder}' lacks {', '.join(absent)}, which {index.name} lists: the download is incomplete")
    elif not (folder / files[0]).exists():
        adapter = (folder / "adapter_config.json").exists()
        reason = "it holds a LoRA adapter alone, merge it into its base model first" if adapter else "no weights there"
        fail(f"'{folder}' has neither model.safetensors nor {index.name}: {reason}")
    found, shapes, dtypes = {}, {}, {}
    for file in files:
        try:
            handle = safe_open(folder / file, "pt")
            for key in handle.keys():
                name = key.removeprefix("_groot_model.")  # LeRobot wraps the model once more
                view = handle.get_slice(key)
                found[name], shapes[name], dtypes[name] = (handle, key), tuple(view.get_shape()), view.get_dtype()
        except (OSError, SafetensorError) as error:
            fail(f"'{folder / file}' cannot be read ({error}): truncated or no safetensors file; fetch it again")
    for name, twin in ((LM_HEAD, EMBED), (EMBED, LM_HEAD)):
        if name in layout and name not in found and twin in found:  # tied when it was written: either may be left out
            found[name], shapes[name], dtypes[name] = found[twin], shapes[twin], dtypes[twin]
    faults = []
    if missing := [name for name in layout if name not in found]:
        faults.append(f"missing: {', '.join(missing)}")
    if FUTURE in missing:
        faults.append(f"{FUTURE} was absent from the first release of N1.5, so this copy may be stale")
    if unexpected := [name for name in found if name not in layout]:
        faults.append(f"unexpected: {', '.join(unexpected)}")
    for name in layout:
        if name in found and shapes[name] != layout[name]:
            faults.append(f"{name} is {shapes[name]}, not {layout[name]}")
        elif name in found and dtypes[name] not in FLOATS:
            faults.append(f"{name} is stored as {dtypes[name]}; only float weights can be loaded")
    if faults:
        fail(f"the weights in '{folder}' do not fit its config.json: {'; '.join(faults)}")
    return found
