"""Llama (arXiv 2302.13971, 2307.09288): a causal text, pre-norm, RMS norms, rotary positions, gated SiLU, no biases."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Pooler, TiedDecoder
from mmx.layers import PROJECTIONS, BlockConfig
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.config import activation, only, sized
from mmx.zoo.family import Family, Generation, Run, Runner, padded
from mmx.zoo.loss import token_loss
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers

LAYER: Table = {  # of every model that copied Llama's
    "self_attn.q_proj": "self/query",
    "self_attn.k_proj": "self/key",
    "self_attn.v_proj": "self/value",
    "self_attn.o_proj": "self/out",
    "input_layernorm": "self_norm",
    "mlp.gate_proj": "mlp/up",  # the activation is behind it
    "mlp.up_proj": "mlp/gate",
    "mlp.down_proj": "mlp/down",
    "post_attention_layernorm": "mlp_norm",
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The published fields of rotary positions."""

    rope_theta: float = 10000.0
    rope_type: str = "default"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The published fields of Llama."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: Rotary = Rotary()
    rope_theta: float | None = None  # older configurations have it here
    rope_scaling: Any = None
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple | None = 2
    pad_token_id: int | None = None


def block(c: Any, dtype: str, **more: Any) -> BlockConfig:
    """The block of a decoder with Llama's fields."""
    only(c, rope_scaling=None)
    only(c.rope_parameters, rope_type="default")
    return BlockConfig(
        width=c.hidden_size,
        heads=c.num_attention_heads,
        head_size=c.head_dim,
        kv_heads=c.num_key_value_heads,
        mlp=c.intermediate_size,
        gated=True,
        blind=True,
        eps=c.rms_norm_eps,
        attention_bias=PROJECTIONS if c.attention_bias else (),
        rotary=float(c.rope_theta or c.rope_parameters.rope_theta),
        dtype=dtype,
        **{"activation": activation(c.hidden_act), "norm_kind": "rms", "bias": getattr(c, "mlp_bias", False), **more},
    )


def text_embedder(c: Any, scale: float = 1.0) -> Ids:
    """Words without positions."""
    return Ids(c.vocab_size, c.max_position_embeddings, width=c.hidden_size, position="none", scale=scale)


def decoder(tied: bool) -> TiedDecoder:
    """The scores of the next word."""
    return TiedDecoder("text", transform=False, bias=False, own=not tied)


def text_table(model: str, stage: str) -> Table:
    """The weights of the decoder in `stage`, without its head."""
    return {
        f"{model}.embed_tokens": "modalities_text/token",
        **layers(f"{model}.layers.{{}}", f"{stage}/text/layers/block", LAYER),
        f"{model}.norm": f"{stage}/text/norm",
    }


def read_text(inputs: Mapping[str, Any], **beside: Any) -> Any:
    """`input_ids`, `attention_mask`, `position_ids` as a raw value; `beside` it what else is told of each token."""
    if "position_ids" in inputs:
        beside["place"] = jnp.broadcast_to(inputs["position_ids"], inputs["input_ids"].shape)
    return padded(inputs["input_ids"], inputs.get("attention_mask"), **beside)


def text_fields(r: Run, inputs: Mapping[str, Any], stage: str = "stages_0", entered: Any = None) -> dict[str, Any]:
    """The published outputs of a decoder; the last of its hidden states is behind the norm, the first what `entered`."""
    logits, last = r.out.logits.get("captioning"), r.out.streams["text"].values
    first, *states = r.states(stage, "text")
    return {
        "loss": token_loss(logits[:, :-1], inputs["labels"][:, 1:]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": last,
        "hidden_states": (first if entered is None else entered, *states[:-1], last),
    }


def text_build(c: Any, heads: Sequence[str], block: BlockConfig, scale: float = 1.0) -> MultimodalTransformer:
    """A decoder alone."""
    return build_model(
        {"text": text_embedder(c, scale)},
        (PerStream(c.num_hidden_layers, block, causal=("text",)),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        head_size=block.head_size,
        embed=0,
        poolers={"text": Pooler("last")},
        outputs={"captioning": decoder(c.tie_word_embeddings)} if "captioning" in heads else {},
        dtype=block.dtype,
    )


def _build(c: LlamaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, model_type="llama")
    return text_build(c, heads, block(c, dtype))


def _table(c: LlamaConfig) -> Table:
    return {**text_table("model", "stages_0"), "lm_head": "heads_captioning/decoder"}


def _forward(run: Runner, c: LlamaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return text_fields(run({"text": read_text(inputs)}), inputs)


_TWO = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
TEXTS = Texts("<s>", pad="</s>", unknown="<unk>", left=True)
FAMILIES = (
    Family(
        "llama",
        LlamaConfig,
        _build,
        _table,
        _forward,
        names={
            "llama-7b": {},
            "llama-13b": sized(40, 5120, 40, 13824),
            "llama-30b": sized(60, 6656, 52, 17920),
            "llama-65b": sized(80, 8192, 64, 22016),
            "Llama-2-7b-hf": _TWO,
            "Llama-2-13b-hf": sized(40, 5120, 40, 13824, **_TWO),
            "Llama-2-70b-hf": sized(80, 8192, 64, 28672, num_key_value_heads=8, **_TWO),
            "Meta-Llama-3-8B": sized(
                32,
                4096,
                32,
                14336,
                num_key_value_heads=8,
                vocab_size=128256,
                max_position_embeddings=8192,
                rms_norm_eps=1e-5,
                rope_theta=500000.0,
            ),
            "TinyLlama-1.1B": sized(22, 2048, 32, 5632, num_key_value_heads=4, **_TWO | {"max_position_embeddings": 2048}),
        },
        heads={"captioning": "model."},
        prefix="model",
        texts=TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"),
        generation=Generation(),
    ),
)
