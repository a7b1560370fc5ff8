"""Masking: what was it that is hidden? Survey 3.4, "masking"."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, at_least
from mmx.heads import stream_of
from mmx.losses import info_nce, kl_divergence, normalised_each, regression_loss, similarity, unit_vectors
from mmx.modalities import Ids
from mmx.modalities.masking import modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.hiding import Mask
from mmx.objectives.objective import Context, Objective, check_entries, check_head, classified_tokens, reading, total
from mmx.objectives.views import View, run_views
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class MaskedModelling(Objective):
    """What stood in the hidden places, told from what is left of its own modality and from the others.

    Words (BERT; with an image beside them UNITER, ViLT), patches (BEiT, MAE), regions (ViLBERT, LXMERT), frames (HERO), pieces
    of a sound, whole modalities. Several modalities may be hidden in one pass (FLAVA, InterBERT).
    """

    masks: Mapping[str, Mask] = dataclasses.field(default_factory=lambda: {"text": Mask()}, hash=False)
    """For each entry that is hidden in part, how; the loss is the mean over them."""
    given: tuple[str, ...] = ("image",)
    """Entries that are read with them, whole."""
    teacher: float = 0.0
    """Share in the loss of what the moving average of the model believes of hidden ids and classes (ALBEF, arXiv 2107.07651, 3.3:
    0.4). Its beliefs of all tokens are held at once, (B, L, ids)."""
    label_smoothing: float = 0.0
    """Part of the target, where it is an id or a class, that is spread over all of them."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, for ids and classes."""
    chunks: int = 1
    """Pieces in which the scores of ids are made, read and forgotten; more of them: less memory, where there are many ids."""

    def __post_init__(self) -> None:
        at_least(self, chunks=1, label_smoothing=0, z_loss=0)
        if not 0 <= self.teacher <= 1:
            raise InputError(f"teacher={self.teacher}; it is a share, 0 to 1")
        if self.teacher and self.chunks > 1:
            raise InputError(f"chunks={self.chunks} with teacher={self.teacher}, whose beliefs are held at once; set chunks=1")

    @property
    def _asked(self) -> dict[str, Mask]:
        """The masks of which something is asked."""
        return {name: mask for name, mask in self.masks.items() if mask.answer != "nothing"}

    @property
    def _taught(self) -> str:
        return f"masking/teacher-{zlib.crc32(repr(self).encode()):08x}"

    def check(self, model: MultimodalTransformer) -> None:
        if not self._asked:
            raise InputError("masks: nothing is asked of what is hidden; name a modality, such as {'text': Mask()}")
        of_ids = [m for n, m in self._asked.items() if isinstance(model.modalities.get(modality_of(n)), Ids) and not m.classes]
        if self.chunks > 1 and not of_ids:
            raise InputError(f"chunks={self.chunks} is of the scores of ids, and no ids are asked; set chunks=1")
        check_entries((*self.masks, *self.given), model)
        for name, mask in self.masks.items():
            mask.check(name, model)
        for name, mask in self._asked.items():
            check_head(mask.head_of(name), model)
            if self.teacher and not mask.form(model.modalities[modality_of(name)])[1]:
                raise InputError(f"teacher={self.teacher}: it speaks of ids and classes, and numbers are asked of {name!r}")

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        return {m.head_of(n): m.make_head(n, modalities[modality_of(n)]) for n, m in self._asked.items() if not m.head}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        for i, (name, mask) in enumerate(self.masks.items()):
            embedder = context.model.modalities[modality_of(name)]
            batch = mask.apply(name, batch, embedder, jax.random.fold_in(key, i))
        if not self.teacher:
            return batch
        if context.average is None:
            raise InputError("the momentum teacher is the moving average of the model; set optimizer.ema, such as 0.995")
        (view,) = self.views()
        lengths = {name: batch[f"{mask.entry(name)}:hidden"].shape[1] for name, mask in self._asked.items()}

        def look(batch: Batch) -> dict[str, jax.Array]:
            output = run_views(context.model, context.average, batch, [view], None)[view]
            said = {n: of_tokens(output, modality_of(n), m.head_of(n), lengths[n], m.drop) for n, m in self._asked.items()}
            return jax.tree.map(jax.nn.softmax, said)

        return {**batch, self._taught: context.ask(look, {entry: batch[entry] for _, entry in view.reads})}

    def evaluated(self) -> Objective:
        return dataclasses.replace(self, teacher=0.0, label_smoothing=0.0, z_loss=0.0)

    def views(self) -> tuple[View, ...]:
        return (reading(*self.given, *(mask.entry(name) for name, mask in self.masks.items())),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        return {name: self._answers(name, mask, outputs[0], batch) for name, mask in self._asked.items()}

    def _answers(self, name: str, mask: Mask, output: Outputs, batch: Batch) -> dict[str, jax.Array]:
        asked, counts = mask.asked(name, batch)
        head = mask.head_of(name)
        at = places(output, modality_of(name), head, counts.shape[1], stripped=mask.drop)
        logits = output.logits[head][:, at]  # (B, L, n)
        if asked.ndim == 2 or mask.answer == "distribution":
            if asked.ndim == 2:
                chunks = 1 if mask.classes else self.chunks
                settings = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
                losses, best = classified_tokens(output, head, at, asked, counts != 0, chunks, **settings)
            else:
                losses, best, asked = kl_divergence(logits, asked), logits.argmax(-1), asked.argmax(-1)
            if self.teacher:
                losses = (1 - self.teacher) * losses + self.teacher * kl_divergence(logits, batch[self._taught][name])
            return _chosen(losses, best == asked, counts)
        asked = asked.astype(jnp.float32)
        if mask.answer == "contrast":
            there = batch[f"{mask.entry(name)}:there"]
            if mask.others == "batch":  # which only `loss` sees
                return {"said": logits, "keys": asked, "there": there, "counts": counts}
            losses, right = jax.vmap(functools.partial(_which, temperature=mask.temperature))(logits, asked, there)
            return _chosen(losses, right, counts)
        asked = normalised_each(asked) if mask.answer == "normalised" else asked
        losses = regression_loss(logits, asked, huber=mask.answer == "huber")
        squares = {"error": jnp.square(logits - asked), "first": asked, "second": jnp.square(asked)}
        return {"loss": _sum(losses, counts), "count": counts.sum(1)} | {n: _sum(x.mean(-1), counts) for n, x in squares.items()}

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        losses, metrics = [], {}
        for name, mask in self._asked.items():
            found, head = values[name], mask.head_of(name)
            if mask.others == "batch":
                counts = found["counts"]
                of_all = {n: found[n].reshape(-1, *found[n].shape[2:]) for n in ("said", "keys", "there")}
                each, right = _which(**of_all, temperature=mask.temperature)
                found = _chosen(each.reshape(counts.shape), right.reshape(counts.shape), counts)
            count = total(found["count"])
            losses.append(found["loss"].sum() / count)
            if "right" in found:
                metrics[f"{head}/accuracy"] = found["right"].sum() / count
            if mask.answer == "content" and "right" in found and not self.teacher:
                metrics[f"{head}/perplexity"] = jnp.exp(losses[-1])
            if "error" in found:  # 0: no better than the mean of all that was hidden
                mean = found["first"].sum() / count
                variance = found["second"].sum() / count - jnp.square(mean)
                metrics[f"{head}/explained"] = 1 - found["error"].sum() / count / jnp.maximum(variance, 1e-12)
        return jnp.stack(losses).mean(), metrics


def of_tokens(output: Outputs, modality: str, head: str, length: int, stripped: bool = False) -> jax.Array:
    """What a head says of the tokens of a modality alone, `(B, length, n)`."""
    return output.logits[head][:, places(output, modality, head, length, stripped)]


def places(output: Outputs, modality: str, head: str, length: int, stripped: bool = False) -> slice:
    """Where a head speaks of the tokens of a modality; special ones stand in front, if they are not `stripped`."""
    stream, said = stream_of(output.streams, modality), output.logits[head]
    if stream is None:
        raise InputError(f"head {head!r}: modality {modality!r} has no stream in this batch")
    tokens = output.streams[stream]
    front = len(tokens.special) if not stripped and said.shape[1] == tokens.length else 0
    if said.shape[1] < front + length:
        raise InputError(f"head {head!r} answers {said.shape[1] - front} tokens, and {modality!r} has {length}")
    return slice(front, front + length)


def _which(said: jax.Array, keys: jax.Array, there: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Which of the keys that are there each is, `(N, D), (N, D), (N,)`: the loss, and whether the nearest is right, `(N,)`."""
    said, keys, own = unit_vectors(said), unit_vectors(keys), jnp.arange(len(said))
    best = jnp.where(there, similarity(said, keys), -jnp.inf).argmax(-1)
    return info_nce(said, keys, own, temperature, there), best == own


def _chosen(losses: jax.Array, right: jax.Array, counts: jax.Array) -> dict[str, jax.Array]:
    """The sums over the tokens of each example."""
    return {"loss": _sum(losses, counts), "right": _sum(right, counts), "count": counts.sum(1)}


def _sum(values: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.where(counts != 0, values * counts, 0).sum(1)
