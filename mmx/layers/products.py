"""Matrix products, forward and backward, in the form each platform is fast with.

XLA's CPU backend has fast kernels for products of bfloat16 that leave float32, and none for those that leave bfloat16: it
turns their operands into float32 first, and is four times as slow (AMX; jaxlib 0.10). So there products leave float32, those
of the backward pass too: a result is rounded where it is used, and the gradient of a parameter, which is float32, never. On
other platforms, and in float32, products are what they always were.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

INITIAL = nn.initializers.normal(0.02)  # of all that is learned and no product: tokens, tables, vectors


def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum(formula, x, y)` in float32, of two operands each of whose indices is in the other one or in the result."""
    left, right, result = formula.replace("->", ",").split(",")
    if _leaves_float32(x) and not {*left} & {*right} & {*result}:  # of a batch of products not every form has its kernel
        return _product(formula, str(y.dtype), x, y)
    return jnp.einsum(formula, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _leaves_float32(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(formula: str, kind: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of bfloat16 that leaves float32, and so do those of its backward pass; `kind` is the type of `y`, as stored."""
    return _forward(formula, kind, x, y)[0]


def _forward(formula: str, kind: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = y.astype(x.dtype)
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32), (x, y)


def _backward(formula: str, kind: str, operands: tuple[jax.Array, jax.Array], out: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, y), (left, right, result) = operands, formula.replace("->", ",").split(",")
    out = out.astype(x.dtype)
    dx = jnp.einsum(f"{result},{right}->{left}", out, y, preferred_element_type=jnp.float32)
    dy = jnp.einsum(f"{left},{result}->{right}", x, out, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dy.astype(kind)


_product.defvjp(_forward, _backward)


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **more: Any) -> jax.Array:
    """What Linen's dense layers call; they contract the last axes of `x` with the first ones of the kernel."""
    if not _leaves_float32(x):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **more)
    count = len(dimension_numbers[0][0])
    letters = "abcdefghijklmnopqrstuvwxyz"
    left, right = letters[: x.ndim], letters[x.ndim - count : x.ndim - count + kernel.ndim]
    return _product(f"{left},{right}->{left[:-count]}{right[count:]}", str(kernel.dtype), x, kernel)


def _promote(x: jax.Array, *parameters: Any, dtype: Any = None, **more: Any) -> Any:
    """What Linen's dense layers call first; a product that leaves float32 takes parameters as they are stored."""
    x, *promoted = promote_dtype(x, *parameters, dtype=dtype, **more)
    return [x, *(parameters if _leaves_float32(x) else promoted)]


class Dense(nn.Dense):
    """Linen's dense layer by these products; where they leave float32, the bias is added before the sum is rounded."""

    dot_general: Any = _dot_general
    promote_dtype: Any = _promote

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype or inputs.dtype)


class DenseGeneral(nn.DenseGeneral):
    """Likewise over several axes."""

    dot_general: Any = _dot_general
    promote_dtype: Any = _promote

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype or inputs.dtype)
