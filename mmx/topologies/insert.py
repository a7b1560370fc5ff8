"""The stage that puts tokens of one stream into the places that another keeps for them."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.layers import ACTIVATIONS
from mmx.layers.products import Dense
from mmx.layers.stack import sow_states
from mmx.topologies.stage import Stage
from mmx.types import Streams, Tokens


class Insert(Stage):
    """Puts the tokens of one stream, mapped to the width of another, in the other's places that are kept for them.

        Z_into[b, l] = f(Z_source)[b, slots[b, l]]   where slots[b, l] >= 0

    Images inside a text, wherever they stand (LLaVA, arXiv 2304.08485; PaliGemma, arXiv 2407.07726). Which token goes where
    is told by the raw value of the text: `{"ids": (B, L), "slots": {"image": (B, L)}}`. Slots count through all tokens of an
    example, special ones left out; where the source has several rows for an example, they stand one behind the other.

    What replaces a token also takes its place in order and its causality. A slot of a token that is masked, or of a stream
    that is absent, is masked itself; one behind the last token is NaN. The source stays as a stream, mapped.

    Args:
        source: the stream whose tokens are placed.
        into: the stream that keeps places.
        hidden: size of a further dense layer in front, with an activation between the two; None: one dense layer.
        activation: that activation.
        bias: whether the dense layers have biases.
        special: whether the source's special tokens are placed, too, as the first ones.
    """

    source: str = "image"
    into: str = "text"
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True
    special: bool = False

    @property
    def separate(self) -> bool:
        return False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.activation not in ACTIVATIONS:
            raise InputError("Insert.activation: " + unknown("activation", self.activation, ACTIVATIONS))
        new = {**streams, **self._inserted(streams)} if self.into in streams else streams
        sow_states(self, {name: tokens.values for name, tokens in new.items()})
        return new

    def _inserted(self, streams: Streams) -> Streams:
        target = streams[self.into]
        slots = (target.slots or {}).get(self.source)
        if self.source not in streams:
            hidden = target if slots is None else dataclasses.replace(target, mask=target.dense_mask & (slots < 0))
            return {self.into: hidden}
        source = self._mapped(streams[self.source], target.values.shape[-1])
        if slots is None:
            return {self.source: source}
        rows = (len(slots), -1)
        values = source.values.reshape(*rows, source.values.shape[-1])
        values = jnp.take_along_axis(values, slots[..., None], 1)  # (B, L, D)
        values = jnp.where((slots < 0)[..., None], target.values, values)
        mask = target.mask
        if mask is not None or source.mask is not None:
            there = jnp.take_along_axis(source.dense_mask.reshape(rows), slots, 1, mode="clip")
            mask = target.dense_mask & ((slots < 0) | there)
        return {self.source: source, self.into: dataclasses.replace(target, values=values, mask=mask)}

    def _mapped(self, source: Tokens, width: int) -> Tokens:
        source = source if self.special else source.without_special
        x = source.values
        if self.hidden is not None:
            x = Dense(self.hidden, use_bias=self.bias, dtype=x.dtype, name="transform")(x)
            x = ACTIVATIONS[self.activation](x)
        return dataclasses.replace(source, values=Dense(width, use_bias=self.bias, dtype=x.dtype, name="project")(x))
