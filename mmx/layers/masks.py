"""Who may see whom. A mask over keys is data `(B, L)`; visibility is a rule, a constant of the program."""

from collections.abc import Sequence

import numpy as np


def visibility(lengths: Sequence[int], causal: Sequence[bool]) -> np.ndarray | None:
    """Returns which token may see which in a concatenation of streams, `(L, L)` bool; None where all see all.

    A causal stream's tokens see their own past and every stream that is not causal; no other stream sees them. For an
    image of 3 tokens and a causal text of 3 (prefix-LM, SimVLM, arXiv 2108.10904; rows see columns):

                 image   text
        image    1 1 1   . . .
                 1 1 1   . . .
                 1 1 1   . . .
        text     1 1 1   1 . .
                 1 1 1   1 1 .
                 1 1 1   1 1 1

    Where a stream is causal its own block is the lower triangle. Two causal streams do not see each other.
    """
    if not any(causal):
        return None
    ends = np.cumsum(lengths)
    visible = np.zeros((ends[-1], ends[-1]), bool)
    for row, row_end in enumerate(ends):
        rows = slice(row_end - lengths[row], row_end)
        for column, column_end in enumerate(ends):
            columns = slice(column_end - lengths[column], column_end)
            if not causal[column]:
                visible[rows, columns] = True
            elif row == column:
                visible[rows, columns] = np.tri(lengths[row], dtype=bool)
    return visible
