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
from mmx.errors import InputError
from mmx.heads import Classifier, stream_of
from mmx.losses import cross_entropy, masked_mean
from mmx.objectives.views import View, view
from mmx.types import Batch, Masked, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Each modality alone into the shared space; partners close, all others of the batch far (CLIP, ALIGN, SigLIP)."""

    weight: float = 1.0
    """Share in the total loss; 0 leaves it out."""
    modalities: tuple[str, ...] = ("image", "text")
    """The loss is the mean over all pairs of these."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which of the batch is the partner (CLIP); sigmoid: each pair a question of its own (SigLIP)."""
    form: Literal["dense", "gather", "ring"] = "dense"
    """How the scores of all pairs are divided over devices: dense (by XLA), gather (each device its rows) or ring (a block at
    a time, for batches whose scores no device can hold); the same number."""

    def heads(self) -> Mapping[str, nn.Module]:
        return {}

    def corrupt(self, batch: Batch, key: jax.Array) -> Batch:
        return batch

    def views(self) -> tuple[View, ...]:
        return tuple(view(name) for name in self.modalities)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        scale = outputs[0].logit_scale
        if scale is None:
            raise InputError("contrastive: the model has no shared space; build it with embed > 0")
        if (self.kind == "sigmoid") != (outputs[0].logit_bias is not None):
            raise InputError(f"contrastive: kind={self.kind!r}; set model.logit_bias to -10 for sigmoid, and to None for softmax")
        embeddings, present = {}, {}
        for name, output in zip(self.modalities, outputs, strict=True):
            embeddings[name] = output.embeddings[name]
            present[name] = output.streams[stream_of(output.streams, name) or name].present
        rows = next(iter(present.values())).shape
        scalars = {"logit_scale": scale, "logit_bias": outputs[0].logit_bias}
        return {"embeddings": embeddings, "present": present} | {
            n: jnp.broadcast_to(x, rows) for n, x in scalars.items() if x is not None
        }

    def loss(self, values: Any) -> tuple[jax.Array, Metrics]:
        embeddings, present = values["embeddings"], values["present"]
        scalars = {name: values[name].mean() for name in ("logit_scale", "logit_bias") if name in values}
        losses = [
            contrastive_loss(embeddings[a], embeddings[b], **scalars, mask=present[a] & present[b], form=self.form)
            for a, b in itertools.combinations(self.modalities, 2)
        ]
        return jnp.stack(losses).mean(), scalars


@dataclasses.dataclass(frozen=True)
class Matching:
    """Is this text the text of this image? In half of the examples it is that of another one of the batch.

    All modalities are read together, so this is what trains their interaction (ITM: ViLBERT, LXMERT, UNITER). An example
    that lacks one of them takes no part.
    """

    weight: float = 1.0
    """Share in the total loss; 0 leaves it out."""
    modalities: tuple[str, ...] = ("image", "text")
    """What is read together; the last one is swapped."""
    swap_rate: float = 0.5
    """How often it is swapped."""

    def heads(self) -> Mapping[str, nn.Module]:
        return {"matching": Classifier(2)}

    def corrupt(self, batch: Batch, key: jax.Array) -> Batch:
        original = batch[self.modalities[-1]]
        size = jax.tree.leaves(original)[0].shape[0]
        shift_key, swap_key = jax.random.split(key)
        shift = jax.random.randint(shift_key, (), 1, max(size, 2))
        swap = jax.random.bernoulli(swap_key, self.swap_rate, (size,))
        other = jax.tree.map(lambda x: jnp.roll(x, shift, axis=0), original)
        same = jnp.stack([_rows_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (original, other)), strict=True)]).all(0)

        def pick(mine: jax.Array, theirs: jax.Array) -> jax.Array:
            return jnp.where(swap.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        swapped = jax.tree.map(pick, original, other)
        return {**batch, "matching/swapped": swapped, "matching/label": (~swap | same).astype(jnp.int32)}

    def views(self) -> tuple[View, ...]:
        return (view(*self.modalities[:-1], **{self.modalities[-1]: "matching/swapped"}),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        entries = [batch[name] for name in (*self.modalities[:-1], "matching/swapped")]
        label = batch["matching/label"]
        present = [raw.mask.reshape(label.shape[0], -1).any(-1) for raw in entries if isinstance(raw, Masked)]
        there = functools.reduce(jnp.logical_and, present, jnp.ones(label.shape, bool))
        return {"logits": outputs[0].logits["matching"], "label": label, "there": there}

    def loss(self, values: Any) -> tuple[jax.Array, Metrics]:
        logits, label, there = values["logits"], values["label"], values["there"]
        accuracy = masked_mean((logits.argmax(-1) == label).astype(jnp.float32), there)
        return masked_mean(cross_entropy(logits, label), there), {"matching/accuracy": accuracy}


def _rows_equal(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a == b).reshape(a.shape[0], -1).all(-1)
