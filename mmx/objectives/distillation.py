"""Distillation: say what a teacher says (survey 4.4; arXiv 1503.02531; for missing modalities arXiv 2110.08270)."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Reconstruction, Similarity, stream_of
from mmx.losses import cosine_distance, distillation_loss, masked_mean
from mmx.modalities import Ids
from mmx.modalities.masking import modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Context, Objective, check_entries, check_head, reading
from mmx.objectives.views import View, run_views
from mmx.topologies import FUSED
from mmx.types import Batch, Metrics, Outputs


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """What a teacher makes of an example, told by the model from as many or fewer of its modalities.

    The teacher is a trained model of the same tokenizer, whose weights are kept in the state of the run (its folder has to stay,
    for it says what they are of), or the moving average of the model itself.
    """

    modalities: tuple[str, ...] = ("image",)
    """The entries that the model reads."""
    taught: tuple[str, ...] = ("image", "text")
    """The entries that the teacher reads."""
    teacher: str = ""
    """Folder of a run or of published weights; empty: the moving average of the model (`optimizer.ema`)."""
    what: Literal["logits", "embeddings", "pooled", "states"] = "embeddings"
    """logits: softened answers of a head; embeddings: vectors in the shared space, by their cosine; pooled: the mean of streams
    that both have, by its cosine; states: each of their tokens behind the last stage, by its cosine (DistilBERT, arXiv
    1910.01108, 3). What one of the two does not have of an example is not asked."""
    head: str = ""
    """The head of one answer an example whose logits these are; the model has it by another objective."""
    temperature: float = 2.0
    """By which logits are divided."""

    def check(self, model: MultimodalTransformer) -> None:
        check_entries(self.modalities, model)
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature}; it has to be more than 0")
        if self.what == "logits":
            self._check_answer(model)
        elif not self._both:
            raise InputError(f"what={self.what!r}: modalities={self.modalities} and taught={self.taught} have none in common")
        if self.what == "embeddings" and model.embed is None:
            raise InputError("what='embeddings': the model has no shared space; build it with embed > 0")
        if not self.teacher:
            check_entries(self.taught, model)

    def check_tokenizer(self, tokenizer: Any) -> None:
        if not self.teacher or tokenizer is None:
            return
        teacher = _load(self.teacher)
        known, reads = teacher.files.get("tokenizer.json"), [teacher.model.modalities[modality_of(e)] for e in self.taught]
        if known is not None and any(isinstance(m, Ids) for m in reads) and not tokenizer.makes_ids_of(known):
            raise InputError(
                f"teacher={self.teacher!r} was trained with another tokenizer, so it would read other words; set "
                f"--data.tokenizer to its tokenizer.json"
            )

    def _check_answer(self, model: MultimodalTransformer) -> None:
        check_head(self.head, model)
        head = model.heads[self.head]
        if getattr(head, "per_token", False) or isinstance(head, (Reconstruction, Similarity)):
            kind = type(head).__name__
            raise InputError(f"head={self.head!r} is a {kind}, without one answer an example; name a head such as a Classifier")

    @property
    def _both(self) -> list[str]:
        return [modality_of(entry) for entry in self.modalities if modality_of(entry) in map(modality_of, self.taught)]

    @property
    def _model(self) -> MultimodalTransformer | None:
        return _load(self.teacher).model if self.teacher else None

    @property
    def _entry(self) -> str:
        return f"distillation/{self.what}-{zlib.crc32(repr(self).encode()):08x}"

    def corrupt(self, batch: Batch, key: jax.Array, context: Context) -> Batch:
        params = context.memory if self.teacher else context.average
        if params is None:
            raise InputError("the teacher is the moving average of the model; set optimizer.ema, or name the folder of another")
        model, wanted = self._model or context.model, reading(*self.taught)

        def look(batch: Batch) -> Any:
            return self._said(run_views(model, params, batch, [wanted], None)[wanted])

        return {**batch, self._entry: context.ask(look, {entry: batch[entry] for entry in self.taught})}

    def _said(self, output: Outputs) -> dict[str, tuple[jax.Array, jax.Array]]:
        """What is compared, by name, `(B, n)` or of tokens `(B, L, n)`, and what of it exists, `(B,)` or `(B, L)`."""
        streams = output.streams
        if self.what == "logits":
            return {self.head: (output.logits[self.head], jnp.stack([x.present for x in streams.values()]).any(0))}
        if self.what == "states":
            said = {name: (x.values, x.dense_mask) for name, x in streams.items()}
        else:
            vectors = output.embeddings if self.what == "embeddings" else output.pooled
            said = {name: (x, streams[stream_of(streams, name) or name].present) for name, x in vectors.items()}
        return {name: x for name, x in said.items() if name in self._both or name == FUSED}

    def views(self) -> tuple[View, ...]:
        return (reading(*self.modalities, alone=self.what == "logits"),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        said, taught = self._said(outputs[0]), batch[self._entry]
        both = [name for name in said if name in taught]
        if not both:
            raise InputError(
                f"what={self.what!r}: the model has {', '.join(said)}, the teacher {', '.join(taught)}: none in common"
            )
        found = [self._compare(name, *said[name], *taught[name]) for name in both]
        loss, agree, there = (jnp.stack(each) for each in zip(*found, strict=True))  # (streams, B), 0 where one is not there
        count = jnp.maximum(there.sum(0), 1)
        return {"loss": loss.sum(0) / count, "agree": agree.sum(0) / count, "there": there.any(0)}

    def _compare(self, name: str, said: jax.Array, here: jax.Array, taught: jax.Array, known: jax.Array) -> tuple[jax.Array, ...]:
        """How far the model is from its teacher, how well they agree, and whether both are there: each `(B,)`."""
        if said.shape != taught.shape:
            forms = f"{said.shape[1:]} of an example and, of the teacher, {taught.shape[1:]}"
            raise InputError(f"what={self.what!r}: {name!r} has {forms}; choose a teacher, or modalities, of the same form")
        if self.what == "logits":
            loss = distillation_loss(said, taught, self.temperature)
            agree = (said.argmax(-1) == taught.argmax(-1)).astype(jnp.float32)
        else:
            loss = cosine_distance(said, taught)
            agree = 1 - loss
        there = (here & known).reshape(len(loss), -1)  # (B, tokens), or (B, 1)
        count = jnp.maximum(there.sum(1), 1)
        loss, agree = (jnp.where(there, x.reshape(there.shape), 0).sum(1) / count for x in (loss, agree))
        return loss, agree, there.any(1)

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        agree = masked_mean(values["agree"], values["there"])
        return masked_mean(values["loss"], values["there"]), {"distillation/agreement": agree}

    def memory(self, model: MultimodalTransformer) -> Any:
        if not self.teacher:
            return None
        teacher = _load(self.teacher).model
        check_entries(self.taught, teacher)
        if self.what == "logits":
            self._check_answer(teacher)
        if self.what == "embeddings" and teacher.embed != model.embed:
            raise InputError(
                f"what='embeddings': spaces of {model.embed} and, of the teacher, {teacher.embed} numbers; they must be one"
            )
        return jax.device_get(_load(self.teacher).params)  # the run lays it out on its own devices


@functools.lru_cache(maxsize=2)
def _load(folder: str) -> Any:
    from mmx.pretrained import load_pretrained  # which knows of runs, and so of objectives

    return load_pretrained(folder)
