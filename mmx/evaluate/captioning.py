"""Captions of held-out images, beside the true ones."""

import dataclasses

import jax
import numpy as np

from mmx.data import Pipeline
from mmx.errors import at_least
from mmx.evaluate.report import Evaluation, Report
from mmx.evaluate.retrieval import check_names, put_local, to_host
from mmx.generation import Decoding, generate
from mmx.modalities import Ids
from mmx.modalities.masking import ids_of


@dataclasses.dataclass(frozen=True)
class Captions:
    """Greedy captions of some images of a split: how many are right to the last word, and a few to read."""

    every: int = 0
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""
    count: int = 128
    """How many images, evenly spread over the split."""
    show: int = 6
    """How many captions to print."""
    text: str = "text"
    """The modality of ids that is generated."""
    given: tuple[str, ...] = ("image",)
    """What it describes."""

    def __post_init__(self) -> None:
        at_least(self, every=0, count=1, show=1)

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split or a modality that does not exist."""
        check_names((*self.given, self.text), data)
        data.source(self.split)

    def __call__(self, evaluation: Evaluation) -> Report:
        model, tokenizer = evaluation.model, evaluation.data.tokenizer
        embedder = model.modalities[self.text]
        if "captioning" not in model.heads or tokenizer is None or not isinstance(embedder, Ids):
            return Report(text="no captions: the model was not trained to write any")
        if embedder.tables or embedder.vectors:
            return Report(text=f"no captions: the ids of {self.text!r} have tables beside them, whose values nobody has told")
        examples = evaluation.data.examples(self.split)
        chosen = np.unique(np.linspace(0, len(examples) - 1, self.count).astype(int))
        rows = [examples[int(i)] for i in chosen]
        filled = rows + rows[-1:] * (-len(rows) % evaluation.batch_size)
        captions: list[str] = []
        for start in range(0, len(filled), evaluation.batch_size):
            part = filled[start : start + evaluation.batch_size]
            given = {name: jax.tree.map(lambda *x: np.stack(x), *[row[name] for row in part]) for name in self.given}
            with jax.set_mesh(evaluation.mesh):
                ids = generate(
                    model,
                    evaluation.params,
                    put_local(given, evaluation),
                    text=self.text,
                    length=embedder.length,
                    begin=tokenizer.begin,
                    decoding=Decoding(end=() if tokenizer.end is None else (tokenizer.end,), pad=tokenizer.pad or 0),
                )
            captions += [tokenizer.decode(row) for row in to_host(ids)]
        truths = [tokenizer.decode(ids_of(row[self.text])) for row in rows]
        pairs = list(zip(captions, truths, strict=False))
        exact = float(np.mean([caption == truth for caption, truth in pairs]))
        step = max(len(pairs) // self.show, 1)
        lines = [f"{'true':<52}  written"]
        lines += [f"{truth[:52]:<52}  {caption[:60]}" for caption, truth in pairs[::step][: self.show]]
        return Report({"exact": exact}, "\n".join([*lines, f"{exact:.1%} of {len(pairs)} are right to the last word"]))
