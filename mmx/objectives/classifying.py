"""A task with labels, as pretraining or as what follows it: answers to questions, sentiment, a class (survey 3.4.2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Classifier
from mmx.losses import binary_cross_entropy
from mmx.modalities.masking import modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Objective, check_entries, check_head, classified, reading
from mmx.objectives.views import View
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """A class or a number for the whole example, told from some of its modalities (LXMERT's answers, MulT's sentiment)."""

    modalities: tuple[str, ...] = ("image", "text")
    """The entries that are read together."""
    label: str = "label"
    """Its name among data.labels; the batch holds it as label/NAME, where -1, or not a number, asks nothing of an example."""
    classes: int = 2
    """How many classes, or answers; of `regression` how many numbers."""
    answer: Literal["class", "answers", "regression"] = "class"
    """class: one of them (B,); answers: how right each is, 0 to 1, (B, classes) (VQA); regression: numbers (B,) or (B, classes),
    by their absolute distance (MulT)."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes."""
    head: str = ""
    """A head that the model has already; empty: one of its own, classify_LABEL."""

    @property
    def _head(self) -> str:
        return self.head or f"classify_{self.label}"

    def check(self, model: MultimodalTransformer) -> None:
        check_entries(self.modalities, model)
        check_head(self._head, model)
        if self.classes < 1 + (self.answer == "class"):
            raise InputError(f"classes={self.classes}; there is nothing to choose from")

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        return {} if self.head else {self._head: Classifier(self.classes)}

    def views(self) -> tuple[View, ...]:
        return (reading(*self.modalities, alone=True),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        name = f"label/{self.label}"
        if name not in batch:
            raise InputError(f"label={self.label!r}: the batch has no entry {name}; name its field in data.labels")
        logits, label = outputs[0].logits[self._head], batch[name]
        used = [modality_of(entry) for entry in self.modalities]
        there = jnp.stack([x.present for n, x in outputs[0].streams.items() if n in used or len(outputs[0].streams) == 1]).any(0)
        if self.answer == "class":
            if not jnp.issubdtype(label.dtype, jnp.integer) or label.ndim != 1:
                raise InputError(f"{name}: expected a class of each example, integers (B,), got {label.dtype} {label.shape}")
            asked = there & (label != -1)
            right = (logits.argmax(-1) == label) & asked
            loss = classified(logits, label, asked, label_smoothing=self.label_smoothing)
            return {"loss": loss, "right": right, "asked": asked}
        label = label.reshape(len(label), -1).astype(jnp.float32)
        if label.shape != logits.shape:
            raise InputError(f"{name}: expected {self.classes} numbers of each example, got {batch[name].shape}")
        asked = there & ~jnp.isnan(label).any(1)
        label = jnp.where(asked[:, None], label, 0)
        if self.answer == "answers":
            wrong = ((label < 0) | (label > 1)).any(1)
            loss = jnp.where(wrong, jnp.nan, binary_cross_entropy(logits, label).sum(1))
            right = jnp.take_along_axis(label, logits.argmax(-1, keepdims=True), 1)[:, 0]  # how right the best answer is
            return {"loss": jnp.where(asked, loss, 0), "right": jnp.where(asked, right, 0), "asked": asked}
        distance = jnp.abs(logits - label).mean(1)
        moments = {"error": jnp.square(logits - label).mean(1), "first": label.mean(1), "second": jnp.square(label).mean(1)}
        return {n: jnp.where(asked, x, 0) for n, x in {"loss": distance, **moments}.items()} | {"asked": asked}

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        count = jnp.maximum(values["asked"].sum(), 1)
        loss = values["loss"].sum() / count
        if "right" in values:
            return loss, {f"{self._head}/accuracy": values["right"].sum() / count}
        variance = values["second"].sum() / count - jnp.square(values["first"].sum() / count)
        return loss, {f"{self._head}/explained": 1 - values["error"].sum() / count / jnp.maximum(variance, 1e-12)}
