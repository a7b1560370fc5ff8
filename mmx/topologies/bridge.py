"""The stage whose layers read the towers below them, one state after the other."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers import make_norm
from mmx.layers.products import INITIAL, Dense
from mmx.topologies.stage import given
from mmx.topologies.stages import Cross
from mmx.types import Streams

TOWER = "{}_tower"  # the stream that is left of a stream's tower


class Bridge(Cross):
    """Streams that query each other, and before each layer take in a state of their own tower (BridgeTower, arXiv 2206.08657).

        Z_m <- Norm(Z_m + W_m S_m^i + t_m)      Z_m <- Tf_m(Q = Z_m, KV = C(the others))      i = 1 .. depth, at first Z_m = 0

    Streams come with the states S_m^1, ..., S_m^depth side by side along the width: `PerStream(taken=...)` leaves them so.
    The towers read nothing of these layers, so that all of a tower is one stack and all of these layers another.

    Args:
        eps: of the LayerNorm in front of each layer.
        norms: eps of a LayerNorm on all states of a stream, before the map W_m; a stream that is not named has none.
        each: whether each layer has a map W_m of its own.
        towers: streams whose last state stays as a stream `NAME_tower`, for what is asked of a tower alone: as it came (False),
            or mapped and with its t_m (True).
    """

    NAMING: ClassVar[tuple[str, ...]] = (*Cross.NAMING, "norms", "towers")

    eps: float = 1e-6
    norms: Mapping[str, float] | None = None
    each: bool = False
    towers: Mapping[str, bool] | None = None

    @property
    def caches(self) -> bool:
        return False

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(map(TOWER.format, self.towers or ()))

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        entered, arriving, left = dict(streams), {}, {}
        norms, towers = self.norms or {}, self.towers or {}
        for name, tokens in streams.items():
            if self.steps is not None and name not in self.steps:
                continue
            states, width = self._states(name, tokens.values), given(self.block, self, name).width  # (depth, B, L, D')
            mapped = states
            if name in norms:
                mapped = make_norm("layer", norms[name], states.dtype, f"{name}_tower_norm")(states)
            dense = nn.vmap(Dense, variable_axes={"params": 0}, split_rngs={"params": True}) if self.each else Dense
            mapped = dense(width, dtype=states.dtype, name=f"{name}_project")(mapped)
            mapped += self.param(f"{name}_type_bias", INITIAL, (width,)).astype(states.dtype)
            arriving[name] = mapped
            entered[name] = dataclasses.replace(tokens, values=jnp.zeros_like(mapped[0]))
            if name in towers:
                last = mapped if towers[name] else states
                left[TOWER.format(name)] = dataclasses.replace(tokens, values=last[-1])
        return self._exchange(entered, arriving, self.eps) | left

    def _states(self, name: str, values: jax.Array) -> jax.Array:
        if self.depth < 1 or values.shape[-1] % self.depth:
            raise InputError(
                f"Bridge: stream {name!r} is {values.shape[-1]} wide, which is not one state for each of {self.depth} layers; "
                f"PerStream(taken=...) leaves them side by side"
            )
        return jnp.moveaxis(values.reshape(*values.shape[:2], self.depth, -1), 2, 0)
