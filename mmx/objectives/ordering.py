"""Ordering: where did it stand? Survey 3.4, "ordering"."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, at_least
from mmx.heads import TokenClassifier
from mmx.layers.positions import grid_coordinates
from mmx.modalities.embedder import COORDINATES, KEPT, PLACE
from mmx.modalities.masking import modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.hiding import EPS
from mmx.objectives.masking import of_tokens
from mmx.objectives.masks import lowest, wanted
from mmx.objectives.objective import Context, Objective, check_entries, check_head, classified, reading, total
from mmx.objectives.views import View
from mmx.topologies import Sum
from mmx.types import Batch, Masked, Metrics, Outputs

SEGMENT = "segment"  # the one table that is known to tell no place within it, but of a sentence it is the place


@dataclasses.dataclass(frozen=True)
class Ordering(Objective):
    """Some tokens of a modality change places, and each of them is to tell where it stood.

    Frames of a video (HERO's frame order modelling, arXiv 2005.00200, 3.2.4), patches of an image, pieces of a sound; with a
    `size`, runs of tokens that move as one; with `sentences`, the sentences of a text (StructBERT, ALBERT).
    """

    modality: str = "image"
    """The entry whose tokens change places."""
    given: tuple[str, ...] = ("text",)
    """Entries that are read with it."""
    rate: float = 0.15
    """The share of the units that change places; two at least."""
    size: int = 1
    """Tokens of a unit, in a row."""
    sentences: str = ""
    """The name among data.labels of the number of each token's sentence (B, L), from 0; -1: of none. Units are these then."""
    most: int = 16
    """Sentences of a text at most."""
    head: str = ""
    """A head that the model has already; empty: one of its own, order_NAME."""

    def __post_init__(self) -> None:
        at_least(self, size=1, most=2)
        if not 0 < self.rate <= 1:
            raise InputError(f"ordering: rate={self.rate}; it is a share, more than 0 and at most 1")

    @property
    def _head(self) -> str:
        units = "_sentences" if self.sentences else f"_{self.size}" if self.size > 1 else ""
        return self.head or f"order_{modality_of(self.modality)}{units}"

    @property
    def _entry(self) -> str:
        return f"{self.modality}/shuffled-{self.rate:g}-{self.size}{self.sentences and '-sentences'}"

    def _units(self, embedder: Any) -> int:
        return self.most if self.sentences else -(-int(np.prod(embedder.grid)) // self.size)

    def check(self, model: MultimodalTransformer) -> None:
        check_entries((self.modality, *self.given), model)
        check_head(self._head, model)
        embedder: Any = model.modalities[modality_of(self.modality)]
        position = embedder.position or embedder.usual_position
        if position != "learned":
            raise InputError(
                f"modality={self.modality!r}: its positions are {position!r}, only learned ones can be exchanged; "
                f"set --modalities.{modality_of(self.modality)}.position learned"
            )
        if embedder.mixes:
            kind = type(embedder).__name__
            raise InputError(f"modality={self.modality!r}: a token of {kind} hears of its neighbours before it can change places")
        if embedder.special_position or getattr(embedder, "last", False):
            raise InputError(f"modality={self.modality!r}: special_position and last have places that are not exchanged")
        if telling := [
            name for name in (*embedder.tables, *embedder.joined, *embedder.vectors) if name != SEGMENT or self.sentences
        ]:
            raise InputError(
                f"modality={self.modality!r}: its {', '.join(telling)} would move with the tokens and may tell where they stood; "
                f"order a modality without tables and vectors, but for a table {SEGMENT!r}"
            )
        if self._units(embedder) < 2:
            raise InputError(f"modality={self.modality!r}: with size={self.size} it has one unit, which has no order")
        if any(isinstance(stage, Sum) for stage in model.stages) and self.sentences:
            raise InputError("sentences: summation adds token by token, and sentences of other lengths would shift what it adds")

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        name = modality_of(self.modality)
        return (
            {} if self.head else {self._head: TokenClassifier(self._units(modalities[name]), name, activation="gelu", norm=EPS)}
        )

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        embedder: Any = context.model.modalities[modality_of(self.modality)]
        raw = batch[self.modality]
        fields, mask = embedder.read(raw)
        shape = embedder.content(raw).shape[:2]
        there = embedder.there(raw)
        there = jnp.ones(shape, bool) if there is None else there
        in_runs = jnp.broadcast_to(jnp.arange(shape[1]) // self.size, shape)
        title = f"label/{self.sentences}"
        if self.sentences and (title not in batch or tuple(batch[title].shape) != shape):
            raise InputError(f"sentences={self.sentences!r}: the batch needs an entry {title} of shape {shape}; see data.labels")
        of = batch[title].astype(jnp.int32) if self.sentences else in_runs
        there &= of >= 0
        order, moved = _shuffle(key, there, jnp.maximum(of, 0), max(self._units(embedder), 1), self.rate)
        coordinates = {}
        if len(embedder.grid) > 1:
            coordinates = {COORDINATES: jnp.asarray(grid_coordinates(embedder.grid))[jnp.argsort(order, 1)]}
        shuffled = {**fields, PLACE: jnp.argsort(order, 1), KEPT: order, **coordinates}
        label = jnp.take_along_axis(of, order, 1)
        entry = self._entry
        return {
            **batch,
            entry: shuffled if mask is None else Masked(shuffled, mask),
            f"{entry}:moved": jnp.take_along_axis(moved, order, 1),
            f"{entry}:label": label,
        }

    def views(self) -> tuple[View, ...]:
        return (reading(*self.given, self._entry),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        label, moved = batch[f"{self._entry}:label"], batch[f"{self._entry}:moved"]
        logits = of_tokens(outputs[0], modality_of(self.modality), self._head, label.shape[1])
        right = (logits.argmax(-1) == label) & moved
        return {"loss": classified(logits, label, moved).sum(1), "right": right.sum(1), "count": moved.sum(1)}

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        count = total(values["count"])
        return values["loss"].sum() / count, {f"{self._head}/accuracy": values["right"].sum() / count}


def _shuffle(key: jax.Array, there: jax.Array, of: jax.Array, units: int, rate: float) -> tuple[jax.Array, jax.Array]:
    """A new order of tokens: place j gets the token `order (B, L)[j]`; and which tokens belong to a unit that changed places.

    Args:
        key: random key.
        there: which tokens exist, `(B, L)`.
        of: the unit of each, `(B, L)`, 0 to units - 1.
        units: how many there are.
        rate: share of the units that exist of which places are drawn anew.
    """
    draw_key, key = jax.random.split(key)
    exists = jax.vmap(lambda of, there: jnp.zeros(units, bool).at[of].max(there))(of, there)  # (B, U)
    count = jnp.where(exists.sum(1) < 2, 0, jnp.maximum(wanted(exists, rate), 2))  # one alone has no other place
    chosen = lowest(jax.random.uniform(draw_key, exists.shape), exists, count)
    unit_at = _in_a_circle(chosen, jax.random.uniform(key, exists.shape))
    place_of = jnp.argsort(unit_at, 1)
    order = _rearranged(there, jnp.take_along_axis(place_of, of, 1))
    return order, there & jnp.take_along_axis(chosen, of, 1)


def _in_a_circle(chosen: jax.Array, scores: jax.Array) -> jax.Array:
    """Who stands in each place `(B, n)`, when each of the chosen takes the place of the next one by their scores."""
    line = jnp.argsort(jnp.where(chosen, scores, jnp.inf), 1)
    own, count = jnp.broadcast_to(jnp.arange(chosen.shape[1]), chosen.shape), chosen.sum(1, keepdims=True)
    following = jnp.where(own < count, (own + 1) % jnp.maximum(count, 1), own)
    return own.at[jnp.arange(len(own))[:, None], jnp.take_along_axis(line, following, 1)].set(line)


def _rearranged(chosen: jax.Array, scores: jax.Array) -> jax.Array:
    """Who stands in each place `(B, n)`, when the chosen share out their places in the order of their scores; others stay."""
    new = jnp.argsort(jnp.where(chosen, scores, jnp.inf), 1, stable=True)
    places = jnp.argsort(~chosen, 1, stable=True)
    own = jnp.broadcast_to(jnp.arange(chosen.shape[1]), chosen.shape)
    taken = own < chosen.sum(1, keepdims=True)
    return own.at[jnp.arange(len(own))[:, None], places].set(jnp.where(taken, new, places))
