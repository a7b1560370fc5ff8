"""The stage that makes streams fit for what comes next."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers import make_norm
from mmx.layers.positions import sincos
from mmx.layers.products import INITIAL, Dense
from mmx.layers.stack import sow_states
from mmx.topologies.stage import Stage
from mmx.topologies.stages import SHARED
from mmx.types import Streams, Tokens

COUNTED = "counted"


class Adapt(Stage):
    """A linear map, a factor, positions, a vector, a norm, each where it is wanted, token by token; and which tokens go on.

        Z_m <- Norm(s W Z_m + p + v)

    Args:
        streams: which ones; None: all.
        width: of the linear map's output; None: there is no linear map.
        scale: the factor s, such as the root of the width (arXiv 1706.03762, 3.4).
        positions: how many learned ones there are (HERO); "counted": sines and cosines of the place, counted from 1, and none
            for a token whose first number is 0, which counts as padding and is seen all the same (MulT). None: no positions.
        type: whether there is a vector for each stream, which tells it from others (BridgeTower).
        norm: eps of a LayerNorm, one number or one for each stream (a stream that is not named has no norm); None: no norm.
        share: one set of weights for all of them, types and positions aside, instead of one each.
        drop: how many tokens in front, or, below 0, at the end stay behind, such as class tokens that are not for others (CoCa).
        unmask: whether the tokens that were masked are seen from here on, as by CoCa's decoder.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("streams", "norm")

    streams: tuple[str, ...] | None = None
    width: int | None = None
    scale: float = 1.0
    positions: int | str | None = None
    type: bool = False
    norm: float | Mapping[str, float] | None = None
    share: bool = False
    drop: int = 0
    unmask: bool = False

    @property
    def caches(self) -> bool:
        return True

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        new, modules = dict(streams), {}
        if self.share and isinstance(self.norm, Mapping):
            raise InputError(f"Adapt.norm={dict(self.norm)}: streams that share one norm have one eps; give a number")
        sow_states(self, {name: tokens.values for name, tokens in streams.items()}, "entered")
        for name, tokens in streams.items():
            if self.streams is not None and name not in self.streams:
                continue
            x, owner = tokens.values, SHARED if self.share else name
            if self.width is not None:
                project = modules.setdefault("project", {})
                if owner not in project:
                    project[owner] = Dense(self.width, dtype=x.dtype, name=f"{owner}_project")
                x = project[owner](x)
            places = self._positions(name, x)
            x = x if self.scale == 1 else x * self.scale
            x = x if places is None else x + places.astype(x.dtype)
            if self.type:
                x = x + self.param(f"{name}_type_bias", INITIAL, (x.shape[-1],)).astype(x.dtype)
            eps = self.norm.get(name) if isinstance(self.norm, Mapping) else self.norm
            if eps is not None:
                norms = modules.setdefault("norm", {})
                if owner not in norms:
                    norms[owner] = make_norm("layer", eps, x.dtype, f"{owner}_norm")
                x = norms[owner](x)
            new[name] = self._choose(dataclasses.replace(tokens, values=x))
        sow_states(self, {name: tokens.values for name, tokens in new.items()})
        return new

    def _positions(self, name: str, x: jax.Array) -> jax.Array | None:
        """`(L, D)`, or `(B, L, D)` where they hang on the tokens."""
        length, width = x.shape[1:]
        if self.positions is None:
            return None
        if self.positions == COUNTED:
            return jnp.where(x[..., :1] == 0, 0, sincos(np.arange(1, length + 1)[:, None], width, closed=True))
        if not isinstance(self.positions, int) or self.positions < length:
            raise InputError(f"Adapt.positions={self.positions!r}: {name!r} has {length} tokens; give as many, or {COUNTED!r}")
        return self.param(f"{name}_position", INITIAL, (self.positions, width))[:length]

    def _choose(self, tokens: Tokens) -> Tokens:
        tokens = tokens.behind(self.drop, special=tokens.special[max(self.drop, 0) :]) if self.drop else tokens
        return dataclasses.replace(tokens, mask=None) if self.unmask else tokens
