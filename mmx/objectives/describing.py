"""Describing: say what is there, one token after the other. Survey 3.4, "describing"."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, at_least
from mmx.heads import TiedDecoder
from mmx.modalities import Ids
from mmx.modalities.embedder import GROUP
from mmx.modalities.masking import modality_of, token_mask, unmask
from mmx.model import MultimodalTransformer
from mmx.objectives.hiding import Mask
from mmx.objectives.objective import Context, Objective, check_entries, check_head, classified_tokens, total
from mmx.objectives.views import View
from mmx.types import Batch, Masked, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Captioning(Objective):
    """The next token of the text, given the tokens before it and the other modalities (CoCa, SimVLM, GIT).

    The text is read causally by the very layers that read it in both directions elsewhere: one set of weights
    understands and generates. In early summation the sum is causal, so a word sees the patches up to its position.

    Of what is given, nothing: a language model. Given what is hidden in part (`masks`): denoising (BART, T5, XGPT). With a
    `prefix`, or where the text's `group` tells one (a question before its answer): a prefix language model (SimVLM).
    """

    text: str = "text"
    """The entry of ids that is written."""
    given: tuple[str, ...] = ("image",)
    """The entries it is written about."""
    masks: Mapping[str, Mask] = dataclasses.field(default_factory=dict, hash=False)
    """For entries of `given` that are hidden in part, how."""
    writer: str = ""
    """The modality of ids that writes; empty: that of the text. Another one is the decoder of an encoder-decoder."""
    prefix: float = 0.0
    """The text up to a random place, at most this share of it, is given: its tokens see each other both ways, none is asked."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over the whole vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser."""
    chunks: int = 1
    """Pieces in which the scores are made, read and forgotten; more of them: less memory, where the vocabulary is large."""
    head: str = ""
    """A head that the model has already; empty: one of its own, captioning."""

    def __post_init__(self) -> None:
        at_least(self, chunks=1, prefix=0, label_smoothing=0, z_loss=0)
        if self.prefix >= 1:
            raise InputError(f"captioning: prefix={self.prefix}; it is a share of the text, less than 1")

    @property
    def _writer(self) -> str:
        return self.writer or modality_of(self.text)

    @property
    def _head(self) -> str:
        own = "captioning" if not self.writer else f"captioning_{self.writer}"
        return self.head or own

    @property
    def _entry(self) -> str:
        return f"{self.text}/prefixed-{self.prefix:g}" if self.prefix else self.text

    def check(self, model: MultimodalTransformer) -> None:
        for entries in (self.given, (self.text,), (self._writer,)):
            check_entries(entries, model)
        check_head(self._head, model)
        if not isinstance(model.modalities[self._writer], Ids):
            kind = type(model.modalities[self._writer]).__name__
            raise InputError(f"text={self.text!r}: {kind} has no ids, and only ids are written one after the other")
        for name in self.masks:
            if name not in self.given:
                raise InputError(f"masks: {name!r} is not among given={self.given}")
            self.masks[name].check(name, model)
        if self.prefix and getattr(model.modalities[self._writer], "last", False):
            raise InputError(f"prefix={self.prefix}: last=True puts a token behind the ids, which prefixes do not count")
        if self._writer in map(modality_of, self.given):
            raise InputError(f"{self._writer!r} cannot be given and written at once; set `writer` to a further modality of ids")

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        return {} if self.head else {self._head: TiedDecoder(self._writer)}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        prefix_key, key = jax.random.split(key)
        for i, (name, mask) in enumerate(self.masks.items()):
            batch = mask.apply(name, batch, context.model.modalities[modality_of(name)], jax.random.fold_in(key, i))
        if self.prefix:
            fields, mask = context.model.modalities[self._writer].read(batch[self.text])  # type: ignore[attr-defined]
            there = _mask(fields["ids"], mask)
            share = jax.random.uniform(prefix_key, (len(there),), maxval=self.prefix)
            length = jnp.ceil(share * there.sum(1)).astype(jnp.int32)  # one at least, of which nothing can be asked anyway
            given = jnp.arange(there.shape[1]) < length[:, None]
            group = jnp.where(given | (fields.get(GROUP, -1) >= 0), 0, -1)
            batch = {**batch, self._entry: Masked({**fields, GROUP: group}, there)}
        return batch

    def evaluated(self) -> Objective:
        return dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)

    def views(self) -> tuple[View, ...]:
        given = [(modality_of(n), self.masks[n].entry(n) if n in self.masks else n) for n in self.given]
        return (View((*given, (self._writer, self._entry)), (self._writer,)),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        raw, mask = unmask(batch[self._entry])
        fields = raw if isinstance(raw, Mapping) else {"ids": raw}
        ids = fields["ids"]
        asked = _mask(ids, mask)[:, 1:]  # (B, L - 1)
        if GROUP in fields:
            asked &= fields[GROUP][:, 1:] < 0
        labels, settings = ids[:, 1:], {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        at = slice(labels.shape[1])
        losses, best = classified_tokens(outputs[0], self._head, at, labels, asked, self.chunks, **settings)
        return {"loss": losses.sum(-1), "right": ((best == labels) & asked).sum(-1), "tokens": asked.sum(-1)}

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        tokens = total(values["tokens"])
        loss, name = values["loss"].sum() / tokens, self._metric
        return loss, {f"{name}/accuracy": values["right"].sum() / tokens, f"{name}/perplexity": jnp.exp(loss)}

    @property
    def _metric(self) -> str:
        """What the metrics begin with: several may write by one head."""
        if self.text == self._writer and self.given:
            return self._head
        return f"{self._head}/{self.text.split('/')[-1] if self.given else 'alone'}"


def _mask(ids: jax.Array, mask: Any) -> jax.Array:
    there = token_mask(mask, ids.shape)
    return jnp.ones(ids.shape, bool) if there is None else there
