"""The encoder in which ALBEF's text and image meet (arXiv 2107.07651): BERT with cross-attention in every layer.

It reads tokens that other networks embedded; post-norm, erf GELU, eps 1e-12.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Pooler
from mmx.modalities import Features
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Cross
from mmx.zoo.config import activation
from mmx.zoo.family import Family, Runner, padded_features
from mmx.zoo.weights import Table, layers

TEXT, IMAGE = 512, 1024  # most tokens; no parameter depends on them
LAYER: Table = {
    **{f"attention.{n}": f"self/{n}" for n in ("query", "key", "value")},
    "attention.output": "self/out",
    "attention_layernorm": "self_norm",
    **{f"cross_attention.{n}": f"cross/{n}" for n in ("query", "key", "value")},
    "cross_attention.output": "cross/out",
    "cross_attention_layernorm": "cross_norm",
    "feedforward.model.0": "mlp/up",
    "feedforward.model.2": "mlp/down",
    "feedforward_layernorm": "mlp_norm",
}


@dataclasses.dataclass(frozen=True)
class ALBEFConfig:
    """The arguments of torchmultimodal's ALBEFMultimodalEncoder."""

    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    transform_act_fn: str = "gelu"


def _build(c: ALBEFConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    return build_model(
        {
            "text": Features(c.hidden_size, TEXT, linear=False),
            "image": Features(c.hidden_size, IMAGE, linear=False),
        },
        (Cross(c.num_hidden_layers, sublayers="self cross mlp", steps=("text",)),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        mlp=c.intermediate_size,
        activation=activation(c.transform_act_fn, "transform_act_fn"),
        norm="post",
        eps=c.layer_norm_eps,
        embed=0,
        poolers={"text": Pooler("first")},
        dtype=dtype,
    )


def _table(c: ALBEFConfig) -> Table:
    return layers("layer.{}", "stages_0/layers/text", LAYER)


def _forward(run: Runner, c: ALBEFConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run(
        {
            "text": padded_features(inputs["hidden_states"], inputs.get("attention_mask")),
            "image": padded_features(inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask")),
        }
    )
    return {
        "last_hidden_state": r.out.streams["text"].values,
        "hidden_states": tuple(r.states("stages_0", "text")),
        "layer_output": tuple(r.after("stages_0", "text")),
    }


FAMILIES = (Family("albef", ALBEFConfig, _build, _table, _forward, names={"albef-multimodal-encoder": {}}),)
