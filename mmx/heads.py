"""What turns streams into answers: poolers, projections into the shared space, classifiers, tied decoders.

A head is called as `head(streams, pooled, modalities)`; it returns None where what it reads is absent from the batch.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """Into the shared space: `(B, D) -> (B, E)`, unit length, float32. An absent modality gives zeros."""

    size: int
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        x = nn.Dense(self.size, use_bias=False, dtype=self.dtype, name="projection")(pooled).astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


class Classifier(nn.Module):
    """A class for the whole example, from the mean of its streams: `(B, classes)` float32."""

    classes: int
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]) -> jax.Array:
        present = jnp.stack([tokens.present for tokens in streams.values()], 1)[..., None]  # (B, M, 1)
        each = jnp.stack([pooled[name] for name in streams], 1)  # (B, M, D)
        x = (each * present.astype(each.dtype)).sum(1) / jnp.maximum(present.sum(1), 1).astype(each.dtype)
        x = jnp.tanh(nn.Dense(x.shape[-1], dtype=self.dtype, name="transform")(x))
        return nn.Dense(self.classes, dtype=self.dtype, name="classifier")(x).astype(jnp.float32)


class TiedDecoder(nn.Module):
    """Scores of the next id at every token of a modality of ids, with its embedding as the matrix: `(B, L, V)` float32."""

    modality: str
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> jax.Array | None:
        ids: Any = modalities[self.modality]
        name = stream_of(streams, self.modality)
        if name is None:
            return None
        first = len(streams[name].special)
        x = streams[name].values[:, first : first + ids.length]  # a fused stream may be longer than the text in it
        x = nn.Dense(ids.width, dtype=self.dtype, name="transform")(x)
        bias = self.param("decoder_bias", nn.initializers.zeros, (ids.vocab,))
        return ids.decode(x) + bias
