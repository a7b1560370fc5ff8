"""Zero-shot classification: a class is a text about it, and what is classified belongs to the nearest one.

CLIP, arXiv 2103.00020, 3.1.4: several texts of each class, made by templates; a class is the mean of their unit vectors.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mmx.data import Pipeline, Tokenizer
from mmx.errors import InputError, at_least, unknown
from mmx.evaluate.report import Evaluation, Report
from mmx.evaluate.retrieval import check_names, embed_batch, embed_split, ranks
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer

Template: TypeAlias = str | Callable[[str], str]
EACH = "mean_per_class"
PLACES = {"top1": 1, "top5": 5, EACH: 1}  # by metric, how many answers a query has
SAME = ("{}",)  # the name of a class alone


def build_zero_shot_classifier(
    model: Any,
    tokenizer: Callable[..., Any] | None,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[Template],
    *,
    text: str = "text",
    batch_size: int = 256,
) -> np.ndarray:
    """The matrix `(E, C)` of a classifier: `embeddings (N, E) @ classifier` are the cosines of N queries to C classes.

    What is classified may be of any modality of the same space: images, sounds, videos, or other texts.

        classifier = mmx.build_zero_shot_classifier(pretrained, None, ["cat", "dog"], ["a photo of a {}."])
        classifier = mmx.build_zero_shot_classifier(model.bind({"params": params}), tokenizer, ["cat", "dog"], [str.upper])

    Args:
        model: what embeds texts: `mmx.Pretrained`; a model of mmx bound to its parameters; or a function of what the tokenizer
            returns, to `(n, E)`.
        tokenizer: from a list of texts to what the model reads; None: what a `Pretrained` prepares itself.
        classnames: C of them; of a class with several names, all of them.
        templates: format strings, "a photo of a {}.", or functions of a name; their unit vectors are averaged.
        text: the modality that is read, of a model of mmx.
        batch_size: texts that are embedded at a time.

    Raises:
        InputError: no class, no template, one without a place for the name, or a model whose texts have no vectors.
    """
    if isinstance(model, MultimodalTransformer):
        embed = _of_bound(model, tokenizer, text)
    elif (own := _of_pretrained(model, tokenizer, text)) is not None:
        embed = own
    elif callable(model) and tokenizer is not None:
        embed = lambda texts: model(tokenizer(texts))  # noqa: E731
    else:
        raise InputError(
            f"build_zero_shot_classifier: got model={type(model).__name__}, tokenizer={type(tokenizer).__name__}; expected a "
            f"Pretrained, a model bound to its parameters (model.bind(variables)), or a function of what a tokenizer returns"
        )
    return class_vectors(embed, classnames, templates, batch_size).T


def class_vectors(
    embed: Callable[[list[str]], Any], classnames: Sequence[str | Sequence[str]], templates: Sequence[Template], batch_size: int
) -> np.ndarray:
    """One unit vector for each class, `(C, E)`, of what `embed` returns for up to `batch_size` texts, `(n, E)`."""
    if not classnames or not templates:
        raise InputError(f"zero shot: {len(classnames)} classes and {len(templates)} templates; give at least one of each")
    names = [(name,) if isinstance(name, str) else tuple(name) for name in classnames]
    if () in names:
        raise InputError(f"zero shot: class number {names.index(())} has no name")
    texts = [_said(template, name) for of_class in names for name in of_class for template in templates]
    found = [np.asarray(embed(texts[i : i + batch_size]), np.float32) for i in range(0, len(texts), batch_size)]
    vectors = _unit(np.concatenate(found))
    ends = np.cumsum([len(of_class) * len(templates) for of_class in names])[:-1]
    return _unit(np.stack([each.mean(0) for each in np.split(vectors, ends)]))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def _said(template: Template, name: str) -> str:
    """The text a template makes of a name.

    Raises:
        InputError: a format string that does not hold the name at one place, written {}.
    """
    if not isinstance(template, str):
        return template(name)
    try:
        said = [template.format(n) for n in (name, name + "?")]
    except (IndexError, KeyError, ValueError) as error:
        raise InputError(f"template {template!r}: {error!r}; the name of a class stands where it says {{}}") from error
    if said[0] == said[1]:
        raise InputError(f"template {template!r} says the same of every class; write {{}} where its name stands")
    return said[0]


def _of_bound(model: MultimodalTransformer, tokenizer: Any, text: str) -> Callable[[list[str]], Any]:
    if model.scope is None:
        raise InputError("build_zero_shot_classifier: the model has no parameters; give model.bind({'params': params})")
    if text not in model.modalities:
        raise InputError("build_zero_shot_classifier: " + unknown("modality", text, model.modalities))
    if tokenizer is None:
        raise InputError("build_zero_shot_classifier: the model reads no words; give the tokenizer that it was trained with")
    module, variables = model.unbind()
    run = jax.jit(lambda variables, raw: module.apply(variables, {text: raw}).embeddings[text])  # type: ignore[union-attr]
    embedder: Any = module.modalities[text]
    return lambda texts: run(variables, tokens(tokenizer, texts, embedder))


def tokens(tokenizer: Any, texts: list[str], embedder: Ids) -> Any:
    """What an embedder of ids reads of texts."""
    return tokenizer(texts, embedder.length) if isinstance(tokenizer, Tokenizer) else tokenizer(texts)


def _of_pretrained(model: Any, tokenizer: Any, text: str) -> Callable[[list[str]], Any] | None:
    from mmx.zoo.preprocess import Preprocessing
    from mmx.zoo.pretrained import Pretrained  # who trains need not wait for all families

    if not isinstance(model, Pretrained):
        return None
    kind = "texts" if isinstance(model.preprocess, Preprocessing) else text  # a run's own names are those of its modalities

    def embed(texts: list[str]) -> Any:
        fields = model(**(model.preprocess(**{kind: texts}) if tokenizer is None else tokenizer(texts)))
        known = [name for name in (f"{text}_embeds", f"{text}_features") if name in fields]
        if not known:
            raise InputError(f"{model.family.name}: a text alone has no vector here; it has {', '.join(fields)}")
        return fields[known[0]]

    return embed


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Each example of a split belongs to the class whose texts are nearest: the share that is right, beside chance.

    Over all examples, and as the mean of the classes' shares, which knows no common ones (CLIP's "mean per class").
    """

    every: int = 0
    """Steps between two evaluations; 0: only at the end."""
    split: str = "composition"
    """The split of the data set."""
    query: str = "image"
    """The modality that is classified."""
    text: str = "text"
    """The modality of ids that classes are told in."""
    label: str = "group"
    """The field of the data set that says the class. Examples that have none, several, or one that is not among the classes are
    left out."""
    classes: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """What the field says -> what the class is called in a text, or all that it is called. Empty: all that the training split
    says, as it says it."""
    names: str = ""
    """The field that says what an example is called: a class is called all that its examples in the training split are. Empty:
    what `classes` says."""
    templates: tuple[str, ...] = SAME
    """The texts about a class, each with {} where its name stands; their vectors are averaged."""

    def __post_init__(self) -> None:
        at_least(self, every=0)
        if self.names and self.classes:
            raise InputError(
                f"zero shot: names={self.names!r} and classes both say what a class is called; leave one of them out"
            )
        if not self.templates:
            raise InputError("zero shot: templates is empty; ('{}',) is the name of the class alone")
        for template in self.templates:
            _said(template, "")

    def check(self, data: Pipeline) -> None:
        """Raises an InputError for a split, a modality or a field that does not exist."""
        check_names((self.query, self.text), data)
        if data.tokenizer is None or not isinstance(data.modalities[self.text], Ids):
            raise InputError(f"zero shot: classes are told in words, but {self.text!r} is not read as text")
        source = data.source(self.split)
        for name, field in {"label": self.label, "names": self.names or self.label}.items():
            if field not in source[0]:
                raise InputError(f"zero shot: {name}: " + unknown(f"field of {source.label}", field, source[0]))

    def __call__(self, evaluation: Evaluation) -> Report:
        labels, classes = _labels(evaluation.data, self.split, self.label), dict(self.classes)
        if not classes:
            trained = evaluation.data.config.split
            known = _labels(evaluation.data, trained, self.label)
            called = _labels(evaluation.data, trained, self.names) if self.names else known
            found: dict[str, list[str]] = {}
            for label, name in sorted({pair for pair in zip(known, called, strict=True) if all(pair)}):
                found.setdefault(label, []).append(name)
            classes.update({label: tuple(names) for label, names in found.items()})
        number = {name: i for i, name in enumerate(classes)}
        chosen = np.asarray([i for i, label in enumerate(labels) if label in number], int)
        if not len(chosen):
            said = ", ".join(sorted({*labels} - {None})) or "nothing"
            raise InputError(
                f"zero shot: {self.label} of {self.split} says {said}; none is among the classes {', '.join(classes)}"
            )
        answers = np.asarray([number[labels[i]] for i in chosen])
        queries = embed_split(evaluation, self.split, (self.query,))[self.query][chosen]
        embed = functools.partial(self._embed, evaluation)
        vectors = class_vectors(embed, tuple(classes.values()), self.templates, evaluation.batch_size)
        places = ranks(queries @ vectors.T, answers)
        metrics = _metrics(places, answers, len(classes))
        if not evaluation.final:
            return Report(metrics)
        commonest = np.argsort(-np.bincount(answers, minlength=len(classes)), kind="stable")
        always = commonest.argsort()[answers] + 1
        rows = {
            f"{self.query} by {self.label}": metrics,
            "chance": {name: PLACES[name] / len(classes) for name in metrics},
            "always the commonest": _metrics(always, answers, len(classes)),
        }
        title = f"{len(answers)} of {self.split}, {len(classes)} classes"
        lines = [f"{title:<36}" + "".join(f"{name.replace('_', ' '):>16}" for name in metrics)]
        lines += [f"{name:<36}" + "".join(f"{value:>16.3f}" for value in row.values()) for name, row in rows.items()]
        return Report(metrics, "\n".join(lines))

    def _embed(self, evaluation: Evaluation, texts: list[str]) -> np.ndarray:
        """The vectors of texts, filled up to the batch that the mesh divides."""
        filled = texts + texts[-1:] * (evaluation.batch_size - len(texts))
        embedder: Any = evaluation.model.modalities[self.text]
        raw = {self.text: tokens(evaluation.data.tokenizer, filled, embedder)}
        return embed_batch(evaluation, raw)[self.text][: len(texts)]


def _metrics(places: np.ndarray, answers: np.ndarray, classes: int) -> dict[str, float]:
    """The share of the examples whose class is among the first places, and of the first alone the mean over classes."""
    right = {name: float((places <= k).mean()) for name, k in PLACES.items() if k < max(classes, 2)}
    each = [(places[answers == answer] <= PLACES[EACH]).mean() for answer in np.unique(answers)]
    return right | {EACH: float(np.mean(each))}


def _labels(data: Pipeline, split: str, field: str) -> list[Any]:
    """What a field says of each example of a split, as a name; None where it says nothing, or several things."""
    source = data.source(split)
    said = [{str(value) for value in np.ravel(source[i][field])} for i in range(len(source))]
    return [values.pop() if len(values) == 1 else None for values in said]
