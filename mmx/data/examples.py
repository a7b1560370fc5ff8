"""From what a data set holds of an example to what a model reads: decoded, checked, and the same every time."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mmx.data.config import Label
from mmx.data.image import check_image, cut_patches
from mmx.data.sources import DataError, Source
from mmx.data.text import Tokenizer
from mmx.errors import InputError, unknown
from mmx.modalities import Embedder, Ids, PackedPatches, Patches
from mmx.modalities.masking import WORDS, modality_of, unmask
from mmx.types import Masked

LABEL = "label/"  # what the entries of labels begin with


class Examples:
    """A source whose examples are decoded and checked for the model: `{entry: array or Masked}`, the same every time.

    Args:
        source: where they come from.
        fields: for each entry its field of the source, or several fields: the parts of one text.
        modalities: the embedders; they say what an example must look like.
        tokenizer: turns str into ids.
        keep: whether decoded examples stay in memory.
        labels: the labels by name.
        words: whether each entry of text comes with the words its tokens belong to.
        grouped: entries of text that tell which tokens are the prompt in every example, also where one has no prompt.
        absent: what stands for each entry that some data set of a mixture lacks, where it is this one.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, str | tuple[str, ...]],
        modalities: Mapping[str, nn.Module],
        tokenizer: Tokenizer | None,
        keep: bool,
        labels: Mapping[str, Label] | None = None,
        words: bool = False,
        grouped: Collection[str] = (),
        absent: Mapping[str, Any] | None = None,
    ):
        self.source, self._fields, self._modalities, self._tokenizer = source, fields, modalities, tokenizer
        self._labels, self._words, self._grouped, self._absent = labels or {}, words, grouped, absent or {}
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None
        self._forms: dict[str, tuple[Any, Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of labels

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"Examples({self.source!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._kept is not None and index in self._kept:
            return dict(self._kept[index])
        raw, example = self.source[index], {}
        for entry, field in self._fields.items():
            with self._naming(index, raw, field, f"entry {entry!r}"):
                example |= self._decode(entry, value_of(raw, field))
        for name, label in self._labels.items():
            with self._naming(index, raw, label.field, f"label {name!r}"):
                told = example[LABEL + name] = read_label(label, raw[label.field])
                if told.shape != (shape := self._shapes.setdefault(name, told.shape)):
                    raise InputError(f"numbers of shape {told.shape}, but {shape} in an example before")
        for entry, nothing in self._absent.items():
            example[entry] = _masked(entry, example[entry]) if entry in example else nothing
        if self._kept is not None:
            self._kept[index] = example
        return dict(example)

    @contextlib.contextmanager
    def _naming(self, index: int, raw: Mapping[str, Any], field: str | tuple[str, ...], what: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            where = f"{self.source.label}, example {index} (key {raw.get('key', 'none')}), field {field!r}, {what}"
            raise DataError(f"{where}: {error}") from error

    def _decode(self, entry: str, value: Any) -> dict[str, Any]:
        embedder = self._modalities[modality_of(entry)]
        if is_image(embedder):
            return {entry: check_image(np.asarray(value), (*embedder.size, embedder.channels))}
        if isinstance(embedder, Ids) and (is_text(value) or entry in self._grouped):
            assert self._tokenizer is not None
            text = self._tokenizer.read(value, embedder.length)
            parts = entry in self._grouped or not isinstance(value, str)
            ids = {"ids": text.ids, "group": text.group} if parts else text.ids
            return {entry: Masked(ids, text.mask)} | ({f"{entry}/{WORDS}": text.words} if self._words else {})
        if isinstance(embedder, PackedPatches):
            return {entry: Masked(*cut_patches(np.asarray(value), embedder.patch, embedder.length))}
        if entry not in self._forms:
            self._forms[entry] = raw_form(embedder)
        return {entry: check_ids(embedder, fit_raw(embedder, value, self._forms[entry]))}


def value_of(raw: Mapping[str, Any], field: str | tuple[str, ...]) -> Any:
    """What an example holds in a field; of several fields the texts, as one list."""
    if isinstance(field, str):
        return raw[field]
    if others := [name for name in field if not isinstance(raw[name], str)]:
        raise InputError(f"of several fields each has to hold a text, but {others[0]!r} holds {type(raw[others[0]]).__name__}")
    return [raw[name] for name in field]


def names_of(field: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the fields an entry is made of."""
    return (field,) if isinstance(field, str) else field


def is_text(value: Any) -> bool:
    """Whether a field holds a text, or the parts of one. An empty list may be of anything, and is not counted."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value))


def is_image(embedder: Any) -> bool:
    """Whether an embedder reads pictures of one size, which may be shifted; not a video, nor a spectrogram."""
    return isinstance(embedder, Patches) and len(embedder.size) == 2 and not embedder.resize


def read_label(label: Label, value: Any) -> np.ndarray:
    """What a field holds as a class () int32, or as numbers float32 where `label` has no classes.

    Raises:
        InputError: an unknown class, or several; no number.
    """
    if label.classes is None:
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iufb" or np.isinf(numbers).any():
            raise InputError(f"expected finite numbers, got {value!r}; for names set the classes of the label")
        absent = np.isin(numbers, [item for item in label.none if not isinstance(item, str)])
        return np.where(absent, np.nan, numbers).astype(np.float32)
    found = {item for item in np.ravel(np.asarray(value, object)).tolist() if item not in label.none}
    if not found or (len(found) > 1 and label.several == "leave_out"):
        return np.asarray(-1, np.int32)
    if len(found) > 1:
        several = ", ".join(sorted(map(str, found)))
        raise InputError(f"expected one class, got several: {several}; set several='leave_out' to leave such examples out")
    (item,) = found
    if isinstance(label.classes, tuple):
        if item not in label.classes:
            raise InputError(unknown("class", str(item), map(str, label.classes)))
        return np.asarray(label.classes.index(item), np.int32)
    if not isinstance(item, int | np.integer):
        raise InputError(f"expected the number of a class, got {item!r}; set the names of the classes")
    if not 0 <= item < label.classes:
        raise InputError(f"class {item} is none of the {label.classes} classes, 0 to {label.classes - 1}")
    return np.asarray(item, np.int32)


def raw_form(embedder: Any) -> tuple[Any, Any]:
    """The shapes of what an embedder reads, and of its mask."""
    return unmask(jax.eval_shape(lambda: embedder.example(1)))


def fit_raw(embedder: Any, value: Any, form: tuple[Any, Any] | None = None) -> Any:
    """A raw value of one example, padded to the size the embedder was built for, and which of it exists.

    Args:
        embedder: says by its example what it reads: an array, or a dict of arrays.
        value: the same, with as many or fewer tokens.
        form: `raw_form(embedder)`, for who calls this for every example.

    Raises:
        ValueError: an array is missing, has another rank, or is larger.
    """
    expected, mask = form or raw_form(embedder)
    names = list(expected) if isinstance(expected, Mapping) else embedder.reads[:1]
    if isinstance(expected, Mapping) and not (isinstance(value, Mapping) and set(value) >= set(names)):
        found = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
        raise InputError(f"expected a dict of {', '.join(names)}, got {found}")
    arrays = {}
    for name in names:
        want, array = (expected[name], value[name]) if isinstance(expected, Mapping) else (expected, value)
        array, shape = np.asarray(array), want.shape[1:]
        array = array if array.size else array.astype(want.dtype)  # an empty list says nothing of its type
        fits = array.dtype != object and array.ndim == len(shape) and all(np.less_equal(array.shape, shape))
        if not fits or (mask is None and array.shape != shape):
            most = "" if mask is None else "at most "
            raise InputError(f"{name}: expected {most}{tuple(shape)}, got {array.dtype} {array.shape}")
        arrays[name] = np.pad(array, [(0, size - here) for here, size in zip(array.shape, shape, strict=True)])
    raw = arrays if isinstance(expected, Mapping) else arrays[names[0]]
    if mask is None:
        return raw
    count = len(value[embedder.reads[0]] if isinstance(expected, Mapping) else value)
    return Masked(raw, np.arange(mask.shape[1]) < count)


def check_ids(embedder: Any, raw: Any) -> Any:
    """A raw value whose ids are those of the embedder's vocabulary and tables, as int32.

    On a device an id outside of its table reads another row, or NaN, and says nothing.

    Raises:
        InputError: an id that is not in its table, or no integer.
    """
    if not isinstance(embedder, Embedder):
        return raw
    array, mask = unmask(raw)
    counts: dict[str, Any] = {name: count for name, count in embedder.tables.items() if isinstance(count, int)}
    counts |= {name: [count for _, count, _ in parts] for name, parts in embedder.joined.items()}
    if vocab := getattr(embedder, "vocab", None):
        counts[embedder.reads[0]] = vocab
    arrays = dict(array) if isinstance(array, Mapping) else {embedder.reads[0]: array}
    for name, count in counts.items():
        ids = arrays[name]
        if ids.dtype.kind not in "iu":
            raise InputError(f"{name}: expected integer ids, got {ids.dtype}")
        if (wrong := (ids < 0) | (ids >= np.asarray(count))).any():
            where = np.argwhere(wrong)[0]
            most = np.broadcast_to(count, ids.shape)[tuple(where)]
            table = "vocabulary" if vocab and name == embedder.reads[0] else "table"
            raise InputError(f"{name}: id {ids[tuple(where)]}, but the {table} has {most} ids, 0 to {most - 1}")
        arrays[name] = ids.astype(np.int32)
    array = arrays if isinstance(array, Mapping) else arrays[embedder.reads[0]]
    return array if mask is None else Masked(array, mask)


def absent_entries(sets: Sequence[Examples]) -> dict[str, Any]:
    """What stands for an entry in the examples of a data set that lacks it, for each that some of several sets lack.

    Raises:
        DataError: an entry that two of the sets have has different shapes or types in them.
    """
    found: dict[str, tuple[Any, Any, str]] = {}
    count: dict[str, int] = {}
    for examples in sets:
        for entry, value in examples[0].items():
            form = jax.tree.map(lambda x: f"{jax.dtypes.canonicalize_dtype(x.dtype)} {x.shape}", value)
            _, other, label = found.setdefault(entry, (value, form, examples.source.label))
            if form != other:
                raise DataError(f"entry {entry!r} is {other} in {label}, and {form} in {examples.source.label}; make them equal")
            count[entry] = count.get(entry, 0) + 1
    return {entry: _nothing(entry, value) for entry, (value, _, _) in found.items() if count[entry] < len(sets)}


def _is_beside(entry: str) -> bool:
    """Whether an entry is no modality's: labels, and words of tokens. These say by their numbers what is not there."""
    return entry.startswith(LABEL) or entry.endswith(f"/{WORDS}")


def _nothing(entry: str, value: Any) -> Any:
    if _is_beside(entry):
        return np.full_like(value, np.nan if value.dtype.kind == "f" else -1)
    array, mask = unmask(value)
    return Masked(jax.tree.map(np.zeros_like, array), np.zeros((), bool) if mask is None else np.zeros_like(mask))


def _masked(entry: str, value: Any) -> Any:
    return value if _is_beside(entry) or isinstance(value, Masked) else Masked(value, np.ones((), bool))
