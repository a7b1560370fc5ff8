"""Gemma (arXiv 2403.08295): Llama's decoder with norms of 1 + weight, scaled embeddings, gated tanh GELU, tied scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.layers import BlockConfig
from mmx.model import MultimodalTransformer
from mmx.zoo import llama
from mmx.zoo.config import activation, only, sized
from mmx.zoo.family import Family, Generation, Runner
from mmx.zoo.weights import Table


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """The published fields of Gemma."""

    model_type: str = "gemma"
    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None  # goes before hidden_act
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_parameters: llama.Rotary = llama.Rotary()
    rope_theta: float | None = None  # older configurations have it here
    rope_scaling: Any = None
    tie_word_embeddings: bool = True
    use_bidirectional_attention: bool | None = None
    eos_token_id: int | tuple | None = 1
    pad_token_id: int | None = 0


def block(c: GemmaConfig, dtype: str) -> BlockConfig:
    """The block of the decoder."""
    only(c, model_type="gemma")
    return llama.block(c, dtype, norm_kind="rms_offset", activation=activation(c.hidden_activation or c.hidden_act))


def _build(c: GemmaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, use_bidirectional_attention=(None, False))
    return llama.text_build(c, heads, block(c, dtype), c.hidden_size**0.5)


def _table(c: GemmaConfig) -> Table:
    return {**llama.text_table("model", "stages_0"), "lm_head": "heads_captioning/decoder"}


def _forward(run: Runner, c: GemmaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return llama.text_fields(run({"text": llama.read_text(inputs)}), inputs)


TEXTS = dataclasses.replace(llama.TEXTS, begin="<bos>", pad="<pad>")
FAMILIES = (
    Family(
        "gemma",
        GemmaConfig,
        _build,
        _table,
        _forward,
        names={"gemma-2b": sized(18, 2048, 8, 16384, num_key_value_heads=1), "gemma-7b": {}},
        heads={"captioning": "model."},
        prefix="model",
        texts=TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"),
        generation=Generation(),
    ),
)
