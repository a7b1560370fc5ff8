"""Where a token stands: on a line, on a grid, in time, in a box. Pure functions of coordinates.

Coordinates are `(..., A)` with A axes: (place,) in a sequence, (row, column) in an image, (time, row, column) in a video.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown

SAMPLING = ("linear", "align_corners", "antialias")


def grid_coordinates(grid: tuple[int, ...]) -> np.ndarray:
    """The coordinates of the cells of a grid in row-major order: `(L, A)` float32."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, len(grid)).astype(np.float32)


def sincos(coordinates: np.ndarray | jax.Array, width: int, base: float = 10_000.0, closed: bool = False) -> jax.Array:
    """Sines and cosines of each axis, one after the other: `(..., A) -> (..., D)` (arXiv 1706.03762, 3.5; 2D: MAE).

    Each axis has an equal, even share of the width: its sines, then its cosines. What cannot be shared out stays zero. The
    frequencies fall from 1 towards 1 / base; `closed`: the last of them is 1 / base itself (tensor2tensor, fairseq).
    """
    known = isinstance(coordinates, np.ndarray)  # before the program runs: in float64, as published tables are made
    n: Any = np if known else jnp
    coordinates = coordinates.astype(np.float64) if known else jnp.asarray(coordinates, jnp.float32)
    axes = coordinates.shape[-1]
    count = width // (2 * axes)  # frequencies of an axis
    if count == 0:
        raise InputError(f"positions: width={width} is too small for sines and cosines of {axes} axes; it needs {2 * axes}")
    frequencies = base ** (-np.arange(count) / max(count - closed, 1))
    angles = coordinates[..., None] * frequencies  # (..., A, count)
    out = n.concatenate([n.sin(angles), n.cos(angles)], -1).reshape(*coordinates.shape[:-1], -1)
    out = jnp.asarray(out, jnp.float32)
    return jnp.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, width - out.shape[-1])])


def interleaved(count: int, width: int, base: float = 10_000.0) -> np.ndarray:
    """Sines and cosines in turns of the places of a line: `(L, D)` (arXiv 1706.03762, 3.5, to the letter; VideoMAE)."""
    angles = np.arange(count)[:, None] / base ** (np.arange(width) // 2 * 2 / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


def fourier(coordinates: np.ndarray | jax.Array, bands: int, resolution: tuple[int, ...]) -> jax.Array:
    """Fourier features of Perceiver (arXiv 2103.03206, 3.2): `(..., A) -> (..., A (2 bands + 1))`.

    Coordinates are scaled to -1..1 by the resolution of each axis; frequencies lie evenly between 1 and half of it.
    """
    scale = np.maximum(np.asarray(resolution, np.float32) - 1, 1)
    x = 2 * jnp.asarray(coordinates, jnp.float32) / scale - 1
    frequencies = np.stack([np.linspace(1.0, max(size / 2, 1.0), bands) for size in resolution])  # (A, bands)
    angles = math.pi * x[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles), x[..., None]], -1).reshape(*x.shape[:-1], -1)


def resample(table: jax.Array, old: tuple[int, ...], new: tuple[int, ...], linear: bool = False) -> jax.Array:
    """A table of learned positions for another grid: `(prod(old), D) -> (prod(new), D)`, cubic, smoothed where it shrinks.

    With `linear`, neighbours are mixed by their distance, and nothing is smoothed.
    """
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    resized = jax.image.resize(grid, (*new, grid.shape[-1]), "linear" if linear else "cubic", antialias=not linear)
    return resized.reshape(-1, grid.shape[-1]).astype(table.dtype)


def sample(
    table: jax.Array,
    grid: tuple[int, int],
    coordinates: jax.Array,
    size: jax.Array,
    how: str = "linear",
) -> jax.Array:
    """Reads a table of learned positions at any place of images of any size, linearly.

    Args:
        table: `(rows * columns, D)`.
        grid: (rows, columns) of the table.
        coordinates: (row, column) of every patch in its own image, `(B, L, 2)`.
        size: rows and columns of that image, `(B, 2)`.
        how: linear: the image's outer edges fall on those of the table; align_corners: the centres of the corner patches do
            (ViLT); antialias: as linear, and a smaller image reads the mean of more cells, its weights a triangle as wide as
            one of its own (SigLIP 2).

    Returns:
        `(B, L, D)`: the same as resampling the table to each image's grid.
    """
    if how not in SAMPLING:
        raise InputError("positions: " + unknown("way to sample a table", how, SAMPLING))
    if how == "antialias":
        weights = [_triangle(coordinates[..., a], size[:, a, None], cells) for a, cells in enumerate(grid)]  # (B, L, cells)
        table = table.reshape(*grid, -1)
        return jnp.einsum("blr,blc,rcd->bld", *weights, table, preferred_element_type=jnp.float32).astype(table.dtype)
    cells = jnp.asarray(grid, jnp.float32)
    size = size[:, None].astype(jnp.float32)
    if how == "align_corners":
        at = coordinates * ((cells - 1) / jnp.maximum(size - 1, 1))
    else:
        at = (coordinates + 0.5) * cells / jnp.maximum(size, 1) - 0.5
    at = jnp.clip(at, 0, cells - 1)  # (B, L, 2)
    low = jnp.floor(at)
    share = at - low
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, cells.astype(jnp.int32) - 1)
    out = jnp.zeros((*coordinates.shape[:2], table.shape[-1]), table.dtype)
    for row, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
        for column, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
            out += table[row * grid[1] + column] * (row_share * column_share)[..., None].astype(table.dtype)
    return out


def _triangle(place: jax.Array, size: jax.Array, cells: int) -> jax.Array:
    """How much the place among `size` ones reads of each of the cells: `(...) -> (..., cells)`, rows with sum 1."""
    scale = cells / jnp.maximum(size, 1).astype(jnp.float32)
    middle = (place + 0.5) * scale
    away = jnp.abs(jnp.arange(cells) + 0.5 - middle[..., None])
    weights = jnp.maximum(1 - away / jnp.maximum(scale, 1)[..., None], 0)
    return weights / weights.sum(-1, keepdims=True)


def rotate(x: jax.Array, coordinates: np.ndarray | jax.Array, base: float) -> jax.Array:
    """Rotary positions (RoFormer, arXiv 2104.09864): turns pairs of `x (B, L, H, K)` by the coordinates `(L, A)` or `(B, L, A)`.

    Frequency j belongs to axis j mod A, so a text whose place is the same number on every axis is turned as by the usual
    rotary positions of one axis, whatever grids stand beside it. The pair of number j is number j + K / 2, as in GPT-NeoX.
    """
    size = x.shape[-1]
    if size % 2:
        raise InputError(f"rotary positions turn pairs of numbers: head_size={size} is odd")
    coordinates = jnp.asarray(coordinates, jnp.float32)
    frequencies = base ** (-np.arange(size // 2) / (size // 2))
    axis = np.arange(size // 2) % coordinates.shape[-1]
    angles = (coordinates[..., axis] * frequencies)[..., None, :]  # ([B,] L, 1, K / 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def distance_buckets(distance: np.ndarray, buckets: int, furthest: int = 128, past: bool = False) -> np.ndarray:
    """T5's buckets of relative positions (arXiv 1910.10683, 2.1): int -> 0..buckets-1; half of them for each direction.

    Half of a direction's buckets hold one distance each; the others grow up to `furthest`, and the last holds the rest. With
    `past` all of them are for what is behind (T5's decoder). In float32 like T5's own, whose edges hang on its rounding.
    """
    half = buckets if past else buckets // 2
    exact = half // 2
    away = np.maximum(-distance, 0) if past else np.abs(distance)
    growing = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    near = np.where(away < exact, away, np.minimum(exact + (growing * np.float32(half - exact)).astype(int), half - 1))
    return near if past else np.where(distance > 0, half, 0) + near


def box_geometry(boxes: jax.Array, numbers: int) -> jax.Array:
    """The place and size of boxes `(..., 4)`, given as x1 y1 x2 y2 in parts of the image.

    4 numbers: the box itself (LXMERT); 5: and its area (ViLBERT); 7: and width, height, area (UNITER).
    """
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    width, height = x2 - x1, y2 - y1
    more = {4: [], 5: [width * height], 7: [width, height, width * height]}
    if numbers not in more:
        raise InputError(f"boxes: {numbers} numbers; a box is described by 4, 5 or 7")
    return jnp.stack([x1, y1, x2, y2, *more[numbers]], -1)
