"""TAPAS (arXiv 2004.02349): BERT that reads a question and a table; seven numbers by token say where in it the token stands."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmx.model import MultimodalTransformer
from mmx.zoo import bert
from mmx.zoo.config import only, sized
from mmx.zoo.family import Family, Runner, padded, told_by_pooler
from mmx.zoo.weights import Table

COLUMN, ROW = 1, 2  # which of the numbers of a token


@dataclasses.dataclass(frozen=True)
class TapasConfig(bert.BertConfig):
    """The published fields of TAPAS: BERT's, and the sizes of its tables: segment, column, row, whether it was an answer
    before, the column's rank, that rank from behind, how its number compares with the question's."""

    max_position_embeddings: int = 1024
    type_vocab_sizes: tuple = (3, 256, 256, 2, 256, 256, 10)
    reset_position_index_per_cell: bool = True
    add_cross_attention: bool = False


def _build(c: TapasConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, add_cross_attention=False)
    tables = {f"type_{i}": size for i, size in enumerate(c.type_vocab_sizes)}
    return bert.assemble(c, dataclasses.replace(bert.text_embedder(c), tables=tables), heads, dtype)


def _table(c: TapasConfig) -> Table:
    table = dict(bert.encoder_table("tapas", c.tie_word_embeddings))
    del table["tapas.embeddings.token_type_embeddings"]
    types = range(len(c.type_vocab_sizes))
    return {**table, **{f"tapas.embeddings.token_type_embeddings_{i}": f"modalities_text/type_{i}" for i in types}}


def places_in_cells(types: jax.Array, most: int) -> jax.Array:
    """How far each token stands behind the first one of its cell `(B, L)`, at most `most`; `types (B, L, 7)`."""
    column, row = types[..., COLUMN], types[..., ROW]
    same = (column[:, :, None] == column[:, None]) & (row[:, :, None] == row[:, None])  # (B, L, L)
    return jnp.minimum(jnp.arange(types.shape[1]) - same.argmax(-1), most)


def _forward(run: Runner, c: TapasConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    types = inputs.get("token_type_ids", jnp.zeros((*ids.shape, len(c.type_vocab_sizes)), jnp.int32))
    beside = {f"type_{i}": types[..., i] for i in range(types.shape[-1])}
    if "position_ids" in inputs:
        beside["place"] = jnp.broadcast_to(inputs["position_ids"], ids.shape)
    elif c.reset_position_index_per_cell:
        beside["place"] = places_in_cells(types, c.max_position_embeddings - 1)
    return bert.masked_lm_fields(c, run({"text": padded(ids, inputs.get("attention_mask"), **beside)}), inputs)


FAMILIES = (
    Family(
        "tapas",
        TapasConfig,
        _build,
        _table,
        _forward,
        names={
            "tapas-tiny": sized(2, 128, 2),
            "tapas-mini": sized(4, 256, 4),
            "tapas-small": sized(4, 512, 8),
            "tapas-medium": sized(8, 512, 8),
            "tapas-base": {},
            "tapas-large": sized(24, 1024, 16),
        },
        heads={"masked-lm": "cls.predictions"},
        prefix="tapas",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=bert.KNOWN,
        infer=told_by_pooler,
    ),
)
