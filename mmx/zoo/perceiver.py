"""Perceiver (arXiv 2103.03206) and Perceiver IO (2107.14795): a few latent tokens read all others. Pre-norm, eps 1e-5 always."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import TiedDecoder
from mmx.layers import BlockConfig
from mmx.modalities import Features, Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Latent
from mmx.types import Masked
from mmx.zoo.config import activation, only
from mmx.zoo.family import Family, Runner, padded
from mmx.zoo.loss import token_loss
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers

ANY_LENGTH = 2**16  # of features, which have no positions
DECODER_HEADS, DECODER_KEYS = 8, 256  # of masked language models, whatever the configuration says


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """The published fields of Perceiver; those of its preprocessors for images, sound and flow are known and not read."""

    num_latents: int = 256
    d_latents: int = 1280
    d_model: int = 768
    num_blocks: int = 1
    num_self_attends_per_block: int = 26
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    qk_channels: int | None = None
    v_channels: int | None = None
    cross_attention_shape_for_attention: str = "kv"
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12  # no norm reads it
    use_query_residual: bool = True
    vocab_size: int = 262
    max_position_embeddings: int = 2048
    image_size: int = 56  # these of preprocessors that are not here
    num_frames: int = 16


def _block(c: PerceiverConfig, width: int, heads: int, keys: int, values: int, widening: int, **more: Any) -> BlockConfig:
    for name, size in (("queries and keys", keys), ("values", values)):
        if size % heads:
            raise InputError(f"PerceiverConfig: {name} are {size} wide, which is not a multiple of {heads} heads")
    return BlockConfig(
        width=width,
        heads=heads,
        head_size=keys // heads,
        value_size=values // heads,
        mlp=widening * width,
        activation=activation(c.hidden_act),
        eps=1e-5,
        final_norm=False,
        **more,
    )


def _build(c: PerceiverConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, cross_attention_shape_for_attention=("kv", "q"))
    keys = c.qk_channels or c.d_latents
    if (c.v_channels or keys) != c.d_latents:
        raise InputError(
            f"PerceiverConfig: values are {c.v_channels or keys} wide and latent tokens {c.d_latents}; they are equal"
        )
    across = c.qk_channels or (c.d_model if c.cross_attention_shape_for_attention == "kv" else c.d_latents)
    writes = "masked-lm" in heads
    modality = Ids(c.vocab_size, c.max_position_embeddings, width=c.d_model)
    raw = Features(c.d_model, ANY_LENGTH, width=c.d_model, linear=False)
    stage = Latent(
        c.num_self_attends_per_block,
        c.num_latents,
        _block(c, c.d_latents, c.num_self_attention_heads, keys, c.d_latents, c.self_attention_widening_factor),
        read=_block(
            c,
            c.d_latents,
            c.num_cross_attention_heads,
            across,
            c.v_channels or across,
            c.cross_attention_widening_factor,
            context_norm="own",
            cross_residual=c.use_query_residual,
        ),
        answer=_block(c, c.d_model, DECODER_HEADS, DECODER_KEYS, c.d_model, 1, context_norm="own", cross_residual=False)
        if writes
        else None,
        blocks=c.num_blocks,
        queries={"text": c.max_position_embeddings} if writes else {},
    )
    return build_model(
        {"text": modality} if writes else {"inputs": raw},
        (stage,),
        width=c.d_latents,
        heads=c.num_self_attention_heads,
        embed=0,
        outputs={"masked-lm": TiedDecoder("text", transform=False)} if writes else {},
        dtype=dtype,
    )


def _layer(kind: str) -> Table:
    return {
        "attention.self.layernorm1": f"{kind}_norm",
        "attention.self.layernorm2": f"{kind}_context_norm",
        **{f"attention.self.{name}": f"{kind}/{name}" for name in ("query", "key", "value")},
        "attention.output.dense": f"{kind}/out",
        "layernorm": "mlp_norm",
        "mlp.dense1": "mlp/up",
        "mlp.dense2": "mlp/down",
    }


def _table(c: PerceiverConfig) -> Table:
    return {
        "perceiver.embeddings.latents": "stages_0/token",
        **layers("perceiver.encoder.cross_attention", "stages_0/read", _layer("cross")),
        **layers("perceiver.encoder.self_attends.{}", "stages_0/stack/layers/block", _layer("self")),
        "perceiver.input_preprocessor.embeddings": "modalities_text/token",
        "perceiver.input_preprocessor.position_embeddings.weight": "modalities_text/position",
        "perceiver.decoder.output_position_encodings.position_embeddings": "stages_0/text_query",
        **layers("perceiver.decoder.decoding_cross_attention", "stages_0/answer", _layer("cross")),
        "embedding_decoder.bias": "heads_masked-lm/decoder_bias",
    }


def _forward(run: Runner, c: PerceiverConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    given, mask = inputs["inputs"], inputs.get("attention_mask")
    if jnp.issubdtype(given.dtype, jnp.integer):
        r = run({"text": padded(given, mask)})
    else:
        r = run({"inputs": given if mask is None else Masked(given, mask != 0, keep=True)})
    own = r.intermediates["stages_0"]
    layers = own["stack"]["layers"]["states"]
    state, states = own["states"], []
    for block in layers.reshape(c.num_blocks, -1, *layers.shape[-3:]):  # each begins with what the one before it left
        states += [state, *block]
        state = block[-1]
    logits = r.out.logits.get("masked-lm")
    return {
        "loss": token_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["latent"].values,
        "hidden_states": tuple(states),
    }


FAMILIES = (
    Family(
        "perceiver",
        PerceiverConfig,
        _build,
        _table,
        _forward,
        names={"language-perceiver": {"qk_channels": 256, "v_channels": 1280}},
        heads={"masked-lm": "embedding_decoder"},
        prefix="perceiver",
        texts=Texts("[CLS]", "[SEP]", bytes=("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")),
        length=lambda c: c.max_position_embeddings,
        inputs={"inputs": "input_ids", "attention_mask": "attention_mask"},
        known=(r"^perceiver\.(input_preprocessor|decoder)\.",),
    ),
)
