"""What all embedders share: a token is a sum of embeddings, and tokens that are not there are hidden."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import make_norm
from mmx.layers.positions import fourier, grid_coordinates, interleaved, resample, sincos
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.masking import hide, token_mask, unmask
from mmx.types import Tokens

POSITIONS = ("learned", "divided", "sincos", "interleaved", "fourier", "none")
PLACE, COORDINATES, KEPT, HIDDEN, GROUP, SLOTS = "place", "coordinates", "kept", "hidden", "group", "slots"
BESIDE = (PLACE, COORDINATES, KEPT, HIDDEN, GROUP, SLOTS)  # what any raw value may tell beside what is embedded
PARTS = ("token", "position", "time_position", "special", "mask_token", "norm", "patch", "linear", "pen")  # parameters
RESERVED = (*PARTS, *BESIDE)


class Embedder(nn.Module, kw_only=True):
    """Turns raw arrays into tokens. Subclasses make the values; `fuse` adds all that is summed to them.

        token + position + sum of tables + sum of vectors + type (survey 3.1.1, "token embedding fusion")

    The raw value is an array, or a dict of the arrays the embedder reads and of what `tables` and `vectors` name:
    `{"ids": ..., "segment": ...}`. Either may stand in a `Masked`. A dict may also hold

        place (B, L)    where each token stands, for learned and rotary positions; without it, its own place in the row
        coordinates     where tokens stand, `(B, L, A)`, for rotary positions and for relative ones by coordinates; those of
                        special tokens in front are 0, if they are not among them
        kept (B, K)     which tokens go on, and in which order (MAE); without it, all
        hidden (B, L)   where the mask token stands instead of the embedding (BEiT), if there is one
        group (B, L)    tokens of a causal text with the same number see each other both ways; -1: only what is before
        slots           {stream: which token of that stream stands here, counted through the example's; -1: none}, `(B, L)`;
                        or its (row, place) where the rows of that stream are not the examples, `(B, L, 2)`
                        (`mmx.topologies.Insert`); or the (row, place) of the token this one is added to (`Scatter`)

    Args:
        width: size of a token, D; None: the model's.
        position: learned; divided (a learned one for each place of a frame and one for each frame: TimeSformer); sincos (1D,
            2D or 3D by the grid); interleaved (sines and cosines in turns, along the rows of a grid: VideoMAE); fourier
            (Perceiver, one linear map behind); none. None: what is usual for the kind. Rotary and relative positions belong
            to attention: `mmx.layers.BlockConfig`.
        tables: further ids by token, `{name: how many}`: segment, row, column, rank, the corners of a layout box. Each is
            an integer array `(B, L)`, or `(B, L, n)` to add up n rows of one table (both ends of a box: LayoutLM). The name
            of a modality instead of a number: its table of that name is read (UNITER).
        joined: further ids by token whose embeddings lie side by side to make a token's width, each by the table it reads:
            `{name: ((table, how many, size), ...)}`, an integer array `(B, L, n)` (the sides of a box: LayoutLMv3).
        vectors: further numbers by token, `{name: how many}`: a box, a time, a pose. Each is an array `(B, L, size)`,
            mapped linearly.
        special: learned tokens in front, by name: ("class",), ("class", "distillation").
        special_position: whether the learned positions begin with one for each special token (ViT).
        position_from: the row of the learned positions that the first token reads; what is before it is nobody's (fairseq's
            tables, such as BEiT-3's, begin at 2).
        mask_token: whether there is a learned token for what is hidden.
        type: whether a learned vector tells the modality (ViLT, FLAVA).
        type_outside: whether that vector is added behind the norm (the text of ViLT), and not before it.
        norm: eps of a LayerNorm on the sum (BERT: 1e-12), or the name of a modality whose norm it is (VisualBERT); None: no
            norm.
        each_norm: eps of a LayerNorm on the token embedding itself and on each of the vectors (UNITER, LXMERT); None: no norm.
        average: whether the sum is divided by the number of its summands, type and special tokens aside (LXMERT).
        dtype: type of the computation.
    """

    width: int | None = None
    position: str | None = None
    tables: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    joined: Mapping[str, tuple[tuple[str, int, int], ...]] = dataclasses.field(default_factory=dict)
    vectors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    special: tuple[str, ...] = ()
    special_position: bool = False
    position_from: int = 0
    mask_token: bool = False
    type: bool = False
    type_outside: bool = False
    norm: float | str | None = None
    each_norm: float | None = None
    average: bool = False
    dtype: Any = "float32"

    usual_position = "learned"
    mixes = False  # whether a token hears of later ones, so that it cannot be read causally
    keeps = False  # whether it reads `Masked.keep` itself; else what is kept is embedded as if nothing were masked
    reads = ("array",)  # the names of what a subclass itself reads in a dict of raw arrays
    may_read: ClassVar[tuple[str, ...]] = BESIDE  # and of what need not be there

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, ...]:
        """How the tokens lie: (L,) in a row, (rows, columns) in an image. The special ones are not among them."""

    @abc.abstractmethod
    def example(self, batch_size: int) -> Any:
        """A batch of the right form, for building parameters and for tests: zeros, all there."""

    def content(self, raw: Any) -> jax.Array:
        """What tokens are made of, before any parameter: numbers `(B, L, n)` or ids `(B, L)`. Masked modelling asks for it."""
        raise InputError(f"{type(self).__name__} does not say what its tokens are made of; give it a method `content`")

    def there(self, raw: Any) -> jax.Array | None:
        """Which tokens of a raw value exist, `(B, L)`; None: all."""
        return token_mask(self.read(raw)[1], self.content(raw).shape[:2])

    def read(self, raw: Any) -> tuple[Mapping[str, Any], Any]:
        """Splits a raw value into a dict that holds what this embedder reads and nothing else, and its mask."""
        raw, mask = unmask(raw)
        if taken := {*self.tables, *self.joined, *self.vectors} & {*self.reads, *RESERVED}:
            raise InputError(f"{self.name}: {', '.join(sorted(taken))} cannot be the name of a table or vector; choose another")
        given = raw if isinstance(raw, Mapping) else {self.reads[0]: raw}
        wanted = (*self.reads, *self.tables, *self.joined, *self.vectors)
        for name in given:
            if name not in (*wanted, *self.may_read):
                raise InputError(f"{self.name}: " + unknown("raw array", name, wanted))
        if missing := [name for name in wanted if name not in given]:
            raise InputError(f"{self.name}: the raw value lacks {', '.join(missing)}; give a dict of {', '.join(wanted)}")
        return given, mask

    def with_tables(self, raw: Any, batch_size: int) -> Any:
        """A raw value for `example`, with zeros for the tables and vectors."""
        if not self.tables and not self.joined and not self.vectors:
            return raw
        shape = (batch_size, int(np.prod(self.grid)))
        tables = {name: jnp.zeros(shape, jnp.int32) for name in self.tables}
        tables |= {name: jnp.zeros((*shape, len(parts)), jnp.int32) for name, parts in self.joined.items()}
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
        values = self._each_norm(values, "value")
        if positions is None:
            positions = self._positions(grid, fields.get(PLACE))
        if positions is not None:
            values = values + positions.astype(self.dtype)
        for name, size in self.tables.items():
            ids = fields[name]
            self._check(name, ids, (*values.shape[:2], *ids.shape[2:3]), integer=True)
            if isinstance(size, str):
                rows = self._lent(size, name)["embedding"].astype(self.dtype)[ids]
            else:
                rows = nn.Embed(size, self.width or 0, dtype=self.dtype, embedding_init=INITIAL, name=name)(ids)
            values = values + (rows if ids.ndim == 2 else rows.sum(-2))
        for name, parts in self.joined.items():
            self._check(name, fields[name], (*values.shape[:2], len(parts)), integer=True)
            shapes = {table: (count, size) for table, count, size in parts}
            embeds = {t: nn.Embed(*n, dtype=self.dtype, embedding_init=INITIAL, name=t) for t, n in shapes.items()}
            values = values + jnp.concatenate([embeds[t](fields[name][..., i]) for i, (t, _, _) in enumerate(parts)], -1)
        for name, size in self.vectors.items():
            self._check(name, fields[name], (*values.shape[:2], size), integer=False)
            here = hide(jnp.asarray(fields[name], self.dtype), mask)
            vector = Dense(self.width or 0, dtype=self.dtype, name=f"{name}_linear")(here)
            values = values + self._each_norm(vector, name)
        coordinates = fields.get(COORDINATES, coordinates)
        if self.average:
            values = values / (1 + (positions is not None) + len(self.tables) + len(self.joined) + len(self.vectors))
        if coordinates is None and len(grid) > 1:
            coordinates = grid_coordinates(grid)
        elif coordinates is None and PLACE in fields:
            coordinates = fields[PLACE][..., None]
        beside: dict[str, Any] = {"groups": fields.get(GROUP), "slots": fields.get(SLOTS)}
        for name, array in {GROUP: beside["groups"], **(beside["slots"] or {})}.items():
            if array is not None:
                pair = (2,) if name != GROUP and array.ndim == 3 else ()
                self._check(name, array, (*values.shape[:2], *pair), integer=True)
        if KEPT in fields:
            values, mask, coordinates = self._keep(fields[KEPT], values, mask, coordinates)
        if self.special:
            values, mask, coordinates = self._put_in_front(values, mask, coordinates)
            front = ((0, 0), (len(self.special), 0))
            beside = jax.tree.map(lambda x: jnp.pad(x, (*front, *[(0, 0)] * (x.ndim - 2)), constant_values=-1), beside)
        kind = self.param("type_bias", INITIAL, (self.width,)).astype(self.dtype) if self.type else 0
        if not self.type_outside:
            values = values + kind
        if self.norm is not None:
            values = hide(values, mask)  # what a norm makes of a NaN has a gradient of NaN
            if isinstance(self.norm, str):
                weights, eps = self._lent(self.norm, "norm"), self.parent.modalities[self.norm].norm  # type: ignore[union-attr]
                norm: Any = nn.LayerNorm(epsilon=eps, dtype=self.dtype, parent=None)
                values = norm.apply({"params": weights}, values)
            else:
                values = make_norm("layer", self.norm, self.dtype, "norm")(values)
        if self.type_outside:
            values = values + kind
        return Tokens(hide(values, mask), mask, coordinates, special=self.special, **beside)

    def _each_norm(self, values: jax.Array, name: str) -> jax.Array:
        if self.each_norm is None:
            return values
        return make_norm("layer", self.each_norm, self.dtype, f"{name}_norm")(values)

    def _lent(self, modality: str, name: str) -> Any:
        """The parameters that another modality of the model, which comes before this one, has for both."""
        lender = getattr(self.parent, "modalities", {}).get(modality)
        found = None if lender is None else lender.get_variable("params", name)
        if found is None:
            raise InputError(f"{self.name}: modality {modality!r} has no {name!r} to lend; it has to come first and to have one")
        return found

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
            return Dense(self.width or 0, dtype=self.dtype, name="position_linear")(features.astype(self.dtype))
        front = len(self.special) if self.special_position else 0
        if position == "divided":
            table = self.param("position", INITIAL, (front + int(np.prod(self.grid[1:])), self.width))
            time = self.param("time_position", INITIAL, (self.grid[0], self.width))
            frame = resample(table[front:], self.grid[1:], grid[1:])
            return (resample(time, self.grid[:1], grid[:1])[:, None] + frame).reshape(-1, frame.shape[-1])
        table = self._position_table(self.position_from + front + int(np.prod(self.grid)))[self.position_from :]
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

    def _position_table(self, rows: int) -> jax.Array:
        return self.param("position", INITIAL, (rows, self.width))

    def _put_in_front(
        self, values: jax.Array, mask: jax.Array | None, coordinates: Any
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """Special tokens exist in an example that has any other token."""
        count = len(self.special)
        special = self.param("special", INITIAL, (count, self.width)).astype(self.dtype)
        if self.special_position:
            special = special + self.get_variable("params", "position")[self.position_from :][:count].astype(self.dtype)
        values = jnp.concatenate([jnp.broadcast_to(special, (len(values), *special.shape)), values], 1)
        if mask is not None:
            mask = jnp.concatenate([jnp.repeat(mask.any(-1, keepdims=True), count, 1), mask], 1)
        if coordinates is not None and coordinates.shape[-2] < values.shape[1]:
            pad = np.pad if isinstance(coordinates, np.ndarray) else jnp.pad
            coordinates = pad(coordinates, [(0, 0)] * (coordinates.ndim - 2) + [(count, 0), (0, 0)])
        return values, mask, coordinates

    def _check(self, name: str, array: Any, shape: tuple[int, ...], integer: bool) -> None:
        kind = "integers" if integer else "numbers"
        if tuple(array.shape) != tuple(shape) or (integer and not jnp.issubdtype(array.dtype, jnp.integer)):
            raise InputError(f"{self.name}: {name} has to hold {kind} of shape {tuple(shape)}, got {array.dtype} {array.shape}")
