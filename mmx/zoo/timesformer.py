"""TimeSformer (arXiv 2102.05095): a video stream whose attention goes along time, then within each frame. Pre-norm."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Classifier, Pooler
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.config import Classes, Pixels, only
from mmx.zoo.family import Family, Runner, channels_last
from mmx.zoo.loss import class_loss
from mmx.zoo.vit import block
from mmx.zoo.weights import Table, convolution, fused, layers, reshaped

DIVIDED = "divided_space_time"


@dataclasses.dataclass(frozen=True)
class TimesformerConfig(Classes, Pixels):
    """The published fields of TimeSformer."""

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 8
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    attention_type: str = DIVIDED
    drop_path_rate: float = 0.0


def _build(c: TimesformerConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, attention_type=(DIVIDED, "joint_space_time", "space_only"))
    frames = c.attention_type == "space_only"  # each by itself, as an image
    size, patch = (c.image_size,) * 2, (c.patch_size,) * 2
    video = Patches(
        size if frames else (c.num_frames, *size),
        patch if frames else (1, *patch),
        c.num_channels,
        width=c.hidden_size,
        position="learned" if frames else "divided",
        special=("class",),
        special_position=True,
        crop=True,
    )
    return build_model(
        {"video": video},
        (PerStream(c.num_hidden_layers, sublayers="time space mlp" if c.attention_type == DIVIDED else "self mlp"),),
        width=c.hidden_size,
        embed=0,
        poolers={"video": Pooler("first")},
        outputs={"classification": Classifier(c.num_labels, "video", transform=False)} if "classification" in heads else {},
        drop_path=c.drop_path_rate,
        dtype=dtype,
        **block(c),
    )


def _attention(published: str, ours: str) -> Table:
    return {
        f"{published}.attention.qkv": fused(*(f"{ours}/{name}" for name in ("query", "key", "value"))),
        f"{published}.output.dense": f"{ours}/out",
    }


def _table(c: TimesformerConfig) -> Table:
    space = "space" if c.attention_type == DIVIDED else "self"
    layer = {
        **_attention("attention", space),
        "layernorm_before": f"{space}_norm",
        **_attention("temporal_attention", "time"),
        "temporal_layernorm": "time_norm",
        "temporal_dense": "time_project",
        "intermediate.dense": "mlp/up",
        "output.dense": "mlp/down",
        "layernorm_after": "mlp_norm",
    }
    places, width = (c.image_size // c.patch_size) ** 2 + 1, c.hidden_size
    return {
        "timesformer.embeddings.cls_token": reshaped("modalities_video/special", 1, 1, width),
        "timesformer.embeddings.position_embeddings": reshaped("modalities_video/position", 1, places, width),
        "timesformer.embeddings.time_embeddings": reshaped("modalities_video/time_position", 1, c.num_frames, width),
        "timesformer.embeddings.patch_embeddings.projection": convolution("modalities_video/patch", *(c.patch_size,) * 2),
        **layers("timesformer.encoder.layer.{}", "stages_0/video/layers/block", layer),
        "timesformer.layernorm": "stages_0/video/norm",
        "classifier": "heads_classification/classifier",
    }


def _forward(run: Runner, c: TimesformerConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    video = channels_last(inputs["pixel_values"])
    if c.attention_type == "space_only":
        video = video.reshape(-1, *video.shape[2:])

    def published(x: Any) -> Any:  # a patch's frames stand side by side, behind the class token
        if c.attention_type == "space_only":
            return x
        inner = x[:, 1:].reshape(len(x), c.num_frames, -1, x.shape[-1]).swapaxes(1, 2).reshape(len(x), -1, x.shape[-1])
        return x.at[:, 1:].set(inner)

    r = run({"video": video})
    logits = r.out.logits.get("classification")
    return {
        "loss": class_loss(logits, inputs["labels"], c.problem_type) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": published(r.out.streams["video"].values),
        "hidden_states": tuple(published(x) for x in r.states("stages_0", "video")),
    }


_HR = {"image_size": 448, "num_frames": 16}
FAMILIES = (
    Family(
        "timesformer",
        TimesformerConfig,
        _build,
        _table,
        _forward,
        names={
            f"timesformer-{kind}-finetuned-{data}": {**fields, "num_labels": classes}
            for kind, fields in (("base", {}), ("hr", _HR))
            for data, classes in (("k400", 400), ("k600", 600), ("ssv2", 174))
        },
        heads={"classification": "classifier"},
        prefix="timesformer",
        video=True,
    ),
)
