"""BLIP (arXiv 2201.12086): an image stream, and a text that reads it by cross-attention, or not: captions and matching.

The image is a ViT, pre-norm, eps 1e-5; the text is BERT, post-norm, eps 1e-12, `self cross mlp` in every layer, read causally
where it is written. A text alone leaves its cross-attention out. Which of the two published classes it is, and so how the
text's tensors are called, is told by `architectures`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, Projection
from mmx.layers import BlockConfig
from mmx.losses import cross_entropy, masked_mean
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Cross, PerStream
from mmx.zoo import bert, clip, vit
from mmx.zoo.config import Layers, Pixels, only, sized
from mmx.zoo.family import Family, Generation, Runner, channels_last, padded
from mmx.zoo.weights import Table, convolution, fused, layers, reshaped

CAPTIONING, RETRIEVAL = ("BlipForConditionalGeneration",), ("BlipForImageTextRetrieval",)
CROSS: Table = {  # the cross-attention of every model that copied BERT's
    "crossattention.self.query": "cross/query",
    "crossattention.self.key": "cross/key",
    "crossattention.self.value": "cross/value",
    "crossattention.output.dense": "cross/out",
    "crossattention.output.LayerNorm": "cross_norm",
}
IMAGE_LAYER: Table = {
    "self_attn.qkv": fused("self/query", "self/key", "self/value"),
    "self_attn.projection": "self/out",
    **{name: path for name, path in clip.LAYER.items() if not name.startswith("self_attn")},
}


@dataclasses.dataclass(frozen=True)
class BlipTextConfig(Layers):
    """The published fields of BLIP's text; the width of what it reads is that of the image, whatever they say."""

    vocab_size: int = 30524
    encoder_hidden_size: int = 768
    projection_dim: int = 768
    num_attention_heads: int = 8
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    is_decoder: bool = True
    bos_token_id: int = 30522
    sep_token_id: int | None = 102
    pad_token_id: int | None = 0
    label_smoothing: float = 0.0
    tie_word_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig(Pixels):
    """The published fields of BLIP's image tower."""

    projection_dim: int = 512
    image_size: int = 384
    patch_size: int = 16
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """The published fields of BLIP."""

    text_config: BlipTextConfig = BlipTextConfig()
    vision_config: BlipVisionConfig = BlipVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    image_text_hidden_size: int = 256
    label_smoothing: float = 0.0
    architectures: tuple = CAPTIONING
    tie_word_embeddings: bool = True


def _build(c: BlipConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text = c.vision_config, c.text_config
    only(c, architectures=(CAPTIONING, RETRIEVAL), tie_word_embeddings=True)
    only(text, is_decoder=True, tie_word_embeddings=True)
    only(image, num_channels=3)
    retrieval = c.architectures == RETRIEVAL
    outputs = {"captioning": bert.masked_lm_head(text), "matching": Classifier(2, "text", transform=False)}
    return build_model(
        {
            "image": vit.image_embedder(image, ("class",)),
            "text": Ids(text.vocab_size, text.max_position_embeddings, width=text.hidden_size, norm=text.layer_norm_eps),
        },
        (
            PerStream({"image": image.num_hidden_layers}, {"image": clip.block(image, dtype)}),
            Cross(
                text.num_hidden_layers,
                {"text": BlockConfig(width=text.hidden_size, skip=True, dtype=dtype, **bert.block(text))},
                "self cross mlp",
                steps=("text",),
            ),
        ),
        width=text.hidden_size,
        heads=text.num_attention_heads,
        embed=c.image_text_hidden_size if retrieval else 0,
        poolers={name: Pooler("first") for name in ("image", "text")},
        projections={n: Projection(c.image_text_hidden_size, bias=True) for n in ("image", "text")} if retrieval else {},
        logit_scale=None,
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
    )


def _table(c: BlipConfig) -> Table:
    image = c.vision_config
    text = "text_encoder" if c.architectures == RETRIEVAL else "text_decoder.bert"
    places = (image.image_size // image.patch_size) ** 2 + 1
    return {
        "vision_model.embeddings.class_embedding": reshaped("modalities_image/special", 1, 1, image.hidden_size),
        "vision_model.embeddings.patch_embedding": convolution("modalities_image/patch", *(image.patch_size,) * 2),
        "vision_model.embeddings.position_embedding": reshaped("modalities_image/position", 1, places, image.hidden_size),
        **layers("vision_model.encoder.layers.{}", "stages_0/image/layers/block", IMAGE_LAYER),
        "vision_model.post_layernorm": "stages_0/image/norm",
        f"{text}.embeddings.word_embeddings": "modalities_text/token",
        f"{text}.embeddings.position_embeddings.weight": "modalities_text/position",
        f"{text}.embeddings.LayerNorm": "modalities_text/norm",
        **layers(f"{text}.encoder.layer.{{}}", "stages_1/layers/text", {**bert.LAYER, **CROSS}),
        "vision_proj": "projections_image/projection",
        "text_proj": "projections_text/projection",
        **bert.masked_lm_table("text_decoder.cls.predictions", "heads_captioning"),
        "itm_head": "heads_matching/classifier",
    }


def _forward(run: Runner, c: BlipConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    image = channels_last(inputs["pixel_values"])
    text = padded(inputs["input_ids"], inputs.get("attention_mask"))
    retrieval = c.architectures == RETRIEVAL
    r = run({"image": image, "text": text}, causal=() if retrieval else ("text",))
    seen, read = r.out.streams["image"].values, r.out.streams["text"].values
    fields = {"last_hidden_state": seen, "hidden_states": tuple(r.states("stages_0", "image"))}
    if not retrieval:
        logits, labels = r.out.logits.get("captioning"), inputs.get("labels")
        loss = None
        if logits is not None and labels is not None:
            each = cross_entropy(logits[:, :-1], jnp.maximum(labels[:, 1:], 0), c.text_config.label_smoothing)
            loss = masked_mean(each, labels[:, 1:] != -100)
        return fields | {
            "loss": loss,
            "logits": logits,
            "image_embeds": seen,
            "text_model_output": {"last_hidden_state": read},
        }
    # Published: one of the two scores, as `use_itm_head` says. Where it says nothing, both.
    head = inputs.get("use_itm_head")
    if head is not False:
        fields |= {"itm_score": r.out.logits.get("matching"), "question_embeds": read}
    if head is not True:
        alone = run({"text": text})
        embeds = alone.out.streams["text"].values
        fields["itc_score"] = r.out.embeddings["image"] @ alone.out.embeddings["text"].T
        fields["question_embeds" if head is False else "question_embeds_alone"] = embeds
    return fields


_BASE = {"text_config": {"num_attention_heads": 12}}
_LARGE = {
    "text_config": {"num_attention_heads": 12, "encoder_hidden_size": 1024},
    "vision_config": sized(24, 1024, 16),
}
_RETRIEVAL = {"architectures": RETRIEVAL}
FAMILIES = (
    Family(
        "blip",
        BlipConfig,
        _build,
        _table,
        _forward,
        names={
            "blip-image-captioning-base": _BASE,
            "blip-image-captioning-large": _LARGE,
            "blip-itm-base-coco": {**_BASE, **_RETRIEVAL},
            "blip-itm-base-flickr": {**_BASE, **_RETRIEVAL},
            "blip-itm-large-coco": {**_LARGE, **_RETRIEVAL},
            "blip-itm-large-flickr": {**_LARGE, **_RETRIEVAL},
        },
        heads={"captioning": "text_decoder.cls", "matching": "itm_head"},
        texts=bert.TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$"),
        generation=Generation(start=lambda c: c.text_config.bos_token_id, end="sep_token_id"),
    ),
)
