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
from mmx.zoo import clip, open_clip
from mmx.zoo.config import only
from mmx.zoo.family import Family, Runner, channels_last, pair
from mmx.zoo.open_clip import EPS
from mmx.zoo.open_clip_config import ModelConfig, TextConfig
from mmx.zoo.weights import Table, attention_table, layers, reshaped

CAPTION_WEIGHT = 2.0  # of the caption's loss beside the contrastive one's 1 (arXiv 2205.01917, 4.1)
LOSS_PAD = 0  # the id that its loss leaves out, whatever pad_id is


@dataclasses.dataclass(frozen=True)
class CoCaMultimodalConfig(TextConfig):
    """The fields of open_clip's decoder, of which width, heads, layers and scale have an effect: its MLP is 4 x width."""

    mlp_ratio: float = 4
    dim_head: int = 64
    n_queries: int = 256
    attn_pooler_heads: int = 8


@dataclasses.dataclass(frozen=True)
class CoCaConfig(ModelConfig):
    """The fields of open_clip's CoCa."""

    text_cfg: TextConfig = TextConfig(embed_cls=True)
    multimodal_cfg: CoCaMultimodalConfig = CoCaMultimodalConfig()


PLAIN: dict[str, Any] = {**open_clip.PLAIN, "act_kwargs": (None, {}), "norm_kwargs": (None, {})}


def _check(c: CoCaConfig) -> None:
    only(c, init_logit_bias=None)
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
        Adapt(("text",), drop=-1, unmask=True),
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


_CROSS: Table = {  # a block that reads the image, and its MLP
    **attention_table("attn", "cross"),
    "ln_1": "cross_norm",
    "ln_1_kv": "cross_context_norm",
    "ls_1.gamma": "cross_scale",
    "mlp.c_fc": "mlp_1/up",
    "mlp.c_proj": "mlp_1/down",
    "ln_2": "mlp_1_norm",
    "ls_2.gamma": "mlp_1_scale",
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
        **open_clip.image_table(image.width, image.patch_size),
        "visual.attn_pool.query": "stages_1/pool/token",
        "visual.attn_pool.ln_q": "stages_1/pool/token_norm",
        "visual.attn_pool.ln_k": "stages_1/pool/context_norm",
        **pool,
        "visual.ln_post": "stages_1/norm" if image.attentional_pool else "stages_0/image/norm",
        "visual.proj": "projections_image/projection/kernel",
        "text.cls_emb": reshaped("modalities_text/last", c.text_cfg.width),
        **open_clip.text_table("text."),
        "text.ln_final": "poolers_text/norm",
        "text.text_projection": "projections_text/projection" + ("" if c.text_cfg.proj_bias else "/kernel"),
        **layers("text_decoder.resblocks.{}", f"stages_{last}/layers/text", open_clip.BLOCK),
        **layers("text_decoder.cross_attn.{}", f"stages_{last}/layers/text", _CROSS),
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
    first = 2 if c.vision_cfg.attentional_pool else 1
    entered = r.intermediates[f"stages_{first}"]["entered"]
    fields |= {f"{name}_hidden_states": tuple(r.states("stages_0", name)) for name in batch}
    if "image" in batch:
        fields["image_embs"] = entered["image"][:, 1:]
    if ids is not None:
        fields["text_token_embs"] = entered["text"][:, :-1]
        fields["decoder_hidden_states"] = (entered["text"][:, :-1], *r.after(f"stages_{first + 2}", "text"))
    logits = r.out.logits.get("captioning")
    if "image" in batch and ids is not None:
        image, text = r.out.embeddings["image"], r.out.embeddings["text"]
        fields["contrastive_loss"] = clip_loss(image, text, fields["logit_scale"])
        if logits is not None:
            labels = ids[:, 1:]
            fields |= {"full_logits": logits, "logits": logits[:, :-1], "labels": labels}
            each = masked_mean(cross_entropy(logits[:, :-1], labels), labels != LOSS_PAD)
            fields["caption_loss"] = CAPTION_WEIGHT * each
            fields["loss"] = fields["contrastive_loss"] + fields["caption_loss"]
    return fields


def _sized(width: int, heads: int, vision: Mapping[str, Any], vocab: int = 49408) -> dict[str, Any]:
    text = {"context_length": 76, "vocab_size": vocab, "width": width, "heads": heads}
    own = {**text, "embed_cls": True, "output_tokens": True}
    return {"text_cfg": own, "multimodal_cfg": text, "vision_cfg": {**vision, "output_tokens": True}}


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
        texts=dataclasses.replace(clip.TEXTS, pad=0, mask=False),
        length=lambda c: c.text_cfg.context_length,
        inputs={"image": "pixel_values", "text": "input_ids"},
        known=(r"attn_mask$",),
        libraries=(open_clip.COCA,),
    ),
)
