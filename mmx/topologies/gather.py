"""Between other stages: streams put into one, beside themselves or in their place."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mmx.layers import make_norm
from mmx.layers.products import INITIAL, Dense
from mmx.layers.stack import sow_states
from mmx.topologies.stage import Stage, concatenate
from mmx.topologies.stages import FUSED
from mmx.types import Streams, Tokens


class Gather(Stage):
    """Puts the tokens of several streams behind each other into the one stream `fused`, beside which the streams may stay.

        Z = norm(C(P_1 Z_1 + t_1, ..., P_M Z_M + t_M) + positions)

    A causal stream is left out. What enters the layers behind is left as a state, under `fused`.

    Args:
        streams: which ones, those of them that are there; None: all.
        keep: whether they stay beside the new one.
        width: to which each is projected, if it has another one; None: that of the first.
        project: whether each has a projection anyway (FLAVA).
        positions: how many learned places, counted over all tokens (UniVL), the last one for all that are beyond; None: none.
        type: whether a learned vector tells the stream (UniVL).
        special: learned tokens in front (FLAVA's class token).
        norm: eps of a LayerNorm; None: no norm.
        norm_beside: the stream without which there is no norm (LayoutLMv3 does not normalise a text alone again); None: always.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("streams", "norm_beside")

    streams: tuple[str, ...] | None = None
    keep: bool = False
    width: int | None = None
    project: bool = False
    positions: int | None = None
    type: bool = False
    special: tuple[str, ...] = ()
    norm: float | None = None
    norm_beside: str | None = None

    @property
    def makes(self) -> tuple[str, ...]:
        return (FUSED,)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        read = {n: t for n, t in streams.items() if (self.streams is None or n in self.streams) and not t.causal}
        if not read:
            return streams
        kept = streams if self.keep else {n: t for n, t in streams.items() if n not in read}
        width = self.width or next(iter(read.values())).values.shape[-1]
        joint = concatenate({name: self._enter(name, tokens, width) for name, tokens in read.items()})
        x, mask, where, count = joint.values, joint.mask, joint.coordinates, len(self.special)
        if self.positions is not None:
            table = self.param("position", INITIAL, (self.positions, width)).astype(x.dtype)
            x = x + table[np.minimum(np.arange(x.shape[1]), self.positions - 1)]
        if self.special:
            special = self.param("special", INITIAL, (count, width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(special, (len(x), count, width)), x], 1)
            where = jnp.pad(where, [(0, 0)] * (where.ndim - 2) + [(count, 0), (0, 0)])
            if mask is not None:
                mask = jnp.concatenate([jnp.repeat(mask.any(-1, keepdims=True), count, 1), mask], 1)
        if self.norm is not None and (self.norm_beside is None or self.norm_beside in read):
            x = make_norm("layer", self.norm, x.dtype, "norm")(x)
        sow_states(self, {FUSED: x})
        return {FUSED: Tokens(x, mask, where, special=self.special), **kept}

    def _enter(self, name: str, tokens: Tokens, width: int) -> Tokens:
        x = tokens.values
        if self.project or x.shape[-1] != width:
            x = Dense(width, dtype=x.dtype, name=f"{name}_project")(x)
        if self.type:
            x = x + self.param(f"{name}_type_bias", INITIAL, (width,)).astype(x.dtype)
        return dataclasses.replace(tokens, values=x)
