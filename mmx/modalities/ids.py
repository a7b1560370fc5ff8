"""Discrete tokens: words, codes, cells, items, anything with a number. Survey table 1: "word, learned embedding"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.modalities.embedder import INITIAL, Embedder
from mmx.modalities.masking import token_mask
from mmx.types import Masked, Tokens


class Ids(Embedder):
    """Token ids `(B, L)` int -> Tokens `(B, L, D)`: a learned embedding for each.

    Args:
        vocab: number of different ids, V.
        length: the longest sequence, L; shorter ones are welcome.
        last: whether a learned token stands behind the last id, with the position after it (CoCa, arXiv 2205.01917: a class
            token that sees the whole text where the text is causal). Then there are L + 1 tokens.
    """

    vocab: int
    length: int
    last: bool = False

    reads = ("ids",)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.length + self.last,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        ids = fields["ids"]
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"{self.name}: expected integer ids of shape (B, L), got {ids.dtype} {ids.shape}")
        if ids.shape[1] > self.length:
            raise InputError(f"{self.name}: {ids.shape[1]} tokens, but length={self.length}; truncate, or build a longer model")
        values = nn.Embed(self.vocab, self.width or 0, dtype=self.dtype, embedding_init=INITIAL, name="token")(ids)
        mask = token_mask(mask, ids.shape)
        if self.last:
            last = self.param("last", INITIAL, (1, self.width)).astype(self.dtype)
            values = jnp.concatenate([values, jnp.broadcast_to(last, (len(ids), *last.shape))], 1)
            mask = None if mask is None else jnp.concatenate([mask, mask.any(-1, keepdims=True)], 1)
        return self.fuse(values, mask, fields, (values.shape[1],))

    def decode(self, x: jax.Array) -> jax.Array:
        """Scores of every id with the embedding as the matrix (tied weights): `(B, L, D) -> (B, L, V)` float32."""
        table = self.get_variable("params", "token")["embedding"].astype(x.dtype)
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.length)
        return Masked(self.with_tables(jnp.zeros(shape, jnp.int32), batch_size), jnp.ones(shape, bool))
