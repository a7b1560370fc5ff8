"""Tables as tokens with a row, a column and a rank (TAPAS, arXiv 2004.02349)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mmx.errors import InputError


def table_tokens(
    header: Sequence[str], rows: Sequence[Sequence[str]], encode: Callable[[str], Sequence[int]], length: int, most: int = 255
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Flattens a table row by row, the header first.

    Args:
        header: names of the columns; their row is 0.
        rows: the cells as text; rows and columns count from 1.
        encode: a text's ids.
        length: tokens in the result; a longer table is cut at a whole token.
        most: the highest row, column and rank; what is higher shares it (TAPAS has tables of 256).

    Returns:
        `{"ids", "row", "column", "rank"}`, `(length,)` int32 each, and which exist. A cell's rank is its place, from 1,
        among the numbers of its column; 0 where the column is not all numbers.
    """
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"table: row {i} has {len(row)} cells, the header {len(header)}")
    ranks = [column_ranks([row[c] for row in rows]) for c in range(len(header))]
    lines = [(0, [0] * len(header), header), *((r + 1, [rank[r] for rank in ranks], row) for r, row in enumerate(rows))]
    tokens = [
        (token, r, c + 1, rank)
        for r, row_ranks, cells in lines
        for c, (cell, rank) in enumerate(zip(cells, row_ranks, strict=True))
        for token in encode(cell)
    ]
    out = np.zeros((4, length), np.int32)
    kept = np.asarray(tokens[:length], np.int32).reshape(-1, 4).T
    out[:, : kept.shape[1]] = kept
    out[1:] = np.minimum(out[1:], most)
    return dict(zip(("ids", "row", "column", "rank"), out, strict=True)), np.arange(length) < kept.shape[1]


def column_ranks(cells: Sequence[str]) -> list[int]:
    """The place of each number among the different numbers of a column, from 1; zeros where any cell is no number."""
    try:
        numbers = [float(cell.replace(",", "").rstrip("%")) for cell in cells]
    except ValueError:
        return [0] * len(cells)
    if not all(map(math.isfinite, numbers)):
        return [0] * len(cells)
    order = {value: i + 1 for i, value in enumerate(sorted(set(numbers)))}
    return [order[value] for value in numbers]
