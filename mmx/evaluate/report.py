"""What evaluators are given, and what they return."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from mmx.data import Pipeline
from mmx.model import MultimodalTransformer
from mmx.types import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The moment at which something is evaluated."""

    model: MultimodalTransformer
    params: Params
    data: Pipeline
    mesh: Mesh
    batch_size: int
    final: bool
    """Whether training is over."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluator found."""

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers for metrics.jsonl; the run puts the evaluator's name in front."""
    text: str = ""
    """Lines for the screen."""
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Pictures for the run folder, by file name: (height, width, 3) uint8."""


class Evaluator(Protocol):
    """An evaluator says when it runs. Its name is the one the experiment gives it."""

    @property
    def every(self) -> int:
        """Steps between two evaluations during training; 0: only at the end."""
        ...

    def check(self, data: Pipeline) -> None:
        """Raises an InputError, before training, for what cannot be evaluated."""
        ...

    def __call__(self, evaluation: Evaluation) -> Report: ...


def due(evaluator: Any, step: int, steps: int) -> bool:
    """Whether an evaluator runs after `step` of `steps`: at the end always, before that every so many steps."""
    return step == steps or bool(evaluator.every and step % evaluator.every == 0)
