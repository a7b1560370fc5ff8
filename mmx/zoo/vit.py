"""ViT (arXiv 2010.11929) and DeiT (2012.12877). One image stream with a class token, pre-norm."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Classifier, Pooler, TokenClassifier
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo import timm
from mmx.zoo.config import Classes, Pixels, activation, sized
from mmx.zoo.family import Family, Runner, channels_last, grid, pair, told_by_pooler
from mmx.zoo.loss import class_loss
from mmx.zoo.weights import Table, convolution, layers, reshaped, row

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

RENAMED = {  # what files that keep the names of transformers 5 have in place of LAYER's
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.(q|k|v)[a-z]+\.": r"attention.\1_proj.",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
}


@dataclasses.dataclass(frozen=True)
class ViTConfig(Classes, Pixels):
    """The published fields of ViT and DeiT."""

    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    add_pooling_layer: bool = True  # an argument of the published class; here it lies beside the fields


@dataclasses.dataclass(frozen=True)
class DeiTConfig(ViTConfig):
    """The published fields of DeiT with a distillation token; without one it is published as ViT."""


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


def _special(c: ViTConfig) -> tuple[str, ...]:
    return ("class", "distillation") if isinstance(c, DeiTConfig) else ("class",)


def _build(c: ViTConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    pooler = Pooler("first", size=c.pooler_output_size or c.hidden_size, activation=activation(c.pooler_act, "pooler_act"))
    outputs = {
        "classification": Classifier(c.num_labels, "image", transform=False),
        "teacher": TokenClassifier({"cls": c.num_labels, "distillation": c.num_labels}, "image", transform=False, special=True),
    }
    return build_model(
        {"image": image_embedder(c, _special(c))},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"image": Pooler("first") if heads or not c.add_pooling_layer else pooler},
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
        **block(c),
    )


def embeddings_table(published: str, c: Any, special: Sequence[str] = ("cls_token",)) -> Table:
    """The weights of `image_embedder`, with its special tokens by their published names."""
    places = math.prod(grid(c)) + len(special)
    return {
        f"{published}.position_embeddings": reshaped("modalities_image/position", 1, places, c.hidden_size),
        f"{published}.patch_embeddings.projection": convolution("modalities_image/patch", *pair(c.patch_size)),
        **{f"{published}.{name}": row("modalities_image/special", i, 1, 1, c.hidden_size) for i, name in enumerate(special)},
    }


def _table(published: str) -> Any:
    def table(c: ViTConfig) -> Table:
        names = {"class": "cls_token", "distillation": "distillation_token"}
        return {
            **embeddings_table(f"{published}.embeddings", c, [names[name] for name in _special(c)]),
            **layers(published + ".encoder.layer.{}", "stages_0/image/layers/block", LAYER),
            f"{published}.layernorm": "stages_0/image/norm",
            f"{published}.pooler.dense": "poolers_image/transform",
            "classifier": "heads_classification/classifier",
            "cls_classifier": "heads_teacher/classifier_cls",
            "distillation_classifier": "heads_teacher/classifier_distillation",
        }

    return table


def _forward(run: Runner, c: ViTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"image": channels_last(inputs["pixel_values"])})
    logits, taught, more = r.out.logits.get("classification"), r.out.logits.get("teacher"), {}
    if taught is not None:
        more = {"cls_logits": taught["cls"][:, 0], "distillation_logits": taught["distillation"][:, 1]}
        logits = (more["cls_logits"] + more["distillation_logits"]) / 2
    return {
        "loss": class_loss(logits, inputs["labels"], c.problem_type) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        **more,
        "last_hidden_state": r.out.streams["image"].values,
        "pooler_output": r.out.pooled["image"] if logits is None and c.add_pooling_layer else None,
        "hidden_states": tuple(r.states("stages_0", "image")),
        "attentions": tuple(r.attentions("stages_0", "image")),
    }


_IMAGENET = {"num_labels": 1000}
_TINY, _SMALL = sized(12, 192, 3, **_IMAGENET), sized(12, 384, 6, **_IMAGENET)
_NAMES = {"tiny": "16_224 16_384", "small": "8_224 16_224 16_384 32_224 32_384", "base": "8_224 16_224 16_384 32_224 32_384"}
_NAMES |= {"large": "14_224 16_224 16_384 32_224 32_384", "huge": "14_224", "giant": "14_224", "gigantic": "14_224"}
FAMILIES = (
    Family(
        "vit",
        ViTConfig,
        _build,
        _table("vit"),
        _forward,
        names={
            "vit-base-patch16-224": _IMAGENET,
            "vit-base-patch16-224-in21k": {},
            "vit-base-patch16-384": {**_IMAGENET, "image_size": 384},
            "vit-base-patch32-224-in21k": {"patch_size": 32},
            "vit-base-patch32-384": {**_IMAGENET, "patch_size": 32, "image_size": 384},
            "vit-large-patch16-224": sized(24, 1024, 16, **_IMAGENET),
            "vit-large-patch16-384": sized(24, 1024, 16, **_IMAGENET, image_size=384),
            "vit-large-patch32-384": sized(24, 1024, 16, **_IMAGENET, patch_size=32, image_size=384),
            "vit-huge-patch14-224-in21k": sized(32, 1280, 16, patch_size=14),
            "deit-tiny-patch16-224": _TINY,
            "deit-small-patch16-224": _SMALL,
            "deit-base-patch16-224": _IMAGENET,
            "deit-base-patch16-384": {**_IMAGENET, "image_size": 384},
            **timm.names(timm.vit_fields, "vit_{}", _NAMES),
            **timm.names(timm.vit_fields, "deit_{}", {"tiny": "16_224", "small": "16_224", "base": "16_224 16_384"}),
        },
        heads={"classification": "classifier"},
        prefix="vit",
        known=(r"mask_token$",),
        infer=told_by_pooler,
        older=RENAMED,
        libraries=(timm.VIT,),
    ),
    Family(
        "deit",
        DeiTConfig,
        _build,
        _table("deit"),
        _forward,
        names={
            "deit-tiny-distilled-patch16-224": _TINY,
            "deit-small-distilled-patch16-224": _SMALL,
            "deit-base-distilled-patch16-224": _IMAGENET,
            "deit-base-distilled-patch16-384": {**_IMAGENET, "image_size": 384},
            **timm.names(timm.vit_fields, "deit_{}_distilled", {"tiny": "16_224", "small": "16_224", "base": "16_224 16_384"}),
        },
        heads={"classification": "classifier", "teacher": "cls_classifier"},
        prefix="deit",
        known=(r"mask_token$", r"^distillation_classifier\."),
        infer=told_by_pooler,
        older=RENAMED,
        libraries=(timm.DEIT,),
    ),
)
