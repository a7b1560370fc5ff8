"""Which forward passes the objectives want, and how they share them."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from mmx.model import MultimodalTransformer
from mmx.types import Batch, Outputs, Params


@dataclasses.dataclass(frozen=True)
class View:
    """One forward pass: which entry of the batch each modality reads, and which modalities read as a decoder does."""

    reads: tuple[tuple[str, str], ...]
    causal: tuple[str, ...] = ()
    alone: bool = dataclasses.field(default=False, compare=False)
    """Whether what is asked of it is of the whole example, and not of its tokens: then it is not read off a larger one."""

    def contains(self, other: "View") -> bool:
        """Whether `other`, one modality alone, can be read off this view.

        It can where every further modality is causal, for no stream sees a causal one: the image tokens of
        (image, causal text) are those of (image).
        """
        return set(other.reads) <= set(self.reads) and not other.causal and self._not_causal == other._not_causal

    @property
    def _not_causal(self) -> set[str]:
        return {modality for modality, _ in self.reads} - set(self.causal)


def view(*modalities: str, causal: Iterable[str] = (), **replaced: str) -> View:
    """`view("image", text="swapped", causal=["text"])` reads batch["image"] as the image and batch["swapped"] as the text."""
    return View((*((name, name) for name in modalities), *replaced.items()), tuple(causal))


def run_views(
    model: MultimodalTransformer, params: Params, batch: Batch, views: Iterable[View], key: jax.Array | None
) -> Mapping[View, Outputs]:
    """Runs every distinct view once; a view that another contains is read off it where the topology keeps streams apart."""
    views = tuple(views)
    wanted, alone = tuple(dict.fromkeys(views)), {v for v in views if v.alone}
    separate = all(stage.separate for stage in model.stages)
    shared = {v: next((w for w in wanted if w != v and separate and w.contains(v)), v) for v in wanted}
    source = {v: v if v in alone else w for v, w in shared.items()}
    outputs = {}
    for i, v in enumerate(dict.fromkeys(source.values())):
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, i)}
        inputs = {modality: batch[entry] for modality, entry in v.reads}
        outputs[v] = model.apply({"params": params}, inputs, v.causal, rngs=rngs)
    return {v: outputs[source[v]] for v in wanted}
