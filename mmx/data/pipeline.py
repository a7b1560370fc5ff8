"""From a source to batches on the devices.

The order is fixed: shuffle, repeat and random transforms come before the slice per process, and a process takes whole
runs of rows, so batch number i holds the same examples in the same order on any number of hosts. The position in the
data is the step number.
"""

import collections
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from mmx.cache import cache_folder
from mmx.data.image import check_image, cut_patches, shift
from mmx.data.sources import DataError, Source, open_source
from mmx.data.text import Tokenizer, cached_tokenizer
from mmx.errors import InputError, at_least, unknown
from mmx.modalities import Ids, PackedPatches, Patches
from mmx.modalities.masking import unmask
from mmx.types import Batch, Masked

CORPUS = 100_000  # examples from which a tokenizer is learned, evenly spread over a larger split


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    name: str = "emoji"
    """A built-in data set, or the folder of one that TFDS prepared in ArrayRecord format."""
    split: str = "train"
    """The split to train on; TFDS's slices (train[:80%]) are understood."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"image": "image", "text": "name"})
    """For each modality the field of the data set that holds it."""
    shift: int = 1
    """Training images are moved by up to this many pixels, at random."""
    keep: bool = True
    """Keep decoded examples in memory, for sets that fit there."""
    threads: int = 1
    """Threads that read and decode."""
    buffer: int = 8
    """Batches that are prepared ahead on the host."""
    tokenizer: str = ""
    """A tokenizer.json. Empty: one is learned from the texts of the split, and kept with the run."""

    def __post_init__(self) -> None:
        at_least(self, shift=0, threads=1, buffer=1)


class Examples:
    """A source whose examples are decoded and checked for the model: `{modality: array or Masked}`, the same every time.

    Args:
        source: where they come from.
        fields: for each modality its field of the source.
        modalities: the embedders; they say what an example must look like.
        tokenizer: turns str into ids.
        keep: whether decoded examples stay in memory.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, str],
        modalities: Mapping[str, nn.Module],
        tokenizer: Tokenizer | None,
        keep: bool,
    ):
        self.source, self._fields, self._modalities, self._tokenizer = source, fields, modalities, tokenizer
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None
        self._forms: dict[str, tuple[Any, Any]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"Examples({self.source!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._kept is not None and index in self._kept:
            return dict(self._kept[index])
        raw, example = self.source[index], {}
        for name, field in self._fields.items():
            try:
                example[name] = self._decode(name, raw[field])
            except ValueError as error:
                key = raw.get("key", "none")
                where = f"{self.source.label}, example {index} (key {key}), field {field!r}, modality {name!r}"
                raise DataError(f"{where}: {error}") from error
        if self._kept is not None:
            self._kept[index] = example
        return dict(example)

    def _decode(self, name: str, value: Any) -> Any:
        embedder = self._modalities[name]
        if isinstance(embedder, Patches) and _is_image(embedder):
            return check_image(np.asarray(value), (*embedder.size, embedder.channels))
        if isinstance(embedder, Ids) and isinstance(value, str):
            assert self._tokenizer is not None
            return Masked(*self._tokenizer.encode(value, embedder.length))
        if isinstance(embedder, PackedPatches):
            return Masked(*cut_patches(np.asarray(value), embedder.patch, embedder.length))
        if name not in self._forms:
            self._forms[name] = raw_form(embedder)
        return fit_raw(embedder, value, self._forms[name])


class Pipeline:
    """Batches of one data set for the modalities of one model.

    Args:
        config: what is read.
        modalities: the model's embedders, by name.
        batch_size: examples per step, over all processes.
        seed: of the order and of the random transforms.
        tokenizer: for ids; None: learned from the texts of the split, once.
    """

    def __init__(
        self,
        config: DataConfig,
        modalities: Mapping[str, nn.Module],
        batch_size: int,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        for name in config.fields:
            if name not in modalities:
                raise InputError(unknown("modality in data.fields", name, modalities))
        self.config, self.batch_size, self.seed, self.modalities = config, batch_size, seed, modalities
        source = self.source(config.split)
        if len(source) < batch_size:
            raise DataError(
                f"{source.label} has {len(source)} examples, fewer than a batch of {batch_size}; "
                f"choose a smaller --batch-size or a larger split"
            )
        if tokenizer is None and config.tokenizer:
            tokenizer = Tokenizer.load(Path(config.tokenizer))
        self.tokenizer = tokenizer or self._learn_tokenizer(source)
        self._check_vocab()
        self.examples = functools.cache(self._examples)

    def train(self, first_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, from batch number `first_step` on: this process's rows, as NumPy."""
        processes, process = jax.process_count(), jax.process_index()
        examples = self.examples(self.config.split)
        order = grain.MapDataset.range(len(examples)).seed(self.seed).shuffle().repeat()
        order = order.batch(self.batch_size // processes, drop_remainder=True)[process::processes]
        batches = order.map_with_index(functools.partial(self._read, examples, process))
        options = grain.ReadOptions(num_threads=self.config.threads, prefetch_buffer_size=self.config.buffer)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": first_step})
        return iterator

    def evaluation(self, split: str, batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """A split in its order, once: `(batch, indices)`. The last batch is filled up with copies of its last example."""
        examples = self.examples(split)
        for start in range(0, len(examples), batch_size):
            indices = np.arange(start, min(start + batch_size, len(examples)))
            rows = [*indices, *[indices[-1]] * (batch_size - len(indices))]
            yield stack([examples[int(i)] for i in rows]), indices

    def source(self, split: str) -> Source:
        """The examples of a split as they are stored."""
        source = open_source(self.config.name, split)
        known = source[0]
        for name, field in self.config.fields.items():
            if field not in known:
                raise DataError(unknown(f"field of {source.label} (data.fields.{name})", field, known))
        return source

    def _examples(self, split: str) -> Examples:
        return Examples(self.source(split), self.config.fields, self.modalities, self.tokenizer, self.config.keep)

    def _read(self, examples: Examples, process: int, step: int, indices: np.ndarray) -> Batch:
        """One process's rows of batch number `step`. Random numbers are drawn for all rows, so that each row has its own."""
        rows = [examples[int(i)] for i in indices]
        rng = np.random.default_rng((self.seed, step))
        for name in self.config.fields:
            if self.config.shift and _is_image(self.modalities[name]):
                shifts = rng.integers(-self.config.shift, self.config.shift + 1, (self.batch_size, 2))
                for row, (down, right) in zip(rows, shifts[process * len(rows) :], strict=False):
                    row[name] = shift(row[name], int(down), int(right))
        return stack(rows)

    def _text_fields(self, source: Source) -> dict[str, Ids]:
        fields = {field: self.modalities[name] for name, field in self.config.fields.items()}
        first = source[0]
        return {f: m for f, m in fields.items() if isinstance(m, Ids) and isinstance(first[f], str)}

    def _learn_tokenizer(self, source: Source) -> Tokenizer | None:
        fields = self._text_fields(source)
        if not fields:
            return None
        rows = np.linspace(0, len(source) - 1, min(len(source), CORPUS)).astype(int)
        corpus = [example[field] for example in (source[i] for i in rows) for field in fields]
        return cached_tokenizer(corpus, min(m.vocab for m in fields.values()), cache_folder("tokenizers"))

    def _check_vocab(self) -> None:
        for name in self.config.fields:
            embedder = self.modalities[name]
            if isinstance(embedder, Ids) and self.tokenizer is not None and self.tokenizer.vocab > embedder.vocab:
                raise InputError(
                    f"modalities.{name}: vocab={embedder.vocab}, but the tokenizer has {self.tokenizer.vocab} ids; "
                    f"set --modalities.{name}.vocab to at least that"
                )


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


def _is_image(embedder: nn.Module) -> bool:
    return isinstance(embedder, Patches) and len(embedder.size) == 2 and not embedder.resize


def stack(examples: Sequence[Any]) -> Any:
    """Examples -> one batch: every leaf gets a leading batch dimension."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def put_batch(batch: Batch, sharding: NamedSharding) -> Batch:
    """Puts this process's rows on its devices; together the processes make one global batch."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class PrefetchToDevice:
    """Keeps `ahead` batches on the devices, filled by a thread, and counts the time spent waiting for it, in seconds."""

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Batch], ahead: int = 2):
        self.waited = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches, put), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        collections.deque(self._drain(), maxlen=0)
        self._thread.join(timeout=10)

    def _drain(self) -> Iterator[Any]:
        while True:
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def _fill(self, batches: Iterator[Batch], put: Callable[[Batch], Batch]) -> None:
        try:
            for batch in batches:
                item = put(batch)
                while not self._stop.is_set():
                    try:
                        self._queue.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:  # noqa: BLE001  (raised again in the consumer)
            self._queue.put(error)
