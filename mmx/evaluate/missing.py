"""What a model still knows when a modality is missing."""

import dataclasses
import functools
from typing import Any

import jax

from mmx.data import Pipeline
from mmx.errors import InputError, at_least
from mmx.evaluate.report import Evaluation, Report
from mmx.evaluate.retrieval import check_names, put_local, to_host
from mmx.modalities.masking import absent
from mmx.model import MultimodalTransformer
from mmx.objectives import Captioning
from mmx.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Missing:
    """The loss of the next token of a text with all that is given, and with each of it missing from every example.

    An example's loss depends on what it lacks itself, so the loss at any missing rate between (Ma et al.,
    arXiv 2204.05454) lies on the line between the two.
    """

    every: int = 0
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""
    text: str = "text"
    """The modality of ids that is told."""
    given: tuple[str, ...] = ("image",)
    """What it is told of; each of these is left out once."""

    def __post_init__(self) -> None:
        at_least(self, every=0)
        if not self.given:
            raise InputError("missing: given is empty; name at least one modality that may be missing")

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split or a modality that does not exist."""
        check_names((*self.given, self.text), data)
        data.source(self.split)

    def __call__(self, evaluation: Evaluation) -> Report:
        if "captioning" not in evaluation.model.heads:
            return Report(text="nothing about missing modalities: the model was not trained to write captions")
        absences = {"complete": "", **{f"without_{name}": name for name in self.given}}
        total, tokens = dict.fromkeys(absences, 0.0), dict.fromkeys(absences, 0.0)
        objective = Captioning(text=self.text, given=self.given)
        for batch, indices in evaluation.data.evaluation(self.split, evaluation.batch_size):
            here = put_local({name: batch[name] for name in (*self.given, self.text)}, evaluation)
            for label, without in absences.items():
                with jax.set_mesh(evaluation.mesh):
                    values = _losses(objective, evaluation.model, without, evaluation.params, here)
                total[label] += float(to_host(values["loss"])[: len(indices)].sum())
                tokens[label] += float(to_host(values["tokens"])[: len(indices)].sum())
        metrics = {f"loss_{label}": total[label] / max(tokens[label], 1) for label in absences}
        lines = [f"{label.replace('_', ' '):<26}{metrics[f'loss_{label}']:>10.3f} nats a token" for label in absences]
        return Report(metrics, "\n".join(lines))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(objective: Captioning, model: MultimodalTransformer, without: str, params: Params, batch: Batch) -> Any:
    if without:
        batch = {**batch, without: absent(batch[without])}
    (view,) = objective.views()
    inputs = {modality: batch[entry] for modality, entry in view.reads}
    outputs: Any = model.apply({"params": params}, inputs, view.causal)
    return objective.select([outputs], batch)
