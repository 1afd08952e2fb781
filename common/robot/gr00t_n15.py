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

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from common.robot.dit import ActionHead as SharedHead
from common.robot.gr00t import BOTH_STACKS, PROJECTOR, TOY_HEAD, HeadConfig, Layers, Network, Size, schema_like

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
TOY = TOY_HEAD | dict(num_future_tokens=4)

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
PUBLISHED = {  # keys of the published file that nothing here depends on
    "architectures": ["GR00T_N1_5"],
    "attn_implementation": None,
    "model_dtype": "float32",
    "backbone_cfg": dict(eagle_path="qwen3_1_7B-Siglip2_400M_1mlp_nops", load_bf16=False, reproject_vision=False)
    | dict(tune_llm=False, tune_visual=True, use_flash_attention=True),
    "action_head_cfg": dict(model_dtype="float32", tune_projector=True, tune_diffusion_model=True),
}


@dataclass(frozen=True)
class GR00TConfig(HeadConfig):
    """Sizes of the model; the defaults are those of nvidia/GR00T-N1.5-3B."""

    state_dim: Size = 64
    action_dim: Size = 32
    action_horizon: Size = 16
    num_future_tokens: Size = 32
    dit_layers: Layers = 16
    vl_layers: Layers = 4
    select_layer: Layers = 12  # text layers kept, of those in text_config
    eagle: dict = field(default_factory=lambda: EAGLE)

    version, title, prefix = "n15", "GR00T N1.5", "eagle_"
    vlm, vlm_file, network = "eagle", "eagle_config.json", "action_head_cfg"
    places, optional, said_twice, published = PLACES, OPTIONAL, SAID_TWICE, PUBLISHED
    vlm_sizes, vlm_schema, toys = EAGLE, schema_like("eagle_config", EAGLE), TOY

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
        return cls(**(TOY | dict(select_layer=2, eagle=eagle) | changes))

    def fixed(self) -> dict[str, object]:
        dit, vl = "diffusion_model_cfg", "vl_self_attention_cfg"
        head = {f"{stack}.{key}": value for stack in (dit, vl) for key, value in BOTH_STACKS.items()}
        head |= {f"{dit}.norm_type": "ada_norm", f"{dit}.interleave_self_attention": True}
        head |= {"add_pos_embed": True, "use_vlln": True, "input_embedding_dim": self.width}
        head |= {f"{dit}.output_dim": self.hidden_size, f"{dit}.cross_attention_dim": self.vl_width}
        head |= {"backbone_embedding_dim": self.vl_width, "max_action_dim": self.action_dim}
        fixed = {f"action_head_cfg.{key}": value for key, value in head.items()}
        fixed |= {key: getattr(self, key) for key in SAID_TWICE}
        return fixed | {"model_type": "gr00t_n1_5", "backbone_cfg.project_to_dim": None}

    def sizes(self) -> list[tuple[str, object, object]]:
        wrong = [(key, self.eagle[key], EAGLE[key]) for key in ("use_pixel_shuffle", "mlp_connector_layers")]
        wrong += super().sizes()
        if not self.instruction_vocab:
            wrong += [("text_config.hidden_size", self.eagle["text_config"]["hidden_size"], self.vl_width)]
            vocabulary, side = self.eagle["text_config"]["vocab_size"], min(self.image_size, 4096)
            wrong += [("image_token_index", self.image_token_index, min(self.image_token_index, vocabulary - 1))]
            wrong += [("vision_config.image_size", self.image_size, side)]
            wrong += [("image tokens of a picture", self.tokens_per_image, max(self.tokens_per_image, 1))]
        return wrong

    def to_json(self) -> dict:
        sizes = dict(action_dim=self.action_dim, action_horizon=self.action_horizon, hidden_size=self.vl_width)
        return super().to_json() | sizes


# ---- backbone --------------------------------------------------------------------------------------------------------


class EagleBackbone(nn.Module):
    """Images and prompt -> one feature per token: SigLIP, one Linear, the first layers of Qwen3 and its final norm."""

    def __init__(self, config: GR00TConfig, attn_implementation: str = "sdpa"):
        super().__init__()
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

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.vision, self.text

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.vision.encoder.layers, *self.text.layers]

    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """The SigLIP pooling head and lm_head, which stand in the published file and which no output depends on."""
        with torch.device("meta"):
            pooling = SiglipMultiheadAttentionPoolingHead(self.vision.config)
        prefix = "backbone.eagle_model.vision_model.vision_model.head"
        shapes = {f"{prefix}.{name}": tuple(p.shape) for name, p in pooling.named_parameters()}
        return shapes | {LM_HEAD: tuple(self.text.embed_tokens.weight.shape)}

    def restore_buffers(self) -> None:
        """Makes what is computed rather than stored; needed after the modules were built without memory."""
        embeddings, rotary = self.vision.embeddings, self.text.rotary_emb
        device = self.text.norm.weight.device
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings, device=device)[None]
        self.text.rotary_emb = type(rotary)(rotary.config).to(device)


# ---- the model -------------------------------------------------------------------------------------------------------


class ActionHead(SharedHead):
    def cross_masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """As the VL self-attention: the original attends to pad tokens, so a sample depends on its batch."""
        return [self.vl_mask(mask)]


EMBED = "backbone.eagle_model.language_model.model.embed_tokens.weight"
LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
FUTURE = "action_head.future_tokens.weight"


class GR00T(Network):
    Config, Backbone, Head = GR00TConfig, EagleBackbone, ActionHead
    groups = {  # the rest (vlln, vl_self_attention, future_tokens) always trains
        "tune_llm": ("backbone.eagle_model.language_model.", "backbone.instruction_table."),
        "tune_visual": ("backbone.eagle_model.vision_model.", "backbone.eagle_model.mlp1."),
        "tune_projector": PROJECTOR,
        "tune_diffusion_model": ("action_head.model.",),
    }
    embed, lm_head, dtype_key = EMBED, LM_HEAD, "torch_dtype"
    hints = {FUTURE: "was absent from the first release of N1.5, so this copy may be stale"}
