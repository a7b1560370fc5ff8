"""A stack of equal layers: scanned, so that compile time does not grow with depth, and rematerialised on request."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.layers.attention import Sight
from mmx.layers.block import Block, BlockConfig, each_part
from mmx.layers.norms import make_norm
from mmx.layers.positions import distance_buckets

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
    parts: tuple[tuple[str, int], ...]
    multiway: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array, shared: tuple[Any, ...]) -> tuple[jax.Array, None]:
        block = Block(self.config, self.sublayers, self.parts, self.multiway, name="block")
        return block(x, *shared, drop_path=rate), None


class Stack(nn.Module):
    """`depth` blocks and, for pre-norm, the norm after them: `(B, L, D') -> (B, L, D)`; with depth 0, the identity.

    `parts` and `multiway` are those of `Block`.
    """

    depth: int
    config: BlockConfig
    sublayers: str = "self mlp"
    parts: tuple[tuple[str, int], ...] = ()
    multiway: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sight: Sight = Sight(),
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        if self.depth == 0:
            return x
        sight = relative_positions(self.config)(sight, [length for _, length in self.parts] or [x.shape[1]])
        layers = scan_layers(_Layer, self.depth, self.config)
        layers = layers(self.config, self.sublayers, self.parts, self.multiway, name="layers")
        x, _ = layers(x, drop_path_rates(self.depth, self.config), (sight, context, context_mask))
        if self.config.norm == "pre":
            c, parts = self.config, self.parts if "norm" in self.multiway else ()
            x = each_part(x, parts, lambda end: make_norm(c.norm_kind, c.eps, c.dtype, f"norm{end}"))
        return x


def relative_positions(config: BlockConfig, name: str = "relative") -> Callable[[Sight, Sequence[int]], Sight]:
    """Returns what adds the bias of relative positions to a Sight, if the configuration wants one, as one submodule."""
    if not config.relative:
        return lambda sight, lengths: sight
    bias = RelativeBias(config.relative, config.heads, name=name)
    return lambda sight, lengths: dataclasses.replace(sight, bias=bias(lengths))


class RelativeBias(nn.Module):
    """T5's bias by the distance of two tokens of one stream, and one number for tokens of two: `(H, L, L)` float32."""

    buckets: int
    heads: int

    @nn.compact
    def __call__(self, lengths: Sequence[int]) -> jax.Array:
        table = self.param("bias", nn.initializers.normal(0.02), (self.buckets + 1, self.heads))
        place = np.concatenate([np.arange(length) for length in lengths])
        stream = np.repeat(np.arange(len(lengths)), lengths)
        buckets = distance_buckets(place[None, :] - place[:, None], self.buckets)
        buckets = np.where(stream[None, :] == stream[:, None], buckets, self.buckets)
        return table[buckets].transpose(2, 0, 1)
