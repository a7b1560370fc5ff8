"""What turns streams into answers: poolers, projections into the shared space, classifiers, tied decoders.

A head is called as `head(streams, pooled, modalities)`; it returns None where what it reads is absent from the batch.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.layers import ACTIVATIONS, make_norm
from mmx.modalities.masking import unmask
from mmx.topologies import FUSED
from mmx.types import Streams, Tokens


def mean_pool(tokens: Tokens) -> jax.Array:
    """The mean over the tokens that exist, `(B, L, D) -> (B, D)`; zeros where none does."""
    if tokens.mask is None:
        return tokens.values.mean(1)
    mask = tokens.mask[..., None].astype(tokens.values.dtype)
    return (tokens.values * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def stream_of(streams: Streams, modality: str) -> str | None:
    """The stream that carries a modality: its own, or the one it was summed into; None where it is absent."""
    return next((name for name in (modality, FUSED) if name in streams), None)


class Projection(nn.Module):
    """Into the shared space: `(B, D) -> (B, E)`, unit length, float32. An absent modality gives zeros.

    Without a size the vector is taken as it is (SigLIP).
    """

    size: int | None
    bias: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        x = pooled
        if self.size is not None:
            x = nn.Dense(self.size, use_bias=self.bias, dtype=self.dtype, name="projection")(x)
        x = x.astype(jnp.float32)
        self.sow("intermediates", "features", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


class Pooler(nn.Module):
    """One vector of a stream: `(B, L, D) -> (B, D')`.

    Args:
        token: which token it is: "first" (a class token), "last", or "end" (the first one with the id `end`, or, if that is
            None, with the highest id, as in OpenAI's CLIP); or "mean", of the tokens that exist; or "special", the mean of the
            learned ones in front (AST).
        end: the id of the end of a text.
        norm: eps of a LayerNorm on it; None: no norm.
        size: of a dense layer behind it; None: no dense layer.
        activation: behind the dense layer; None: none.
    """

    token: str = "first"
    end: int | None = None
    norm: float | None = None
    size: int | None = None
    activation: str | None = None
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, tokens: Tokens, raw: Any) -> jax.Array:
        x = self._choose(tokens, raw)
        if self.norm is not None:
            x = make_norm("layer", self.norm, self.dtype, "norm")(x)
        if self.size is not None:
            x = nn.Dense(self.size, dtype=self.dtype, name="transform")(x)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def _choose(self, tokens: Tokens, raw: Any) -> jax.Array:
        if self.token == "mean":
            return mean_pool(tokens)
        if self.token == "special":
            return tokens.values[:, : len(tokens.special)].mean(1)
        if self.token in ("first", "last"):
            return tokens.values[:, 0 if self.token == "first" else -1]
        if self.token != "end":
            raise InputError("pooler: " + unknown("token", self.token, ("first", "last", "end", "mean", "special")))
        raw, _ = unmask(raw)
        ids = raw["ids"] if isinstance(raw, Mapping) else raw
        at = (ids if self.end is None else ids == self.end).argmax(-1)  # the first of the highest
        return jnp.take_along_axis(tokens.values, at[:, None, None], 1)[:, 0]


class Classifier(nn.Module):
    """A class for the whole example: `(B, classes)` float32.

    Args:
        classes: how many.
        stream: whose vector is read; None: the mean of all that are there.
        transform: whether a dense layer with tanh stands before the last one.
        norm: eps of a LayerNorm before the last one (AST); None: no norm.
    """

    classes: int
    stream: str | None = None
    transform: bool = True
    norm: float | None = None
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> jax.Array | None:
        if self.stream is not None and self.stream not in pooled:
            return None
        x = self._mean(streams, pooled) if self.stream is None else pooled[self.stream]
        if self.transform:
            x = jnp.tanh(nn.Dense(x.shape[-1], dtype=self.dtype, name="transform")(x))
        if self.norm is not None:
            x = make_norm("layer", self.norm, self.dtype, "norm")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="classifier")(x).astype(jnp.float32)

    def _mean(self, streams: Streams, pooled: Mapping[str, jax.Array]) -> jax.Array:
        present = jnp.stack([tokens.present for tokens in streams.values()], 1)[..., None]  # (B, M, 1)
        each = jnp.stack([pooled[name] for name in streams], 1)  # (B, M, D)
        return (each * present.astype(each.dtype)).sum(1) / jnp.maximum(present.sum(1), 1).astype(each.dtype)


class TiedDecoder(nn.Module):
    """Scores of ids at every token of a modality of ids, with its embedding as the matrix or one of its own: `(B, L, V)` float32.

    Args:
        modality: whose ids.
        own: whether the matrix is one of its own (Llama, T5 1.1) and not the embedding.
        scale: factor of the states before the matrix (T5: 1 / sqrt(D)).
        transform: whether a dense layer stands before the matrix.
        activation: behind that dense layer; None: none.
        norm: eps of a LayerNorm behind it (BERT); None: no norm.
        bias: whether every id has a number of its own added to its scores.
    """

    modality: str
    transform: bool = True
    activation: str | None = None
    norm: float | None = None
    bias: bool = True
    dtype: Any = "float32"
    own: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> jax.Array | None:
        ids: Any = modalities[self.modality]
        name = stream_of(streams, self.modality)
        if name is None:
            return None
        first = len(streams[name].special)
        last = first + ids.length if name == FUSED else None  # a fused stream may be longer than the text in it
        x = streams[name].values[:, first:last]
        if self.transform:
            x = nn.Dense(ids.width, dtype=self.dtype, name="transform")(x)
            x = x if self.activation is None else ACTIVATIONS[self.activation](x)
        if self.norm is not None:
            x = make_norm("layer", self.norm, self.dtype, "norm")(x)
        x = x if self.scale == 1 else x * self.scale
        if self.own:
            logits = nn.Dense(ids.vocab, use_bias=False, dtype=self.dtype, name="decoder")(x).astype(jnp.float32)
        else:
            logits = ids.decode(x)
        return logits + self.param("decoder_bias", nn.initializers.zeros, (ids.vocab,)) if self.bias else logits
