"""Key points of a drawing, in the order in which the pen went.

Survey table 1: "sketch, stroke key point, linear projection and learnable embedding" (Multi-Graph Transformer,
arXiv 1912.11258).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, token_mask
from mmx.types import Masked, Tokens


class Strokes(Embedder):
    """`{"points": (B, L, 2), "pen": (B, L) int}` -> Tokens `(B, L, D)`: the place linearly, the state of the pen learned.

    Args:
        length: most key points of a drawing, L; fewer are welcome.
        states: number of states of the pen: 3 for draws on, lifts, ends.
    """

    length: int
    states: int = 3

    reads = ("points", "pen")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.length,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        points, pen = fields["points"], fields["pen"]
        if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] > self.length or pen.shape != points.shape[:2]:
            raise InputError(
                f"{self.name}: expected points (B, L <= {self.length}, 2) and pen (B, L), got {points.shape}, {pen.shape}"
            )
        mask = token_mask(mask, points.shape[:2])
        x = Dense(self.width or 0, dtype=self.dtype, name="linear")(hide(jnp.asarray(points, self.dtype), mask))
        x = x + nn.Embed(self.states, self.width or 0, dtype=self.dtype, embedding_init=INITIAL, name="pen")(pen)
        return self.fuse(x, mask, fields, (points.shape[1],))

    def content(self, raw: Any) -> jax.Array:
        fields, _ = self.read(raw)
        return jnp.concatenate([fields["points"], jax.nn.one_hot(fields["pen"], self.states)], -1)

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.length)
        arrays = {"points": jnp.zeros((*shape, 2), jnp.float32), "pen": jnp.zeros(shape, jnp.int32)}
        return Masked(self.with_tables(arrays, batch_size), jnp.ones(shape, bool))
