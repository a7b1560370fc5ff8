"""Retrieval between two modalities, each embedded alone."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmx.data import Pipeline
from mmx.data.pipeline import put_batch
from mmx.errors import InputError, at_least, unknown
from mmx.evaluate.contact_sheet import contact_sheet
from mmx.evaluate.report import Evaluation, Report
from mmx.modalities.masking import unmask
from mmx.model import MultimodalTransformer
from mmx.parallel import batch_sharding
from mmx.types import Batch, Params

RECALLS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """For each example of a split, the rank of its partner among all of the split, in both directions."""

    every: int = 100
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""
    modalities: tuple[str, str] = ("image", "text")
    """Between which."""

    def __post_init__(self) -> None:
        at_least(self, every=0)

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split or a modality that does not exist."""
        check_names(self.modalities, data)
        data.source(self.split)

    def __call__(self, evaluation: Evaluation) -> Report:
        a, b = self.modalities
        embeddings = embed_split(evaluation, self.split, self.modalities)
        similarity = embeddings[a] @ embeddings[b].T  # (N, N)
        metrics = retrieval_metrics(similarity, f"{a}_to_{b}") | retrieval_metrics(similarity.T, f"{b}_to_{a}")
        if not evaluation.final:
            return Report(metrics)
        pictures = {}
        if self._can_be_drawn(evaluation):
            pictures["contact_sheet.png"] = self._contact_sheet(evaluation, similarity)
        return Report(metrics, self._table(metrics, len(similarity)), pictures)

    def _table(self, metrics: dict[str, float], count: int) -> str:
        a, b = self.modalities
        columns = [*(f"R@{k}" for k in RECALLS), "mean_rank", "median_rank"]
        chance = chance_metrics(count)
        lines = [f"{f'among {count} of {self.split}':<26}" + "".join(f"{c.replace('_', ' '):>13}" for c in columns)]
        for name in (f"{a}_to_{b}", f"{b}_to_{a}"):
            lines.append(f"{name.replace('_', ' '):<26}" + "".join(f"{metrics[f'{name}_{c}']:>13.3f}" for c in columns))
        lines.append(f"{'chance':<26}" + "".join(f"{chance[c]:>13.3f}" for c in columns))
        return "\n".join(lines)

    def _can_be_drawn(self, evaluation: Evaluation) -> bool:
        if evaluation.data.tokenizer is None or self.modalities != ("image", "text"):
            return False
        image, _ = unmask(evaluation.data.examples(self.split)[0]["image"])
        return image.dtype == np.uint8 and image.shape[-1:] == (3,)

    def _contact_sheet(self, evaluation: Evaluation, similarity: np.ndarray) -> np.ndarray:
        examples = evaluation.data.examples(self.split)
        tokenizer = evaluation.data.tokenizer
        assert tokenizer is not None
        rows = [examples[i] for i in range(len(examples))]
        images = [unmask(row["image"])[0] for row in rows]
        return contact_sheet(images, [tokenizer.decode(row["text"].array) for row in rows], similarity)


def check_names(modalities: Iterable[str], data: Pipeline) -> None:
    """Raises an InputError for a modality that the data does not have."""
    known = [entry for entry in data.config.fields if "/" not in entry]  # further entries are no modalities of their own
    for name in modalities:
        if name not in known:
            raise InputError(unknown("modality", name, known))


def ranks(similarity: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The rank of the right answer `answers (N,)` in each row of `(N, C)`, `(N,)`; ranks start at 1.

    A tie counts as half a place, so embeddings that are all equal score as chance does, not as perfect. What is not a
    number is behind everything.
    """
    right = np.take_along_axis(similarity, answers[:, None], 1)
    behind = (similarity < right).sum(1)
    ties = np.maximum((similarity == right).sum(1) - 1, 0)
    return similarity.shape[1] - behind - ties / 2


def retrieval_metrics(similarity: np.ndarray, name: str) -> dict[str, float]:
    """R@1/5/10, mean and median rank of the diagonal in each row of `(N, N)`."""
    found = ranks(similarity, np.arange(len(similarity)))
    metrics = {f"{name}_R@{k}": float((found <= k).mean()) for k in RECALLS}
    return metrics | {f"{name}_mean_rank": float(found.mean()), f"{name}_median_rank": float(np.median(found))}


def chance_metrics(count: int) -> dict[str, float]:
    """What a random order of `count` answers gives."""
    rank = (count + 1) / 2
    return {f"R@{k}": min(k / count, 1.0) for k in RECALLS} | {"mean_rank": rank, "median_rank": rank}


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: MultimodalTransformer, params: Params, batch: Batch) -> dict[str, jax.Array]:
    def embed(name: str) -> jax.Array:
        out: Any = model.apply({"params": params}, {name: batch[name]})
        return out.embeddings[name]

    return {name: embed(name) for name in batch}


def embed_split(evaluation: Evaluation, split: str, modalities: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Embeds every example of a split, each modality alone: `{modality: (N, E)}`."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in modalities}
    for batch, indices in evaluation.data.evaluation(split, evaluation.batch_size):
        for name, vectors in embed_batch(evaluation, {name: batch[name] for name in modalities}).items():
            found[name].append(vectors[: len(indices)])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def embed_batch(evaluation: Evaluation, batch: Batch) -> dict[str, np.ndarray]:
    """Embeds a batch of `evaluation.batch_size` that every process holds whole, each modality alone: `{modality: (B, E)}`."""
    here = put_local(batch, evaluation)
    with jax.set_mesh(evaluation.mesh):
        embedded = _embed(evaluation.model, evaluation.params, here)
    return {name: to_host(vectors) for name, vectors in embedded.items()}


def put_local(batch: Batch, evaluation: Evaluation) -> Batch:
    """Puts a batch that every process holds whole on the mesh: each process gives its rows."""
    processes, process = jax.process_count(), jax.process_index()

    def rows(x: Any) -> Any:
        size = len(x) // processes
        return x[process * size : (process + 1) * size]

    return put_batch(jax.tree.map(rows, batch), batch_sharding(evaluation.mesh))


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
