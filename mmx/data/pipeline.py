"""From a source to batches on the devices.

The order is fixed: shuffle, repeat and random transforms come before the slice per process, and a process takes whole
runs of rows, so batch number i holds the same examples in the same order on any number of hosts. The position in the
data is the step number.
"""

import bisect
import collections
import functools
import itertools
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
from mmx.data.config import DataConfig
from mmx.data.examples import LABEL, Examples, absent_entries, is_image, is_text, names_of, value_of
from mmx.data.image import shift
from mmx.data.sources import DataError, Source, open_source
from mmx.data.text import Tokenizer, cached_tokenizer
from mmx.errors import InputError, naming, unknown
from mmx.modalities import Ids
from mmx.modalities.masking import WORDS, modality_of, unmask
from mmx.types import Batch, Masked

CORPUS = 100_000  # examples from which a tokenizer is learned, evenly spread over a larger split


class Pipeline:
    """Batches of one data set, or of several that are mixed, for the modalities of one model.

    Args:
        config: what is read.
        modalities: the model's embedders, by name.
        batch_size: examples per step, over all processes.
        seed: of the order and of the random transforms.
        tokenizer: for ids; None: learned from the texts of the splits, once.
    """

    def __init__(
        self,
        config: DataConfig,
        modalities: Mapping[str, nn.Module],
        batch_size: int,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        self.config, self.batch_size, self.seed, self.modalities = config, batch_size, seed, modalities
        self._check_names()
        sources = [self._source(number, data.split) for number, data in enumerate(config.sets)]
        if len(sources[0]) < batch_size:
            raise DataError(
                f"{sources[0].label} has {len(sources[0])} examples, fewer than a batch of {batch_size}; "
                f"choose a smaller --batch-size or a larger split"
            )
        if tokenizer is None and config.tokenizer:
            tokenizer = Tokenizer.load(Path(config.tokenizer))
        texts = [self._texts(number, source) for number, source in enumerate(sources)]
        self.tokenizer = tokenizer or self._learn_tokenizer(sources, texts)
        self._check_vocab()
        self._grouped = {e for found in texts for e, parts in found.items() if parts}
        self._absent = {}
        if config.also:
            self._absent = absent_entries([self._decoded(source, number, False) for number, source in enumerate(sources)])
        self._examples = functools.cache(
            lambda number, split: self._decoded(self._source(number, split), number, self.config.keep)
        )

    def train(self, first_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, from batch number `first_step` on: this process's rows, as NumPy.

        The examples of several data sets are counted through; their ratios hold in every batch, to one example.
        """
        processes, process = jax.process_count(), jax.process_index()
        sets = [self._examples(number, data.split) for number, data in enumerate(self.config.sets)]
        starts = [0, *itertools.accumulate(map(len, sets))]
        orders = [
            grain.MapDataset.range(*places).seed(self.seed + number).shuffle().repeat()
            for number, places in enumerate(itertools.pairwise(starts))
        ]
        order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [data.ratio for data in self.config.sets])
        order = order.batch(self.batch_size // processes, drop_remainder=True)[process::processes]
        batches = order.map_with_index(functools.partial(self._read, sets, starts, process))
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

    def examples(self, split: str) -> Examples:
        """The examples of a split of the first data set, decoded."""
        return self._examples(0, split)

    def source(self, split: str) -> Source:
        """The examples of a split of the first data set, as they are stored."""
        return self._source(0, split)

    def _source(self, number: int, split: str) -> Source:
        data = self.config.sets[number]
        source = open_source(data.name, split)
        known = source[0]
        fields = {f"fields.{entry}": field for entry, field in data.fields.items()}
        fields |= {f"labels.{name}": label.field for name, label in data.labels.items()}
        for where, field in fields.items():
            for name in names_of(field):
                if name not in known:
                    raise DataError(unknown(f"field of {source.label} ({_place(number)}.{where})", name, known))
        return source

    def _decoded(self, source: Source, number: int, keep: bool) -> Examples:
        data = self.config.sets[number]
        told = {"words": self.config.words, "grouped": self._grouped, "absent": self._absent}
        return Examples(source, data.fields, self.modalities, self.tokenizer, keep, data.labels, **told)

    def _read(self, sets: Sequence[Examples], starts: Sequence[int], process: int, step: int, indices: np.ndarray) -> Batch:
        """One process's rows of batch number `step`. Random numbers are drawn for all rows, so that each row has its own."""
        places = [(bisect.bisect_right(starts, i) - 1, int(i)) for i in indices]
        rows = [sets[number][i - starts[number]] for number, i in places]
        rng = np.random.default_rng((self.seed, step))
        for entry in dict.fromkeys(entry for data in self.config.sets for entry in data.fields):
            if self.config.shift and is_image(self.modalities[modality_of(entry)]):
                shifts = rng.integers(-self.config.shift, self.config.shift + 1, (self.batch_size, 2))
                for row, (down, right) in zip(rows, shifts[process * len(rows) :], strict=False):
                    image, mask = unmask(row[entry])
                    image = shift(image, int(down), int(right))
                    row[entry] = image if mask is None else Masked(image, mask)
        return stack(rows)

    def _check_names(self) -> None:
        labels: dict[str, Any] = {}
        for number, data in enumerate(self.config.sets):
            for entry in data.fields:
                modality, _, rest = entry.partition("/")
                if modality not in self.modalities:
                    raise InputError(unknown(f"modality in {_place(number)}.fields", modality, self.modalities))
                if (entry != modality and not rest) or rest.split("/")[-1] == WORDS or f"{modality}/" == LABEL:
                    raise InputError(
                        f"{_place(number)}.fields: {entry!r} cannot be the name of an entry; write MODALITY or "
                        f"MODALITY/ENTRY, where the modality is not called {LABEL[:-1]!r} and the entry not {WORDS!r}"
                    )
            for name, label in data.labels.items():
                if labels.setdefault(name, label.classes) != label.classes:
                    raise InputError(f"{_place(number)}.labels.{name}: its classes are others than in a data set before")

    def _texts(self, number: int, source: Source) -> dict[str, bool]:
        """The entries of a data set that are made of text; whether of several parts."""
        found: dict[str, bool] = {}
        for entry, field in self.config.sets[number].fields.items():
            if isinstance(self.modalities[modality_of(entry)], Ids):
                with naming(f"{_place(number)}.fields.{entry}"):
                    held = (value_of(source[i], field) for i in range(min(len(source), CORPUS)))
                    first = next((value for value in held if not (isinstance(value, list) and not value)), None)
                if is_text(first):
                    found[entry] = not isinstance(first, str)
        return found

    def _learn_tokenizer(self, sources: Sequence[Source], texts: Sequence[Mapping[str, bool]]) -> Tokenizer | None:
        vocab = min((self._ids(entry).vocab for found in texts for entry in found), default=None)
        if vocab is None:
            return None
        corpus: list[str] = []
        for source, found, data in zip(sources, texts, self.config.sets, strict=True):
            rows = np.linspace(0, len(source) - 1, min(len(source), CORPUS)).astype(int)
            names = dict.fromkeys(name for entry in found for name in names_of(data.fields[entry]))
            held = (example[name] for example in (source[i] for i in rows) for name in names)
            corpus += [text for value in held for text in ([value] if isinstance(value, str) else value)]
        return cached_tokenizer(corpus, vocab, cache_folder("tokenizers"))

    def _check_vocab(self) -> None:
        for name in dict.fromkeys(modality_of(entry) for data in self.config.sets for entry in data.fields):
            if isinstance(self.modalities[name], Ids) and self.tokenizer and self.tokenizer.vocab > self._ids(name).vocab:
                raise InputError(
                    f"modalities.{name}: vocab={self._ids(name).vocab}, but the tokenizer has {self.tokenizer.vocab} ids; "
                    f"set --modalities.{name}.vocab to at least that"
                )

    def _ids(self, entry: str) -> Ids:
        embedder = self.modalities[modality_of(entry)]
        assert isinstance(embedder, Ids)
        return embedder


def _place(number: int) -> str:
    """What messages call a data set of the configuration."""
    return f"data.also[{number - 1}]" if number else "data"


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
