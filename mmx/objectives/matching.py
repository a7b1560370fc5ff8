"""Matching: does this belong to that? Survey 3.4, "matching"."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, at_least, unknown
from mmx.heads import Classifier, Pooler
from mmx.losses import (
    cross_entropy,
    hard_negatives,
    masked_mean,
    similarity,
    transport_distance,
    word_region_alignment_loss,
)
from mmx.modalities.masking import modality_of, present
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Context, Objective, check_entries, check_head, reading
from mmx.objectives.views import View
from mmx.topologies import Sum
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Matching(Objective):
    """Is this text the text of this image? In half of the examples it is that of another one of the batch.

    All modalities are read together, so this is what trains their interaction (ITM: ViLBERT, LXMERT, UNITER). A pair
    that lacks one of them takes no part.
    """

    modalities: tuple[str, ...] = ("image", "text")
    """The entries that are read together; the last one is swapped."""
    swap_rate: float = 0.5
    """How often it is swapped."""
    negatives: Literal["random", "hard"] = "random"
    """random: any other of the batch; hard: likelier the closer it is to the first of the modalities in the shared space
    (ALBEF, arXiv 2107.07651, 3.2)."""
    alignment: float = 0.0
    """Weight of the alignment of words and regions: the cheapest transport between the tokens of the first and the last modality
    is to be short where they match, and long where not (UNITER: 0.1)."""
    stream: str = ""
    """The modality whose tokens tell, as they leave the last stage; empty: all streams, where the model's poolers read them."""
    head: str = ""
    """A head that the model has already, of two classes, of which the second is: they match; empty: one of its own, matching."""

    def __post_init__(self) -> None:
        at_least(self, swap_rate=0, alignment=0)
        if self.swap_rate > 1:
            raise InputError(f"swap_rate={self.swap_rate}; it is a share, at most 1")

    @property
    def _head(self) -> str:
        own = (
            "matching"
            if set(map(modality_of, self.modalities)) == {"image", "text"}
            else "matching_" + "_".join(modality_of(entry) for entry in self.modalities)
        )
        return self.head or own

    @property
    def _swapped(self) -> str:
        return f"{self.modalities[-1]}/swapped-{self.swap_rate:g}-{self.negatives}-{len(self.modalities)}"

    def check(self, model: MultimodalTransformer) -> None:
        check_entries(self.modalities, model)
        check_head(self._head, model)
        if len(self.modalities) < 2:
            raise InputError(f"modalities={self.modalities}: there is nothing to match; name two or more")
        if self.negatives == "hard" and (model.embed is None or model.logit_scale is None):
            raise InputError("negatives='hard' are near in the shared space, and the model has none; build it with embed > 0")
        if self.alignment and not all(stage.separate for stage in model.stages):
            raise InputError("alignment: this topology sums the streams into one; there are no words and regions left to align")
        if self.stream and not self.head:
            self._check_stream(model)

    def _check_stream(self, model: MultimodalTransformer) -> None:
        read, made = list(map(modality_of, self.modalities)), [name for stage in model.stages for name in stage.makes]
        if self.stream not in (*read, *made):
            raise InputError(unknown("stream", self.stream, (*read, *made)))
        if self.stream in read and any(isinstance(stage, Sum) for stage in model.stages):
            raise InputError(
                f"stream={self.stream!r}: this topology sums the streams into one; leave `stream` empty, which reads it"
            )

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        own = Classifier(2, self.stream, pooler=Pooler("mean")) if self.stream else Classifier(2)
        return {} if self.head else {self._head: own}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        original = jax.tree.map(jnp.asarray, batch[self.modalities[-1]])
        size = jax.tree.leaves(original)[0].shape[0]
        shift_key, swap_key = jax.random.split(key)
        swap = jax.random.bernoulli(swap_key, self.swap_rate, (size,))
        if self.negatives == "hard":
            chosen = self._hard(batch, shift_key, context)
            other = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), original)
        else:
            shift = jax.random.randint(shift_key, (), 1, max(size, 2))
            other = jax.tree.map(lambda x: jnp.roll(x, shift, axis=0), original)
        embedder = context.model.modalities[modality_of(self.modalities[-1])]
        both = zip(_existing(embedder, original), _existing(embedder, other), strict=True)
        same = jnp.stack([(a == b).reshape(size, -1).all(1) for a, b in both]).all(0)

        def pick(mine: jax.Array, theirs: jax.Array) -> jax.Array:
            return jnp.where(swap.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        swapped = jax.tree.map(pick, original, other)
        return {**batch, self._swapped: swapped, f"{self._swapped}:label": (~swap | same).astype(jnp.int32)}

    def _hard(self, batch: Batch, key: jax.Array, context: Context) -> jax.Array:
        """The number of another example whose last entry is near to this one's first, `(B,)`."""
        first, last = self.modalities[0], self.modalities[-1]
        found = context.embeddings(batch, (first, last), context.params)
        scores = similarity(found[first], found[last], found["scale"].mean())
        return hard_negatives(scores, key, present(batch[last]))

    def views(self) -> tuple[View, ...]:
        return (reading(*self.modalities[:-1], self._swapped, alone=True),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        label, output = batch[f"{self._swapped}:label"], outputs[0]
        entries = (*self.modalities[:-1], self._swapped)
        there = functools.reduce(jnp.logical_and, [present(batch[entry]) for entry in entries])
        values = {"logits": output.logits[self._head], "label": label, "there": there}
        if self.alignment:
            text, image = (output.streams[modality_of(self.modalities[i])].without_special for i in (-1, 0))
            words, regions = text.values.astype(jnp.float32), image.values.astype(jnp.float32)
            values["distance"] = transport_distance(words, regions, text.dense_mask, image.dense_mask)
        return values

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        logits, label, there = values["logits"], values["label"], values["there"]
        accuracy = masked_mean((logits.argmax(-1) == label).astype(jnp.float32), there)
        loss, metrics = masked_mean(cross_entropy(logits, label), there), {f"{self._head}/accuracy": accuracy}
        if self.alignment:
            metrics[f"{self._head}/alignment"] = word_region_alignment_loss(values["distance"], label == 1, there)
            loss += self.alignment * metrics[f"{self._head}/alignment"]
        return loss, metrics


def _existing(embedder: Any, raw: Any) -> list[jax.Array]:
    """What a raw value tells of the tokens that exist, each `(B, ...)`; whatever stands in the padding is zeros."""
    fields, there = embedder.read(raw)[0], embedder.there(raw)
    told = jax.tree.leaves({**fields, embedder.reads[0]: embedder.content(raw)})
    if there is None:
        return told

    def hidden(x: jax.Array) -> jax.Array:
        by_token = x.shape[:2] == there.shape
        return jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, 0) if by_token else x

    return [there, *map(hidden, told)]
