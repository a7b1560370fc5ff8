"""A stack of equal layers: scanned, so that compile time does not grow with depth, and rematerialised on request."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.layers.block import Block, BlockConfig
from mmx.layers.norms import make_norm

POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(layer: type[nn.Module], depth: int, config: BlockConfig) -> Callable[..., nn.Module]:
    """Returns `layer` repeated `depth` times: parameters get a leading axis `layers`, inputs other than the first are shared.

    The layer is called as `layer(carry, rate, *shared) -> (carry, None)`; `rate` is its drop-path rate, a scalar.
    """
    if config.remat != "none":
        layer = nn.remat(layer, prevent_cse=False, policy=POLICIES[config.remat])
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        length=depth,
        unroll=config.unroll,
    )


def drop_path_rates(depth: int, config: BlockConfig) -> jax.Array:
    """The drop-path rate of each layer, `(depth,)`."""
    return jnp.linspace(0.0, config.drop_path, depth)


class _Layer(nn.Module):
    config: BlockConfig
    sublayers: str

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array, shared: tuple[Any, ...]) -> tuple[jax.Array, None]:
        return Block(self.config, self.sublayers, name="block")(x, *shared, drop_path=rate), None


class Stack(nn.Module):
    """`depth` blocks and, for pre-norm, the norm after them: `(B, L, D') -> (B, L, D)`; with depth 0, the identity."""

    depth: int
    config: BlockConfig
    sublayers: str = "self mlp"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        visible: np.ndarray | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        if self.depth == 0:
            return x
        layers = scan_layers(_Layer, self.depth, self.config)(self.config, self.sublayers, name="layers")
        x, _ = layers(x, drop_path_rates(self.depth, self.config), (mask, visible, context, context_mask))
        if self.config.norm == "pre":
            x = make_norm(self.config.norm_kind, self.config.eps, self.config.dtype, "norm")(x)
        return x
