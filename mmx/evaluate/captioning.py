"""Captions of held-out images, beside the true ones."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from mmx.data import Pipeline
from mmx.decoding import Decoding
from mmx.errors import InputError, at_least, unknown
from mmx.evaluate.report import Evaluation, Report
from mmx.evaluate.retrieval import check_names, put_local, to_host
from mmx.generation import generate
from mmx.modalities import Ids
from mmx.modalities.embedder import GROUP
from mmx.modalities.masking import modality_of
from mmx.types import Masked


@dataclasses.dataclass(frozen=True)
class Captions:
    """Greedy captions of some images of a split: how many are right to the last word, and a few to read.

    Of a text in parts, such as a question and its answer, the last one is written, with those before it as the prompt.
    """

    every: int = 0
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""
    count: int = 128
    """How many images, evenly spread over the split."""
    show: int = 6
    """How many captions to print."""
    text: str = "text"
    """The entry of ids that is generated."""
    head: str = "captioning"
    """The head that scores the next id."""
    given: tuple[str, ...] = ("image",)
    """What it describes."""

    def __post_init__(self) -> None:
        at_least(self, every=0, count=1, show=1)

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split or a modality that does not exist."""
        check_names((*self.given, modality_of(self.text)), data)
        if self.text not in data.config.fields:
            raise InputError(unknown("entry", self.text, data.config.fields))
        data.source(self.split)

    def __call__(self, evaluation: Evaluation) -> Report:
        model, tokenizer, text = evaluation.model, evaluation.data.tokenizer, modality_of(self.text)
        embedder = model.modalities[text]
        if self.head not in model.heads or tokenizer is None or not isinstance(embedder, Ids):
            return Report(text="no captions: the model was not trained to write any")
        if embedder.tables or embedder.vectors:
            return Report(text=f"no captions: the ids of {text!r} have tables beside them, whose values nobody has told")
        examples = evaluation.data.examples(self.split)
        chosen = np.unique(np.linspace(0, len(examples) - 1, self.count).astype(int))
        rows = [examples[int(i)] for i in chosen]
        told = [_parts(row[self.text], tokenizer.begin) for row in rows]
        widest = max(len(prompt) for prompt, _ in told)
        prompts = np.stack([np.pad(prompt, (0, widest - len(prompt))) for prompt, _ in told]).astype(np.int32)
        there = np.arange(widest) < np.array([len(prompt) for prompt, _ in told])[:, None]
        group = np.where(np.pad(there, ((0, 0), (0, embedder.length - widest))), 0, -1)
        written: list[np.ndarray] = []
        for start in range(0, len(rows), evaluation.batch_size):
            part = np.minimum(np.arange(start, start + evaluation.batch_size), len(rows) - 1)
            given = {name: jax.tree.map(lambda *x: np.stack(x), *[rows[i][name] for i in part]) for name in self.given}
            if widest > 1:
                given[text] = {GROUP: group[part]}
            here = put_local({"given": given, "prompt": Masked(prompts[part], there[part])}, evaluation)
            with jax.set_mesh(evaluation.mesh):
                ids = generate(
                    model,
                    evaluation.params,
                    here["given"],
                    text=text,
                    head=self.head,
                    length=embedder.length,
                    prompt=here["prompt"],
                    decoding=Decoding(end=() if tokenizer.end is None else (tokenizer.end,), pad=tokenizer.pad or 0),
                )
            written += list(to_host(ids))
        captions = [tokenizer.decode(ids[len(prompt) :]) for ids, (prompt, _) in zip(written, told, strict=False)]
        truths = [tokenizer.decode(rest) for _, rest in told]
        pairs = list(zip(captions, truths, strict=False))
        exact = float(np.mean([caption == truth for caption, truth in pairs]))
        step = max(len(pairs) // self.show, 1)
        whole = [f"{tokenizer.decode(prompt)} {truth}".strip() for (prompt, _), truth in zip(told, truths, strict=True)]
        lines = [f"{'true':<52}  written"]
        lines += [
            f"{true[:52]:<52}  {caption[:60]}" for true, caption in list(zip(whole, captions, strict=False))[::step][: self.show]
        ]
        return Report({"exact": exact}, "\n".join([*lines, f"{exact:.1%} of {len(pairs)} are right to the last word"]))


def _parts(raw: Masked, begin: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text that are given, at least its begin, and those that are to be written."""
    fields = raw.array if isinstance(raw.array, Mapping) else {"ids": raw.array}
    ids = np.asarray(fields["ids"])[np.asarray(raw.mask)]
    given = int((np.asarray(fields[GROUP]) == 0).sum()) if GROUP in fields else int(begin is not None)
    return ids[:given], ids[given:]
