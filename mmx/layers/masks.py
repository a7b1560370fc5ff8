"""Who may see whom. A mask over keys is data `(B, L)`; visibility is a rule, a constant of the program."""

from collections.abc import Collection, Mapping

import numpy as np


def visibility(
    lengths: Mapping[str, int], causal: Collection[str] = (), sees: Mapping[str, Collection[str]] | None = None
) -> np.ndarray | None:
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

    `sees` names for a stream the others it may see (`{"image": ()}`: an image that looks at nothing else, whose text
    sees it); a stream that is not named sees all, and every stream sees itself. Where a stream is causal, its own block
    is the lower triangle. Two causal streams do not see each other.
    """
    if not causal and sees is None:
        return None
    blocks = []
    for row, height in lengths.items():
        line = []
        for column, width in lengths.items():
            own = row == column
            seen = own or (column not in causal and (sees is None or row not in sees or column in sees[row]))
            line.append(np.tri(height, dtype=bool) if own and row in causal else np.full((height, width), seen))
        blocks.append(line)
    return np.block(blocks)
