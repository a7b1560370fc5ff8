"""The Q-Former of BLIP-2 (arXiv 2301.12597): queries and a text with one self-attention; queries alone read the image.

Cross-attention in every n-th layer, an MLP for the queries and one for the text; BERT's post-norm, erf GELU, eps 1e-12. It
reads tokens that are embedded already, and puts one norm in front.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Pooler
from mmx.layers import BlockConfig
from mmx.modalities import Features
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Cross, Stage
from mmx.zoo import bert
from mmx.zoo.albef import IMAGE, TEXT
from mmx.zoo.config import Layers, only
from mmx.zoo.family import Family, Run, Runner, padded_features
from mmx.zoo.weights import Table, layers

QUERIES = 512  # most of them; no parameter depends on it


@dataclasses.dataclass(frozen=True)
class Blip2QFormerConfig(Layers):
    """The published fields of the Q-Former; those of words and places are of the model around it."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = False


def _groups(c: Blip2QFormerConfig) -> list[tuple[int, int]]:
    """Layers from one that reads to the next are one layer of ours: (how many of ours, how many published ones each)."""
    every = c.cross_attention_frequency
    count, rest = divmod(c.num_hidden_layers, every)
    return [group for group in ((count, every), (1, rest)) if all(group)]


def _build(c: Blip2QFormerConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, position_embedding_type="absolute")
    embedders = {
        "query": Features(c.hidden_size, QUERIES, linear=False),
        "text": Features(c.hidden_size, TEXT, linear=False),
        "image": Features(c.encoder_hidden_size, IMAGE, linear=False, width=c.encoder_hidden_size),
    }
    if not c.use_qformer_text_input:
        del embedders["text"]
    tokens = tuple(name for name in embedders if name != "image")
    block = BlockConfig(width=c.hidden_size, skip=True, dtype=dtype, **bert.block(c))
    stages: list[Stage] = [Adapt(tokens, norm=c.layer_norm_eps, share=True)]
    for depth, size in _groups(c):
        stages.append(
            Cross(
                depth,
                block,
                "self cross mlp" + " self mlp" * (size - 1),
                edges={"query": ("image",)},
                steps=tokens,
                share=("self",),
                together=tokens,
            )
        )
    return build_model(
        embedders,
        tuple(stages),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        embed=0,
        poolers={name: Pooler("first") for name in tokens},
        dtype=dtype,
    )


def _layer(which: int) -> Table:
    """The weights of one published layer, `which` of its group."""
    end = f"_{which}" if which else ""
    table: dict[str, Any] = {f"attention.attention.{n}": f"shared/self{end}/{n}" for n in ("query", "key", "value")}
    table |= {"attention.output.dense": f"shared/self{end}/out", "attention.output.LayerNorm": f"shared/self{end}_norm"}
    if which == 0:
        table |= {f"crossattention.attention.{n}": f"query/cross/{n}" for n in ("query", "key", "value")}
        table |= {"crossattention.output.dense": "query/cross/out", "crossattention.output.LayerNorm": "query/cross_norm"}
    for stream, published in (("query", "_query"), ("text", "")):
        table |= {
            f"intermediate{published}.dense": f"{stream}/mlp{end}/up",
            f"output{published}.dense": f"{stream}/mlp{end}/down",
            f"output{published}.LayerNorm": f"{stream}/mlp{end}_norm",
        }
    return table


def _table(c: Blip2QFormerConfig) -> Table:
    table: dict[str, Any] = {"layernorm": "stages_0/shared_norm"}
    done = 0
    for stage, (depth, size) in enumerate(_groups(c), 1):
        for which in range(size):
            table |= layers(f"encoder.layer.{{{done + which}+{size}}}", f"stages_{stage}/layers", _layer(which))
        done += depth * size
    return table


def _states(r: Run, c: Blip2QFormerConfig, stream: str) -> list[Any]:
    """The states of a stream before the first published layer, and after each."""
    found = [r.intermediates["stages_0"]["states"][stream]]
    for stage, (depth, size) in enumerate(_groups(c), 1):
        left = r.intermediates[f"stages_{stage}"]["layers"]
        between = left["between"] if size > 1 else [left["states"]]
        found += [states[stream][layer] for layer in range(depth) for states in between]
    return found


def _forward(run: Runner, c: Blip2QFormerConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    given, mask = inputs["query_embeds"], inputs.get("attention_mask")
    count = inputs.get("query_length", given.shape[1])
    parts = {"query": slice(0, count), "text": slice(count, None)}
    parts = {name: part for name, part in parts.items() if given[:, part].shape[1]}
    batch = {name: padded_features(given[:, part], None if mask is None else mask[:, part]) for name, part in parts.items()}
    if "encoder_hidden_states" in inputs:
        batch["image"] = padded_features(inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask"))
    r = run(batch)
    states = [_states(r, c, name) for name in parts]
    joined = tuple(jnp.concatenate(each, 1) for each in zip(*states, strict=True))
    return {"last_hidden_state": joined[-1], "pooler_output": joined[-1][:, 0], "hidden_states": joined}


FAMILIES = (
    Family(
        "blip_2_qformer",
        Blip2QFormerConfig,
        _build,
        _table,
        _forward,
        names={"blip2-qformer": {}, "blip2-itm-vit-g-qformer": {"use_qformer_text_input": True}},
    ),
)
