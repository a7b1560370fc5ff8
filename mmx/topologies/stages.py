"""The four stages that the six topologies are made of; `mmx.topologies.latents` adds two that exchange through learned tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import MULTIWAY, Block, BlockConfig, Sight, Stack, make_norm, sublayer_names
from mmx.layers.block import SUBLAYERS
from mmx.layers.stack import drop_path_rates, relative_positions, scan_layers, sow_states
from mmx.topologies.stage import Stage, caches, concatenate, fit, given, norm_each, sight, split
from mmx.types import Streams, Tokens

FUSED = "fused"  # the name of the stream that summation and gathering leave
PLACES = ("own", "continued")
SHARED = "shared"  # the owner of weights that streams have in common
TOGETHER = "streams together"  # no modality has such a name


class Sum(Stage):
    """Adds token-aligned streams into the one stream `fused`.

        Z = sum over m of a_m Z_m / sum over the streams m present there of a_m

    A shorter stream is padded with masked tokens; at each position the weights are renormalised over the streams that
    have a token there. Weights are positive: `weights` by stream (missing: 1), or, with `learned`, the exponential of a
    parameter that starts at their logarithm.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("weights",)

    weights: Mapping[str, float] | None = None
    learned: bool = False

    @property
    def makes(self) -> tuple[str, ...]:
        return (FUSED,)

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
        if all(tokens.mask is None and tokens.values.shape[1] == length for tokens in streams.values()):
            mask = None
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
        taken: for a stream the numbers of layers behind which its states are taken, side by side along the width, and no norm:
            `{"image": (23,)}`; 0: as they came. A stream that is not named leaves from the end of its stack.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("depth", "block", "causal", "taken")

    depth: int | Mapping[str, int]
    block: BlockConfig | Mapping[str, BlockConfig] | None = None
    causal: tuple[str, ...] = ()
    share: bool = False
    sublayers: str = "self mlp"
    taken: Mapping[str, tuple[int, ...]] | None = None

    @property
    def caches(self) -> bool:
        return not self.share and caches(self.sublayers)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        stacks: dict[str, Stack] = {}
        new = {}
        for name, tokens in streams.items():
            depth = self.depth.get(name, 0) if isinstance(self.depth, Mapping) else self.depth
            if depth == 0:
                new[name] = tokens
                continue
            owner = SHARED if self.share else name
            if owner not in stacks:
                taken = (self.taken or {}).get(name, ())
                if any(not 0 <= i <= depth for i in taken):
                    raise InputError(f"PerStream.taken: {name!r} has layers 0 to {depth}, not {taken}")
                stacks[owner] = Stack(depth, given(self.block, self, name), self.sublayers, taken=taken, name=owner)
            tokens = fit(tokens, stacks[owner].config.width, name)
            read = dataclasses.replace(tokens, causal=tokens.causal or name in self.causal)
            new[name] = dataclasses.replace(tokens, values=stacks[owner](tokens.values, sight({name: read})))
            if self.share:  # the next stream's states take the place of these
                sow_states(self, jax.tree.map(lambda x: x, stacks[owner].variables.get("intermediates", {})), name)
        return new


class Joint(Stage):
    """Concatenates the streams, runs one stack over all tokens, and splits them again.

        C(Z_1, ..., Z_M) = Tf(C(Z_1, ..., Z_M))

    Args:
        depth: layers.
        sees: for a stream the others it may see; a stream that is not named sees all. None: all see all, but for causal
            streams: `mmx.layers.visibility` has the drawing.
        multiway: what every stream has for itself, of "attention" (its projections), "mlp" and "norm" (BEiT-3: all three).
        places: where tokens stand for rotary and relative positions. "own": each stream counts from 0. "continued": one
            line of all tokens that exist, a stream behind the other (LLaVA, PaliGemma).
        streams: which ones; the others leave as they came. None: all.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("sees", "streams")

    depth: int
    block: BlockConfig | None = None
    sublayers: str = "self mlp"
    sees: Mapping[str, tuple[str, ...]] | None = None
    multiway: tuple[str, ...] = ()
    places: str = "own"
    streams: tuple[str, ...] | None = None

    @property
    def caches(self) -> bool:
        return caches(self.sublayers)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        chosen = {name: tokens for name, tokens in streams.items() if self.streams is None or name in self.streams}
        if self.depth == 0 or not chosen:
            return streams
        for what in self.multiway:
            if what not in MULTIWAY:
                raise InputError("Joint.multiway: " + unknown("part of a block", what, MULTIWAY))
        if self.places not in PLACES:
            raise InputError("Joint.places: " + unknown("way to count", self.places, PLACES))
        block = given(self.block, self)
        chosen = {name: fit(tokens, block.width, name) for name, tokens in chosen.items()}
        parts = tuple((name, tokens.values.shape[1]) for name, tokens in chosen.items())
        stack = Stack(self.depth, block, self.sublayers, parts, self.multiway, name="stack")
        return {**streams, **split(stack(concatenate(chosen).values, sight(chosen, self.sees, self.places)), chosen)}


class Cross(Stage):
    """Every stream queries the others; all streams step together, from the same inputs.

        Z_m <- Tf_m(Q = Z_m, KV = C(the others))

    Named by the query stream, whose residual carries the result (the survey labels by the key/value stream). A stream
    that has nothing to read, because it is alone or because all others are causal, gets zero from that sublayer.

    Args:
        depth: layers.
        block: one configuration or one for each stream; widths may differ (ViLBERT).
        sublayers: the word of every block; `"cross self mlp"` (LXMERT) keeps the context inside a stream, `"cross mlp"`
            (MulT) is the survey's bare formula.
        edges: for each stream the streams it reads; a stream that is not named reads nothing. None: all others.
        steps: the streams that go through the layers; the others are read as they entered and leave as they came (the
            image of ALBEF, BLIP, CoCa). None: all.
        original: read the others as they entered the stage (MulT), not as the layer before left them.
        share: the kinds of sublayers that all streams have in common: `("cross",)` (LXMERT), `("cross", "self", "mlp")`.
        together: streams whose self-attention is one over all their tokens, with weights in common (queries and text of the
            Q-Former, arXiv 2301.12597); `share` has to name "self".
        past: whether a token reads of another stream only what stands there no further along than it stands itself, the
            difference in their lengths aside (MulT).
        apart: whether a stream reads each of its edges by layers of their own; what these make of it lies side by side along
            its width (MulT). It needs `original`, and `edges`, which say how wide a stream leaves.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("block", "edges", "steps", "together")

    depth: int
    block: BlockConfig | Mapping[str, BlockConfig] | None = None
    sublayers: str = "cross self mlp"
    edges: Mapping[str, tuple[str, ...]] | None = None
    steps: tuple[str, ...] | None = None
    original: bool = False
    share: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    past: bool = False
    apart: bool = False

    @property
    def caches(self) -> bool:
        return not self.together and not {"self", "cross"} & {*self.share} and caches(self.sublayers)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        return self._exchange(streams, {})

    def _exchange(self, streams: Streams, arriving: dict[str, jax.Array], eps: float = 0.0) -> Streams:
        """Runs the layers; before each of them a stream takes in what arrives there, `(depth, B, L, D)`, and is normalised."""
        readers = self._readers(streams)
        if self.depth == 0 or not readers:
            return streams
        active = list(dict.fromkeys(name for name, _ in readers.values()))
        blocks = {name: given(self.block, self, name) for name in active}
        self._check(blocks)
        width = {name: blocks[name].width if name in blocks else None for name in streams}
        streams = {name: fit(tokens, width[name] or tokens.values.shape[-1], name) for name, tokens in streams.items()}
        blocks = {reader: blocks[name] for reader, (name, _) in readers.items()}
        sources = {reader: read for reader, (_, read) in readers.items()}
        owners = {kind: {reader: SHARED if kind in self.share else reader for reader in readers} for kind in SUBLAYERS}
        owner = owners["self"]
        of_owner = {owner[name]: block for name, block in blocks.items()}
        relative = {name: relative_positions(block, f"{name}_relative") for name, block in of_owner.items()}
        sights = {reader: relative[owner[reader]](self._sight(name, read, streams)) for reader, (name, read) in readers.items()}
        together = tuple(name for name in active if name in self.together)
        if together:
            sights[TOGETHER] = relative[SHARED](sight({name: streams[name] for name in together}))
        entered = {  # a stream without values is read as the layer before left it
            name: tokens if self.original or name not in active else dataclasses.replace(tokens, values=None)
            for name, tokens in streams.items()
        }
        first = next(iter(blocks.values()))
        layers = scan_layers(_CrossLayer, self.depth, first)
        layers = layers(blocks, self.sublayers, sources, owners, together, eps, name="layers")
        carry = {reader: streams[name].values for reader, (name, _) in readers.items()}
        rates = {name: drop_path_rates(self.depth, block) for name, block in blocks.items()}
        carry, _ = layers(carry, (rates, arriving), (sights, entered))
        ends = {reader: SHARED if {*self.share} >= {*self.sublayers.split()} else reader for reader in readers}
        carry = norm_each(carry, ends, blocks)
        new = {name: [carry[reader] for reader, (own, _) in readers.items() if own == name] for name in streams}
        return {n: dataclasses.replace(t, values=jnp.concatenate(new[n] or [t.values], -1)) for n, t in streams.items()}

    def _readers(self, streams: Streams) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Who goes through the layers: the stream that it is, or, for `apart`, is a copy of, and the streams that it reads."""
        readers = {}
        for name in (n for n in streams if self.steps is None or n in self.steps):
            named = [n for n in streams if n != name] if self.edges is None else self.edges.get(name, ())
            read = tuple(n for n in named if n in streams and n != name and not streams[n].causal)
            if self.apart:
                readers |= {f"{name}_{n}": (name, (n,) if n in read else ()) for n in named}
            else:
                readers[name] = name, read
        return readers

    def _sight(self, name: str, read: Sequence[str], streams: Streams) -> Sight:
        own = sight({name: streams[name]})
        if not self.past or not read:
            return own
        length, others = streams[name].length, [streams[n].length for n in read]
        rules = [np.tri(length, other, abs(length - other), dtype=bool) for other in others]
        return dataclasses.replace(own, reads=np.concatenate(rules, 1))

    def _check(self, blocks: Mapping[str, BlockConfig]) -> None:
        if self.apart and (self.edges is None or not self.original or self.together):
            raise InputError("Cross.apart: it needs `edges`, which say how wide a stream leaves, `original`, and no `together`")
        words = tuple(dict.fromkeys(self.sublayers.split()))
        for kind in self.share:
            if kind not in words:
                raise InputError("Cross.share: " + unknown("sublayer", kind, words))
        if self.together and "self" not in self.share:
            raise InputError(f"Cross.together={self.together}: one self-attention has weights in common; add 'self' to share")
        if self.share and len({*blocks.values()}) > 1:
            raise InputError("Cross.share: streams that share weights have one block; give `block` one BlockConfig")


class _CrossLayer(nn.Module):
    configs: Mapping[str, BlockConfig]
    sublayers: str
    sources: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, Mapping[str, str]]
    together: tuple[str, ...]
    eps: float  # of the norm on what arrives

    @nn.compact
    def __call__(
        self,
        values: dict[str, jax.Array],
        own: tuple[dict[str, jax.Array], dict[str, jax.Array]],
        shared: tuple[dict[str, Sight], Streams],
    ) -> tuple[dict[str, jax.Array], None]:
        (rates, arriving), (sights, entered) = own, shared
        for name, x in arriving.items():
            norm = make_norm("layer", self.eps, self.configs[name].dtype, f"{name}_bridge_norm")
            values = {**values, name: norm(values[name] + x)}
        configs = {owner[name]: config for name, config in self.configs.items() for owner in self.owners.values()}
        relative = {
            o: relative_positions(configs[o], f"{o}_relative", each=True) for o in dict.fromkeys(self.owners["self"].values())
        }
        sights = {n: relative[self.owners["self"].get(n, SHARED)](sight) for n, sight in sights.items()}
        blocks = {owner: Block(config, self.sublayers, name=owner) for owner, config in configs.items()}
        contexts = {name: self._context(name, values, entered) for name in self.sources}
        new, between = dict(values), []
        for sublayer, kind in sublayer_names(self.sublayers):
            joint = self.together if kind == "self" else ()
            if joint:
                lines = {name: Tokens(new[name]) for name in joint}
                whole = concatenate(lines).values
                whole = blocks[SHARED](whole, sights[TOGETHER], drop_path=rates[joint[0]], only=sublayer)
                new |= {name: tokens.values for name, tokens in split(whole, lines).items()}
            for name, context in contexts.items():
                if name in joint:
                    continue
                block = blocks[self.owners[kind][name]]
                new[name] = block(new[name], sights[name], context.values, context.mask, rates[name], sublayer)
            if kind == "mlp":
                between.append(dict(new))
        sow_states(self, new)
        if len(between) > 1:  # a word of several published layers
            sow_states(self, between, "between")
        return new, None

    def _context(self, name: str, values: Mapping[str, jax.Array], entered: Streams) -> Tokens:
        """What the stream reads: as they come where they are of one width, else projected to the stream's own."""
        read = {
            n: entered[n] if entered[n].values is not None else dataclasses.replace(entered[n], values=values[n])
            for n in self.sources[name]
        }
        if len({tokens.values.shape[-1] for tokens in read.values()}) > 1:
            read = {n: fit(tokens, self.configs[name].width, f"{name}_reads_{n}") for n, tokens in read.items()}
        return concatenate(read) if read else Tokens(None)  # type: ignore[arg-type]


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Pads dimension 1 with zeros (False) up to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
