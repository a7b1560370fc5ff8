"""VideoMAE (arXiv 2203.12602) and ViViT (2103.15691). One video stream of tubelets, pre-norm."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmx.heads import Classifier, Pooler
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.config import Classes, Layers, Pixels, activation, sized
from mmx.zoo.family import Family, Runner, channels_last, pair, told_by_pooler
from mmx.zoo.loss import class_loss
from mmx.zoo.vit import LAYER as VIT_LAYER
from mmx.zoo.vit import RENAMED, block
from mmx.zoo.weights import Table, convolution, layers, reshaped

LAYER: Table = {  # of VideoMAE: biases stand apart, and keys have none
    **{name: path for name, path in VIT_LAYER.items() if not name.startswith("attention.attention")},
    **{f"attention.attention.{name}.weight": f"self/{name}/kernel" for name in ("query", "key", "value")},
    "attention.attention.q_bias": "self/query/bias",
    "attention.attention.v_bias": "self/value/bias",
}


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig(Classes, Pixels):
    """The published fields of VideoMAE."""

    num_frames: int = 16
    tubelet_size: int = 2
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    qv_bias: bool = True  # the newer name of the same
    use_mean_pooling: bool = True
    decoder_num_attention_heads: int = 6  # these of the pretraining decoder, which is not here
    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 4
    decoder_intermediate_size: int = 1536
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        for name in ("qkv_bias", "qv_bias"):  # whichever is told; both are written, as each is read somewhere
            object.__setattr__(self, name, self.qkv_bias and self.qv_bias)


@dataclasses.dataclass(frozen=True)
class VivitConfig(Classes, Layers):
    """The published fields of ViViT."""

    image_size: int | tuple = 224
    num_frames: int = 32
    tubelet_size: tuple = (2, 16, 16)
    num_channels: int = 3
    hidden_act: str = "gelu_fast"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    video_size: tuple | None = None  # said again in older files
    add_pooling_layer: bool = True  # an argument of the published class; here it lies beside the fields


def tubelet(c: Any) -> tuple[int, int, int]:
    """(frames, height, width) of a tubelet."""
    if isinstance(c, VivitConfig):
        return tuple(c.tubelet_size)  # type: ignore[return-value]
    return (c.tubelet_size, *pair(c.patch_size))


def _build_videomae(c: VideoMAEConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    biases = ("query", "value", "out") if c.qv_bias else ("out",)
    classifies = "classification" in heads
    return build_model(
        {
            "video": Patches(
                (c.num_frames, *pair(c.image_size)),
                tubelet(c),
                c.num_channels,
                width=c.hidden_size,
                position="interleaved",
                crop=True,
            )
        },
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        # Where it is the mean that is classified, it is normalised, and the encoder's states are not.
        poolers={"video": Pooler("mean", norm=1e-5 if classifies else None) if c.use_mean_pooling else Pooler("first")},
        outputs={"classification": Classifier(c.num_labels, "video", transform=False)} if classifies else {},
        final_norm=not c.use_mean_pooling,
        dtype=dtype,
        **{**block(c), "attention_bias": biases},
    )


def _build_vivit(c: VivitConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    pooler = Pooler("first", size=c.pooler_output_size or c.hidden_size, activation=activation(c.pooler_act, "pooler_act"))
    classifies = "classification" in heads
    return build_model(
        {
            "video": Patches(
                (c.num_frames, *pair(c.image_size)),
                tubelet(c),
                c.num_channels,
                width=c.hidden_size,
                special=("class",),
                special_position=True,
                resize=True,
                crop=True,
            )
        },
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"video": Pooler("first") if classifies or not c.add_pooling_layer else pooler},
        outputs={"classification": Classifier(c.num_labels, "video", transform=False)} if classifies else {},
        dtype=dtype,
        **block(c),
    )


def _table(published: str, layer: Table) -> Callable[[Any], Table]:
    def table(c: Any) -> Table:
        size = (c.num_frames, *pair(c.image_size))
        places = 1
        for whole, part in zip(size, tubelet(c), strict=True):
            places *= whole // part
        return {
            f"{published}.embeddings.cls_token": reshaped("modalities_video/special", 1, 1, c.hidden_size),
            f"{published}.embeddings.position_embeddings": reshaped("modalities_video/position", 1, places + 1, c.hidden_size),
            f"{published}.embeddings.patch_embeddings.projection": convolution("modalities_video/patch", *tubelet(c)),
            **layers(published + ".encoder.layer.{}", "stages_0/video/layers/block", layer),
            f"{published}.layernorm": "stages_0/video/norm",
            f"{published}.pooler.dense": "poolers_video/transform",
            "fc_norm": "poolers_video/norm",
            "classifier": "heads_classification/classifier",
        }

    return table


def _forward(run: Runner, c: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"video": channels_last(inputs["pixel_values"])})
    logits = r.out.logits.get("classification")
    return {
        "loss": class_loss(logits, inputs["labels"], c.problem_type) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["video"].values,
        "pooler_output": r.out.pooled["video"] if logits is None and getattr(c, "add_pooling_layer", False) else None,
        "hidden_states": tuple(r.states("stages_0", "video")),
        "attentions": tuple(r.attentions("stages_0", "video")),
    }


_KINETICS = {"num_labels": 400}
FAMILIES = (
    Family(
        "videomae",
        VideoMAEConfig,
        _build_videomae,
        _table("videomae", LAYER),
        _forward,
        names={
            "videomae-small-finetuned-kinetics": sized(12, 384, 6, **_KINETICS),
            "videomae-base": {"use_mean_pooling": False},
            "videomae-base-finetuned-kinetics": _KINETICS,
            "videomae-base-finetuned-ssv2": {"num_labels": 174},
            "videomae-large": sized(24, 1024, 16, use_mean_pooling=False),
            "videomae-large-finetuned-kinetics": sized(24, 1024, 16, **_KINETICS),
            "videomae-huge-finetuned-kinetics": sized(32, 1280, 16, **_KINETICS),
        },
        heads={"classification": "classifier"},
        prefix="videomae",
        video=True,
        older={r"\.q_bias$": ".query.bias", r"\.v_bias$": ".value.bias"},
        known=(r"position_embeddings$", r"^decoder\.", r"^encoder_to_decoder\.", r"^mask_token$", r"^fc_norm\."),
    ),
    Family(
        "vivit",
        VivitConfig,
        _build_vivit,
        _table("vivit", VIT_LAYER),
        _forward,
        names={
            "vivit-b-16x2": {},
            "vivit-b-16x2-kinetics400": _KINETICS,
        },
        heads={"classification": "classifier"},
        prefix="vivit",
        video=True,
        infer=told_by_pooler,
        older=RENAMED,
    ),
)
