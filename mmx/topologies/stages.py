"""The four stages that the six topologies are made of; `mmx.topologies.latents` adds two that exchange through learned tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import Block, BlockConfig, Sight, Stack
from mmx.layers.stack import drop_path_rates, relative_positions, scan_layers
from mmx.topologies.stage import Stage, concatenate, fit, given, lengths, norm_each, sight, split
from mmx.types import Streams, Tokens

FUSED = "fused"  # the name of the stream that summation leaves
MULTIWAY = ("mlp", "norm")


class Sum(Stage):
    """Adds token-aligned streams into the one stream `fused`.

        Z = sum over m of a_m Z_m / sum over the streams m present there of a_m

    A shorter stream is padded with masked tokens; at each position the weights are renormalised over the streams that
    have a token there. Weights are positive: `weights` by stream (missing: 1), or, with `learned`, the exponential of a
    parameter that starts at their logarithm.
    """

    weights: Mapping[str, float] | None = None
    learned: bool = False

    @property
    def separate(self) -> bool:
        return False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        widths = {name: tokens.values.shape[-1] for name, tokens in streams.items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"Sum: streams have different widths {widths}; give their embedders one width")
        length = max(tokens.values.shape[1] for tokens in streams.values())
        total, norm, mask = jnp.float32(0), jnp.float32(0), jnp.zeros((), bool)
        for name, tokens in streams.items():
            weight = self._weight(name)
            here = _pad(tokens.dense_mask, length)  # (B, L)
            total += weight * jnp.where(here[..., None], _pad(tokens.values, length), 0)
            norm += weight * here
            mask |= here
        values = total / jnp.where(mask, norm, 1)[..., None]  # (B, L, D)
        dtype = next(iter(streams.values())).values.dtype
        causal = any(tokens.causal for tokens in streams.values())
        special = {tokens.special for tokens in streams.values()}
        if len(special) > 1:
            raise InputError(
                f"Sum: streams have different special tokens in front {sorted(special)}; they would be summed to others"
            )
        return {FUSED: Tokens(values.astype(dtype), mask, causal=causal, special=special.pop())}

    def _weight(self, name: str) -> Any:
        weight = (self.weights or {}).get(name, 1.0)
        if weight <= 0:
            raise InputError(f"Sum: the weight of {name!r} is {weight}; weights are positive")
        if not self.learned:
            return weight
        return jnp.exp(self.param(f"{name}_weight", nn.initializers.constant(np.log(weight)), ()))


class PerStream(Stage):
    """An own stack for each stream.

        Z_m = Tf_m(Z_m)

    Args:
        depth: layers, one number or one for each stream (a stream that is not named has depth 0: it passes unchanged).
        block: one configuration or one for each stream; widths may differ between streams.
        causal: streams that are causal here, beside those that come in as causal.
        share: one stack for all streams instead of one each.
    """

    depth: int | Mapping[str, int]
    block: BlockConfig | Mapping[str, BlockConfig] | None = None
    causal: tuple[str, ...] = ()
    share: bool = False
    sublayers: str = "self mlp"

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        stacks: dict[str, Stack] = {}
        new = {}
        for name, tokens in streams.items():
            depth = self.depth.get(name, 0) if isinstance(self.depth, Mapping) else self.depth
            if depth == 0:
                new[name] = tokens
                continue
            if isinstance(self.block, Mapping) and name not in self.block:
                raise InputError(f"PerStream.block: no block for stream {name!r}; it has {', '.join(self.block)}")
            block = self.block[name] if isinstance(self.block, Mapping) else self.block
            owner = "shared" if self.share else name
            if owner not in stacks:
                stacks[owner] = Stack(depth, given(block, self), self.sublayers, name=owner)
            tokens = fit(tokens, stacks[owner].config.width, name)
            read = dataclasses.replace(tokens, causal=tokens.causal or name in self.causal)
            new[name] = dataclasses.replace(tokens, values=stacks[owner](tokens.values, sight({name: read})))
        return new


class Joint(Stage):
    """Concatenates the streams, runs one stack over all tokens, and splits them again.

        C(Z_1, ..., Z_M) = Tf(C(Z_1, ..., Z_M))

    Args:
        depth: layers.
        sees: for a stream the others it may see; a stream that is not named sees all. None: all see all, but for causal
            streams: `mmx.layers.visibility` has the drawing.
        multiway: what every stream has for itself, of "mlp" and "norm", beside the attention they share (BEiT-3).
    """

    depth: int
    block: BlockConfig | None = None
    sublayers: str = "self mlp"
    sees: Mapping[str, tuple[str, ...]] | None = None
    multiway: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.depth == 0:
            return streams
        for what in self.multiway:
            if what not in MULTIWAY:
                raise InputError("Joint.multiway: " + unknown("part of a block", what, MULTIWAY))
        block = given(self.block, self)
        streams = {name: fit(tokens, block.width, name) for name, tokens in streams.items()}
        parts = tuple(lengths(streams).items())
        stack = Stack(self.depth, block, self.sublayers, parts, self.multiway, name="stack")
        return split(stack(concatenate(streams).values, sight(streams, self.sees)), streams)


class Cross(Stage):
    """Every stream queries the others; all streams step together, from the same inputs.

        Z_m <- Tf_m(Q = Z_m, KV = C(the others))

    Named by the query stream, whose residual carries the result (the survey labels by the key/value stream). A stream
    that has nothing to read, because it is alone or because all others are causal, gets zero from that sublayer.

    Args:
        depth: layers.
        sublayers: the word of every block; `"cross self mlp"` (LXMERT) keeps the context inside a stream, `"cross mlp"`
            (MulT) is the survey's bare formula.
        edges: for each stream the streams it reads; a stream that is not named reads nothing. None: all others.
        steps: the streams that go through the layers; the others are read as they entered and leave as they came (the
            image of ALBEF, BLIP, CoCa). None: all.
        original: read the others as they entered the stage (MulT), not as the layer before left them.
        share: one set of weights for all streams (LXMERT's shared cross-attention) instead of one each.
    """

    depth: int
    block: BlockConfig | None = None
    sublayers: str = "cross self mlp"
    edges: Mapping[str, tuple[str, ...]] | None = None
    steps: tuple[str, ...] | None = None
    original: bool = False
    share: bool = False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.depth == 0:
            return streams
        block = given(self.block, self)
        streams = {name: fit(tokens, block.width, name) for name, tokens in streams.items()}
        active = {name: tokens for name, tokens in streams.items() if self.steps is None or name in self.steps}
        sources = {name: self._sources(name, streams) for name in active}
        owners = {name: "shared" if self.share else name for name in active}
        relative = {owner: relative_positions(block, f"{owner}_relative") for owner in dict.fromkeys(owners.values())}
        sights = {n: relative[owners[n]](sight({n: t}), [t.values.shape[1]]) for n, t in active.items()}
        entered = {  # a stream without values is read as the layer before left it
            name: tokens if self.original or name not in active else dataclasses.replace(tokens, values=None)
            for name, tokens in streams.items()
        }
        layers = scan_layers(_CrossLayer, self.depth, block)
        layers = layers(block, self.sublayers, sources, owners, name="layers")
        carry = {name: tokens.values for name, tokens in active.items()}
        carry, _ = layers(carry, drop_path_rates(self.depth, block), (sights, entered))
        carry = norm_each(carry, owners, block)
        return {name: dataclasses.replace(t, values=carry.get(name, t.values)) for name, t in streams.items()}

    def _sources(self, name: str, streams: Streams) -> tuple[str, ...]:
        named = [n for n in streams if n != name] if self.edges is None else self.edges.get(name, ())
        return tuple(n for n in named if n in streams and n != name and not streams[n].causal)


class _CrossLayer(nn.Module):
    config: BlockConfig
    sublayers: str
    sources: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, str]

    @nn.compact
    def __call__(
        self, values: dict[str, jax.Array], rate: jax.Array, shared: tuple[dict[str, Sight], Streams]
    ) -> tuple[dict[str, jax.Array], None]:
        sights, entered = shared

        def read(name: str) -> Tokens:
            tokens = entered[name]
            return tokens if tokens.values is not None else dataclasses.replace(tokens, values=values[name])

        blocks = {o: Block(self.config, self.sublayers, name=o) for o in dict.fromkeys(self.owners.values())}
        new = {}
        for name, sources in self.sources.items():
            context = concatenate({n: read(n) for n in sources}) if sources else Tokens(None)  # type: ignore[arg-type]
            new[name] = blocks[self.owners[name]](values[name], sights[name], context.values, context.mask, rate)
        return new, None


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Pads dimension 1 with zeros (False) up to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
