"""CoCa (arXiv 2205.01917) as in open_clip: two towers for retrieval, and a decoder on top of them for captions.

The text is causal, and a class token behind it sees it all; learned queries read the image, the first for retrieval, the
others for the decoder, whose layers are a block with self-attention and a block with cross-attention. Pre-norm, eps 1e-5.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Pooler, Projection, TokenClassifier
from mmx.layers import BlockConfig
from mmx.losses import clip_loss, cross_entropy, masked_mean
from mmx.modalities import Ids, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Cross, PerStream, Pool, Stage
from mmx.types import Masked
from mmx.zoo.config import only
from mmx.zoo.family import Family, Runner, channels_last
from mmx.zoo.siglip import attention_table
from mmx.zoo.vit import pair
from mmx.zoo.weights import Table, convolution, layers, reshaped

EPS = 1e-5
CAPTION_WEIGHT = 2.0  # of the caption's loss beside the contrastive one's 1 (arXiv 2205.01917, 4.1)
LOSS_PAD = 0  # the id that its loss leaves out, whatever pad_id is


@dataclasses.dataclass(frozen=True)
class CoCaTextConfig:
    """The fields of open_clip's text tower."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Any = None
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str | None = "linear"
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
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


@dataclasses.dataclass(frozen=True)
class CoCaMultimodalConfig(CoCaTextConfig):
    """The fields of open_clip's decoder, of which width, heads, layers and scale have an effect: its MLP is 4 x width."""

    mlp_ratio: float = 4
    dim_head: int = 64
    n_queries: int = 256
    attn_pooler_heads: int = 8


@dataclasses.dataclass(frozen=True)
class CoCaVisionConfig:
    """The fields of open_clip's image tower."""

    layers: int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int | tuple = 224
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
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
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


@dataclasses.dataclass(frozen=True)
class CoCaConfig:
    """The fields of open_clip's CoCa."""

    embed_dim: int = 512
    vision_cfg: CoCaVisionConfig = CoCaVisionConfig()
    text_cfg: CoCaTextConfig = CoCaTextConfig(embed_cls=True)
    multimodal_cfg: CoCaMultimodalConfig = CoCaMultimodalConfig()
    quick_gelu: bool = False


PLAIN: dict[str, Any] = {  # open_clip's variants of a block
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
    "block_type": (None, "default"),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False),
}


def _check(c: CoCaConfig) -> None:
    only(c.text_cfg, embed_cls=True, no_causal_mask=False, proj_type="linear", hf_model_name=None, **PLAIN)
    only(c.multimodal_cfg, hf_model_name=None, **PLAIN)
    only(c.vision_cfg, attentional_pool=(True, False), pos_embed_type="learnable", pool_type="tok", timm_model_name=None, **PLAIN)
    if not c.vision_cfg.attentional_pool:
        only(c.vision_cfg, final_ln_after_pool=False)


def _block(c: CoCaConfig, width: int, heads: int, ratio: float, scale: float | None, dtype: str, **more: Any) -> BlockConfig:
    activation = "quick_gelu" if c.quick_gelu else "gelu"
    mlp = int(width * ratio)
    return BlockConfig(width=width, heads=heads, mlp=mlp, activation=activation, eps=EPS, layer_scale=scale, dtype=dtype, **more)


def _build(c: CoCaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    _check(c)
    image, text, decoder = c.vision_cfg, c.text_cfg, c.multimodal_cfg
    blocks = {
        "image": _block(
            c,
            image.width,
            image.width // image.head_width,
            image.mlp_ratio,
            image.ls_init_value,
            dtype,
            final_norm=not image.attentional_pool,
        ),
        "text": _block(c, text.width, text.heads, text.mlp_ratio, text.ls_init_value, dtype, final_norm=False),
    }
    towers: list[Stage] = [PerStream({"image": image.layers, "text": text.layers}, blocks, causal=("text",))]
    if image.attentional_pool:
        towers.append(Pool("image", image.attn_pooler_heads, image.attn_pooler_queries, c.embed_dim, EPS))
    meeting: list[Stage] = [
        Adapt(("image",), drop=1),
        Adapt(("text",), unmask=True),
        Cross(
            decoder.layers,
            {"text": _block(c, decoder.width, decoder.heads, 4, decoder.ls_init_value, dtype, context_norm="own")},
            "self mlp cross mlp",
            steps=("text",),
        ),
    ]
    return build_model(
        {
            "image": Patches(
                pair(image.image_size),
                (image.patch_size, image.patch_size),
                width=image.width,
                bias=False,
                special=("class",),
                special_position=True,
                norm=None if image.no_ln_pre else EPS,
                resize=True,
                crop=True,
            ),
            "text": Ids(text.vocab_size, text.context_length, width=text.width, last=True),
        },
        (*towers, *meeting),
        width=text.width,
        heads=text.heads,
        embed=c.embed_dim,
        poolers={"image": Pooler("first"), "text": Pooler("last", norm=EPS)},
        projections={
            "image": Projection(c.embed_dim),
            "text": Projection(c.embed_dim, bias=text.proj_bias),
        },
        pool_after=len(towers),
        outputs={"captioning": TokenClassifier(text.vocab_size, "text", transform=False, bias=False)}
        if "captioning" in heads
        else {},
        dtype=dtype,
    )


def _layer(kind: str, mlp: str = "mlp") -> Table:
    """The weights of a block of `kind` and its MLP."""
    return {
        **attention_table("attn", kind),
        "ln_1": f"{kind}_norm",
        "ln_1_kv": f"{kind}_context_norm",
        "ls_1.gamma": f"{kind}_scale",
        "mlp.c_fc": f"{mlp}/up",
        "mlp.c_proj": f"{mlp}/down",
        "ln_2": f"{mlp}_norm",
        "ls_2.gamma": f"{mlp}_scale",
    }


def _table(c: CoCaConfig) -> Table:
    image, last = c.vision_cfg, 4 if c.vision_cfg.attentional_pool else 3
    pool = attention_table("visual.attn_pool.attn", "stages_1/pool/cross")
    if c.embed_dim != image.width:  # torch keeps matrices of different shapes apart
        apart = {"query": "q", "key": "k", "value": "v"}
        pool = {name: path for name, path in pool.items() if not name.endswith("in_proj_weight")}
        pool |= {f"visual.attn_pool.attn.{n}_proj_weight": f"stages_1/pool/cross/{ours}/kernel" for ours, n in apart.items()}
    return {
        "logit_scale": "logit_scale",
        "visual.class_embedding": reshaped("modalities_image/special", image.width),
        "visual.conv1": convolution("modalities_image/patch", image.patch_size, image.patch_size),
        "visual.positional_embedding": "modalities_image/position",
        "visual.ln_pre": "modalities_image/norm",
        **layers("visual.transformer.resblocks.{}", "stages_0/image/layers/block", _layer("self")),
        "visual.attn_pool.query": "stages_1/pool/token",
        "visual.attn_pool.ln_q": "stages_1/pool/token_norm",
        "visual.attn_pool.ln_k": "stages_1/pool/context_norm",
        **pool,
        "visual.ln_post": "stages_1/norm" if image.attentional_pool else "stages_0/image/norm",
        "visual.proj": "projections_image/projection/kernel",
        "text.cls_emb": reshaped("modalities_text/last", c.text_cfg.width),
        "text.token_embedding": "modalities_text/token",
        "text.positional_embedding": "modalities_text/position",
        **layers("text.transformer.resblocks.{}", "stages_0/text/layers/block", _layer("self")),
        "text.ln_final": "poolers_text/norm",
        "text.text_projection": "projections_text/projection" + ("" if c.text_cfg.proj_bias else "/kernel"),
        **layers("text_decoder.resblocks.{}", f"stages_{last}/layers/text", _layer("self")),
        **layers("text_decoder.cross_attn.{}", f"stages_{last}/layers/text", _layer("cross", "mlp_1")),
        "text_decoder.ln_final": f"stages_{last}/text_norm",
        "text_decoder.text_projection": "heads_captioning/classifier/kernel",
    }


def _forward(run: Runner, c: CoCaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    if "image" in inputs:
        batch["image"] = channels_last(inputs["image"])
    ids = inputs.get("text")
    if ids is not None:
        # Published weights were trained with the padding's mask one place too far to the right, and open_clip keeps to it.
        mask = jnp.pad(ids != c.text_cfg.pad_id, ((0, 0), (1, 0)), constant_values=True)
        batch["text"] = Masked(ids, mask, keep=True)
    r = run(batch, causal=("text",) if ids is not None else ())
    fields: dict[str, Any] = {"logit_scale": r.out.logit_scale}
    for name in batch:
        fields[f"{name}_features"] = r.out.embeddings[name]
        fields[f"{name}_features_raw"] = r.intermediates[f"projections_{name}"]["features"]
    entered = r.intermediates[f"stages_{2 if c.vision_cfg.attentional_pool else 1}"]["entered"]
    if "image" in batch:
        fields["image_embs"] = entered["image"][:, 1:]
    if ids is not None:
        fields["text_token_embs"] = entered["text"][:, :-1]
    logits = r.out.logits.get("captioning")
    if "image" in batch and ids is not None:
        image, text = r.out.embeddings["image"], r.out.embeddings["text"]
        fields["contrastive_loss"] = clip_loss(image, text, fields["logit_scale"])
        if logits is not None:
            labels, logits = ids[:, 1:], logits[:, :-1]
            fields |= {"full_logits": logits, "logits": logits[:, :-1], "labels": labels}
            each = masked_mean(cross_entropy(logits[:, :-1], labels), labels != LOSS_PAD)
            fields["caption_loss"] = CAPTION_WEIGHT * each
            fields["loss"] = fields["contrastive_loss"] + fields["caption_loss"]
    return fields


def _sized(width: int, heads: int, vision: Mapping[str, Any], vocab: int = 49408) -> dict[str, Any]:
    text = {"context_length": 76, "vocab_size": vocab, "width": width, "heads": heads}
    return {"text_cfg": {**text, "embed_cls": True}, "multimodal_cfg": text, "vision_cfg": dict(vision)}


FAMILIES = (
    Family(
        "coca",
        CoCaConfig,
        _build,
        _table,
        _forward,
        names={
            "coca_ViT-B-32": _sized(512, 8, {"patch_size": 32, "attentional_pool": True}),
            "coca_ViT-L-14": {
                **_sized(768, 12, {"layers": 24, "width": 1024, "patch_size": 14, "attentional_pool": True}),
                "embed_dim": 768,
            },
            "coca_base": _sized(768, 12, {"patch_size": 18, "image_size": 288}, 64000),
        },
        heads={"captioning": "text_decoder.text_projection"},
        known=(r"attn_mask$",),
    ),
)
