"""Which tokens are hidden: in units of tokens, words, spans, regions, blocks, tubes, frames or whole modalities.

Nearly every unit is a way to put tokens into groups. Groups are drawn one after the other, and all tokens of a group go together,
until the wanted share of the tokens that exist is hidden:

    token   1 2 3 4 5 6     word   1 1 2 3 3 3     span   1 1 1 2 3 3 (cut at random)
    frame   1 1 1 2 2 2     tube   1 2 3 1 2 3     (two frames of three patches)
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Unit = Literal["token", "word", "span", "region", "block", "tube", "frame", "modality"]
SPAN = 3.0  # mean tokens of a span (T5, arXiv 1910.10683, 3.1.4)
RECTANGLES = 16  # that blocks are made of
ASPECT = 0.3  # least height to width, or width to height, of a rectangle (BEiT, arXiv 2106.08254, 2.3)
OVERLAP = 0.4  # intersection over union from which on a region would give another one away (ViLBERT, arXiv 1908.02265, 3.2)


def wanted(there: jax.Array, rate: float) -> jax.Array:
    """How many of the tokens that exist `(B, L)` are hidden: `(B,)`, one at least where there is any."""
    count = there.sum(1)
    return jnp.where(count > 0, jnp.maximum(jnp.round(rate * count), 1), 0).astype(jnp.int32)


def lowest(scores: jax.Array, there: jax.Array, count: jax.Array) -> jax.Array:
    """The tokens with the lowest scores `(B, L)`, so many of each example `(B,)`; those with equal scores go together."""
    scores = jnp.where(there, scores, jnp.inf)
    before = jax.vmap(lambda ordered, each: jnp.searchsorted(ordered, each))(jnp.sort(scores, 1), scores)
    return there & (before < count[:, None])


def groups(key: jax.Array, there: jax.Array, numbers: jax.Array, rate: float) -> jax.Array:
    """Whole groups of tokens, by the number of the group each belongs to, `(B, L)` or `(L,)`, 0 to L - 1."""
    drawn = jax.random.uniform(key, there.shape)
    scores = jnp.take_along_axis(drawn, jnp.broadcast_to(numbers, there.shape), 1)
    return lowest(scores, there, wanted(there, rate))


def tokens(key: jax.Array, there: jax.Array, rate: float) -> jax.Array:
    """Each token for itself."""
    return groups(key, there, jnp.arange(there.shape[1]), rate)


def spans(key: jax.Array, there: jax.Array, rate: float) -> jax.Array:
    """Runs of tokens: the line is cut at random, every third token on average, and pieces are hidden (SpanBERT, T5, BART)."""
    cut_key, key = jax.random.split(key)
    cuts = jax.random.bernoulli(cut_key, 1 / SPAN, there.shape)
    return groups(key, there, jnp.cumsum(cuts, 1) - cuts[:, :1], rate)


def frames(key: jax.Array, there: jax.Array, grid: tuple[int, ...], rate: float) -> jax.Array:
    """All tokens of a step of the first axis: a frame of a video, a mel bin or, in a row, a token."""
    return groups(key, there, jnp.repeat(jnp.arange(grid[0]), int(np.prod(grid[1:]))), rate)


def tubes(key: jax.Array, there: jax.Array, grid: tuple[int, ...], rate: float) -> jax.Array:
    """The same places in every frame, so that none can be looked up in the next one (VideoMAE, arXiv 2203.12602, 3.2)."""
    return groups(key, there, jnp.tile(jnp.arange(int(np.prod(grid[1:]))), grid[0]), rate)


def blocks(key: jax.Array, there: jax.Array, grid: tuple[int, ...], rate: float) -> jax.Array:
    """Rectangles of rows and columns, in all frames alike, until there are enough tokens (BEiT, arXiv 2106.08254, 2.3)."""
    rows, columns = grid[-2:]
    area_key, aspect_key, place_key, key = jax.random.split(key, 4)
    shape = (len(there), RECTANGLES)
    area = rows * columns * jax.random.uniform(area_key, shape, minval=rate / 4, maxval=rate)
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=np.log(ASPECT), maxval=-np.log(ASPECT)))
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
    place = jax.random.uniform(place_key, (2, *shape))
    top, left = jnp.floor(place[0] * (rows - height + 1)), jnp.floor(place[1] * (columns - width + 1))
    row, column = np.divmod(np.arange(rows * columns), columns)
    inside = (row >= top[..., None]) & (row < (top + height)[..., None])
    inside &= (column >= left[..., None]) & (column < (left + width)[..., None])  # (B, R, rows * columns)
    first = jnp.where(inside.any(1), inside.argmax(1), RECTANGLES)  # the first rectangle that covers a place
    scores = jnp.tile(first + jax.random.uniform(key, first.shape), (1, int(np.prod(grid[:-2]))))
    return lowest(scores, there, wanted(there, rate))


def regions(key: jax.Array, there: jax.Array, boxes: jax.Array, rate: float) -> jax.Array:
    """Regions, and with each the others that overlap it much; `boxes (B, L, 4 or more)`: x1, y1, x2, y2."""
    chosen = tokens(key, there, rate)
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))

    def both(low: jax.Array, high: jax.Array) -> jax.Array:
        over = jnp.minimum(high[:, :, None], high[:, None]) - jnp.maximum(low[:, :, None], low[:, None])
        return jnp.maximum(over, 0)

    area = jnp.maximum(x2 - x1, 0) * jnp.maximum(y2 - y1, 0)
    shared = both(x1, x2) * both(y1, y2)  # (B, L, L)
    union = area[:, :, None] + area[:, None] - shared
    near = shared > OVERLAP * jnp.maximum(union, 1e-12)
    return there & (chosen | (near & chosen[:, None]).any(2))


def whole(key: jax.Array, there: jax.Array, rate: float) -> jax.Array:
    """All tokens of so many of the examples: a modality that has to be told from the others."""
    return there & jax.random.bernoulli(key, rate, (len(there), 1))
