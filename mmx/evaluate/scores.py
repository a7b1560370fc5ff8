"""What a model is trained to do, on examples it has not seen."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmx import objectives as objectives_
from mmx.data import Pipeline
from mmx.errors import InputError, at_least
from mmx.evaluate.report import Evaluation, Report
from mmx.evaluate.retrieval import put_local, to_host
from mmx.objectives import Context, Objective


@dataclasses.dataclass(frozen=True)
class Scores:
    """Losses and metrics of objectives on a held-out split: accuracy, perplexity, what is explained.

    What objectives draw at random, such as which words are hidden, is the same in every evaluation; momentum teachers are left
    out.
    """

    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=dict)
    """By name, as in the experiment; the model has to have their heads."""
    every: int = 0
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""

    def __post_init__(self) -> None:
        at_least(self, every=0)

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split that does not exist."""
        if not self.objectives:
            raise InputError("objectives: there are none to score; give those of the experiment")
        data.source(self.split)

    def __call__(self, evaluation: Evaluation) -> Report:
        model, chosen = evaluation.model, {name: objective.evaluated() for name, objective in self.objectives.items()}
        objectives_.check(chosen, model)

        @jax.jit
        def select(params: Any, batch: Any) -> Any:
            context = Context(model, params, params, objectives_.memories(chosen, model))
            prepared = objectives_.corrupt(chosen, batch, jax.random.key(0), context)
            return objectives_.forward(chosen, model, params, prepared, None)

        parts = []
        for batch, indices in evaluation.data.evaluation(self.split, evaluation.batch_size):
            with jax.set_mesh(evaluation.mesh):
                values = select(evaluation.params, put_local(batch, evaluation))
            parts.append(jax.tree.map(lambda x, count=len(indices): to_host(x)[:count], values))
        values = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        total, measured = jax.jit(functools.partial(objectives_.total_loss, chosen))(values)
        found = {name: float(value) for name, value in {**objectives_.flatten_metrics(measured), "loss": total}.items()}
        return Report(found, "\n".join(f"{name:<36} {value:8.3f}" for name, value in found.items()))
