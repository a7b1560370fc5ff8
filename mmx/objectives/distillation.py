"""Distillation: say what a teacher says (survey 4.4; arXiv 1503.02531; for missing modalities arXiv 2110.08270)."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmx.errors import InputError
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
    what: Literal["logits", "embeddings", "pooled"] = "embeddings"
    """logits: softened answers of a head; embeddings: vectors in the shared space, by their cosine; pooled: the mean of streams
    that both have, by its cosine."""
    head: str = ""
    """The head of one answer an example whose logits these are; the model has it by another objective."""
    temperature: float = 2.0
    """By which logits are divided."""

    def check(self, model: MultimodalTransformer) -> None:
        check_entries(self.modalities, model)
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature}; it has to be more than 0")
        if self.what == "logits":
            check_head(self.head, model)
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

    def _said(self, output: Outputs) -> Any:
        if self.what == "logits":
            return output.logits[self.head]
        said = output.embeddings if self.what == "embeddings" else output.pooled
        return {name: x for name, x in said.items() if name in self._both or name == FUSED}

    def views(self) -> tuple[View, ...]:
        return (reading(*self.modalities, alone=self.what == "logits"),)

    def select(self, outputs: Sequence[Outputs], batch: Batch) -> Any:
        said, taught, streams = self._said(outputs[0]), batch[self._entry], outputs[0].streams
        if self.what == "logits":
            there = jnp.stack([x.present for x in streams.values()]).any(0)
            each = distillation_loss(said, taught, self.temperature)
            agree = said.argmax(-1) == taught.argmax(-1)
            more = tuple(range(1, each.ndim))
            return {"loss": each.mean(more), "agree": agree.astype(jnp.float32).mean(more), "there": there}
        both = [name for name in said if name in taught]
        distance = jnp.stack([cosine_distance(said[name], taught[name]) for name in both]).mean(0)
        there = functools.reduce(jnp.logical_and, [jnp.square(taught[name]).sum(-1) > 0 for name in both])
        return {"loss": distance, "agree": 1 - distance, "there": there & jnp.stack([x.present for x in streams.values()]).any(0)}

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, Metrics]:
        agree = masked_mean(values["agree"], values["there"])
        return masked_mean(values["loss"], values["there"]), {"distillation/agreement": agree}

    def memory(self, model: MultimodalTransformer) -> Any:
        if not self.teacher:
            return None
        teacher = _load(self.teacher).model
        check_entries(self.taught, teacher)
        if self.what == "logits":
            check_head(self.head, teacher)
        if self.what == "embeddings" and teacher.embed != model.embed:
            raise InputError(
                f"what='embeddings': spaces of {model.embed} and, of the teacher, {teacher.embed} numbers; they must be one"
            )
        return jax.device_get(_load(self.teacher).params)  # the run lays it out on its own devices


@functools.lru_cache(maxsize=2)
def _load(folder: str) -> Any:
    from mmx.pretrained import load_pretrained  # which knows of runs, and so of objectives

    return load_pretrained(folder)
