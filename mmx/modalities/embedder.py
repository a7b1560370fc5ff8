"""What all embedders share: a token is a sum of embeddings, and tokens that are not there are hidden."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import make_norm
from mmx.layers.positions import fourier, grid_coordinates, interleaved, resample, sincos
from mmx.modalities.masking import hide, unmask
from mmx.types import Tokens

POSITIONS = ("learned", "divided", "sincos", "interleaved", "fourier", "none")
PLACE, KEPT, HIDDEN = "place", "kept", "hidden"
BESIDE = (PLACE, KEPT, HIDDEN)  # what the raw value of any embedder may tell beside what is embedded
RESERVED = ("token", "position", "time_position", *BESIDE, "special", "mask_token", "norm", "patch", "linear", "pen")
INITIAL = nn.initializers.normal(0.02)


class Embedder(nn.Module, kw_only=True):
    """Turns raw arrays into tokens. Subclasses make the values; `fuse` adds all that is summed to them.

        token + position + sum of tables + sum of vectors + type (survey 3.1.1, "token embedding fusion")

    The raw value is an array, or a dict of the arrays the embedder reads and of what `tables` and `vectors` name:
    `{"ids": ..., "segment": ...}`. Either may stand in a `Masked`. A dict may also hold

        place (B, L)    which of the learned positions each token has; without it, its own place in the row
        kept (B, K)     which tokens go on, and in which order (MAE); without it, all
        hidden (B, L)   where the mask token stands instead of the embedding (BEiT), if there is one

    Args:
        width: size of a token, D; None: the model's.
        position: learned; divided (one table for the places of a frame, one for time: TimeSformer); sincos (1D, 2D or 3D by
            the grid); interleaved (sines and cosines in turns, along the rows of a grid: VideoMAE); fourier (Perceiver, one
            linear map behind); none. None: what is usual for the kind. Rotary and relative positions belong to attention:
            `mmx.layers.BlockConfig`.
        tables: further ids by token, `{name: how many}`: segment, row, column, rank, the corners of a layout box. Each is
            an integer array `(B, L)`.
        vectors: further numbers by token, `{name: how many}`: a box, a time, a pose. Each is an array `(B, L, size)`,
            mapped linearly.
        special: learned tokens in front, by name: ("class",), ("class", "distillation").
        special_position: whether the learned positions begin with one for each special token (ViT).
        mask_token: whether there is a learned token for what is hidden.
        type: whether a learned vector tells the modality (ViLT, FLAVA).
        norm: eps of a LayerNorm on the sum (BERT: 1e-12); None: no norm.
        dtype: type of the computation.
    """

    width: int | None = None
    position: str | None = None
    tables: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vectors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    special: tuple[str, ...] = ()
    special_position: bool = False
    mask_token: bool = False
    type: bool = False
    norm: float | None = None
    dtype: Any = "float32"

    usual_position = "learned"
    mixes = False  # whether a token hears of later ones, so that it cannot be read causally
    reads = ("array",)  # the names of what a subclass itself reads in a dict of raw arrays

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, ...]:
        """How the tokens lie: (L,) in a row, (rows, columns) in an image. The special ones are not among them."""

    @abc.abstractmethod
    def example(self, batch_size: int) -> Any:
        """A batch of the right form, for building parameters and for tests: zeros, all there."""

    def read(self, raw: Any) -> tuple[Mapping[str, Any], Any]:
        """Splits a raw value into a dict that holds what this embedder reads and nothing else, and its mask."""
        raw, mask = unmask(raw)
        if taken := {*self.tables, *self.vectors} & {*self.reads, *RESERVED}:
            raise InputError(f"{self.name}: {', '.join(sorted(taken))} cannot be the name of a table or vector; choose another")
        given = raw if isinstance(raw, Mapping) else {self.reads[0]: raw}
        wanted = (*self.reads, *self.tables, *self.vectors)
        for name in given:
            if name not in (*wanted, *BESIDE):
                raise InputError(f"{self.name}: " + unknown("raw array", name, wanted))
        if missing := [name for name in wanted if name not in given]:
            raise InputError(f"{self.name}: the raw value lacks {', '.join(missing)}; give a dict of {', '.join(wanted)}")
        return given, mask

    def with_tables(self, raw: Any, batch_size: int) -> Any:
        """A raw value for `example`, with zeros for the tables and vectors."""
        if not self.tables and not self.vectors:
            return raw
        shape = (batch_size, int(np.prod(self.grid)))
        tables = {name: jnp.zeros(shape, jnp.int32) for name in self.tables}
        vectors = {name: jnp.zeros((*shape, size), jnp.float32) for name, size in self.vectors.items()}
        return {**(raw if isinstance(raw, Mapping) else {self.reads[0]: raw}), **tables, **vectors}

    def fuse(
        self,
        values: jax.Array,
        mask: jax.Array | None,
        fields: Mapping[str, Any],
        grid: tuple[int, ...] | None = None,
        positions: jax.Array | None = None,
        coordinates: Any = None,
    ) -> Tokens:
        """Adds position, tables, vectors and type to `values (B, L, D)`, puts special tokens in front, hides what is masked.

        Args:
            values: the token embeddings.
            mask: which exist, `(B, L)`.
            fields: the raw arrays by name.
            grid: how these tokens lie, where that is not `self.grid`: shorter, or at another resolution.
            positions: the position embeddings `(B, L, D)` of an embedder that makes its own.
            coordinates: likewise where tokens stand, `(B, L, A)`.
        """
        grid = grid or self.grid
        if self.mask_token:
            token = self.param("mask_token", INITIAL, (self.width,)).astype(self.dtype)
            values = jnp.where(fields[HIDDEN][..., None] != 0, token, values) if HIDDEN in fields else values
        elif HIDDEN in fields:
            raise InputError(f"{self.name}: {HIDDEN} is given, but there is no mask token; set mask_token=True")
        if positions is None:
            positions = self._positions(grid, fields.get(PLACE))
        if positions is not None:
            values = values + positions.astype(self.dtype)
        for name, size in self.tables.items():
            self._check(name, fields[name], values.shape[:2], integer=True)
            values = values + nn.Embed(size, self.width or 0, dtype=self.dtype, embedding_init=INITIAL, name=name)(fields[name])
        for name, size in self.vectors.items():
            self._check(name, fields[name], (*values.shape[:2], size), integer=False)
            here = hide(jnp.asarray(fields[name], self.dtype), mask)
            values = values + nn.Dense(self.width or 0, dtype=self.dtype, name=f"{name}_linear")(here)
        if coordinates is None and len(grid) > 1:
            coordinates = grid_coordinates(grid)
        if KEPT in fields:
            values, mask, coordinates = self._keep(fields[KEPT], values, mask, coordinates)
        if self.special:
            values, mask, coordinates = self._put_in_front(values, mask, coordinates)
        if self.type:
            values = values + self.param("type_bias", INITIAL, (self.width,)).astype(self.dtype)
        if self.norm is not None:
            values = hide(values, mask)  # what a norm makes of a NaN has a gradient of NaN
            values = make_norm("layer", self.norm, self.dtype, "norm")(values)
        return Tokens(hide(values, mask), mask, coordinates, special=self.special)

    def _positions(self, grid: tuple[int, ...], place: Any) -> jax.Array | None:
        """Position embeddings `(L, D)` of a grid. On a line a shorter one is the beginning; others are resampled."""
        position = self.position or self.usual_position
        if position not in POSITIONS:
            raise InputError(f"{self.name}: " + unknown("position", position, POSITIONS))
        if position == "none":
            return None
        if position == "sincos":
            return sincos(grid_coordinates(grid), self.width or 0)
        if position == "interleaved":
            return jnp.asarray(interleaved(int(np.prod(grid)), self.width or 0))
        if position == "fourier":
            features = fourier(grid_coordinates(grid), 16, self.grid)
            return nn.Dense(self.width or 0, dtype=self.dtype, name="position_linear")(features.astype(self.dtype))
        front = len(self.special) if self.special_position else 0
        if position == "divided":
            table = self.param("position", INITIAL, (front + int(np.prod(self.grid[1:])), self.width))
            time = self.param("time_position", INITIAL, (self.grid[0], self.width))
            frame = resample(table[front:], self.grid[1:], grid[1:])
            return (resample(time, self.grid[:1], grid[:1])[:, None] + frame).reshape(-1, frame.shape[-1])
        table = self.param("position", INITIAL, (front + int(np.prod(self.grid)), self.width))
        if place is not None:
            return table[place]
        table = table[front:]
        return table[: grid[0]] if len(grid) == 1 and grid <= self.grid else resample(table, self.grid, grid)

    def _keep(self, kept: jax.Array, values: jax.Array, mask: jax.Array | None, coordinates: Any) -> tuple[jax.Array, Any, Any]:
        """The tokens of the given numbers `(B, K)`, which stand where they stood."""
        where = jnp.arange(values.shape[1])[:, None] if coordinates is None else jnp.asarray(coordinates)
        where = jnp.broadcast_to(where, (len(values), *where.shape[-2:]))
        values, where = (jnp.take_along_axis(x, kept[..., None], 1) for x in (values, where))
        return values, None if mask is None else jnp.take_along_axis(mask, kept, 1), where

    def _put_in_front(
        self, values: jax.Array, mask: jax.Array | None, coordinates: Any
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """Special tokens exist in an example that has any other token."""
        count = len(self.special)
        special = self.param("special", INITIAL, (count, self.width)).astype(self.dtype)
        if self.special_position:
            special = special + self.get_variable("params", "position")[:count].astype(self.dtype)
        values = jnp.concatenate([jnp.broadcast_to(special, (len(values), *special.shape)), values], 1)
        if mask is not None:
            mask = jnp.concatenate([jnp.repeat(mask.any(-1, keepdims=True), count, 1), mask], 1)
        if coordinates is not None:
            pad = np.pad if isinstance(coordinates, np.ndarray) else jnp.pad
            coordinates = pad(coordinates, [(0, 0)] * (coordinates.ndim - 2) + [(count, 0), (0, 0)])
        return values, mask, coordinates

    def _check(self, name: str, array: Any, shape: tuple[int, ...], integer: bool) -> None:
        kind = "integers" if integer else "numbers"
        if tuple(array.shape) != tuple(shape) or (integer and not jnp.issubdtype(array.dtype, jnp.integer)):
            raise InputError(f"{self.name}: {name} has to hold {kind} of shape {tuple(shape)}, got {array.dtype} {array.shape}")
