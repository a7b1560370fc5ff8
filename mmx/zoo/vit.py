"""ViT (arXiv 2010.11929) and DeiT (2012.12877). One image stream with a class token, pre-norm."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmx.heads import Classifier, Pooler
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.bert import token_loss
from mmx.zoo.config import Pixels, activation
from mmx.zoo.family import Family, Runner, channels_last
from mmx.zoo.weights import Table, convolution, layers, reshaped

LAYER: Table = {
    "attention.attention.query": "self/query",
    "attention.attention.key": "self/key",
    "attention.attention.value": "self/value",
    "attention.output.dense": "self/out",
    "layernorm_before": "self_norm",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "layernorm_after": "mlp_norm",
}


@dataclasses.dataclass(frozen=True)
class ViTConfig(Pixels):
    """The published fields of ViT and DeiT."""

    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    num_labels: int = 2


def pair(size: int | tuple) -> tuple[int, int]:
    """(height, width) of a published size, which is a number for a square."""
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]


def attention_bias(qkv: bool) -> tuple[str, ...] | None:
    """Which projections have a bias, by the published `qkv_bias`."""
    return None if qkv else ("out",)


def block(c: Any) -> dict[str, Any]:
    """The fields of `BlockConfig` that ViT's configuration tells."""
    return {
        "heads": c.num_attention_heads,
        "mlp": c.intermediate_size,
        "activation": activation(c.hidden_act),
        "eps": c.layer_norm_eps,
        "attention_bias": attention_bias(c.qkv_bias),
    }


def image_embedder(c: Any, special: tuple[str, ...]) -> Patches:
    """Patches, special tokens in front, a learned position for each of both."""
    return Patches(
        pair(c.image_size),
        pair(c.patch_size),
        c.num_channels,
        width=c.hidden_size,
        special=special,
        special_position=True,
        resize=True,
        crop=True,
    )


def _build(special: tuple[str, ...]) -> Any:
    def build(c: ViTConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
        pooler = Pooler("first", size=c.pooler_output_size or c.hidden_size, activation=activation(c.pooler_act, "pooler_act"))
        classifies = "classification" in heads
        return build_model(
            {"image": image_embedder(c, special)},
            (PerStream(c.num_hidden_layers),),
            width=c.hidden_size,
            embed=0,
            poolers={"image": Pooler("first") if classifies else pooler},
            outputs={"classification": Classifier(c.num_labels, "image", transform=False)} if classifies else {},
            dtype=dtype,
            **block(c),
        )

    return build


def _table(published: str, special: tuple[str, ...]) -> Any:
    def table(c: ViTConfig) -> Table:
        height, width = (s // p for s, p in zip(pair(c.image_size), pair(c.patch_size), strict=True))
        places = height * width + len(special)
        return {
            f"{published}.embeddings.position_embeddings": reshaped("modalities_image/position", 1, places, c.hidden_size),
            f"{published}.embeddings.patch_embeddings.projection": convolution("modalities_image/patch", *pair(c.patch_size)),
            **special_table(published + ".embeddings", special, c.hidden_size),
            **layers(published + ".encoder.layer.{}", "stages_0/image/layers/block", LAYER),
            f"{published}.layernorm": "stages_0/image/norm",
            f"{published}.pooler.dense": "poolers_image/transform",
            "classifier": "heads_classification/classifier",
        }

    return table


def special_table(published: str, special: tuple[str, ...], width: int) -> Table:
    """The class token, (1, 1, D)."""
    return {f"{published}.cls_token": reshaped("modalities_image/special", 1, 1, width)} if special == ("class",) else {}


def class_loss(logits: Any, labels: Any) -> Any:
    """Cross-entropy of labels `(B,)`; with a single class, the squared distance to its number; `(B, classes)`: each by itself."""
    if logits.shape[-1] == 1:
        return jnp.square(logits[:, 0] - labels.reshape(-1)).mean()
    return token_loss(logits, labels) if labels.ndim == 1 else (jax.nn.softplus(logits) - labels * logits).mean()


def _forward(run: Runner, c: ViTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"image": channels_last(inputs["pixel_values"])})
    logits = r.out.logits.get("classification")
    return {
        "loss": class_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["image"].values,
        "pooler_output": r.out.pooled["image"] if logits is None else None,
        "hidden_states": tuple(r.states("stages_0", "image")),
    }


def _sized(layers: int, width: int, heads: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": patch,
        **more,
    }


FAMILIES = (
    Family(
        "vit",
        ViTConfig,
        _build(("class",)),
        _table("vit", ("class",)),
        _forward,
        names={
            "vit-base-patch16-224": {},
            "vit-base-patch16-224-in21k": {},
            "vit-base-patch16-384": {"image_size": 384},
            "vit-base-patch32-224-in21k": {"patch_size": 32},
            "vit-base-patch32-384": {"patch_size": 32, "image_size": 384},
            "vit-large-patch16-224": _sized(24, 1024, 16, 16),
            "vit-large-patch16-384": _sized(24, 1024, 16, 16, image_size=384),
            "vit-large-patch32-384": _sized(24, 1024, 16, 32, image_size=384),
            "vit-huge-patch14-224-in21k": _sized(32, 1280, 16, 14),
        },
        heads={"classification": "classifier"},
        prefix="vit",
        known=(r"mask_token$",),
    ),
)
