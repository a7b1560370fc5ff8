"""Numbers for things that are not words: medical codes, items a user touched, cells of a codebook."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from mmx.errors import InputError

PADDING, UNKNOWN = 0, 1


class Vocabulary:
    """Ids of things, the frequent ones first: 0 is padding, 1 stands for whatever is not known.

    Args:
        things: all of them, as often as they occur.
        size: most ids, the two special ones included; None: as many as there are different things.
    """

    def __init__(self, things: Iterable[Hashable], size: int | None = None):
        counted = sorted(Counter(things).items(), key=lambda item: (-item[1], str(item[0])))
        kept = counted[: None if size is None else max(size - 2, 0)]
        self.ids: dict[Hashable, int] = {thing: i + 2 for i, (thing, _) in enumerate(kept)}

    def __len__(self) -> int:
        return len(self.ids) + 2

    def encode(self, things: Sequence[Hashable], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `(length,)` int32 and which exist. Of a longer sequence the last things stay: a history ends with today."""
        found = [self.ids.get(thing, UNKNOWN) for thing in things][-length:]
        ids = np.full(length, PADDING, np.int32)
        ids[: len(found)] = found
        return ids, np.arange(length) < len(found)


def code_hierarchy(codes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Codes with the groups they belong to, and the edges between a code and its group (G-BERT, arXiv 1906.00346).

    An ICD code belongs to its category (E11.9 to E11) and that to its chapter's letter (E11 to E).

    Returns:
        the codes and, behind them, their groups; and the edges among them, both ways, `(N, N)` bool.
    """
    nodes = list(dict.fromkeys(codes))
    for node in nodes:
        if not node:
            raise InputError("codes: an empty code")
        if (parent := _parent(node)) and parent not in nodes:
            nodes.append(parent)  # seen by this very loop: groups have groups
    edges = np.zeros((len(nodes), len(nodes)), bool)
    for i, node in enumerate(nodes):
        if parent := _parent(node):
            j = nodes.index(parent)
            edges[i, j] = edges[j, i] = True
    return nodes, edges


def _parent(code: str) -> str:
    if "." in code:
        return code.split(".")[0]
    return code[:1] if len(code) > 1 else ""


class Codebook:
    """Centres of clusters of vectors, which turn features into ids: VideoBERT's video words (arXiv 1904.01766).

    Args:
        centres: `(codes, D)`.
    """

    def __init__(self, centres: np.ndarray):
        self.centres = np.asarray(centres, np.float32)

    @classmethod
    def learn(cls, vectors: np.ndarray, codes: int, rng: np.random.Generator, rounds: int = 25) -> "Codebook":
        """k-means (Lloyd) from centres that are spread as in k-means++."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or len(vectors) < codes:
            raise InputError(f"codebook: {codes} codes need at least as many vectors (N, D), got {vectors.shape}")
        book = cls(vectors[[rng.integers(len(vectors))]])
        for _ in range(codes - 1):
            away = book.distances(vectors).min(1).clip(0)
            weights = away / away.sum() if away.sum() > 0 else None
            book.centres = np.concatenate([book.centres, vectors[[rng.choice(len(vectors), p=weights)]]])
        for _ in range(rounds):
            ids = book.encode(vectors)
            sums = np.zeros_like(book.centres)
            np.add.at(sums, ids, vectors)
            counts = np.bincount(ids, minlength=codes)[:, None]
            centres = np.where(counts > 0, sums / np.maximum(counts, 1), book.centres).astype(np.float32)
            if np.array_equal(centres, book.centres):
                break
            book.centres = centres
        return book

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """Squared distances to the centres: `(..., D) -> (..., codes)`."""
        square = np.square(vectors).sum(-1, keepdims=True) + np.square(self.centres).sum(-1)
        return square - 2 * vectors @ self.centres.T

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The nearest centre's number: `(..., D) -> (...)` int32."""
        return self.distances(np.asarray(vectors, np.float32)).argmin(-1).astype(np.int32)

    def decode(self, ids: Any) -> np.ndarray:
        """The centres: `(...) -> (..., D)`."""
        return self.centres[ids]
