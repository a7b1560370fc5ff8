"""A stack of equal layers: scanned, so that compile time does not grow with depth, and rematerialised on request."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers.attention import Line, Sight, each_part
from mmx.layers.block import Block, BlockConfig
from mmx.layers.norms import make_norm
from mmx.layers.positions import distance_buckets, grid_coordinates, resample

POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(layer: type[nn.Module], depth: int, config: BlockConfig) -> Callable[..., Any]:
    """Returns `layer` repeated `depth` times: parameters get a leading axis `layers`, inputs other than the first are shared.

    The layer is called as `layer(carry, rate, *shared) -> (carry, None)`; `rate` is its drop-path rate, a scalar.
    """
    one_by_one = config.unroll >= depth
    if config.remat != "none":
        layer = nn.remat(layer, prevent_cse=one_by_one, policy=POLICIES[config.remat])
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        length=depth,
        unroll=config.unroll,
    )
    return functools.partial(_one_by_one, layer, scanned, depth) if one_by_one else scanned


def _one_by_one(layer: type[nn.Module], scanned: type[nn.Module], depth: int, *fields: Any, name: str) -> Callable[..., Any]:
    """Layers that are applied without a scan, which would put what the backward pass needs of each of them into one array."""
    module, single = scanned(*fields, name=name), layer(*fields, parent=None)

    def run(carry: Any, rates: Any, shared: Any) -> tuple[Any, Any]:
        if module.is_initializing():
            return module(carry, rates, shared)
        keys = jax.tree.map(lambda key: jax.random.split(key, depth), dict(module.scope.rngs))  # type: ignore[union-attr]
        stacked, left = [module.variables["params"], rates, keys], []
        for i in range(depth):
            params, rate, rngs = jax.tree.map(lambda x, i=i: x[i], stacked, is_leaf=lambda x: isinstance(x, tuple))
            out, state = single.apply({"params": params}, carry, rate, shared, rngs=rngs, mutable=["intermediates"])
            carry = out[0]
            left.append((out[1], state.get("intermediates", {})))
        states, intermediates = jax.tree.map(lambda *each: jnp.stack(each), *left)
        if module.is_mutable_collection("intermediates"):
            for key, value in intermediates.items():
                module.put_variable("intermediates", key, value)
        return carry, states

    return run


def by_layer(params: Any, inside: bool = False) -> Any:
    """Parameters whose stacked arrays are tuples of one array for each layer: for a model with `unroll` as large as its depth.

    A CPU then reads them where they lie; what is cut out of one array, it copies first.
    """
    if isinstance(params, Mapping):
        return {name: by_layer(value, inside or name == "layers") for name, value in params.items()}
    return tuple(params) if inside else params


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
    def __call__(self, x: jax.Array, rate: jax.Array, shared: tuple[Any, ...]) -> tuple[jax.Array, jax.Array | None]:
        block = Block(self.config, self.sublayers, self.parts, self.multiway, name="block")
        sight, *rest = shared
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
        x, states = layers(x, drop_path_rates(self.depth, self.config), (sight, context, context_mask))
        if self.config.ends_with_norm:
            c, parts = self.config, self.parts if "norm" in self.multiway else ()
            x = each_part(x, parts, lambda end: make_norm(c.norm_kind, c.eps, c.dtype, f"norm{end}"))
        if self.taken:
            x = jnp.concatenate([states[i - 1] if i else entered for i in self.taken], -1)
        return x


def relative_positions(config: BlockConfig, name: str = "relative", each: bool = False) -> Callable[[Sight], Sight]:
    """Returns what adds the bias of relative positions to a Sight, if the configuration wants one, as its submodules.

    It is asked for once before the layers, and in each of them with `each`.
    """
    c = config
    if not (c.relative or c.relative_axes) or c.relative_each != each:
        return lambda sight: sight
    by_line = by_axes = None
    if c.relative:
        by_line = RelativeBias(c.relative, c.heads, c.relative_furthest, c.relative_past, c.relative_linear, name=name)
    if c.relative_axes:
        scale = (c.head_size or c.width // c.heads) ** -0.5 if c.scale is None else c.scale
        by_axes = AxesBias(c.relative_axes, c.heads, scale, name=f"{name}_axes")

    def add(sight: Sight) -> Sight:
        biases = [by_line(sight.lines)] if by_line else []
        biases += [by_axes(sight.coordinates)] if by_axes else []
        return dataclasses.replace(sight, bias=sum(biases))

    return add


class AxesBias(nn.Module):
    """A number for each head by how far apart two tokens are on every axis of their coordinates `(B, L, A)`: `(B, H, L, L)`.

    The distances of an axis lie in T5's buckets, and each axis has a table (LayoutLMv3, arXiv 2204.08387, A).
    """

    axes: tuple[tuple[int, int], ...]
    heads: int
    scale: float

    @nn.compact
    def __call__(self, coordinates: jax.Array) -> jax.Array:
        if coordinates is None or coordinates.shape[-1] < len(self.axes):
            raise InputError(f"relative_axes: there are {len(self.axes)}, tokens need coordinates with as many numbers")
        total: Any = 0.0
        for axis, (buckets, furthest) in enumerate(self.axes):
            table = self.param(f"bias_{axis}", nn.initializers.normal(0.02), (self.heads, buckets))
            place = jnp.asarray(coordinates)[..., axis].astype(jnp.int32)
            away = jnp.clip(place[..., None, :] - place[..., :, None], -furthest, furthest)  # (B, L, L)
            bucket = jnp.asarray(distance_buckets(np.arange(-furthest, furthest + 1), buckets, furthest))
            total += table[:, bucket[away + furthest]]
        return self.scale * (total if total.ndim == 3 else total.swapaxes(0, 1))


class RelativeBias(nn.Module):
    """A number for each head by where two tokens of one stream stand to each other, and one where they are of two: `(H, L, L)`.

    With buckets, by their distance on the line (T5, arXiv 1910.10683). With a grid, by the rows and columns between them
    (BEiT, arXiv 2106.08254; Swin), and one each for a special token that reads, is read, and reads another; at another
    resolution the table is resampled, and a stream that lies on no grid has no numbers of its own.
    """

    relative: int | tuple[int, int]
    heads: int
    furthest: int = 128
    past: bool = False
    linear: bool = False

    @nn.compact
    def __call__(self, lines: Sequence[Line]) -> jax.Array:
        grid = self.relative if isinstance(self.relative, tuple) else None
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 if grid else self.relative
        table = self.param("bias", nn.initializers.normal(0.02), (rows, self.heads))
        own = [self._on_grid(table, grid, line) if grid else self._on_line(table, line) for line in lines]
        if len(lines) == 1:
            return own[0]
        between = self.param("between_bias", nn.initializers.normal(0.02), (self.heads,))
        ends = np.cumsum([line.length for line in lines])
        bias = jnp.broadcast_to(between[:, None, None], (self.heads, ends[-1], ends[-1]))
        for end, line, part in zip(ends, lines, own, strict=True):
            bias = bias.at[:, end - line.length : end, end - line.length : end].set(part)
        return bias

    def _on_line(self, table: jax.Array, line: Line) -> jax.Array:
        place = np.arange(line.length)
        buckets = distance_buckets(place[None, :] - place[:, None], len(table), self.furthest, self.past)
        return table[buckets].transpose(2, 0, 1)

    def _on_grid(self, table: jax.Array, grid: tuple[int, int], line: Line) -> jax.Array:
        if line.grid is None or len(line.grid) != 2:
            return jnp.zeros((self.heads, line.length, line.length))
        rows, columns = line.grid
        offsets = resample(table[:-3], (2 * grid[0] - 1, 2 * grid[1] - 1), (2 * rows - 1, 2 * columns - 1), self.linear)
        where = grid_coordinates(line.grid).astype(int)
        away = where[:, None] - where[None, :] + (rows - 1, columns - 1)  # (L, L, 2)
        index = np.full((line.length, line.length), len(offsets))  # a special token reads,
        index[line.special :, : line.special] = len(offsets) + 1  # is read,
        index[: line.special, : line.special] = len(offsets) + 2  # or reads another
        index[line.special :, line.special :] = away @ (2 * columns - 1, 1)
        return jnp.concatenate([offsets, table[-3:]])[index].transpose(2, 0, 1)
