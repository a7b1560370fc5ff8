"""What a model is trained to do, named for the survey's kinds of pretraining task (section 3.4).

An objective is a frozen dataclass of settings. Its parts act in this order:

    check(model)                    whether this model can be trained to do it at all
    check_tokenizer(tokenizer)      whether the ids of texts are those it knows
    heads(modalities)               the heads it needs, {name: head}; the model is built with them
    entries                         what of the batch it is about, by the fields that NAMING names; absent where it is no key
    corrupt(batch, key, context)    over the whole batch: adds masked, swapped or shuffled copies of its entries
    views()                         the forward passes it wants; equal ones of several objectives are run once
    select(outputs, batch)          what the loss needs of them, example by example: every leaf is (B, ...)
    loss(values, memory)            cheap, over the whole batch: a scalar, and metrics
    memory(model)                   what it keeps from step to step, at the beginning: a queue of negatives, a teacher's weights
    remember(memory, batch)         the same for the next step
    evaluated()                     what is asked of held-out examples, without a momentum teacher

Only the forward passes are expensive, and they treat examples one by one. So gradient accumulation is exact for every
objective, also for one that compares all examples with each other: see `mmx.train.accumulate`.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, naming
from mmx.modalities.masking import WORDS, absent, modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.classifying import Classification
from mmx.objectives.contrasting import Contrastive
from mmx.objectives.describing import Captioning
from mmx.objectives.distillation import Distillation
from mmx.objectives.grounding import Grounding
from mmx.objectives.hiding import Mask
from mmx.objectives.masking import MaskedModelling
from mmx.objectives.matching import Matching
from mmx.objectives.objective import Context, Objective
from mmx.objectives.ordering import Ordering
from mmx.objectives.reach import check_reach, prepared
from mmx.objectives.views import View, run_views, view
from mmx.types import Batch, Metrics, Params


def needed_heads(objectives: Mapping[str, Objective], modalities: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The heads of all objectives together; one that several name is one."""
    heads: dict[str, nn.Module] = {}
    for name, objective in objectives.items():
        with naming(f"objectives.{name}"):
            for title, head in objective.heads(modalities).items():
                if heads.setdefault(title, head) != head:
                    kinds = " and ".join(type(h).__name__ for h in (heads[title], head))
                    raise InputError(f"head {title!r} is wanted in two forms ({kinds}), with other fields; train one of them")
    return heads


def check(objectives: Mapping[str, Objective], model: MultimodalTransformer) -> None:
    """Raises an InputError, before training, for an objective that this model cannot be trained to do, with the reason."""
    for name, objective in objectives.items():
        with naming(f"objectives.{name}"):
            objective.check(model)


def check_reached(objectives: Mapping[str, Objective], model: MultimodalTransformer, params: Params, batch: Batch) -> None:
    """The same for what a topology keeps apart, and for what no batch has; `params` and `batch` may be shapes."""
    for name, objective in objectives.items():
        with naming(f"objectives.{name}"):
            if lacking := [entry for entry in objective.entries if entry not in batch]:
                raise InputError(
                    f"the batch has no entry {', '.join(lacking)}; name its field in data.fields, or leave it out here"
                )
            check_reach(objective, model, params, prepared(objective, model, params, batch, objective.memory(model)))


def memories(objectives: Mapping[str, Objective], model: MultimodalTransformer) -> dict[str, Any]:
    """What objectives remember from step to step, at the beginning; those that remember nothing are left out."""
    found = {name: objective.memory(model) for name, objective in objectives.items()}
    return {name: memory for name, memory in found.items() if memory is not None}


def corrupt(objectives: Mapping[str, Objective], batch: Batch, key: jax.Array, context: Context) -> Batch:
    """Lets every objective add its entries to the batch; `context.memory` is what they all remember.

    What an objective is about and the batch does not have, is absent from all its examples.
    """
    for i, (name, objective) in enumerate(objectives.items()):
        with naming(f"objectives.{name}"):
            batch = _filled(objective, batch, context)
            mine = dataclasses.replace(context, memory=(context.memory or {}).get(name))
            batch = objective.corrupt(batch, jax.random.fold_in(key, i), mine)
    return batch


def _filled(objective: Objective, batch: Batch, context: Context) -> Batch:
    """The batch with the entries that the objective is about; those that were no key are there of no example."""
    size, filled = jax.tree.leaves(batch)[0].shape[0], dict(batch)
    for entry in objective.entries:
        if entry not in batch:
            embedder: Any = context.model.modalities.get(modality_of(entry))
            if embedder is None:
                raise InputError(
                    f"the batch has no entry {entry!r}, which only the teacher reads; give it, with a mask that is all False"
                )
            example = embedder.example(size)
            filled[entry] = absent(example)
            filled.setdefault(f"{entry}/{WORDS}", jnp.full(embedder.content(example).shape[:2], -1))  # no token is of a word
    return filled


def forward(
    objectives: Mapping[str, Objective], model: MultimodalTransformer, params: Params, batch: Batch, key: jax.Array | None
) -> dict[str, Any]:
    """Runs the forward passes of all objectives and selects what their losses need: every leaf is `(B, ...)`."""
    views = {name: objective.views() for name, objective in objectives.items()}
    outputs = run_views(model, params, batch, (v for wanted in views.values() for v in wanted), key)
    return {name: o.select([outputs[v] for v in views[name]], batch) for name, o in objectives.items()}


def total_loss(
    objectives: Mapping[str, Objective], values: Mapping[str, Any], memory: Mapping[str, Any] | None = None
) -> tuple[jax.Array, dict[str, Metrics]]:
    """The weighted sum of the losses; and what each objective measured, its own loss among it."""
    found = {name: objective.loss(values[name], (memory or {}).get(name)) for name, objective in objectives.items()}
    total = sum((objectives[name].weight * loss for name, (loss, _) in found.items()), jnp.float32(0))
    return total, {name: {"loss": loss, **metrics} for name, (loss, metrics) in found.items()}


def flatten_metrics(found: Mapping[str, Metrics]) -> Metrics:
    """What objectives measured, as it is logged: `loss/NAME`, and each metric by its name, NAME:metric where several have one."""
    often = collections.Counter(metric for metrics in found.values() for metric in metrics)
    flat = {f"loss/{name}": metrics["loss"] for name, metrics in found.items()}
    for name, metrics in found.items():
        others = {metric: value for metric, value in metrics.items() if metric != "loss"}
        flat |= {metric if often[metric] == 1 else f"{name}:{metric}": value for metric, value in others.items()}
    return flat


def remember(objectives: Mapping[str, Objective], memory: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """What objectives remember after a step with this batch, as `corrupt` left it."""
    return {name: objectives[name].remember(kept, batch) if name in objectives else kept for name, kept in memory.items()}


__all__ = [
    "Captioning",
    "Classification",
    "Context",
    "Contrastive",
    "Distillation",
    "Grounding",
    "Mask",
    "MaskedModelling",
    "Matching",
    "Objective",
    "Ordering",
    "View",
    "check",
    "check_reached",
    "corrupt",
    "flatten_metrics",
    "forward",
    "memories",
    "needed_heads",
    "remember",
    "run_views",
    "total_loss",
    "view",
]
