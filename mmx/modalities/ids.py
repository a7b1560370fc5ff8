"""Discrete tokens: words, codes, anything with a number. Survey table 1: "word, learned embedding"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.modalities.masking import hide, token_mask, unmask
from mmx.types import Masked, Tokens


class Ids(nn.Module):
    """Token ids `(B, L)` int -> Tokens `(B, L, D)`: a learned embedding plus a learned position.

    Args:
        vocab: number of different ids, V.
        length: the longest sequence, L; shorter ones are welcome.
        width: size of a token, D; None: the model's.
    """

    vocab: int
    length: int
    width: int | None = None
    dtype: Any = "float32"

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.token = nn.Embed(self.vocab, self.width or 0, dtype=self.dtype, embedding_init=init)
        self.position = self.param("position", init, (self.length, self.width))

    def __call__(self, raw: Any) -> Tokens:
        ids, mask = unmask(raw)
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"{self.name}: expected integer ids of shape (B, L), got {ids.dtype} {ids.shape}")
        if ids.shape[1] > self.length:
            raise InputError(f"{self.name}: {ids.shape[1]} tokens, but length={self.length}; truncate, or build a longer model")
        values = self.token(ids) + self.position[: ids.shape[1]].astype(self.dtype)  # (B, L, D)
        mask = token_mask(mask, ids.shape)
        return Tokens(hide(values, mask), mask)

    def decode(self, x: jax.Array) -> jax.Array:
        """Scores of every id with the embedding as the matrix (tied weights): `(B, L, D) -> (B, L, V)` float32."""
        table = self.token.embedding.astype(x.dtype)
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.length)
        return Masked(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
