"""MulT (arXiv 1906.00295): each of text, sound and video reads the two others through layers of their own, then itself.

Three streams, which need not be aligned. What a stream made of the two others lies side by side in its "memory" layers. Pre-norm,
ReLU, eps 1e-5; one norm for queries and for what they read. A step whose first number is 0 counts as padding where places
are told, and is read all the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Classifier, Pooler
from mmx.layers import BlockConfig
from mmx.modalities import Features
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Cross, PerStream
from mmx.topologies.adapt import COUNTED
from mmx.zoo.config import only
from mmx.zoo.family import Family, Runner
from mmx.zoo.weights import Table, attention_table, convolution, layers

STEPS = 512  # the most a stream may have here; published ones know no limit
LETTERS = {"text": "l", "audio": "a", "video": "v"}  # our streams and the published letters
EDGES = {name: tuple(other for other in LETTERS if other != name) for name in LETTERS}


@dataclasses.dataclass(frozen=True)
class MulTConfig:
    """The published fields of MulT: those of the command line, and what its code reads off the data or has in itself."""

    orig_d_l: int = 300
    orig_d_a: int = 74
    orig_d_v: int = 35
    d_l: int = 30
    d_a: int = 30
    d_v: int = 30
    lonly: bool = True
    aonly: bool = True
    vonly: bool = True
    num_heads: int = 5
    layers: int = 5
    attn_mask: bool = True
    output_dim: int = 1

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"attn_dropout", "attn_dropout_a", "attn_dropout_v", "relu_dropout", "res_dropout", "out_dropout", "embed_dropout"}
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """The streams that read the others and are read at the end: all three or one."""
        return tuple(name for name, letter in LETTERS.items() if getattr(self, f"{letter}only"))


def _build(c: MulTConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, d_a=c.d_l, d_v=c.d_l)
    targets = c.targets
    if len(targets) not in (1, len(LETTERS)) or c.layers < 1:
        raise InputError(
            f"MulTConfig: lonly={c.lonly}, aonly={c.aonly}, vonly={c.vonly}, layers={c.layers} is not supported; all three of "
            f"them are True or one is, and there is at least one layer"
        )
    sizes = {name: getattr(c, f"orig_d_{letter}") for name, letter in LETTERS.items()}
    pairs, memory = (
        BlockConfig(
            width=width,
            heads=c.num_heads,
            activation="relu",
            eps=1e-5,
            context_norm="shared",
            dtype=dtype,
        )
        for width in (c.d_l, 2 * c.d_l)
    )
    return build_model(
        {name: Features(size, STEPS, width=c.d_l, linear=size != c.d_l, bias=False) for name, size in sizes.items()},
        (
            Adapt(scale=c.d_l**0.5, positions=COUNTED),
            Cross(
                c.layers,
                pairs,
                "cross mlp",
                edges={name: EDGES[name] for name in targets},
                original=True,
                past=c.attn_mask,
                apart=True,
            ),
            Adapt(targets, scale=(2 * c.d_l) ** 0.5, positions=COUNTED),
            PerStream(dict.fromkeys(targets, max(c.layers, 3)), memory, causal=targets if c.attn_mask else ()),
        ),
        width=c.d_l,
        heads=c.num_heads,
        embed=0,
        poolers={name: Pooler("last") for name in LETTERS},
        outputs={"output": Classifier(c.output_dim, targets, residual="relu", transform=False)} if "output" in heads else {},
        dtype=dtype,
    )


def _layer(attention: str) -> Table:
    return {
        **attention_table("self_attn", attention),
        "layer_norms.0": f"{attention}_norm",
        "fc1": "mlp/up",
        "fc2": "mlp/down",
        "layer_norms.1": "mlp_norm",
    }


def _table(c: MulTConfig) -> Table:
    table: dict[str, Any] = {
        "proj1": "heads_output/residual/up",
        "proj2": "heads_output/residual/down",
        "out_layer": "heads_output/classifier",
    }
    for name, letter in LETTERS.items():
        table[f"proj_{letter}"] = convolution(f"modalities_{name}/linear", 1)
        table |= layers(f"trans_{letter}_mem.layers.{{}}", f"stages_3/{name}/layers/block", _layer("self"))
        table[f"trans_{letter}_mem.layer_norm"] = f"stages_3/{name}/norm"
        for other in EDGES[name]:
            published, pair = f"trans_{letter}_with_{LETTERS[other]}", f"{name}_{other}"
            table |= layers(f"{published}.layers.{{}}", f"stages_1/layers/{pair}", _layer("cross"))
            table[f"{published}.layer_norm"] = f"stages_1/{pair}_norm"
    return table


def _forward(run: Runner, c: MulTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`x_l`, `x_a`, `x_v` `(B, L, size)`: the words, the sound, the video. Beside the published outputs, those of its parts."""
    r = run({name: inputs[f"x_{letter}"] for name, letter in LETTERS.items()})
    fields = {"output": r.out.logits.get("output"), "last_hs": jnp.concatenate([r.out.pooled[name] for name in c.targets], -1)}
    for name in c.targets:
        letter, joined = LETTERS[name], r.intermediates["stages_2"]["entered"][name]
        fields[f"trans_{letter}_mem"] = r.out.streams[name].values
        entered = {stage: r.intermediates[stage]["states"][name] for stage in ("stages_0", "stages_2")}
        fields[f"trans_{letter}_mem_hidden_states"] = (entered["stages_2"], *r.after("stages_3", name))
        for other, part in zip(EDGES[name], jnp.split(joined, 2, -1), strict=True):
            published = f"trans_{letter}_with_{LETTERS[other]}"
            fields[published] = part
            fields[f"{published}_hidden_states"] = (entered["stages_0"], *r.after("stages_1", f"{name}_{other}"))
    return fields


FAMILIES = (
    Family(
        "mult",
        MulTConfig,
        _build,
        _table,
        _forward,
        names={"mult-mosei": {}, "mult-iemocap": {"output_dim": 8}},
        heads={"output": "out_layer"},
        known=(  # buffers; a projection where there is none; the memory of streams that are not read; the head's first two layers
            r"\.(version|embed_positions\._float_tensor)$",
            r"^proj_[lav]\.weight$",
            r"^trans_[lav]_mem\.",
            r"^proj[12]\.",
        ),
    ),
)
