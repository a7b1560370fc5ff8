"""Relative positions: a number for each head by where two tokens stand to each other, added to the scores of attention.

A stack has one table of them, or, with `each`, every layer its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers.attention import Line, Sight
from mmx.layers.positions import distance_buckets, grid_coordinates, resample
from mmx.layers.products import INITIAL


@dataclasses.dataclass(frozen=True)
class Buckets:
    """By the distance on the line (T5, arXiv 1910.10683, 2.1); see `mmx.layers.positions.distance_buckets`.

    Args:
        count: of distances that are told from each other.
        furthest: the distance from which on the last bucket holds all.
        past: whether all buckets are for the past (T5's decoder), and not half of them for each direction.
        each: whether every layer has a table of its own.
    """

    count: int
    furthest: int = 128
    past: bool = False
    each: bool = False

    def __post_init__(self) -> None:
        exact = self.count // (2 if self.past else 4)
        if not 1 <= exact < self.furthest:
            raise InputError(
                f"relative: {self}; {exact} of the buckets of a direction hold one distance each, which has to be at least 1 "
                f"and less than furthest={self.furthest}"
            )

    def bias(self, heads: int, scale: float, name: str) -> nn.Module:
        """The module that makes `(H, L, L)` of a Sight."""
        return _ByLine(self, self.count, heads, name=name)

    def within(self, table: jax.Array, line: Line) -> jax.Array:
        """Within one stream: `(H, L, L)`."""
        place = np.arange(line.length)
        buckets = distance_buckets(place[None, :] - place[:, None], self.count, self.furthest, self.past)
        return table[buckets].transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Grid:
    """By the rows and columns between them (BEiT, arXiv 2106.08254; Swin).

    And one number each for a special token that reads, is read, and reads another. At another resolution the table is
    resampled; a stream that lies on no grid has no numbers of its own.

    Args:
        rows, columns: of the grid that the table is made for.
        linear: whether the table is read linearly at another resolution (BEiT), and not cubic and smoothed.
        each: whether every layer has a table of its own (BEiT).
    """

    rows: int
    columns: int
    linear: bool = False
    each: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise InputError(f"relative: {self}; a grid has at least one row and one column")

    @property
    def offsets(self) -> tuple[int, int]:
        """Differences of rows and of columns that there are."""
        return 2 * self.rows - 1, 2 * self.columns - 1

    def bias(self, heads: int, scale: float, name: str) -> nn.Module:
        """The module that makes `(H, L, L)` of a Sight."""
        rows, columns = self.offsets
        return _ByLine(self, rows * columns + 3, heads, name=name)

    def within(self, table: jax.Array, line: Line) -> jax.Array:
        """Within one stream: `(H, L, L)`."""
        if line.grid is None or len(line.grid) != 2:
            return jnp.zeros((table.shape[1], line.length, line.length))
        rows, columns = line.grid
        offsets = resample(table[:-3], self.offsets, (2 * rows - 1, 2 * columns - 1), self.linear)
        where = grid_coordinates(line.grid).astype(int)
        away = where[:, None] - where[None, :] + (rows - 1, columns - 1)  # (L, L, 2)
        index = np.full((line.length, line.length), len(offsets))  # a special token reads,
        index[line.special :, : line.special] = len(offsets) + 1  # is read,
        index[: line.special, : line.special] = len(offsets) + 2  # or reads another
        index[line.special :, line.special :] = away @ (2 * columns - 1, 1)
        return jnp.concatenate([offsets, table[-3:]])[index].transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Axes:
    """By how far apart they are on every axis of their coordinates `(B, L, A)`, each with a table (LayoutLMv3, arXiv 2204.08387).

    The sum of the axes is scaled as scores are.

    Args:
        axes: (buckets, the furthest distance that is told from others) of each: place, x, y.
        each: whether every layer has tables of its own.
    """

    axes: tuple[tuple[int, int], ...]
    each: bool = False

    def __post_init__(self) -> None:
        if any(buckets < 4 or furthest <= buckets // 4 for buckets, furthest in self.axes):
            raise InputError(f"relative: {self}; an axis has at least 4 buckets, and a distance above their fourth")

    def bias(self, heads: int, scale: float, name: str) -> nn.Module:
        """The module that makes `(H, L, L)` or `(B, H, L, L)` of a Sight."""
        return _ByAxes(self.axes, heads, scale, name=name)


Relative = Buckets | Grid | Axes


class _ByLine(nn.Module):
    """What `Buckets` and `Grid` say within each stream, and one number between two streams: `(H, L, L)`."""

    kind: Buckets | Grid
    rows: int
    heads: int

    @nn.compact
    def __call__(self, sight: Sight) -> jax.Array:
        lines: Sequence[Line] = sight.lines
        table = self.param("bias", INITIAL, (self.rows, self.heads))
        own = [self.kind.within(table, line) for line in lines]
        if len(lines) == 1:
            return own[0]
        between = self.param("between_bias", INITIAL, (self.heads,))
        ends = np.cumsum([line.length for line in lines])
        bias = jnp.broadcast_to(between[:, None, None], (self.heads, ends[-1], ends[-1]))
        for end, line, part in zip(ends, lines, own, strict=True):
            bias = bias.at[:, end - line.length : end, end - line.length : end].set(part)
        return bias


class _ByAxes(nn.Module):
    axes: tuple[tuple[int, int], ...]
    heads: int
    scale: float

    @nn.compact
    def __call__(self, sight: Sight) -> jax.Array:
        coordinates = sight.coordinates
        if coordinates is None or coordinates.shape[-1] < len(self.axes):
            raise InputError(f"relative: {len(self.axes)} axes; tokens need coordinates with as many numbers")
        total: Any = 0.0
        for axis, (buckets, furthest) in enumerate(self.axes):
            table = self.param(f"bias_{axis}", INITIAL, (self.heads, buckets))
            place = jnp.asarray(coordinates)[..., axis].astype(jnp.int32)
            away = jnp.clip(place[..., None, :] - place[..., :, None], -furthest, furthest)  # (B, L, L)
            bucket = jnp.asarray(distance_buckets(np.arange(-furthest, furthest + 1), buckets, furthest))
            total += table[:, bucket[away + furthest]]
        return self.scale * (total if total.ndim == 3 else total.swapaxes(0, 1))
