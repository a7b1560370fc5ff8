"""MBT (arXiv 2107.00135) in scenic's layout: video and sound side by side, then exchanging through a bottleneck or openly.

Pre-norm, tanh GELU, eps 1e-6. Tensors are flax leaves, their paths joined by dots.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmx.heads import Classifier, Pooler
from mmx.modalities import Features
from mmx.modalities.patches import cut
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Bottleneck, Cross, Joint, PerStream
from mmx.topologies.stage import Stage
from mmx.zoo.config import only
from mmx.zoo.family import Family, Run, Runner
from mmx.zoo.weights import Layout, Table, layers, reshaped

EPS = 1e-6  # of every norm; no field of the configuration tells it


@dataclasses.dataclass(frozen=True)
class MBTConfig:
    """The published fields of MBT, and how many patches its positions are for, which scenic reads off its inputs."""

    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_classes: int = 527
    hidden_size: int = 768
    classifier: str = "gap"
    modality_fusion: tuple = ("spectrogram",)
    fusion_layer: int = 0
    use_bottleneck: bool = False
    n_bottlenecks: int = 4
    test_with_bottlenecks: bool = True
    share_encoder: bool = False
    representation_size: int | None = None
    patches: tuple = (16, 16, 2)
    temporal_encoding_method: str = "3d_conv"
    n_sampled_frames: int = 8
    rgb_tokens: int = 3136
    rgb_channels: int = 3
    spectrogram_tokens: int = 400
    spectrogram_channels: int = 3


def _patch(c: MBTConfig, modality: str) -> tuple[int, ...]:
    """A patch's (height, width), or (frames, height, width)."""
    height, width = c.patches[:2]
    return (c.patches[2], height, width) if modality == "rgb" and c.temporal_encoding_method == "3d_conv" else (height, width)


def _end(c: MBTConfig, modality: str, joined: str = "_") -> str:
    """What scenic adds to the names of a modality's modules."""
    return "" if modality == "rgb" else joined + modality


def _apart(c: MBTConfig) -> int:
    """In how many layers modalities keep to themselves."""
    alone = len(c.modality_fusion) == 1 or (c.use_bottleneck and not c.test_with_bottlenecks)
    return c.num_layers if alone else c.fusion_layer


def _exchange(c: MBTConfig) -> Stage:
    depth = c.num_layers - _apart(c)
    if c.use_bottleneck:
        return Bottleneck(depth, c.n_bottlenecks + (c.classifier == "token"), share=c.share_encoder)
    return Joint(depth) if c.share_encoder else Cross(depth, sublayers="both mlp")


def _build(c: MBTConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(
        c,
        classifier=("token", "gap"),
        representation_size=None,
        temporal_encoding_method=("3d_conv", "temporal_sampling"),
    )
    token = c.classifier == "token"
    classifier = Classifier(c.num_classes, transform=False, by_tokens=not token)
    return build_model(
        {
            name: Features(
                int(np.prod(_patch(c, name))) * getattr(c, f"{name}_channels"),
                getattr(c, f"{name}_tokens"),
                width=c.hidden_size,
                position="learned",
                special=("class",) if token else (),
                special_position=True,
            )
            for name in c.modality_fusion
        },
        (PerStream(_apart(c), share=c.share_encoder), _exchange(c), Adapt(norm=EPS, share=True)),
        width=c.hidden_size,
        heads=c.num_heads,
        mlp=c.mlp_dim,
        eps=EPS,
        final_norm=False,
        embed=0,
        poolers={name: Pooler("first" if token else "mean") for name in c.modality_fusion},
        outputs={"classification": classifier} if "classification" in heads else {},
        dtype=dtype,
    )


def _layer(c: MBTConfig, attention: str) -> Table:
    heads, size = c.num_heads, c.hidden_size // c.num_heads
    table: dict[str, str | Layout] = {}
    for name, ours in (("LayerNorm_0", f"{attention}_norm"), ("LayerNorm_1", "mlp_norm")):
        table |= {f"{name}.{leaf}": f"{ours}/{leaf}" for leaf in ("scale", "bias")}
    for name, ours in (("Dense_0", "mlp/up"), ("Dense_1", "mlp/down")):
        table |= {f"MlpBlock_0.{name}.{leaf}": f"{ours}/{leaf}" for leaf in ("kernel", "bias")}
    for name in ("query", "key", "value", "out"):
        published, ours = f"MultiHeadDotProductAttention_0.{name}", f"{attention}/{name}"
        table[f"{published}.kernel"] = f"{ours}/kernel"
        table[f"{published}.bias"] = f"{ours}/bias" if name == "out" else reshaped(f"{ours}/bias", heads, size)
    return table


def _table(c: MBTConfig) -> Table:
    table: dict[str, str | Layout] = {
        "bottleneck": reshaped("stages_1/token", 1, c.n_bottlenecks + (c.classifier == "token"), c.hidden_size)
    }
    apart = _apart(c)
    crossing = not c.use_bottleneck and not c.share_encoder
    for name in c.modality_fusion:
        ours, end, more = f"modalities_{name}", _end(c, name), c.classifier == "token"
        kernel = (*_patch(c, name), getattr(c, f"{name}_channels"), c.hidden_size)
        table[f"embedding{end}.kernel"] = reshaped(f"{ours}/linear/kernel", *kernel)
        table[f"embedding{end}.bias"] = f"{ours}/linear/bias"
        table["cls" + ("" if len(c.modality_fusion) == 1 else _end(c, name, ""))] = reshaped(
            f"{ours}/special", 1, 1, c.hidden_size
        )
        places = getattr(c, f"{name}_tokens") + more
        table[f"Transformer.posembed_input{end}.pos_embedding"] = reshaped(f"{ours}/position", 1, places, c.hidden_size)
        owner, end = ("shared", "") if c.share_encoder else (name, end)
        exchange = "stack/layers/block" if c.share_encoder and not c.use_bottleneck else f"layers/{owner}"
        table |= layers(f"Transformer.encoderblock_{{}}{end}", f"stages_0/{owner}/layers/block", _layer(c, "self"))
        later = f"Transformer.encoderblock_{{{apart}+1}}{end}"
        table |= layers(later, f"stages_1/{exchange}", _layer(c, "both" if crossing else "self"))
    for leaf in ("scale", "bias"):
        table[f"Transformer.encoder_norm.{leaf}"] = f"stages_2/shared_norm/{leaf}"
    for leaf in ("kernel", "bias"):
        table[f"output_projection.{leaf}"] = f"heads_classification/classifier/{leaf}"
    return table


def _infer(c: MBTConfig, shapes: Mapping[str, tuple[int, ...]]) -> MBTConfig:
    found = {}
    for name in c.modality_fusion:
        end = _end(c, name)
        places, kernel = shapes.get(f"Transformer.posembed_input{end}.pos_embedding"), shapes.get(f"embedding{end}.kernel")
        if places is not None and kernel is not None:
            found |= {f"{name}_tokens": places[1] - (c.classifier == "token"), f"{name}_channels": kernel[-2]}
    return dataclasses.replace(c, **found)


def _frames(c: MBTConfig, video: Any) -> Any:
    """Where patches are flat, some frames, evenly spaced."""
    if c.temporal_encoding_method == "3d_conv":
        return cut(video, _patch(c, "rgb"))
    count, step = video.shape[1], 1.0
    if c.n_sampled_frames < count:
        step = count / (c.n_sampled_frames + 1)
    at = np.minimum(np.round(np.arange(0 if step == 1 else step, count, step)).astype(int), count - 1)
    return cut(video[:, at], (1, *_patch(c, "rgb")))


def _forward(run: Runner, c: MBTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`rgb (B, T, H, W, C)` and `spectrogram (B, H, W, C)`, as scenic takes them."""
    batch = {}
    for name in c.modality_fusion:
        batch[name] = _frames(c, inputs[name]) if name == "rgb" else cut(inputs[name], _patch(c, name))
    r = run(batch)
    tokens = {name: stream.values for name, stream in r.out.streams.items()}
    joined = jnp.concatenate(list(tokens.values()), 1)
    return {
        "logits": r.out.logits.get("classification"),
        "preclassifier": joined,
        "prelogits": {**r.out.pooled} if c.classifier == "token" else joined.mean(1),
        **{f"{name}_hidden_states": _states(r, c, name) for name in tokens},
    }


def _states(r: Run, c: MBTConfig, name: str) -> tuple[Any, ...]:
    """Those of one modality; of layers that all go through together, its part of all tokens."""
    later = r.after("stages_1", name)
    if c.share_encoder and not c.use_bottleneck:
        ends = np.cumsum([tokens.length for tokens in r.out.streams.values()])
        which = list(r.out.streams).index(name)
        later = [jnp.split(x, ends[:-1], 1)[which] for x in later]
    return (*r.states("stages_0", name), *later)


FAMILIES = (
    Family(
        "mbt",
        MBTConfig,
        _build,
        _table,
        _forward,
        names={
            "mbt-base-audioset": {
                "classifier": "token",
                "modality_fusion": ("spectrogram", "rgb"),
                "fusion_layer": 8,
                "use_bottleneck": True,
            },
        },
        heads={"classification": "output_projection"},
        infer=_infer,
        known=(r"^bottleneck$",),
    ),
)
