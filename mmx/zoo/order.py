"""The order in which published code of two streams lays their tokens: UNITER's and HERO's `gather_index`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Order:
    """Which token stands at which place: `gather (B, S)`, and whether the place counts: `mask (B, S)`.

    `gather` numbers the tokens of the first stream (UNITER: words, HERO: frames) before those of the second. Published models
    attend from place to place; as nothing depends on the order, mmx attends from token to token and brings into that order what
    comes out.
    """

    first: int
    second: int
    gather: Any
    mask: Any

    @classmethod
    def of(cls, size: int, first: int, second: int, gather: Any = None, mask: Any = None) -> "Order":
        """That of `size` examples; where it is not told, one stream stands behind the other, and every place counts."""
        gather = jnp.broadcast_to(jnp.arange(first + second), (size, first + second)) if gather is None else gather
        return cls(first, second, gather, jnp.ones(gather.shape, bool) if mask is None else mask != 0)

    @property
    def exists(self) -> jax.Array:
        """Which tokens stand at a place that counts: `(B, first + second)`."""
        rows = jnp.arange(len(self.gather))[:, None]
        return jnp.zeros((len(self.gather), self.first + self.second), bool).at[rows, self.gather].max(self.mask)

    def fill(self, values: Any) -> jax.Array:
        """`(B, first + second, D) -> (B, S, D)`."""
        return jnp.take_along_axis(values, self.gather[..., None], 1)

    def fill_second(self, values: Any) -> jax.Array:
        """`(B, second, D) -> (B, S, D)`, zeros for the first."""
        return self.fill(jnp.pad(values, ((0, 0), (self.first, 0), (0, 0))))
