"""Grounding: where is what is named? Survey 3.4, "matching"."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import TokenClassifier
from mmx.losses import binary_cross_entropy, grounding_loss
from mmx.modalities.masking import modality_of, present
from mmx.model import MultimodalTransformer
from mmx.objectives.masking import of_tokens
from mmx.objectives.objective import Context, Objective, check_entries, check_head, reading, total
from mmx.objectives.views import View
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Grounding(Objective):
    """Which tokens of one modality are meant by the others: a choice among all of them, or a question to each.

    The regions of an image that a phrase names (MDETR; ViLBERT's referring expressions, each by itself); with two labels, the
    first and the last frame of the moment that a subtitle belongs to (HERO's VSM, arXiv 2005.00200, 3.2.3), or the ends of an
    answer in a text.
    """

    modality: str = "image"
    """The entry whose tokens are chosen from."""
    given: tuple[str, ...] = ("text",)
    """The entries that say which is meant."""
    labels: tuple[str, ...] = ("region",)
    """Names among data.labels, each a choice of its own. The batch holds as label/NAME the number of the token (B,), where -1
    asks nothing; or how surely each token is meant (B, tokens), where all 0, or what is not a number, asks nothing. Tokens are
    those that the embedder reads: of a text, [BOS] is number 0."""
    kind: Literal["softmax", "binary"] = "softmax"
    """softmax: the tokens share out what is meant (MDETR, arXiv 2104.12763, 2.2); binary: each is asked for itself how surely it
    is meant, 0 to 1, and an example's loss is the sum over its tokens (12-in-1, arXiv 1912.02315)."""
    head: str = ""
    """A head that the model has already; empty: one of its own, ground_LABELS."""

    @property
    def _head(self) -> str:
        return self.head or "ground_" + "_".join(self.labels)

    def check(self, model: MultimodalTransformer) -> None:
        check_entries((self.modality, *self.given), model)
        check_head(self._head, model)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise InputError(f"labels={self.labels}; name one or more of data.labels, each once")
        if not all(stage.separate for stage in model.stages):
            raise InputError("this topology sums the streams into one; there are no tokens left to choose from")
        head: Any = model.heads[self._head]
        if not isinstance(head, TokenClassifier) or (head.classes, head.stream) != (len(self.labels), modality_of(self.modality)):
            raise InputError(
                f"head={self._head!r} is no TokenClassifier({len(self.labels)}, {modality_of(self.modality)!r}); leave it out"
            )

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        own = TokenClassifier(len(self.labels), modality_of(self.modality), activation="gelu", norm=1e-12)
        return {} if self.head else {self._head: own}

    @property
    def _there(self) -> str:
        return f"{self.modality}:there"

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        embedder: Any = context.model.modalities[modality_of(self.modality)]
        there = embedder.there(batch[self.modality])
        shape = embedder.content(batch[self.modality]).shape[:2]
        return {**batch, self._there: jnp.ones(shape, bool) if there is None else there}

    def views(self) -> tuple[View, ...]:
        return (reading(self.modality, *self.given),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        name, there = modality_of(self.modality), batch[self._there]  # (B, R)
        left = outputs[0].streams[name].without_special.length
        if left not in (there.shape[1], there.shape[1] + 1):  # a learned token may stand behind the others
            raise InputError(
                f"modality={self.modality!r}: of its {there.shape[1]} tokens the stages leave {left}; none can be named"
            )
        scores = of_tokens(outputs[0], name, self._head, there.shape[1])  # (B, R, labels)
        given = [present(batch[entry]) for entry in self.given] or [there.any(1)]
        found = [self._of_label(f"label/{label}", scores[..., i], there, batch) for i, label in enumerate(self.labels)]
        loss, right, asked = (jnp.stack(x, 1) for x in zip(*found, strict=True))
        asked &= functools.reduce(jnp.logical_or, given)[:, None]
        return {"loss": jnp.where(asked, loss, 0), "right": right, "asked": asked}

    def _of_label(self, entry: str, scores: jax.Array, there: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss, whether it is right, and whether it was asked, each `(B,)`."""
        if entry not in batch:
            raise InputError(f"labels={self.labels}: the batch has no entry {entry}; name its field in data.labels")
        label = batch[entry]
        if jnp.issubdtype(label.dtype, jnp.integer) and label.ndim == 1:
            named = (label[:, None] == jnp.arange(there.shape[1])).astype(jnp.float32)
            wrong = (label < -1) | (label >= there.shape[1])
        elif label.shape == there.shape:
            named = jnp.nan_to_num(label.astype(jnp.float32), nan=0)
            wrong = (named < 0).any(1)
        else:
            form = f"the number of a token (B,) as an integer, or how surely each is meant {there.shape}"
            remedy = f"for numbers of tokens set data.labels.{entry.removeprefix('label/')}.classes to {there.shape[1]}"
            raise InputError(f"{entry}: expected {form}, got {label.dtype} {label.shape}; {remedy}")
        wrong |= ((named > 0) & ~there).any(1)
        if self.kind == "binary":
            wrong |= (named > 1).any(1)
            each = jnp.where(there, binary_cross_entropy(scores, named), 0).sum(1)
        else:
            each = grounding_loss(scores, named, there)
        asked = there.any(1) & ((named > 0).any(1) | wrong)
        loss = jnp.where(wrong, jnp.nan, each)  # of what is no token: see `classified`
        best = jnp.where(there, scores, -jnp.inf).argmax(1)
        return loss, asked & (jnp.take_along_axis(named, best[:, None], 1)[:, 0] > 0), asked

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        """The sum over the choices; accuracy is how often all of an example are right."""
        asked = values["asked"]
        each = values["loss"].sum(0) / jnp.maximum(asked.sum(0), 1)
        examples = asked.any(1)
        right = (values["right"] | ~asked).all(1) & examples
        return each.sum(), {f"{self._head}/accuracy": right.sum() / total(examples)}
