"""The gradient of a loss over the whole batch, of which only a part holds activations at a time.

The usual accumulation averages the gradients of small batches. That is another loss wherever examples are compared with
each other: a contrastive loss would see fewer negatives. Here the forward passes of all parts run first and keep only
what the loss needs of each example; the loss is taken over the whole batch; then each part is run again and pulls its
share of the gradient back (GradCache, arXiv 2101.06983). The result is that of one large batch, for every objective.

Parts need not be of one size. Each takes its share of the rows of every device, so that no row moves:

    rows of device 0      rows of device 1          16 rows, 2 devices, parts of 6, 6 and 4:
    0 0 0 1 1 1 2 2       0 0 0 1 1 1 2 2           the part that computes each row

Dropout is drawn for a part at once, so it is not the same for other parts: it equals that of one pass in which each part keeps
its key, `jax.random.split(key, parts)`, and it is the same in both passes of a part.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.parallel import constrain
from mmx.parallel.mesh import batch_parts
from mmx.types import Batch, Params

Forward = Callable[[Params, Batch, jax.Array], Any]  # (params, batch, key) -> values, every leaf (B, ...)
Loss = Callable[[Any], tuple[jax.Array, Any]]  # values -> loss, metrics


def value_and_grad(
    forward: Forward, loss: Loss, params: Params, batch: Batch, key: jax.Array, parts: int | Sequence[int] = 1
) -> tuple[tuple[jax.Array, Any], Params]:
    """Returns `(loss, metrics), gradient` of `loss(forward(params, batch, key))` with the batch in `parts`.

    Args:
        forward: the expensive part, example by example.
        loss: the cheap part, over the whole batch.
        params: what the gradient is of.
        batch: every leaf `(B, ...)`.
        key: of dropout.
        parts: how many, as equal as they can be; or the size of each.

    Raises:
        InputError: see `part_sizes`.
    """
    sizes = part_sizes(jax.tree.leaves(batch)[0].shape[0], parts)
    if len(sizes) == 1:
        return jax.value_and_grad(lambda p: loss(forward(p, batch, key)), has_aux=True)(params)
    runs = _runs(sizes)
    keys = jax.random.split(key, len(sizes))
    split = [functools.partial(jax.tree.map, functools.partial(_split, run=run)) for run in runs]
    batches = [(cut(batch), keys[run.first :][: run.parts]) for cut, run in zip(split, runs, strict=True)]
    found = [jax.lax.map(lambda part: forward(params, *part), same) for same in batches]
    values = jax.tree.map(lambda *x: _merge(x, runs), *found)
    leaves, structure = jax.tree.flatten(values)

    def loss_of(floats: list[jax.Array]) -> tuple[jax.Array, Any]:
        rest = iter(floats)
        return loss(jax.tree.unflatten(structure, [next(rest) if _is_float(x) else x for x in leaves]))

    def floats_of(p: Params, batch: Batch, key: jax.Array) -> list[jax.Array]:
        return [x for x in jax.tree.leaves(forward(p, batch, key)) if _is_float(x)]

    def pull_back(gradient: Params, part: Any) -> tuple[Params, None]:
        batch, key, cotangent = part
        (share,) = jax.vjp(lambda p: floats_of(p, batch, key), params)[1](cotangent)
        return jax.tree.map(jnp.add, gradient, share), None

    (total, metrics), cotangents = jax.value_and_grad(loss_of, has_aux=True)([x for x in leaves if _is_float(x)])
    gradient = jax.tree.map(jnp.zeros_like, params)
    for cut, part in zip(split, batches, strict=True):
        gradient, _ = jax.lax.scan(pull_back, gradient, (*part, cut(cotangents)))
    return (total, metrics), gradient


def part_sizes(rows: int, parts: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of the parts of `rows` rows; of a number of parts, the first are larger by a row of each device.

    Raises:
        InputError: a size that is not a multiple of the parts that the mesh splits a batch into, or sizes that are not the batch.
    """
    if parts == 1:
        return (rows,)
    devices = batch_parts(jax.sharding.get_abstract_mesh())
    if isinstance(parts, int):
        each, more = divmod(rows // devices, max(parts, 1))
        sizes = tuple(devices * (each + (part < more)) for part in range(parts))
    else:
        sizes = tuple(parts)
    if sum(sizes) != rows or any(size < 1 or size % devices for size in sizes):
        raise InputError(
            f"parts={parts}: parts of {sizes} rows for a batch of {rows}; each has to be a multiple of {devices}, into which the "
            f"mesh splits a batch, and together they have to be the batch"
        )
    return sizes


class _Run(NamedTuple):
    """Parts of one size that follow each other, from part `first` on: rows `start` to `end` of each of `groups` equal groups
    of the batch."""

    first: int
    parts: int
    groups: int
    start: int
    end: int


def _runs(sizes: Sequence[int]) -> list[_Run]:
    groups, first, start, runs = math.gcd(*sizes), 0, 0, []
    for size, same in itertools.groupby(sizes):
        count = len(list(same))
        runs.append(_Run(first, count, groups, start, start + count * size // groups))
        first, start = first + count, runs[-1].end
    return runs


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _split(x: jax.Array, run: _Run) -> jax.Array:
    """(B, ...) -> (parts, size, ...); every device keeps its own rows."""
    x = x.reshape(run.groups, -1, *x.shape[1:])[:, run.start : run.end]
    x = x.reshape(run.groups, run.parts, -1, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(run.parts, -1, *x.shape[3:])
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _merge(found: Sequence[jax.Array], runs: Sequence[_Run]) -> jax.Array:
    """Undoes `_split` of all runs: (B, ...)."""
    rows = [
        x.reshape(run.parts, run.groups, -1, *x.shape[2:]).swapaxes(0, 1).reshape(run.groups, -1, *x.shape[2:])
        for x, run in zip(found, runs, strict=True)
    ]
    return jnp.concatenate(rows, 1).reshape(-1, *rows[0].shape[2:])
