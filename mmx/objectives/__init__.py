"""What a model is trained to do, named for the survey's kinds of pretraining task (section 3.4).

An objective is a frozen dataclass of settings. Its parts act in this order:

    heads()                  the heads it needs, {name: head}; the model is built with them
    corrupt(batch, key)      cheap, over the whole batch: adds masked or swapped copies of its entries
    views()                  the forward passes it wants; equal ones of several objectives are run once
    select(outputs, batch)   what the loss needs of them, example by example: every leaf is (B, ...)
    loss(values)             cheap, over the whole batch: a scalar, and metrics

Only the forward passes are expensive, and they treat examples one by one. So gradient accumulation is exact for every
objective, also for one that compares all examples with each other: see `mmx.train.accumulate`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.model import MultimodalTransformer
from mmx.objectives.describing import Captioning
from mmx.objectives.matching import Contrastive, Matching
from mmx.objectives.views import View, run_views, view
from mmx.types import Batch, Metrics, Outputs, Params


class Objective(Protocol):
    """See the head of this module."""

    @property
    def weight(self) -> float:
        """Its share in the sum of losses; an objective of weight 0 is left out."""
        ...

    def heads(self) -> Mapping[str, nn.Module]: ...
    def corrupt(self, batch: Batch, key: jax.Array) -> Batch: ...
    def views(self) -> tuple[View, ...]: ...
    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any: ...
    def loss(self, values: Any) -> tuple[jax.Array, Metrics]: ...


def needed_heads(objectives: Mapping[str, Objective]) -> dict[str, nn.Module]:
    """The heads of all objectives together."""
    return {name: head for objective in objectives.values() for name, head in objective.heads().items()}


def corrupt(objectives: Mapping[str, Objective], batch: Batch, key: jax.Array) -> Batch:
    """Lets every objective add its entries to the batch."""
    for i, objective in enumerate(objectives.values()):
        batch = objective.corrupt(batch, jax.random.fold_in(key, i))
    return batch


def forward(
    objectives: Mapping[str, Objective], model: MultimodalTransformer, params: Params, batch: Batch, key: jax.Array | None
) -> dict[str, Any]:
    """Runs the forward passes of all objectives and selects what their losses need: every leaf is `(B, ...)`."""
    views = {name: objective.views() for name, objective in objectives.items()}
    outputs = run_views(model, params, batch, (v for wanted in views.values() for v in wanted), key)
    return {name: o.select([outputs[v] for v in views[name]], batch) for name, o in objectives.items()}


def total_loss(objectives: Mapping[str, Objective], values: Mapping[str, Any]) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the losses; each of them is the metric `loss/NAME`."""
    total, metrics = jnp.float32(0), {}
    for name, objective in objectives.items():
        loss, parts = objective.loss(values[name])
        total += objective.weight * loss
        metrics |= {f"loss/{name}": loss} | parts
    return total, metrics | {"loss": total}


__all__ = [
    "Captioning",
    "Contrastive",
    "Matching",
    "Objective",
    "View",
    "corrupt",
    "forward",
    "needed_heads",
    "run_views",
    "total_loss",
    "view",
]
