"""SigLIP (arXiv 2303.15343) and SigLIP 2 (2502.14786): two towers without projections, every pair a question of its own.

Pre-norm, tanh GELU, eps 1e-6; the text sees itself in both directions and is read at its last token, the image by a learned
token. NaFlex, SigLIP 2's second form, takes patches cut from images of any size and shape.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmx.heads import AttentionPooler, Pooler, Projection
from mmx.losses import sigmoid_loss
from mmx.modalities import Ids, PackedPatches, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.types import Masked
from mmx.zoo import clip, open_clip, open_clip_names
from mmx.zoo.config import Layers, Pixels, activation, only, sized
from mmx.zoo.family import Family, Runner, channels_last, padded
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, attention_table, convolution, layers, reshaped

SCALE, BIAS = 10.0, -10.0  # first values (arXiv 2303.15343, 3.2)


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(Layers):
    """The published fields of SigLIP's text tower."""

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(Pixels):
    """The published fields of SigLIP's image tower."""

    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """The published fields of SigLIP."""

    text_config: SiglipTextConfig = SiglipTextConfig()
    vision_config: SiglipVisionConfig = SiglipVisionConfig()


@dataclasses.dataclass(frozen=True)
class Siglip2VisionConfig(Layers):
    """The published fields of the image tower of SigLIP 2 NaFlex."""

    num_channels: int = 3
    num_patches: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


@dataclasses.dataclass(frozen=True)
class Siglip2Config:
    """The published fields of SigLIP 2 NaFlex."""

    text_config: SiglipTextConfig = SiglipTextConfig()
    vision_config: Siglip2VisionConfig = Siglip2VisionConfig()


def _embedder(c: SiglipVisionConfig | Siglip2VisionConfig) -> nn.Module:
    patch = (c.patch_size, c.patch_size)
    if isinstance(c, SiglipVisionConfig):
        return Patches((c.image_size,) * 2, patch, c.num_channels, width=c.hidden_size, crop=True)
    side = int(c.num_patches**0.5)
    return PackedPatches(c.num_patches, patch, (side, side), c.num_channels, width=c.hidden_size, sampling="antialias")


def _build(c: SiglipConfig | Siglip2Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text = c.vision_config, c.text_config
    only(image, vision_use_head=True)
    return build_model(
        {
            "image": _embedder(image),
            "text": Ids(text.vocab_size, text.max_position_embeddings, width=text.hidden_size),
        },
        (
            PerStream(
                {"image": image.num_hidden_layers, "text": text.num_hidden_layers},
                {"image": clip.block(image, dtype), "text": clip.block(text, dtype)},
            ),
        ),
        width=image.hidden_size,
        heads=image.num_attention_heads,
        embed=image.hidden_size,
        poolers={
            "image": AttentionPooler(
                image.num_attention_heads,
                mlp=image.intermediate_size,
                activation=activation(image.hidden_act),
                eps=image.layer_norm_eps,
            ),
            "text": Pooler("last", size=text.projection_size or text.hidden_size),
        },
        projections={name: Projection(None) for name in ("image", "text")},
        logit_scale=SCALE,
        logit_bias=BIAS,
        dtype=dtype,
    )


def _table(c: SiglipConfig | Siglip2Config) -> Table:
    image = c.vision_config
    patch: Any = "modalities_image/patch"
    return {
        "logit_scale": reshaped("logit_scale", 1),
        "logit_bias": reshaped("logit_bias", 1),
        "text_model.embeddings.token_embedding": "modalities_text/token",
        "text_model.embeddings.position_embedding.weight": "modalities_text/position",
        **layers("text_model.encoder.layers.{}", "stages_0/text/layers/block", clip.LAYER),
        "text_model.final_layer_norm": "stages_0/text/norm",
        "text_model.head": "poolers_text/transform",
        "vision_model.embeddings.patch_embedding": convolution(patch, *(image.patch_size,) * 2)
        if isinstance(image, SiglipVisionConfig)
        else patch,
        "vision_model.embeddings.position_embedding.weight": "modalities_image/position",
        **layers("vision_model.encoder.layers.{}", "stages_0/image/layers/block", clip.LAYER),
        "vision_model.post_layernorm": "stages_0/image/norm",
        "vision_model.head.probe": reshaped("poolers_image/token", 1, 1, image.hidden_size),
        **attention_table("vision_model.head.attention", "poolers_image/cross"),
        "vision_model.head.layernorm": "poolers_image/mlp_norm",
        "vision_model.head.mlp.fc1": "poolers_image/mlp/up",
        "vision_model.head.mlp.fc2": "poolers_image/mlp/down",
    }


def _packed(inputs: Mapping[str, Any]) -> Masked:
    """Patches row by row; those behind the last one of an image lie in its first place."""
    pixels, extent = inputs["pixel_values"], inputs["spatial_shapes"]
    number = jnp.arange(pixels.shape[1])
    columns = extent[:, 1, None]
    place = jnp.stack([number // columns, number % columns], -1)  # (B, L, 2)
    place = jnp.where((number < extent.prod(-1)[:, None])[..., None], place, 0)
    mask = inputs.get("pixel_attention_mask")
    mask = jnp.ones(pixels.shape[:2], bool) if mask is None else mask != 0
    return Masked({"patches": pixels, "place": place, "extent": extent}, mask, keep=True)


def _forward(run: Runner, c: SiglipConfig | Siglip2Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch = {}
    if "pixel_values" in inputs:
        batch["image"] = channels_last(inputs["pixel_values"]) if isinstance(c, SiglipConfig) else _packed(inputs)
    if "input_ids" in inputs:
        beside = {"place": inputs["position_ids"]} if "position_ids" in inputs else {}
        batch["text"] = padded(inputs["input_ids"], inputs.get("attention_mask"), **beside)
    r = run(batch)
    image, text = r.out.embeddings.get("image"), r.out.embeddings.get("text")
    fields = {"image_embeds": image, "text_embeds": text, **clip.tower_fields(r)}
    fields |= {"logit_scale": r.out.logit_scale, "logit_bias": r.out.logit_bias}
    if image is not None and text is not None:
        scale: Any = r.out.logit_scale
        bias: Any = r.out.logit_bias
        fields["logits_per_text"] = scale * text @ image.T + bias
        fields["logits_per_image"] = fields["logits_per_text"].T
        fields["loss"] = sigmoid_loss(image, text, scale, bias) if inputs.get("return_loss") else None
    return fields


_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # text, image
    "base": ({}, {}),
    "large": (sized(24, 1024, 16), sized(24, 1024, 16)),
    "so400m": (sized(27, 1152, 16, 4304), sized(27, 1152, 16, 4304)),
    "giant-opt": (sized(27, 1152, 16, 4304, projection_size=1536), sized(40, 1536, 16)),
}


def _sized(size: str, text: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    return {"text_config": {**_SIZES[size][0], **text}, "vision_config": {**_SIZES[size][1], **image}}


def _names() -> dict[str, dict[str, Any]]:
    one = {"base": (224, 256, 384, 512), "large": (256, 384), "so400m": ()}
    names = {
        f"siglip-{size}-patch16-{pixels}": _sized(size, {}, {"image_size": pixels})
        for size, all_pixels in one.items()
        for pixels in all_pixels
    }
    many = {"vocab_size": 250000}
    names["siglip-base-patch16-256-multilingual"] = _sized("base", many, {"image_size": 256})
    names["siglip-so400m-patch14-224"] = _sized("so400m", {"max_position_embeddings": 16}, {"patch_size": 14})
    names["siglip-so400m-patch14-384"] = _sized("so400m", {}, {"patch_size": 14, "image_size": 384})
    names["siglip-so400m-patch16-256-i18n"] = _sized("so400m", many, {"image_size": 256})
    two = {
        ("base", 32): (256,),
        ("base", 16): (224, 256, 384, 512),
        ("large", 16): (256, 384, 512),
        ("so400m", 14): (224, 384),
        ("so400m", 16): (256, 384, 512),
        ("giant-opt", 16): (256, 384),
    }
    for (size, patch), all_pixels in two.items():
        for pixels in all_pixels:
            image = {"patch_size": patch, "image_size": pixels}
            names[f"siglip2-{size}-patch{patch}-{pixels}"] = _sized(size, {"vocab_size": 256000}, image)
    return names


TEXTS = Texts(end="</s>", pad="</s>", unknown="<unk>", lower=True, plain=True, full=True, mask=False)
TEXTS_2 = dataclasses.replace(TEXTS, end="<eos>", pad="<pad>", plain=False)
FAMILIES = (
    Family(
        "siglip",
        SiglipConfig,
        _build,
        _table,
        _forward,
        names=_names() | open_clip_names.siglip_names(),
        texts=TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$",),
        libraries=(open_clip.SIGLIP,),
    ),
    Family(
        "siglip2",
        Siglip2Config,
        _build,
        _table,
        _forward,
        names={f"siglip2-{size}-patch16-naflex": _sized(size, {"vocab_size": 256000}, {}) for size in ("base", "so400m")},
        texts=TEXTS_2,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$",),
    ),
)
