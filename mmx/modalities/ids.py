"""Discrete tokens: words, codes, cells, items, anything with a number. Survey table 1: "word, learned embedding"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers.products import INITIAL, product
from mmx.modalities.embedder import HIDDEN, PLACE, Embedder
from mmx.modalities.masking import token_mask
from mmx.types import Masked, Tokens


class Ids(Embedder):
    """Token ids `(B, L)` int -> Tokens `(B, L, D)`: a learned embedding for each.

    Args:
        vocab: number of different ids, V.
        length: the longest sequence, L; shorter ones are welcome, and longer ones where positions are not learned, or where
            each token says which place it takes.
        scale: factor of the embedding, such as the root of the width (arXiv 1706.03762, 3.4); not of `decode`.
        last: whether a learned token stands behind the last id, with the position after it (CoCa, arXiv 2205.01917: a class
            token that sees the whole text where the text is causal). Then there are L + 1 tokens.
        lender: the modality, an earlier one, whose embeddings and positions these are too (the decoder of UniVL); None: own ones.
    """

    vocab: int
    length: int
    scale: float = 1.0
    last: bool = False
    lender: str | None = None

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
        if ids.shape[1] > self.length and PLACE not in fields and self.position in (None, "learned"):
            raise InputError(f"{self.name}: {ids.shape[1]} tokens, but length={self.length}; truncate, or build a longer model")
        if self.lender:
            values = self._lent(self.lender, "token")["embedding"][ids].astype(self.dtype)
        else:
            values = nn.Embed(self.vocab, self.width or 0, embedding_init=INITIAL, name="token")(ids).astype(self.dtype)
        values = values if self.scale == 1 else values * jnp.asarray(self.scale, values.dtype)
        mask = token_mask(mask, ids.shape)
        if self.last:
            last = self.param("last", INITIAL, (1, self.width)).astype(self.dtype)
            values = jnp.concatenate([values, jnp.broadcast_to(last, (len(ids), *last.shape))], 1)
            mask = None if mask is None else jnp.concatenate([mask, mask.any(-1, keepdims=True)], 1)
            if HIDDEN in fields:  # which is of ids
                fields = {**fields, HIDDEN: jnp.pad(fields[HIDDEN], ((0, 0), (0, 1)))}
        return self.fuse(values, mask, fields, (values.shape[1],))

    def content(self, raw: Any) -> jax.Array:
        return self.read(raw)[0]["ids"]

    def decode(self, x: jax.Array) -> jax.Array:
        """Scores of every id with the embedding as the matrix (tied weights): `(B, L, D) -> (B, L, V)` float32."""
        return product("bld,vd->blv", x, self.matrix)

    @property
    def matrix(self) -> jax.Array:
        """The embeddings, `(V, D)`."""
        return (self._lent(self.lender, "token") if self.lender else self.get_variable("params", "token"))["embedding"]

    def _position_table(self, rows: int) -> jax.Array:
        return self._lent(self.lender, "position") if self.lender else super()._position_table(rows)

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.length)
        return Masked(self.with_tables(jnp.zeros(shape, jnp.int32), batch_size), jnp.ones(shape, bool))
