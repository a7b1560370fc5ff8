"""Matching: does this belong to that? Survey 3.4, "matching"."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.contrastive import contrastive_loss
from mmx.errors import InputError, at_least
from mmx.heads import Classifier, Pooler, stream_of
from mmx.losses import (
    LOWEST,
    cross_entropy,
    hard_negatives,
    masked_mean,
    momentum_contrastive_loss,
    similarity,
    transport_distance,
    word_region_alignment_loss,
)
from mmx.modalities.masking import modality_of, present
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Context, Objective, check_entries, check_head, reading
from mmx.objectives.views import View
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Each modality alone into the shared space; partners close, all others of the batch far (CLIP, ALIGN, SigLIP).

    With a `teacher`, the moving average of the model (`optimizer.ema`), the targets are in part what it believes, and its vectors
    of earlier batches wait in a `queue` as further negatives (MoCo, ALBEF).
    """

    modalities: tuple[str, ...] = ("image", "text")
    """The loss is the mean over all pairs of these entries."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which of the batch is the partner (CLIP); sigmoid: each pair a question of its own (SigLIP)."""
    form: Literal["dense", "gather", "ring"] = "dense"
    """How the scores of all pairs are divided over devices: dense (by XLA), gather (each device its rows) or ring (a block at
    a time, for batches whose scores no device can hold); the same number."""
    teacher: float = 0.0
    """Share of the momentum teacher in the targets (ALBEF: 0.4)."""
    queue: int = 0
    """Vectors of earlier batches that the teacher keeps of each modality (ALBEF: 65536)."""

    def __post_init__(self) -> None:
        at_least(self, teacher=0, queue=0)
        if self.teacher > 1:
            raise InputError(f"teacher={self.teacher}; it is a share, at most 1")
        if self._momentum and (self.kind != "softmax" or self.form != "dense"):
            raise InputError(f"kind={self.kind!r}, form={self.form!r}: a teacher or queue wants kind='softmax', form='dense'")

    @property
    def _taught(self) -> str:
        return "contrastive/teacher-" + "+".join(self.modalities)

    @property
    def _momentum(self) -> bool:
        return bool(self.teacher or self.queue)

    def check(self, model: MultimodalTransformer) -> None:
        check_entries(self.modalities, model)
        if len(self.modalities) < 2:
            raise InputError(f"modalities={self.modalities}: there is nothing to compare; name two or more")
        if model.embed is None or model.logit_scale is None:
            raise InputError("the model has no shared space; build it with embed > 0")
        self._check_bias(model.logit_bias)

    def _check_bias(self, bias: Any) -> None:
        if (self.kind == "sigmoid") != (bias is not None):
            raise InputError(f"kind={self.kind!r}; set model.logit_bias to -10 for sigmoid, and to None for softmax")

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        if not self._momentum:
            return batch
        if context.average is None:
            raise InputError("the momentum teacher is the moving average of the model; set optimizer.ema, such as 0.995")
        found = context.embeddings(batch, {modality_of(entry): entry for entry in self.modalities}, context.average)
        return {**batch, self._taught: {n: x for n, x in found.items() if n != "scale"}}

    def views(self) -> tuple[View, ...]:
        return tuple(reading(entry) for entry in self.modalities)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        scale = outputs[0].logit_scale
        if scale is None:
            raise InputError("contrastive: the model has no shared space; build it with embed > 0")
        self._check_bias(outputs[0].logit_bias)
        embeddings, there = {}, {}
        for name, output in zip(map(modality_of, self.modalities), outputs, strict=True):
            embeddings[name] = output.embeddings[name]
            there[name] = output.streams[stream_of(output.streams, name) or name].present
        rows = next(iter(there.values())).shape
        scalars = {"logit_scale": scale, "logit_bias": outputs[0].logit_bias}
        taught = {"teacher": batch[self._taught]} if self._momentum else {}
        return {"embeddings": embeddings, "present": there, **taught} | {
            n: jnp.broadcast_to(x, rows) for n, x in scalars.items() if x is not None
        }

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        embeddings, there = values["embeddings"], values["present"]
        scalars = {name: values[name].mean() for name in ("logit_scale", "logit_bias") if name in values}
        pairs = list(itertools.combinations(map(modality_of, self.modalities), 2))
        if self._momentum:
            losses = [self._with_teacher(a, b, values, scalars["logit_scale"], memory) for a, b in pairs]
            return jnp.stack(losses).mean(), scalars
        losses = [
            contrastive_loss(embeddings[a], embeddings[b], **scalars, mask=there[a] & there[b], form=self.form) for a, b in pairs
        ]
        metrics = dict(scalars)
        if self.form == "dense":  # elsewhere the scores are never held at once
            a, b = pairs[0]
            scores, both = similarity(embeddings[a], embeddings[b]), there[a] & there[b]
            best = jnp.where(both[None], scores, LOWEST).argmax(1) == jnp.arange(len(scores))
            metrics["contrastive/recall"] = masked_mean(best.astype(jnp.float32), both)
        return jnp.stack(losses).mean(), metrics

    def _with_teacher(self, a: str, b: str, values: Any, scale: jax.Array, memory: Any) -> jax.Array:
        own, taught, both = values["embeddings"], values["teacher"], values["present"][a] & values["present"][b]
        waiting: dict[str, Any] = memory["queue"] if memory else {}
        here = jnp.concatenate([both, *([waiting["there"]] if waiting else [])])  # (N,)
        keys = {n: jnp.concatenate([taught[n], *([waiting[n]] if waiting else [])]) for n in (a, b)}  # (N, E)

        def scores(queries: jax.Array, n: str) -> jax.Array:
            return jnp.where(here, similarity(queries, keys[n], scale), LOWEST)

        return momentum_contrastive_loss(
            scores(own[a], b), scores(own[b], a), scores(taught[a], b), scores(taught[b], a), self.teacher, both
        )

    def memory(self, model: MultimodalTransformer) -> Any:
        if not self.queue:
            return None
        assert model.embed is not None
        empty = {modality_of(entry): jnp.zeros((self.queue, model.embed)) for entry in self.modalities}
        return {"queue": {**empty, "there": jnp.zeros(self.queue, bool)}}

    def remember(self, memory: Any, batch: Batch) -> Any:
        if not self.queue:
            return memory
        new = batch[self._taught]
        there = functools.reduce(jnp.logical_and, [present(batch[entry]) for entry in self.modalities])
        old = memory["queue"]
        return {"queue": {n: jnp.concatenate([x, old[n]])[: self.queue] for n, x in {**new, "there": there}.items()}}


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

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        own = Classifier(2, self.stream, pooler=Pooler("mean")) if self.stream else Classifier(2)
        return {} if self.head else {self._head: own}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        original = batch[self.modalities[-1]]
        size = jax.tree.leaves(original)[0].shape[0]
        shift_key, swap_key = jax.random.split(key)
        swap = jax.random.bernoulli(swap_key, self.swap_rate, (size,))
        if self.negatives == "hard":
            chosen = self._hard(batch, shift_key, context)
            other = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), original)
        else:
            shift = jax.random.randint(shift_key, (), 1, max(size, 2))
            other = jax.tree.map(lambda x: jnp.roll(x, shift, axis=0), original)
        same = jnp.stack([_rows_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (original, other)), strict=True)]).all(0)

        def pick(mine: jax.Array, theirs: jax.Array) -> jax.Array:
            return jnp.where(swap.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        swapped = jax.tree.map(pick, original, other)
        return {**batch, self._swapped: swapped, f"{self._swapped}:label": (~swap | same).astype(jnp.int32)}

    def _hard(self, batch: Batch, key: jax.Array, context: Context) -> jax.Array:
        """The number of another example whose last entry is near to this one's first, `(B,)`."""
        first, last = self.modalities[0], self.modalities[-1]
        found = context.embeddings(batch, {modality_of(entry): entry for entry in (first, last)}, context.params)
        scores = similarity(found[modality_of(first)], found[modality_of(last)], found["scale"].mean())
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


def _rows_equal(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a == b).reshape(a.shape[0], -1).all(-1)
