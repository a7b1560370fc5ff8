"""open_clip's `model_cfg`: the fields of its towers, as published."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The fields that both towers of open_clip have."""

    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    final_ln_after_pool: bool = False
    output_tokens: bool = False
    act_kwargs: Any = None
    norm_kwargs: Any = None
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    """Those of its text tower."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Any = None
    width: int = 512
    heads: int = 8
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str | None = "linear"
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Those of its image tower."""

    width: int = 768
    head_width: int = 64
    patch_size: int = 16
    image_size: int | tuple = 224
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    pool_type: str = "tok"
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of open_clip's two towers."""

    embed_dim: int = 512
    vision_cfg: VisionConfig = VisionConfig()
    text_cfg: TextConfig = TextConfig()
    quick_gelu: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
