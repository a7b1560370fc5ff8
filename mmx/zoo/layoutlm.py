"""LayoutLM (arXiv 1912.13318): BERT whose words also say where on the page they stand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.model import MultimodalTransformer
from mmx.types import Masked
from mmx.zoo import bert
from mmx.zoo.config import sized
from mmx.zoo.family import Family, Runner, told_by_pooler
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table


@dataclasses.dataclass(frozen=True)
class LayoutLMConfig(bert.BertConfig):
    """The published fields of LayoutLM: BERT's, and how many places a page has along each side."""

    without_pooler: ClassVar[tuple[str, ...]] = ()
    max_2d_position_embeddings: int = 1024


def _build(c: LayoutLMConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    sides = dict.fromkeys(("x", "y", "box_height", "box_width"), c.max_2d_position_embeddings)
    embedder = bert.text_embedder(c)
    return bert.assemble(c, dataclasses.replace(embedder, tables={**embedder.tables, **sides}), heads, dtype)


def _table(c: LayoutLMConfig) -> Table:
    sides = {"x": "x", "y": "y", "h": "box_height", "w": "box_width"}
    return {
        **bert.encoder_table("layoutlm", c.tie_word_embeddings),
        **{f"layoutlm.embeddings.{name}_position_embeddings": f"modalities_text/{ours}" for name, ours in sides.items()},
    }


def _forward(run: Runner, c: LayoutLMConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    text = bert.read_text(inputs)
    box = inputs.get("bbox", jnp.zeros((*inputs["input_ids"].shape, 4), jnp.int32))
    x, y = box[..., 0::2], box[..., 1::2]  # (B, L, 2): from, to
    corners = {"x": x, "y": y, "box_width": x[..., 1] - x[..., 0], "box_height": y[..., 1] - y[..., 0]}
    r = run({"text": Masked({**text.array, **corners}, text.mask, keep=True)})
    return bert.masked_lm_fields(c, r, inputs)


FAMILIES = (
    Family(
        "layoutlm",
        LayoutLMConfig,
        _build,
        _table,
        _forward,
        names={"layoutlm-base-uncased": {}, "layoutlm-large-uncased": sized(24, 1024, 16)},
        heads={"masked-lm": "cls.predictions"},
        prefix="layoutlm",
        known=bert.KNOWN,
        infer=told_by_pooler,
        texts=Texts("[CLS]", "[SEP]", lower=True, page=1000),
        length=lambda c: c.max_position_embeddings,
    ),
)
