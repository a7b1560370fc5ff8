"""A stack of equal layers: scanned, so that compile time does not grow with depth, and rematerialised on request."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.layers.attention import Line, Sight, each_part
from mmx.layers.block import Block, BlockConfig
from mmx.layers.norms import make_norm

POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
CACHE = "cache"  # the collection of keys and values of what was read and written before
LEFT = ("intermediates", "attentions", CACHE)  # collections of what layers leave for who wants to look

_ONCE: contextvars.ContextVar[bool] = contextvars.ContextVar("once", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Here layers are traced once when parameters are made: enough for their shapes, and the random numbers are others.

    Else Flax traces them twice, to check what leaves the scan, and counts its random keys on from one time to the other.
    """
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)


def scan_layers(layer: type[nn.Module], depth: int, config: BlockConfig) -> Callable[..., Any]:
    """Returns `layer` repeated `depth` times: parameters get a leading axis `layers`, inputs other than the first are shared.

    The layer is called as `layer(carry, own, shared) -> (carry, state)`; what is its `own` has the layers in front.
    """
    one_by_one = config.unroll >= depth
    if config.remat != "none":
        layer = nn.remat(layer, prevent_cse=one_by_one, policy=POLICIES[config.remat])
    split = {"variable_axes": {"params": 0, **dict.fromkeys(LEFT, 0)}, "split_rngs": {"params": True, "dropout": True}}
    once = {"check_constancy_invariants": not _ONCE.get(), "length": depth, "unroll": config.unroll}
    begun = nn.scan(layer, **split, in_axes=(0, nn.broadcast), **once)  # type: ignore[arg-type]

    def make(*fields: Any, name: str) -> Callable[..., Any]:
        module, single = begun(*fields, name=name), layer(*fields, parent=None)

        def run(carry: Any, own: Any, shared: Any) -> tuple[Any, Any]:
            if module.is_initializing():
                return module(carry, own, shared)
            leave = [name for name in LEFT if module.is_mutable_collection(name)]
            given = {name: module.variables.get(name, {}) for name in ("params", CACHE)}
            rngs = {"dropout": jax.random.split(module.make_rng("dropout"), depth)} if module.has_rng("dropout") else {}

            def each(carry: Any, mine: Any) -> tuple[Any, Any]:
                given, own, rngs = mine
                (carry, state), left = single.apply(given, carry, own, shared, rngs=rngs, mutable=leave)
                return carry, (state, left)

            over = _one_by_one if one_by_one else functools.partial(jax.lax.scan, unroll=config.unroll)
            carry, (states, left) = over(each, carry, (given, own, rngs))
            for collection, values in left.items():
                for key, value in values.items():
                    module.put_variable(collection, key, value)
            return carry, states

        return run

    return make


def _one_by_one(each: Callable[[Any, Any], tuple[Any, Any]], carry: Any, own: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` without a loop, which would put what the backward pass needs of each layer into one array."""
    left = []
    for i in range(len(jax.tree.leaves(own)[0])):
        carry, state = each(carry, jax.tree.map(lambda x, i=i: x[i], own))
        left.append(state)
    return carry, jax.tree.map(lambda *states: jnp.stack(states), *left)


def sow_states(layer: nn.Module, states: Any, name: str = "states") -> None:
    """Lets who applies a model with `mutable=["intermediates"]` read what a layer leaves, `(depth, B, L, D)` behind the scan."""
    layer.sow("intermediates", name, states, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def drop_path_rates(depth: int, config: BlockConfig) -> jax.Array:
    """The drop-path rate of each layer, `(depth,)`."""
    return jnp.linspace(0.0, config.drop_path, depth)


class _Layer(nn.Module):
    config: BlockConfig
    sublayers: str
    parts: tuple[tuple[str, int], ...]
    multiway: tuple[str, ...]
    leaves: bool  # its states to whoever called the scan

    @nn.compact
    def __call__(
        self, x: jax.Array, own: tuple[jax.Array, jax.Array], shared: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        block = Block(self.config, self.sublayers, self.parts, self.multiway, name="block")
        (rate, number), (sight, *rest) = own, shared
        if self.config.scale_by_layer:
            sight = dataclasses.replace(sight, scale=1 / number)
        x = block(x, relative_positions(self.config, each=True)(sight), *rest, drop_path=rate)
        sow_states(self, x)
        return x, x if self.leaves else None


class Stack(nn.Module):
    """`depth` blocks and, for pre-norm, the norm after them: `(B, L, D') -> (B, L, D)`; with depth 0, the identity.

    `parts` and `multiway` are those of `Block`. `taken`: what leaves the stack is the states behind these numbers of layers,
    side by side along the width, and no norm (LLaVA reads an image behind the last but one); () leaves the end of it.
    """

    depth: int
    config: BlockConfig
    sublayers: str = "self mlp"
    parts: tuple[tuple[str, int], ...] = ()
    multiway: tuple[str, ...] = ()
    taken: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sight: Sight = Sight(),
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        if self.depth == 0:
            return x
        sight = relative_positions(self.config)(sight if sight.lines else dataclasses.replace(sight, lines=(Line(x.shape[1]),)))
        layers = scan_layers(_Layer, self.depth, self.config)
        layers = layers(self.config, self.sublayers, self.parts, self.multiway, bool(self.taken), name="layers")
        entered = x
        own = drop_path_rates(self.depth, self.config), jnp.arange(1, self.depth + 1)
        x, states = layers(x, own, (sight, context, context_mask))
        if self.config.ends_with_norm:
            c, parts = self.config, self.parts if "norm" in self.multiway else ()
            x = each_part(x, parts, lambda end: make_norm(c.norm_kind, c.eps, c.dtype, f"norm{end}"))
        if self.taken:
            x = jnp.concatenate([states[i - 1] if i else entered for i in self.taken], -1)
        return x


def relative_positions(config: BlockConfig, name: str = "relative", each: bool = False) -> Callable[[Sight], Sight]:
    """Returns what adds the bias of relative positions to a Sight, if the configuration wants one, as a submodule.

    It is asked for once before the layers, and in each of them with `each`.
    """
    c = config
    if c.relative is None or c.relative.each != each:
        return lambda sight: sight
    scale = (c.head_size or c.width // c.heads) ** -0.5 if c.scale is None else c.scale
    bias = c.relative.bias(c.heads, scale, name)
    return lambda sight: dataclasses.replace(sight, bias=bias(sight))
