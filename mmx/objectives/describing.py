"""Describing: say what is there, one token after the other. Survey 3.4, "describing"."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.heads import TiedDecoder
from mmx.losses import cross_entropy
from mmx.modalities.masking import unmask
from mmx.objectives.views import View, view
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Captioning:
    """The next token of the text, given the tokens before it and the other modalities (CoCa, SimVLM, GIT).

    The text is read causally by the very layers that read it in both directions elsewhere: one set of weights
    understands and generates. In early summation the sum is causal, so a word sees the patches up to its position.
    """

    weight: float = 1.0
    """Share in the total loss; 0 leaves it out."""
    text: str = "text"
    """The modality of ids that is generated."""
    given: tuple[str, ...] = ("image",)
    """The modalities it describes."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over the whole vocabulary."""

    def heads(self) -> Mapping[str, nn.Module]:
        return {"captioning": TiedDecoder(self.text)}

    def corrupt(self, batch: Batch, key: jax.Array) -> Batch:
        return batch

    def views(self) -> tuple[View, ...]:
        return (view(*self.given, self.text, causal=[self.text]),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        raw, mask = unmask(batch[self.text])
        ids = raw["ids"] if isinstance(raw, Mapping) else raw
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        mask = jnp.broadcast_to(mask[:, None] if mask.ndim == 1 else mask, ids.shape)[:, 1:]  # (B, L - 1)
        logits = outputs[0].logits["captioning"][:, : ids.shape[1] - 1]  # (B, L - 1, V)
        losses = cross_entropy(logits, ids[:, 1:], self.label_smoothing)
        right = logits.argmax(-1) == ids[:, 1:]
        return {"loss": (losses * mask).sum(-1), "right": (right & mask).sum(-1), "tokens": mask.sum(-1)}

    def loss(self, values: Any) -> tuple[jax.Array, Metrics]:
        tokens = jnp.maximum(values["tokens"].sum(), 1)
        return values["loss"].sum() / tokens, {"captioning/accuracy": values["right"].sum() / tokens}
