"""Tokens that go to places of another stream: into those it keeps for them, or onto what stands there."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.layers import ACTIVATIONS
from mmx.layers.products import Dense
from mmx.layers.stack import sow_states
from mmx.topologies.stage import Stage, fit
from mmx.types import Streams, Tokens


class Insert(Stage):
    """Puts the tokens of one stream, mapped to the width of another, in the other's places that are kept for them.

        Z_into[b, l] = f(Z_source)[b, slots[b, l]]   where slots[b, l] >= 0

    Images inside a text, wherever they stand (LLaVA, arXiv 2304.08485; PaliGemma, arXiv 2407.07726). Which token goes where
    is told by the raw value of the text: `{"ids": (B, L), "slots": {"image": (B, L)}}`. Slots count through all tokens of an
    example, special ones left out; where the source has several rows for an example, they stand one behind the other. Where
    examples differ in how many rows they have, `(B, L, 2)` tells of each slot the row of the source and the token in it.

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

    NAMING: ClassVar[tuple[str, ...]] = ("source", "into")

    source: str = "image"
    into: str = "text"
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True
    special: bool = False

    @property
    def caches(self) -> bool:
        return True

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
        slots: Any = (target.slots or {}).get(self.source)
        empty: Any = None if slots is None else (slots if slots.ndim == 2 else slots[..., 0]) < 0  # (B, L)
        if self.source not in streams:
            hidden = target if empty is None else dataclasses.replace(target, mask=target.dense_mask & empty)
            return {self.into: hidden}
        source = self._mapped(streams[self.source], target.values.shape[-1])
        if slots is None:
            return {self.source: source}
        values = target.values
        if target.at is None:  # what is written behind a prompt keeps no places
            values = jnp.where(empty[..., None], values, _taken(source.values, slots, jnp.nan))
        mask = target.mask
        if mask is not None or source.mask is not None:
            mask = target.dense_mask & (empty | _taken(source.dense_mask, slots, True))
        return {self.source: source, self.into: dataclasses.replace(target, values=values, mask=mask)}

    def _mapped(self, source: Tokens, width: int) -> Tokens:
        source = source if self.special else source.without_special
        x = source.values
        if self.hidden is not None:
            x = Dense(self.hidden, use_bias=self.bias, dtype=x.dtype, name="transform")(x)
            x = ACTIVATIONS[self.activation](x)
        return dataclasses.replace(source, values=Dense(width, use_bias=self.bias, dtype=x.dtype, name="project")(x))


class Scatter(Stage):
    """Adds the tokens of one stream to those of another, each to the one that it says it is of.

        Z_into[i] <- Z_into[i] + sum of Z_source[l] over all l where slots[l] = i,  i = (row, place)

    Frames that were read with their subtitles, clip by clip, come back to the whole video (HERO, arXiv 2005.00200). The raw
    value of the source tells where they go: `{"features": (C, L, size), "slots": {"video": (C, L, 2)}}`, -1: nowhere; special
    tokens count. The two streams may have different numbers of rows.

    A source of another width is projected; what is masked is not added; the source stays as it is.

    Args:
        source: the stream whose tokens are added.
        into: the stream that they are added to.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("source", "into")

    source: str
    into: str

    @property
    def separate(self) -> bool:
        return False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        new = dict(streams)
        source, into = streams.get(self.source), streams.get(self.into)
        slots = None if source is None else (source.slots or {}).get(self.into)
        if source is not None and into is not None and slots is not None:
            values = fit(source, into.values.shape[-1], self.source).values
            row = jnp.where(source.dense_mask & (slots[..., 0] >= 0), slots[..., 0], len(into.values))  # behind the last: dropped
            added = jnp.asarray(into.values).at[row, slots[..., 1]].add(values, mode="drop")
            new[self.into] = dataclasses.replace(into, values=added)
        sow_states(self, {name: tokens.values for name, tokens in new.items()})
        return new


def _taken(array: jax.Array, slots: Any, beyond: Any) -> jax.Array:
    """What `slots (B, L)` or `(B, L, 2)` take of `array (rows, tokens, ...)`; `beyond` where there is no such token."""
    if slots.ndim == 3:
        return jnp.asarray(array).at[slots[..., 0], slots[..., 1]].get(mode="fill", fill_value=beyond)
    each = jnp.asarray(array).reshape(len(slots), -1, *array.shape[2:])  # a gather inside each example crosses no mesh
    return jax.vmap(lambda one, at: one.at[at].get(mode="fill", fill_value=beyond))(each, slots)
