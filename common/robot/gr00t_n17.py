"""GR00T N1.7: another backbone and another way to look at it. Architecture and checkpoint files only.

    images ── Qwen3-VL's tower ── mergers ──┐ (three more mergers, from within the tower: into the first text layers)
    instruction ── token embedding ─────────┴─ Qwen3-VL text layers ── LayerNorm ── self-attention ──┐ VL features
    state ── per-embodiment MLP ───────────┐   even blocks look at text and image tokens in turns ───┤
    x_t and t ── per-embodiment encoder ───┴─ DiT: odd blocks at each other ── per-embodiment MLP ── velocity v_pred

Dims: B samples, S backbone tokens, P patches and I image tokens of all images, H action horizon, D action dim.
Sizes of the published checkpoint: S 83 (one square view), H 40, D 132, VL features 2048 wide, DiT 1536 wide, 32 blocks.

A batch is a dict of tensors; an optional key is in brackets:
    input_ids, attention_mask  (B, S) int64           left-padded; `image_token_id` once per image token; 0 on pads
    [pixel_values]        (P, 3 * 2 * patch^2)        in [-1, 1]; the four patches of a token one after the other
    [image_grid_thw]      (images, 3) int64           1, rows and columns of patches; sample by sample
    state                 (B, 1, state_dim)           normalised, zero-padded
    embodiment_id         (B,) int64                  or (1,): all samples share one
    [action, action_mask] (B, H, D)                   for the loss; the mask is 0 on padded dims and padded steps
    [backbone_features, backbone_attention_mask, image_mask]    of an earlier `model.backbone(batch)`; see `vl_features`

What the scripts call is that of gr00t_n15.py. The mask that goes with the features says what a token is: 0 a pad, 1
text, 2 a place of an image. Where the original is matched although one might not: the VL self-attention sees pad tokens
(`mask_padding=True` hides them), and noise on padded steps and dims is seen by the rest.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

from common.robot.dit import ActionHead
from common.robot.gr00t import BOTH_STACKS, PROJECTOR, TOY_HEAD, HeadConfig, Layers, Network, Size, schema_like

# ---- config ----------------------------------------------------------------------------------------------------------

VISION = dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, hidden_act="gelu_pytorch_tanh")
VISION |= dict(patch_size=16, temporal_patch_size=2, spatial_merge_size=2, in_channels=3, out_hidden_size=2048)
VISION |= dict(num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17])
ROPE = dict(rope_type="default", mrope_interleaved=True, mrope_section=[24, 20, 20])
TEXT = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, head_dim=128)
TEXT |= dict(num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=5000000, rope_scaling=ROPE)
TEXT |= dict(attention_bias=False, attention_dropout=0, vocab_size=151936, max_position_embeddings=262144)
# The published checkpoint does not hold the sizes of its vision-language model; a folder may, as backbone_config.json.
QWEN = dict(model_type="qwen3_vl", image_token_id=151655, video_token_id=151656, vision_start_token_id=151652)
QWEN |= dict(vision_end_token_id=151653, tie_word_embeddings=True, vision_config=VISION, text_config=TEXT)
TOY_IDS = dict(vision_start_token_id=265, vision_end_token_id=266, image_token_id=268, video_token_id=269)
TOY = TOY_HEAD | dict(action_horizon=16, vl_width=64)

DIT, VL = "diffusion_model_cfg", "vl_self_attention_cfg"
STACK = dict(layers="num_layers", heads="num_attention_heads", head_dim="attention_head_dim")
PLACES = {f"dit_{name}": f"{DIT}.{key}" for name, key in STACK.items()} | {"dropout": f"{DIT}.dropout"}
PLACES |= {f"vl_{name}": f"{VL}.{key}" for name, key in STACK.items()} | {"vl_dropout": f"{VL}.dropout"}
PLACES |= {f"{name}_dim": f"max_{name}_dim" for name in ("state", "action")}
PLACES |= {"num_embodiments": "max_num_embodiments", "vl_width": "backbone_embedding_dim"}
SAME_NAME = "action_horizon max_seq_len hidden_size num_timestep_buckets noise_beta_alpha noise_beta_beta noise_s"
SAME_NAME += " num_inference_timesteps select_layer attend_text_every_n_blocks instruction_vocab mask_padding"
PLACES |= {name: name for name in SAME_NAME.split()}
OPTIONAL = {"num_embodiments", "max_seq_len", "attend_text_every_n_blocks", "instruction_vocab", "mask_padding"}
PUBLISHED = {  # keys of the published file that nothing here depends on
    "architectures": ["Gr00tN1d7"],
    "model_name": "nvidia/Cosmos-Reason2-2B",
    "backbone_trainable_params_fp32": True,
    "load_bf16": True,
    "rtc_ramp_rate": 6.0,
    **dict(tune_llm=False, tune_visual=True, tune_projector=True, tune_diffusion_model=True, tune_vlln=True),
}


@dataclass(frozen=True)
class GR00TN17Config(HeadConfig):
    """Sizes of the model; the defaults are those of nvidia/GR00T-N1.7-3B."""

    state_dim: Size = 132
    action_dim: Size = 132
    action_horizon: Size = 40
    vl_width: Size = 2048
    dit_layers: Layers = 32
    vl_layers: Annotated[int, Interval(ge=0, le=1000)] = 4
    select_layer: Layers = 16  # text layers kept, of those in text_config
    attend_text_every_n_blocks: Layers = 2  # of so many cross-attention blocks one looks at text, the rest at images
    qwen: dict = field(default_factory=lambda: QWEN)

    version, title, prefix = "n17", "GR00T N1.7", ""
    vlm, vlm_file, network = "qwen", "backbone_config.json", DIT
    places, optional, published = PLACES, OPTIONAL, PUBLISHED
    vlm_sizes, vlm_schema, toys = QWEN, schema_like("backbone_config", QWEN), TOY
    num_future_tokens = 0

    @property
    def image_token_id(self) -> int:
        return self.qwen["image_token_id"]

    @property
    def vocab_size(self) -> int:
        return self.qwen["text_config"]["vocab_size"]

    @property
    def patch_size(self) -> int:
        return self.qwen["vision_config"]["patch_size"]

    @property
    def merge_size(self) -> int:
        return self.qwen["vision_config"]["spatial_merge_size"]

    @property
    def toy(self) -> bool:
        """Whether it reads the bundled tokenizer."""
        return self.instruction_vocab > 0 or self.image_token_id == TOY_IDS["image_token_id"]

    @classmethod
    def tiny(cls, patch_size: int = 8, **changes) -> "GR00TN17Config":
        """Every part at toy width. Ids: 256 bytes, 3 Qwen specials, then those of Qwen3-VL in their order from 259."""
        vision = VISION | dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=64)
        vision |= dict(patch_size=patch_size, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text = TEXT | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)
        text |= dict(num_key_value_heads=1, head_dim=32, vocab_size=272, max_position_embeddings=1024)
        text |= dict(rope_scaling=ROPE | dict(mrope_section=[6, 5, 5]))
        qwen = QWEN | TOY_IDS | dict(vision_config=vision, text_config=text)
        return cls(**(TOY | dict(select_layer=2, qwen=qwen) | changes))

    def fixed(self) -> dict[str, object]:
        stacks = (DIT, VL) if self.vl_layers else (DIT,)
        fixed = {f"{stack}.{key}": value for stack in stacks for key, value in BOTH_STACKS.items()}
        fixed |= {f"{DIT}.norm_type": "ada_norm", f"{DIT}.interleave_self_attention": True}
        fixed |= {f"{DIT}.output_dim": self.hidden_size, "input_embedding_dim": self.width, "add_pos_embed": True}
        fixed |= dict(use_vlln=True, use_alternate_vl_dit=True)
        fixed |= dict(state_history_length=1, reproject_vision=False, backbone_model_type="qwen")
        return fixed | {"model_type": "Gr00tN1d7"}

    def sizes(self) -> list[tuple[str, object, object]]:
        wrong = super().sizes() + [("use_future_tokens", self.source.get("use_future_tokens") or False, False)]
        if self.vl_layers:
            wrong += [("backbone_embedding_dim", self.vl_width, self.vl_heads * self.vl_head_dim)]
        if self.instruction_vocab:
            return wrong
        vision, text = self.qwen["vision_config"], self.qwen["text_config"]
        side, rope = round(vision["num_position_embeddings"] ** 0.5), text["rope_scaling"].get("mrope_section", [])
        wrong += [("text_config.hidden_size", text["hidden_size"], self.vl_width)]
        wrong += [("vision_config.out_hidden_size", vision["out_hidden_size"], text["hidden_size"])]
        wrong += [("image_token_id", self.image_token_id, min(self.image_token_id, text["vocab_size"] - 1))]
        wrong += [("select_layer", self.select_layer, min(self.select_layer, text["num_hidden_layers"]))]
        wrong += [("vision_config.num_position_embeddings", vision["num_position_embeddings"], side**2)]
        wrong += [
            ("vision_config.hidden_size modulo 4 num_heads", vision["hidden_size"] % (4 * vision["num_heads"]), 0)
        ]
        wrong += [("heads modulo their keys", text["num_attention_heads"] % text["num_key_value_heads"], 0)]
        wrong += [("mrope_section's sum", (len(rope), sum(rope)), (3, text["head_dim"] // 2))]
        wrong += [(f"vision_config.{key}", vision[key], VISION[key]) for key in ("in_channels", "temporal_patch_size")]
        deep = vision["deepstack_visual_indexes"]
        return wrong + [("deepstack_visual_indexes", deep, sorted({i for i in deep if i < vision["depth"]}))]

    @classmethod
    def read(cls, config: dict) -> dict:
        found = super().read(config)
        if not config.get("use_vl_self_attention", True) or not config.get(VL):
            found |= {name: getattr(cls, name) for name in found if name.startswith("vl_") and found[name] is None}
            found["vl_layers"] = 0
        return found

    def to_json(self) -> dict:
        config = super().to_json() | {"use_vl_self_attention": self.vl_layers > 0}
        return config if self.vl_layers else config | {VL: None}


# ---- backbone --------------------------------------------------------------------------------------------------------


def positions(ids: Tensor, mask: Tensor, is_image: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Where each token is in time, down and across: (3, B, S) for rotary embeddings with three axes.

    ids, mask, is_image (B, S); grids: rows and columns of tokens of each image, in order. A word takes a place in all
    three; the tokens of an image stand where it begins, and what follows it stands behind its longer side.
    """
    place = partial(torch.as_tensor, device=ids.device, dtype=ids.dtype)
    row = place([r for rows, columns in grids for r in range(rows) for _ in range(columns)])  # (I,)
    column = place([c for rows, columns in grids for _ in range(rows) for c in range(columns)])  # (I,)
    step = place([n for rows, columns in grids for n in [0] * (rows * columns - 1) + [max(rows, columns)]])  # (I,)
    steps = (mask & ~is_image).to(ids.dtype).masked_scatter(is_image, step)  # (B, S) to the next token's place
    start = steps.cumsum(1) - steps  # (B, S)
    down, across = (torch.zeros_like(ids).masked_scatter(is_image, x) for x in (row, column))  # (B, S)
    return torch.stack([start, start + down, start + across])


def embed_patches(projection: nn.Conv3d, patches: Tensor) -> Tensor:
    """(P, 3 * 2 * patch^2) -> (P, vision). A convolution whose kernel is a patch, which as such is slow in bf16."""
    return F.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)


class QwenBackbone(nn.Module):
    """Images and prompt -> one feature per token: Qwen3-VL's first layers, without the norm that would follow them."""

    def __init__(self, config: GR00TN17Config, attn_implementation: str = "sdpa"):
        super().__init__()
        vision = {k: v for k, v in config.qwen["vision_config"].items() if k in VISION}
        text = {k: v for k, v in config.qwen["text_config"].items() if k in TEXT}
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["num_hidden_layers"] = config.select_layer
        tower = Qwen3VLVisionModel(Qwen3VLVisionConfig(**vision, attn_implementation=attn_implementation))
        words = Qwen3VLTextModel(Qwen3VLTextConfig(**text, use_cache=False, attn_implementation=attn_implementation))
        tower.patch_embed.forward = partial(embed_patches, tower.patch_embed.proj)
        words.norm = nn.Identity()  # the feature is taken before it
        # the nesting gives the tensors the names they have in the published checkpoint
        self.model = nn.ModuleDict({"model": nn.ModuleDict({"visual": tower, "language_model": words})})
        self.image_token_id, self.merge = config.image_token_id, config.merge_size

    @property
    def vision(self) -> Qwen3VLVisionModel:
        return self.model["model"]["visual"]

    @property
    def text(self) -> Qwen3VLTextModel:
        return self.model["model"]["language_model"]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> features (B, S, vl_width), what each token is (B, S). ValueError when images and image tokens differ."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()  # (B, S)
        is_image = (ids == self.image_token_id) & mask  # (B, S)
        embeds, deep, grids = self.text.embed_tokens(ids), None, []  # (B, S, text)
        if "pixel_values" in batch:
            grid = batch["image_grid_thw"]  # (images, 3)
            seen = self.vision(batch["pixel_values"].to(self.vision.dtype), grid_thw=grid)
            tokens, deep = seen.pooler_output, seen.deepstack_features  # (I, text), three more for the first layers
            grids = [(rows // self.merge, columns // self.merge) for _, rows, columns in grid.tolist()]
        if (expected := int(is_image.sum())) != (found := sum(rows * columns for rows, columns in grids)):
            raise ValueError(f"the prompts have {expected} image tokens, the images {found}")
        if grids:
            embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
        # Causal. A pad row sees no key at all, and sdpa gives it zeros, as flash attention does; "eager" does not,
        # which changes what the head's VL self-attention reads there.
        features = self.text(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions(ids, mask, is_image, grids),  # (3, B, S)
            visual_pos_masks=is_image,
            deepstack_visual_embeds=deep,
            use_cache=False,
        ).last_hidden_state  # (B, S, vl_width)
        return features, mask.long() + is_image

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.vision, self.text

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.vision.blocks, *self.text.layers]

    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """The norm behind the last layer and lm_head, which the published file holds and no output depends on."""
        weight = self.text.embed_tokens.weight
        return {NORM: (weight.shape[1],), LM_HEAD: tuple(weight.shape)}

    def restore_buffers(self) -> None:
        """Makes what is computed rather than stored; needed after the modules were built without memory."""
        vision, text, device = self.vision.config, self.text.config, self.text.embed_tokens.weight.device
        rotaries = [(self.vision.rotary_pos_emb, 10000.0, vision.hidden_size // vision.num_heads // 2)]
        rotaries += [(self.text.rotary_emb, text.rope_parameters["rope_theta"], text.head_dim)]
        for rotary, theta, dim in rotaries:
            # eq: f_j = theta^(-2 j / dim)
            f = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
            for name, _ in list(rotary.named_buffers()):
                setattr(rotary, name, f.to(device, copy=True))


# ---- the model -------------------------------------------------------------------------------------------------------


class ActionHeadN17(ActionHead):
    def cross_masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """The first of every `attend_text_every_n_blocks` blocks looks at text, the others at images; none at pads.

        mask (B, S): 0 on pads, 1 on text, 2 on images. The lite model has no images: all its blocks look at text.
        """
        if self.config.instruction_vocab:
            return [None if mask is None else mask[:, None, None] > 0]
        if mask is None:
            raise ValueError("which tokens are of images? give `velocity` the mask that came with the features")
        text, image = (mask[:, None, None] == kind for kind in (1, 2))  # (B, 1, 1, S)
        return [text] + [image] * (self.config.attend_text_every_n_blocks - 1)


EMBED = "backbone.model.model.language_model.embed_tokens.weight"
LM_HEAD = "backbone.model.lm_head.weight"
NORM = "backbone.model.model.language_model.norm.weight"


class GR00TN17(Network):
    Config, Backbone, Head = GR00TN17Config, QwenBackbone, ActionHeadN17
    groups = {
        "tune_llm": ("backbone.model.model.language_model.", "backbone.model.lm_head.", "backbone.instruction_table."),
        "tune_visual": ("backbone.model.model.visual.",),
        "tune_projector": PROJECTOR,
        "tune_diffusion_model": ("action_head.model.",),
        "tune_vlln": ("action_head.vlln.", "action_head.vl_self_attention."),
    }
    embed, lm_head, tied, unused, dtype_key = EMBED, LM_HEAD, True, 1.0, "dtype"
    not_decayed = ("bias", "layernorm", "rmsnorm", ".norm.", "_norm.")

    def kinds_of(self, ids: Tensor) -> Tensor:
        return 1 + (ids == self.config.image_token_id).long()

    def set_trainable(self, *flags: bool, tune_vlln=True, tune_top_llm_layers: int = 0, **named: bool) -> None:
        """tune_vlln: the norm and the self-attention over the VL features. tune_top_llm_layers: so many of the kept
        text layers, from the last one back, even where `tune_llm` is off."""
        super().set_trainable(*flags, tune_vlln=tune_vlln, **named)
        for layer in self.backbone.text.layers[-tune_top_llm_layers:] if tune_top_llm_layers else ():
            layer.requires_grad_(True)
