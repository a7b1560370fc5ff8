"""Points in space, of which each has a place and perhaps more: colour, normal, intensity.

Survey table 1: "3D point cloud, point, non-linear projection" (Point Cloud Transformer, arXiv 2012.09688).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers.products import Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, token_mask
from mmx.types import Masked, Tokens


class Points(Embedder):
    """Points `(B, P, channels)` -> Tokens `(B, P, D)` through an MLP; the first channels are the place.

    Args:
        points: most points of an example, P; fewer are welcome.
        channels: numbers of a point: 3 for x, y, z.
        hidden: size of the MLP's middle; None: the width of a token.
        position: usually none, since points have no order and tell their place themselves.
    """

    points: int
    channels: int = 3
    hidden: int | None = None

    usual_position = "none"
    reads = ("points",)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.points,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        x, width = fields["points"], self.width or 0
        if x.ndim != 3 or x.shape[2] != self.channels or x.shape[1] > self.points:
            raise InputError(f"{self.name}: expected points of shape (B, P <= {self.points}, {self.channels}), got {x.shape}")
        mask = token_mask(mask, x.shape[:2])
        x = hide(jnp.asarray(x, self.dtype), mask)
        x = jax.nn.gelu(Dense(self.hidden or width, dtype=self.dtype, name="linear")(x))
        x = Dense(width, dtype=self.dtype, name="project")(x)
        return self.fuse(x, mask, fields, (x.shape[1],))

    def content(self, raw: Any) -> jax.Array:
        return self.read(raw)[0]["points"]

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        raw = self.with_tables(jnp.zeros((batch_size, self.points, self.channels), jnp.float32), batch_size)
        return Masked(raw, jnp.ones((batch_size, self.points), bool))
