"""The stages: a stage maps streams to streams, and a topology is a tuple of stages.

Conventions, the same for all: streams come in the order of the model's modalities; a stream that is absent from the
whole batch is no key, one that is absent from an example is a mask that is all False, and both give the same numbers;
tokens that are masked are seen by nobody; a causal stream stays causal. A stage whose `block` is None uses the model's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers import Block, BlockConfig, Stack, make_norm, visibility
from mmx.layers.stack import drop_path_rates, scan_layers
from mmx.types import Streams, Tokens

FUSED = "fused"  # the name of the stream that summation leaves


class Stage(nn.Module):
    """What maps streams to streams. Subclasses are called as `stage(streams) -> streams`.

    `separate` says that streams keep apart: what no stream may see (a causal one) changes no other stream.
    """

    @property
    def separate(self) -> bool:
        return True


class Sum(Stage):
    """Adds token-aligned streams into the one stream `fused`.

        Z = sum over m of a_m Z_m / sum over the streams m present there of a_m

    A shorter stream is padded with masked tokens; at each position the weights are renormalised over the streams that
    have a token there. Weights are positive: `weights` by stream (missing: 1), or, with `learned`, the exponential of a
    parameter that starts at their logarithm.
    """

    weights: Mapping[str, float] | None = None
    learned: bool = False
    block: BlockConfig | None = None

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
        return {FUSED: Tokens(values.astype(dtype), mask, causal)}

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
            block = self.block[name] if isinstance(self.block, Mapping) else self.block
            owner = "shared" if self.share else name
            if owner not in stacks:
                stacks[owner] = Stack(depth, _given(block, self), self.sublayers, name=owner)
            visible = visibility([tokens.values.shape[1]], [tokens.causal or name in self.causal])
            x = _fit(tokens, stacks[owner].config.width, name).values
            new[name] = dataclasses.replace(tokens, values=stacks[owner](x, tokens.mask, visible))
        return new


class Joint(Stage):
    """Concatenates the streams, runs one stack over all tokens, and splits them again.

        C(Z_1, ..., Z_M) = Tf(C(Z_1, ..., Z_M))

    All see all, but for causal streams: see `mmx.layers.visibility` for the drawing.
    """

    depth: int
    block: BlockConfig | None = None
    sublayers: str = "self mlp"

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.depth == 0:
            return streams
        block = _given(self.block, self)
        streams = {name: _fit(tokens, block.width, name) for name, tokens in streams.items()}
        joint = concatenate(streams)
        visible = visibility([t.values.shape[1] for t in streams.values()], [t.causal for t in streams.values()])
        values = Stack(self.depth, block, self.sublayers, name="stack")(joint.values, joint.mask, visible)
        return split(values, streams)


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
        share: one set of weights for all streams (LXMERT's shared cross-attention) instead of one each.
    """

    depth: int
    block: BlockConfig | None = None
    sublayers: str = "cross self mlp"
    edges: Mapping[str, tuple[str, ...]] | None = None
    share: bool = False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.depth == 0:
            return streams
        block = _given(self.block, self)
        streams = {name: _fit(tokens, block.width, name) for name, tokens in streams.items()}
        carry = {name: t.values for name, t in streams.items()}
        shared = {name: dataclasses.replace(t, values=None) for name, t in streams.items()}
        sources = {name: self._sources(name, streams) for name in streams}
        layers = scan_layers(_CrossLayer, self.depth, block)
        layers = layers(block, self.sublayers, sources, self.share, name="layers")
        carry, _ = layers(carry, drop_path_rates(self.depth, block), (shared,))
        if block.norm == "pre":
            norms = {n: make_norm(block.norm_kind, block.eps, block.dtype, n) for n in self._owners(streams)}
            carry = {name: norms[self._owner(name)](x) for name, x in carry.items()}
        return {name: dataclasses.replace(t, values=carry[name]) for name, t in streams.items()}

    def _sources(self, name: str, streams: Streams) -> tuple[str, ...]:
        named = [n for n in streams if n != name] if self.edges is None else self.edges.get(name, ())
        return tuple(n for n in named if n in streams and n != name and not streams[n].causal)

    def _owner(self, name: str) -> str:
        return "shared_norm" if self.share else f"{name}_norm"

    def _owners(self, streams: Streams) -> list[str]:
        return list(dict.fromkeys(self._owner(name) for name in streams))


class _CrossLayer(nn.Module):
    config: BlockConfig
    sublayers: str
    sources: Mapping[str, tuple[str, ...]]
    share: bool

    @nn.compact
    def __call__(
        self, values: dict[str, jax.Array], rate: jax.Array, shared: tuple[Streams]
    ) -> tuple[dict[str, jax.Array], None]:
        (shape,) = shared
        streams = {name: dataclasses.replace(shape[name], values=values[name]) for name in self.sources}
        blocks: dict[str, Block] = {}
        new = {}
        for name, sources in self.sources.items():
            owner = "shared" if self.share else name
            if owner not in blocks:
                blocks[owner] = Block(self.config, self.sublayers, name=owner)
            tokens = streams[name]
            visible = visibility([tokens.values.shape[1]], [tokens.causal])
            context = concatenate({n: streams[n] for n in sources}) if sources else None
            new[name] = blocks[owner](
                tokens.values, tokens.mask, visible, *((None, None) if context is None else (context.values, context.mask)), rate
            )
        return new, None


def concatenate(streams: Streams) -> Tokens:
    """C(Z_1, ..., Z_M): all tokens of all streams in one, `(B, sum of L, D)`."""
    masks = [tokens.mask for tokens in streams.values()]
    whole = all(mask is None for mask in masks)
    return Tokens(
        jnp.concatenate([tokens.values for tokens in streams.values()], 1),
        None if whole else jnp.concatenate([tokens.dense_mask for tokens in streams.values()], 1),
    )


def split(values: jax.Array, streams: Streams) -> Streams:
    """Undoes `concatenate`: gives every stream its part of `values`."""
    ends = np.cumsum([tokens.values.shape[1] for tokens in streams.values()])
    parts = jnp.split(values, ends[:-1], axis=1)
    return {name: dataclasses.replace(tokens, values=part) for (name, tokens), part in zip(streams.items(), parts, strict=True)}


def fill_block(stage: Stage, block: BlockConfig) -> Stage:
    """Returns the stage with `block` where it has none of its own."""
    if getattr(stage, "block", block) is None:
        return dataclasses.replace(stage, block=block)  # pyright: ignore[reportCallIssue]
    return stage


def _given(block: BlockConfig | None, stage: Stage) -> BlockConfig:
    if block is None:
        raise InputError(f"{type(stage).__name__}: no block; pass one, or build the model with mmx.build_model")
    return block


def _fit(tokens: Tokens, width: int, name: str) -> Tokens:
    """Projects the tokens of stream `name` to `width` where they have another one."""
    if tokens.values.shape[-1] == width:
        return tokens
    project = nn.Dense(width, dtype=tokens.values.dtype, name=f"{name}_project")
    return dataclasses.replace(tokens, values=project(tokens.values))


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Pads dimension 1 with zeros (False) up to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
