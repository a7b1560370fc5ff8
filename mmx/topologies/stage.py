"""What every stage is, and what stages share: joining streams, splitting them, fitting widths.

Conventions, the same for all: streams come in the order of the model's modalities; a stream that is absent from the
whole batch is no key, one that is absent from an example is a mask that is all False, and both give the same numbers;
tokens that are masked are seen by nobody; a causal stream stays causal. A stage whose `block` is None uses the model's.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import BlockConfig, Line, Sight, make_norm, visibility
from mmx.layers.products import Dense
from mmx.types import Streams, Tokens

AXES = 3  # time, row, column


class Stage(nn.Module):
    """What maps streams to streams. Subclasses are called as `stage(streams) -> streams`.

    `separate` says that streams keep apart: what no stream may see (a causal one) changes no other stream. `NAMING`: which of
    its fields name streams. `makes`: the streams that it adds.
    """

    NAMING: ClassVar[tuple[str, ...]] = ()

    @property
    def makes(self) -> tuple[str, ...]:
        return ()

    @property
    def separate(self) -> bool:
        return True

    @property
    def caches(self) -> bool:
        """Whether a stream can be written token by token: one passes alone, and reads what the stage remembers of the others."""
        return False


def caches(sublayers: str) -> bool:
    """Whether layers of this word remember keys and values; those that streams share would those of the last one only."""
    return {*sublayers.split()} <= {"self", "cross", "mlp"}


def fill_block(stage: Stage, block: BlockConfig) -> Stage:
    """Returns the stage with `block` where it has none of its own, and in any case with its type of computation."""
    filled = stage if getattr(stage, "block", block) is not None else dataclasses.replace(stage, block=block)  # pyright: ignore[reportCallIssue]
    return change_block(filled, dtype=block.dtype)


def change_block(stage: Stage, **fields: Any) -> Stage:
    """Returns the stage with fields of its block, or of each of its blocks, changed."""
    own = getattr(stage, "block", None)
    if own is None:
        return stage
    if isinstance(own, Mapping):
        new: Any = {name: dataclasses.replace(block, **fields) for name, block in own.items()}
    else:
        new = dataclasses.replace(own, **fields)
    return dataclasses.replace(stage, block=new)  # pyright: ignore[reportCallIssue]


def check_names(stages: Iterable[Stage], modalities: Iterable[str]) -> None:
    """Raises an InputError for a stream that a field of a stage names and that neither is a modality nor made by a stage."""
    stages = tuple(stages)
    known = dict.fromkeys([*modalities, *(name for stage in stages for name in stage.makes)])
    for stage in stages:
        for field in stage.NAMING:
            for name in _names(getattr(stage, field)):
                if name not in known:
                    raise InputError(f"{type(stage).__name__}.{field}: " + unknown("stream", name, known))


def _names(value: Any) -> Iterator[str]:
    """The strings in a field: itself, those of a tuple, keys and values of a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, tuple)):
        for each in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _names(each)


def given(block: BlockConfig | Mapping[str, BlockConfig] | None, stage: Stage, name: str = "") -> BlockConfig:
    """The block of a stage, or that of its stream `name`; it has to be there by now."""
    if isinstance(block, Mapping):
        if name not in block:
            raise InputError(f"{type(stage).__name__}.block: no block for stream {name!r}; it has {', '.join(block)}")
        return block[name]
    if block is None:
        raise InputError(f"{type(stage).__name__}: no block; pass one, or build the model with mmx.build_model")
    return block


def fit(tokens: Tokens, width: int, name: str) -> Tokens:
    """Projects the tokens of stream `name` to `width` where they have another one."""
    if tokens.values.shape[-1] == width:
        return tokens
    project = Dense(width, dtype=tokens.values.dtype, name=f"{name}_project")
    return dataclasses.replace(tokens, values=project(tokens.values))


def norm_each(values: dict[str, jax.Array], owners: Mapping[str, str], blocks: Mapping[str, BlockConfig]) -> dict[str, jax.Array]:
    """The norm behind the layers of each stream, if its block ends with one, by the name of whoever owns its weights."""
    norms: dict[str, Any] = {}
    for name, owner in owners.items():
        block = blocks[name]
        if owner not in norms and block.ends_with_norm:
            norms[owner] = make_norm(block.norm_kind, block.eps, block.dtype, f"{owner}_norm")
    return {name: norms.get(owners[name], lambda x: x)(x) for name, x in values.items()}


def lengths(streams: Streams) -> dict[str, int]:
    """Tokens of each stream, those that are masked too."""
    return {name: tokens.length for name, tokens in streams.items()}


def sight(streams: Streams, sees: Mapping[str, Collection[str]] | None = None, places: str = "own") -> Sight:
    """What the tokens of a concatenation of streams see of each other; places are those of `Joint`."""
    joint = concatenate(streams)
    causal = [name for name, tokens in streams.items() if tokens.causal]
    visible = _with_groups(visibility(lengths(streams), causal, sees), streams)
    where, lines = joint.coordinates, tuple(_line(t) for t in streams.values())
    if places == "continued":
        where = jnp.maximum(jnp.cumsum(joint.dense_mask, 1) - 1, 0)[..., None]  # (B, L, 1): what is masked takes no place
        lines = (Line(joint.length),)
    return Sight(joint.mask, visible, where, lines=lines, at=joint.at)


def _with_groups(visible: Any, streams: Streams) -> Any:
    """The rule who may see whom, and beside it the groups of tokens of one stream that see each other: `(B, 1, L, L)`."""
    if visible is None or all(tokens.groups is None for tokens in streams.values()):
        return visible
    each = [jnp.full(t.dense_mask.shape, -1) if t.groups is None else t.groups for t in streams.values()]
    groups, owner = jnp.concatenate(each, 1), np.repeat(np.arange(len(each)), list(lengths(streams).values()))
    same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, :, None] & (owner[:, None] == owner)
    return (visible | same)[:, None]


def _line(tokens: Tokens) -> Line:
    """A stream that lies on a grid, the same in every example, says so by coordinates that are known before the program runs."""
    where, special = tokens.coordinates, len(tokens.special)
    grid = tuple(int(n) + 1 for n in where.max(0)) if isinstance(where, np.ndarray) and where.ndim == 2 else None
    if grid and math.prod(grid) + special != len(where):
        grid = None
    return Line(tokens.length, special, grid)


def concatenate(streams: Streams) -> Tokens:
    """C(Z_1, ..., Z_M): all tokens of all streams in one, `(B, sum of L, D)`."""
    tokens = list(streams.values())
    unmasked, starts = all(t.mask is None for t in tokens), np.cumsum([0, *(t.length for t in tokens)])
    parted = any(t.at is not None for t in tokens)
    return Tokens(
        jnp.concatenate([t.values for t in tokens], 1),
        None if unmasked else jnp.concatenate([t.dense_mask for t in tokens], 1),
        _join_coordinates(tokens),
        at=jnp.concatenate([t.at + start for t, start in zip(tokens, starts, strict=False)], 1) if parted else None,
        whole=int(starts[-1]) if parted else None,
    )


def split(values: jax.Array, streams: Streams) -> Streams:
    """Undoes `concatenate`: gives every stream its part of `values`."""
    ends = np.cumsum([tokens.values.shape[1] for tokens in streams.values()])
    parts = jnp.split(values, ends[:-1], axis=1)
    return {name: dataclasses.replace(tokens, values=part) for (name, tokens), part in zip(streams.items(), parts, strict=True)}


def _join_coordinates(tokens: list[Tokens]) -> jax.Array:
    """On three axes, each stream from 0: a place on a line is the same number on every axis; an image stands at time 0.

    Always on three, so that who else is there changes nobody's place.
    """
    where = [np.arange(t.length)[:, None] if t.coordinates is None else t.coordinates for t in tokens]
    per_example = any(w.ndim == 3 for w in where)
    lifted = []
    for w, t in zip(where, tokens, strict=True):
        w = jnp.asarray(w, jnp.float32)
        w = jnp.tile(w, AXES) if w.shape[-1] == 1 else jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(AXES - w.shape[-1], 0)])
        lifted.append(jnp.broadcast_to(w, (t.values.shape[0], *w.shape[-2:])) if per_example else w)
    return jnp.concatenate(lifted, -2)
