"""Contrasting: which of the batch belongs to this? Survey 3.4, "matching"."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.contrastive import contrastive_loss, contrastive_recall, recall
from mmx.errors import InputError, at_least
from mmx.heads import TokenClassifier, stream_of
from mmx.losses import (
    LOWEST,
    batch_ranking_loss,
    late_interaction,
    masked_mean,
    mil_nce_loss,
    momentum_contrastive_loss,
    similarity,
    symmetric_cross_entropy,
    unit_vectors,
)
from mmx.modalities.masking import modality_of, present
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Context, Objective, check_entries, reading
from mmx.objectives.views import View
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Each entry alone into the shared space; partners close, all others of the batch far (CLIP, ALIGN, SigLIP).

    With `tokens`, the tokens of both meet there one by one (FILIP, arXiv 2111.07783). With a `teacher`, the moving average of the
    model (`optimizer.ema`), the targets are in part what it believes, and its vectors of earlier batches wait in a `queue` as
    further negatives (MoCo, ALBEF).
    """

    modalities: tuple[str, ...] = ("image", "text")
    """The loss is the mean over all pairs of these entries."""
    kind: Literal["softmax", "sigmoid", "ranking", "mil_nce"] = "softmax"
    """softmax: which of the batch is the partner (CLIP); sigmoid: each pair a question of its own (SigLIP); ranking: a partner
    scores more than any other, by `margin` (videos and subtitles in HERO); mil_nce: one at least of several entries of a modality
    is the partner (video, text/before, text, text/after: MIL-NCE), which the other modality may have several of, too (UniVL)."""
    form: Literal["dense", "gather", "ring"] = "dense"
    """How the scores of all pairs are divided over devices: dense (by XLA), gather (each device its rows) or ring (a block at
    a time, for batches whose scores no device can hold); the same number."""
    tokens: int = 0
    """Size of a space in which tokens are compared, [BOS] and [EOS] too: each asks for its best match in the other, and the mean
    of these is the score of a pair (FILIP: 256). It trains no vector of the whole, which retrieval and hard negatives want: list
    a Contrastive without tokens beside it for those. 0: one vector of each."""
    margin: float = 0.2
    """By how much a partner is to score more, for ranking."""
    teacher: float = 0.0
    """Share of the momentum teacher in the targets (ALBEF: 0.4)."""
    queue: int = 0
    """Vectors of earlier batches that the teacher keeps of each modality (ALBEF: 65536)."""

    def __post_init__(self) -> None:
        at_least(self, teacher=0, queue=0, tokens=0, margin=0)
        if self.teacher > 1:
            raise InputError(f"teacher={self.teacher}; it is a share, at most 1")
        if self._momentum and (self.kind != "softmax" or self.form != "dense" or self.tokens):
            wanted = "kind='softmax', form='dense', tokens=0"
            raise InputError(f"kind={self.kind!r}, form={self.form!r}, tokens={self.tokens}: a teacher or queue wants {wanted}")
        if self.tokens and self.kind not in ("softmax", "ranking"):
            raise InputError(f"kind={self.kind!r}: tokens are compared by softmax or ranking")
        if self.form != "dense" and (self.tokens or self.kind not in ("softmax", "sigmoid")):
            raise InputError(f"form={self.form!r}: only softmax and sigmoid of one vector each can be divided; use form='dense'")

    @property
    def _bags(self) -> list[list[str]]:
        """The entries of each modality."""
        names = dict.fromkeys(map(modality_of, self.modalities))
        return [[entry for entry in self.modalities if modality_of(entry) == name] for name in names]

    @property
    def _taught(self) -> str:
        return "contrastive/teacher-" + "+".join(self.modalities)

    @property
    def _momentum(self) -> bool:
        return bool(self.teacher or self.queue)

    def check(self, model: MultimodalTransformer) -> None:
        for entry in self.modalities:  # each is read alone
            check_entries((entry,), model)
        if len(set(self.modalities)) < max(len(self.modalities), 2):
            raise InputError(f"modalities={self.modalities}: there is nothing to compare; name two or more, each once")
        if self.kind == "mil_nce" and (len(self._bags) != 2 or len(self._bags[1]) % len(self._bags[0])):
            raise InputError(
                f"modalities={self.modalities}: mil_nce wants entries of two modalities, and of the second as many, or a multiple"
            )
        if model.embed is None or model.logit_scale is None:
            raise InputError("the model has no shared space; build it with embed > 0")
        self._check_bias(model.logit_bias)
        if self.tokens and not all(stage.separate for stage in model.stages):
            raise InputError("tokens: this topology sums the streams into one; there are no tokens of either left to compare")

    def _check_bias(self, bias: Any) -> None:
        if (self.kind == "sigmoid") != (bias is not None):
            raise InputError(f"kind={self.kind!r}; set model.logit_bias to -10 for sigmoid, and to None for others")

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        names = dict.fromkeys(map(modality_of, self.modalities)) if self.tokens else ()
        return {_head(name): TokenClassifier(self.tokens, name, transform=False, bias=False) for name in names}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        if not self._momentum:
            return batch
        if context.average is None:
            raise InputError("the momentum teacher is the moving average of the model; set optimizer.ema, such as 0.995")
        found = context.embeddings(batch, self.modalities, context.average)
        return {**batch, self._taught: {entry: found[entry] for entry in self.modalities}}

    def evaluated(self) -> Objective:
        return dataclasses.replace(self, teacher=0.0, queue=0)

    def views(self) -> tuple[View, ...]:
        return tuple(reading(entry) for entry in self.modalities)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        scale = outputs[0].logit_scale
        if scale is None:
            raise InputError("contrastive: the model has no shared space; build it with embed > 0")
        self._check_bias(outputs[0].logit_bias)
        embeddings, there = {}, {}
        for entry, output in zip(self.modalities, outputs, strict=True):
            name = modality_of(entry)
            tokens = output.streams[stream_of(output.streams, name) or name]
            there[entry] = tokens.present
            embeddings[entry] = output.embeddings[name]
            if self.tokens:
                each = output.logits[_head(name)][:, len(tokens.special) :]
                embeddings[entry] = unit_vectors(each), tokens.without_special.dense_mask
        scalars = {"logit_scale": scale, "logit_bias": outputs[0].logit_bias}
        taught = {"teacher": batch[self._taught]} if self._momentum else {}
        rows = there[self.modalities[0]].shape
        return {"embeddings": embeddings, "present": there, **taught} | {
            n: jnp.broadcast_to(x, rows) for n, x in scalars.items() if x is not None
        }

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        scalars = {name: values[name].mean() for name in ("logit_scale", "logit_bias") if name in values}
        if self.kind == "mil_nce":
            return self._of_bags(values, scalars)
        pairs = list(itertools.combinations(self.modalities, 2))
        losses = [self._of_pair(a, b, values, scalars, memory) for a, b in pairs]
        metrics = dict(scalars)
        metrics["contrastive/recall"], metrics["contrastive/recall_back"] = self._recall(*pairs[0], values)
        return jnp.stack(losses).mean(), metrics

    def _recall(self, a: str, b: str, values: Any) -> tuple[jax.Array, jax.Array]:
        """How often the partner of an a scores more than any other b, and the other way round."""
        x, y = values["embeddings"][a], values["embeddings"][b]
        both = values["present"][a] & values["present"][b]
        if not self.tokens:
            return contrastive_recall(x, y, both, self.form)
        forth, back = self._scores(x, y)
        return recall(forth, both), recall(back, both)

    def _of_pair(self, a: str, b: str, values: Any, scalars: Any, memory: Any) -> jax.Array:
        x, y = values["embeddings"][a], values["embeddings"][b]
        both = values["present"][a] & values["present"][b]
        if self._momentum:
            return self._with_teacher(a, b, both, values, scalars["logit_scale"], memory)
        if not self.tokens and self.kind != "ranking":
            return contrastive_loss(x, y, **scalars, mask=both, form=self.form)
        forth, back = self._scores(x, y)
        if self.kind == "ranking":
            return batch_ranking_loss(forth, back, self.margin, both)
        return symmetric_cross_entropy(scalars["logit_scale"] * forth, scalars["logit_scale"] * back, both)

    def _scores(self, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
        """Cosines of every a and every b, and the other way round, `(B, B)`."""
        if self.tokens:
            return late_interaction(x[0], y[0], x[1], y[1])
        scores = similarity(x, y)
        return scores, scores.T

    def _of_bags(self, values: Any, scalars: Any) -> tuple[jax.Array, Metrics]:
        def rows(found: Mapping[str, jax.Array], bag: Sequence[str]) -> jax.Array:
            each = jnp.stack([found[entry] for entry in bag], 1)
            return each.reshape(-1, *each.shape[2:])

        clips, texts = ([rows(values[name], bag) for name in ("embeddings", "present")] for bag in self._bags)
        scores, both = similarity(texts[0], clips[0]), texts[1][:, None] & clips[1]
        bag = len(self._bags[0])
        loss = mil_nce_loss(scalars["logit_scale"] * scores, bag, both)
        of_clip, of_text = (
            jnp.arange(len(x)) // len(entries) for (x, _), entries in zip((clips, texts), self._bags, strict=True)
        )
        there, own = jnp.where(both, scores, LOWEST), both & (of_text[:, None] == of_clip)
        forth, back = of_text[there.argmax(0)] == of_clip, of_clip[there.argmax(1)] == of_text
        return loss, {
            **scalars,
            "contrastive/recall": masked_mean(forth.astype(jnp.float32), own.any(0)),
            "contrastive/recall_back": masked_mean(back.astype(jnp.float32), own.any(1)),
        }

    def _with_teacher(self, a: str, b: str, both: jax.Array, values: Any, scale: jax.Array, memory: Any) -> jax.Array:
        own, taught = values["embeddings"], values["teacher"]
        queue = memory["queue"] if memory else None
        waiting = {} if queue is None else dict(zip(self.modalities, queue["vectors"], strict=True))
        here = both if queue is None else jnp.concatenate([both, queue["there"]])  # (N,)
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
        empty = [jnp.zeros((self.queue, model.embed)) for _ in self.modalities]
        return {"queue": {"vectors": empty, "there": jnp.zeros(self.queue, bool)}}

    def remember(self, memory: Any, batch: Batch) -> Any:
        if not self.queue:
            return memory
        there = functools.reduce(jnp.logical_and, [present(batch[entry]) for entry in self.modalities])
        new = {"vectors": [batch[self._taught][entry] for entry in self.modalities], "there": there}
        return {"queue": jax.tree.map(lambda new, old: jnp.concatenate([new, old])[: self.queue], new, memory["queue"])}


def _head(modality: str) -> str:
    return f"tokenwise_{modality}"
