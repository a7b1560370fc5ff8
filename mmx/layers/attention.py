"""Attention, and the one place where a kernel is chosen."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mmx.layers.norms import make_norm
from mmx.layers.positions import rotate
from mmx.layers.products import DenseGeneral, product
from mmx.parallel import constrain

PROJECTIONS = ("query", "key", "value", "out")
LOWEST = float(jnp.finfo(jnp.float32).min)  # the score of a key that may not be seen


class Line(NamedTuple):
    """A stream in a concatenation: how many tokens, how many special ones in front, and the grid of the others, if any."""

    length: int
    special: int = 0
    grid: tuple[int, ...] | None = None


@flax.struct.dataclass
class Sight:
    """What the tokens of a stream, or of several in one, see of each other, and from where.

    Attributes:
        mask: which tokens exist, `(B, L)`.
        visible: the rule who may see whom, `(L, L)`, a constant; `(B, 1, L, L)` where it differs between examples.
        coordinates: where they stand, `(L, A)` or `(B, L, A)`; read by rotary positions.
        bias: added to the scores, `(H, L, L)` or `(B, H, L, L)`: relative positions.
        scale: a further factor of the scores; None: none.
        lines: the streams that stand one behind the other; read by relative positions.
        reads: the rule who may see what of a context, `(L, M)`, a constant; None: all.
        at: where a stream is written token by token: the places of those that ask, `(B, n)`; all else tells of all places.
    """

    mask: Any = None
    visible: Any = None
    coordinates: Any = None
    bias: Any = None
    scale: Any = None
    lines: tuple[Line, ...] = flax.struct.field(pytree_node=False, default=())
    reads: Any = None
    at: Any = None

    def of_those_who_ask(self) -> "Sight":
        """Rules, positions and biases of the places `at` alone."""
        if self.at is None:
            return self
        taken = {name: None if (x := getattr(self, name)) is None else _rows(x, self.at) for name in ("visible", "bias", "reads")}
        if self.coordinates is not None:
            where = jnp.asarray(self.coordinates)
            taken["coordinates"] = where[self.at] if where.ndim == 2 else jnp.take_along_axis(where, self.at[..., None], 1)
        return dataclasses.replace(self, **taken)


def _rows(rule: Any, at: jax.Array) -> jax.Array:
    """The rows `at (B, n)` of `(L, M)`, `(H, L, M)` or `(B, H, L, M)`: `(B, 1 or H, n, M)`."""
    rule = jnp.asarray(rule)
    rule = rule.reshape(1, *[1] * (3 - rule.ndim), *rule.shape) if rule.ndim < 4 else rule
    return jnp.take_along_axis(rule, at[:, None, :, None], 2)


def each_part(x: jax.Array, parts: Sequence[tuple[str, int]], make: Callable[[str], Any]) -> jax.Array:
    """Applies `make("")` to `x (B, L, ...)`, or, where there are parts, `make("_NAME")` to each part of its tokens."""
    if not parts:
        return make("")(x)
    pieces = jnp.split(x, np.cumsum([length for _, length in parts])[:-1], axis=1)
    return jnp.concatenate([make(f"_{name}")(piece) for (name, _), piece in zip(parts, pieces, strict=True)], 1)


def attend(
    query: Float[Array, "B Lq H K"],
    key: Float[Array, "B Lk G K"],
    value: Float[Array, "B Lk G V"],
    key_mask: Bool[Array, "B Lk"] | None = None,
    visible: np.ndarray | jax.Array | None = None,
    bias: Float[Array, "*B H Lq Lk"] | None = None,
    scale: float | None = None,
    see: Callable[[jax.Array], Any] | None = None,
    blind: bool = False,
) -> Float[Array, "B Lq H V"]:
    """Scaled dot-product attention (arXiv 1706.03762, 3.2.1); scores and softmax in float32.

    Args:
        query: `(B, Lq, H, K)`.
        key: `(B, Lk, G, K)`; G divides H, and H / G query heads share one key head.
        value: `(B, Lk, G, V)`.
        key_mask: which keys exist, `(B, Lk)`.
        visible: the rule who may see whom, `(Lq, Lk)`, a constant; or by example, `(B, 1, Lq, Lk)`.
        bias: added to the scores, `(H, Lq, Lk)` or `(B, H, Lq, Lk)`.
        scale: factor of the scores; None: 1 / sqrt(K).
        see: is called with the weights, `(B, H, Lq, Lk)` float32, by who wants to look at them.
        blind: whether a query that may see no key gets the mean of all values, as from a softmax over equal scores.

    Returns:
        `(B, Lq, H, V)`. A query that may see no key gets zeros, in value and in gradient, unless `blind`.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    query = query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = product("bqhk,bmhk->bhqm", query, key)  # (B, H, Lq, Lk)
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, LOWEST)
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    highest = scores.max(-1, keepdims=True)
    highest = highest if blind else jnp.maximum(highest, LOWEST / 2)  # so that a row without keys has weights of zero
    weights = jnp.exp(scores - jax.lax.stop_gradient(highest))
    total = weights.sum(-1, keepdims=True)  # (B, H, Lq, 1); at least 1 in a row with keys
    total = jnp.where(total == 0, 1, total)
    if see is not None:
        see(weights / total)
    # The softmax's division comes last, as in FlashAttention (arXiv 2205.14135): K numbers a query, and not Lk.
    weights = weights.astype(value.dtype)
    out = product("bhqm,bmhk->bqhk", weights, value) / total.swapaxes(1, 2)
    return out.astype(value.dtype)


class Attention(nn.Module):
    """Multi-head attention of `x (B, L, D)` to itself, or to `context (B, M, D')`.

    Who applies a model with `mutable=["attentions"]` reads the weights `(depth, B, H, L, M)` there, as `weights`.

    `parts` have projections of their own: `(name, length)` of each stream that `x` is a concatenation of.
    """

    heads: int
    head_size: int
    kv_heads: int
    bias: tuple[str, ...]
    scale: float | None
    qk_norm: bool
    eps: float
    rotary: float | None
    dtype: Any
    parts: tuple[tuple[str, int], ...] = ()
    value_size: int | None = None
    inner_norm: str | None = None  # the kind of a norm on what all heads read, before the output projection
    blind: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, context: jax.Array | None = None) -> jax.Array:
        """Where there is a context, `sight` tells of its tokens, and positions play no part."""

        def heads(y: jax.Array, count: int, name: str) -> jax.Array:  # (B, L, D) -> (B, L, H, K)
            size = self.value_size or self.head_size if name == "value" else self.head_size

            def dense(end: str) -> nn.Module:
                return DenseGeneral((count, size), use_bias=name in self.bias, dtype=self.dtype, name=name + end)

            parts = self.parts if y is x else ()
            return constrain(each_part(y, parts, dense), "batch", "length", "heads", "head")

        sight = sight.of_those_who_ask()
        query = heads(x, self.heads, "query")
        key, value = (heads(x if context is None else context, self.kv_heads, name) for name in ("key", "value"))
        if self.qk_norm:
            query = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="query_norm")(query)
            key = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="key_norm")(key)
        if self.rotary and context is None:
            where = np.arange(x.shape[1])[:, None] if sight.coordinates is None else sight.coordinates
            query, key = (rotate(y, where, self.rotary) for y in (query, key))
        if self.is_mutable_collection("cache") and not self.is_initializing():
            key, value = (self._remember(name, y, sight.at) for name, y in (("key", key), ("value", value)))
        query = query if sight.scale is None else query * jnp.asarray(sight.scale, query.dtype)
        asked = self.is_mutable_collection("attentions") and not self.is_initializing()
        see = self._leave_weights if asked else None
        y = attend(query, key, value, sight.mask, sight.visible, sight.bias, self.scale, see, self.blind)  # (B, L, H, K)
        if (kind := self.inner_norm) is not None:
            read = y.reshape(*y.shape[:2], -1)
            y = each_part(read, self.parts, lambda end: make_norm(kind, self.eps, self.dtype, "norm" + end)).reshape(y.shape)

        def out(end: str) -> nn.Module:
            return DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias="out" in self.bias, dtype=self.dtype, name="out" + end)

        return each_part(y, self.parts, out)

    def _remember(self, name: str, new: jax.Array, at: jax.Array | None) -> jax.Array:
        """The keys or values of all places, those of the places `at` put among those that are known (KV cache)."""
        if at is not None:
            known = self.get_variable("cache", name)
            new = known if not new.shape[1] else known.at[jnp.arange(len(new))[:, None], at].set(new)
        self.put_variable("cache", name, new)
        return new

    def _leave_weights(self, weights: Any) -> None:
        self.sow("attentions", "weights", weights, reduce_fn=lambda _, new: new, init_fn=lambda: None)
