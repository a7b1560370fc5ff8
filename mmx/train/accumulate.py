"""The gradient of a loss over the whole batch, of which only a part holds activations at a time.

The usual accumulation averages the gradients of small batches. That is another loss wherever examples are compared with
each other: a contrastive loss would see fewer negatives. Here the forward passes of all parts run first and keep only
what the loss needs of each example; the loss is taken over the whole batch; then each part is run again and pulls its
share of the gradient back (GradCache, arXiv 2101.06983). The result is that of one large batch, for every objective.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmx.parallel import constrain
from mmx.types import Batch, Metrics, Params

Forward = Callable[[Params, Batch, jax.Array], Any]  # (params, batch, key) -> values, every leaf (B, ...)
Loss = Callable[[Any], tuple[jax.Array, Metrics]]  # values -> loss, metrics


def value_and_grad(
    forward: Forward, loss: Loss, params: Params, batch: Batch, key: jax.Array, parts: int = 1
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """Returns `(loss, metrics), gradient` of `loss(forward(params, batch, key))` with the batch in `parts` equal parts."""
    if parts == 1:
        return jax.value_and_grad(lambda p: loss(forward(p, batch, key)), has_aux=True)(params)
    split = functools.partial(jax.tree.map, functools.partial(_split, parts=parts))
    batches, keys = split(batch), jax.random.split(key, parts)
    values = jax.tree.map(_merge, jax.lax.map(lambda part: forward(params, *part), (batches, keys)))
    leaves, structure = jax.tree.flatten(values)

    def loss_of(floats: list[jax.Array]) -> tuple[jax.Array, Metrics]:
        rest = iter(floats)
        return loss(jax.tree.unflatten(structure, [next(rest) if _is_float(x) else x for x in leaves]))

    def floats_of(p: Params, batch: Batch, key: jax.Array) -> list[jax.Array]:
        return [x for x in jax.tree.leaves(forward(p, batch, key)) if _is_float(x)]

    def pull_back(gradient: Params, part: Any) -> tuple[Params, None]:
        batch, key, cotangent = part
        (share,) = jax.vjp(lambda p: floats_of(p, batch, key), params)[1](cotangent)
        return jax.tree.map(jnp.add, gradient, share), None

    (total, metrics), cotangents = jax.value_and_grad(loss_of, has_aux=True)([x for x in leaves if _is_float(x)])
    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(pull_back, zeros, (batches, keys, split(cotangents)))
    return (total, metrics), gradient


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...); every device keeps its own rows."""
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _merge(x: jax.Array) -> jax.Array:
    """Undoes `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
