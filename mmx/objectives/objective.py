"""What every objective is, and what it may know of the model while it prepares a batch."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.heads import scores_of
from mmx.losses import chunked_cross_entropy, cross_entropy
from mmx.modalities.masking import modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.views import View, run_views
from mmx.types import Batch, Metrics, Outputs, Params


@dataclasses.dataclass(frozen=True)
class Context:
    """The model as it is when a batch is prepared: who wants to know more than the batch tells may ask it, without a gradient.

    Args:
        model: what is trained.
        params: its parameters.
        average: their moving average, the momentum teacher; None: there is none.
        memory: what this objective remembers from step to step.
        parts: microbatches; a pass over the whole batch is taken in so many.
    """

    model: MultimodalTransformer
    params: Params = None
    average: Params | None = None
    memory: Any = None
    parts: int = 1

    def embeddings(self, batch: Batch, entries: Sequence[str], params: Params) -> dict[str, Any]:
        """Each entry of the batch alone into the shared space: `{entry: (B, E)}` and `"scale" (B,)`."""

        def look(batch: Batch) -> dict[str, Any]:
            wanted = {entry: reading(entry) for entry in entries}
            outputs = run_views(self.model, params, batch, wanted.values(), None)
            found: dict[str, Any] = {entry: outputs[v].embeddings[modality_of(entry)] for entry, v in wanted.items()}
            scale = next(iter(outputs.values())).logit_scale
            return found if scale is None else {**found, "scale": jnp.broadcast_to(scale, len(next(iter(found.values()))))}

        return self.ask(look, {entry: batch[entry] for entry in entries})

    def ask(self, look: Any, batch: Batch) -> Any:
        """`look(batch)`, whose leaves are `(B, ...)`, in as many parts as the step has; no gradient flows back."""
        size = jax.tree.leaves(batch)[0].shape[0]
        parts = next(n for n in range(min(self.parts, size), size + 1) if size % n == 0)  # equal ones
        if parts > 1:
            split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
            found = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(look, split))
        else:
            found = look(batch)
        return jax.lax.stop_gradient(found)


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """What a model is trained to do: a frozen dataclass of settings, whose parts act in the order of `mmx.objectives`.

    An entry of the batch is named by its modality, or by it and what is told apart behind a slash: `text/question` is read by
    the modality `text`. `NAMING`: which of the fields name entries of the batch.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("modality", "modalities", "masks", "given", "text", "taught")

    weight: float = dataclasses.field(default=1.0, kw_only=True)
    """Share in the total loss; 0 leaves it out."""

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the batch that it is about, each once; labels are not among them."""
        named = [getattr(self, field, ()) for field in self.NAMING]
        return tuple(dict.fromkeys(entry for value in named for entry in ([value] if isinstance(value, str) else value)))

    def check(self, model: MultimodalTransformer) -> None:
        """Raises an InputError, before training, for what this model cannot be trained to do, with the reason."""
        return

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises an InputError where texts become other ids (`mmx.data.Tokenizer`; None: there are no texts) than it knows."""
        return

    def heads(self, modalities: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The heads it needs; the model is built with them."""
        return {}

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        """Adds entries to the batch, as a whole: what is masked, swapped or shuffled, and what is asked."""
        return batch

    @abc.abstractmethod
    def views(self) -> tuple[View, ...]:
        """The forward passes it wants."""

    @abc.abstractmethod
    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        """What the loss needs of them, example by example: every leaf is `(B, ...)`."""

    @abc.abstractmethod
    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        """The loss of the whole batch, a scalar, and metrics."""

    def evaluated(self) -> "Objective":
        """What is asked of held-out examples: without that which only training has, such as a momentum teacher."""
        return self

    def memory(self, model: MultimodalTransformer) -> Any:
        """What it remembers from step to step, at the beginning: a tree of arrays, part of the training state."""
        return None

    def remember(self, memory: Any, batch: Batch) -> Any:
        """What it remembers after a step with this batch, as `corrupt` left it."""
        return memory


def reading(*entries: str, alone: bool = False) -> View:
    """The forward pass in which each entry is read by its modality; `alone`: see `View`."""
    return View(tuple((modality_of(entry), entry) for entry in entries), alone=alone)


def classified(logits: jax.Array, labels: jax.Array, asked: jax.Array, **settings: float) -> jax.Array:
    """Cross-entropy `(...)` of `logits (..., V)` where something is asked, else 0.

    A label that is no class is not a number: the step is counted and moves nothing, and ten in a row stop the run.
    """
    return _of_classes(cross_entropy(logits, labels, **settings), labels, logits.shape[-1], asked)


def _of_classes(losses: jax.Array, labels: jax.Array, classes: int, asked: jax.Array) -> jax.Array:
    wrong = (labels < 0) | (labels >= classes)
    return jnp.where(asked, jnp.where(wrong, jnp.nan, losses), 0)


def classified_tokens(
    output: Outputs, head: str, at: slice, labels: jax.Array, asked: jax.Array, chunks: int, **settings: float
) -> tuple[jax.Array, jax.Array]:
    """`classified` by what a head says at these places, and the likeliest class, both `(B, L)`.

    In several `chunks` the scores of ids are made, read and forgotten: those of all tokens are never held at once.
    """
    if chunks == 1:
        logits = output.logits[head][:, at]  # (B, L, V)
        return classified(logits, labels, asked, **settings), logits.argmax(-1)
    scored = output.scored.get(head)
    if scored is None:
        raise InputError(f"chunks={chunks}: head {head!r} scores all tokens at once; set chunks=1")
    losses, best = chunked_cross_entropy(scored.states[:, at], functools.partial(scores_of, scored), labels, chunks, **settings)
    return _of_classes(losses, labels, len(scored.matrix), asked), best


def check_entries(entries: Sequence[str], model: MultimodalTransformer) -> None:
    """Raises an InputError for an entry that no modality of the model reads, and for two that one modality would read at once."""
    for entry in entries:
        if modality_of(entry) not in model.modalities:
            raise InputError(unknown("modality", modality_of(entry), model.modalities))
    read = [modality_of(entry) for entry in entries]
    if twice := [entry for entry in entries if read.count(modality_of(entry)) > 1]:
        raise InputError(f"{' and '.join(twice)} would be read by one modality in one pass; give the model a further modality")


def check_head(head: str, model: MultimodalTransformer) -> None:
    """Raises an InputError where a head is named that the model does not have."""
    if head not in model.heads:
        raise InputError(unknown("head", head, model.heads) if model.heads else f"the model has no heads, and {head!r} is wanted")


def total(x: jax.Array) -> jax.Array:
    """The sum over the batch, or 1 where it is 0, to divide by."""
    found = x.sum()
    return jnp.where(found == 0, 1, found)
