"""The two stages that exchange through learned tokens: what they cost grows with the streams' lengths, not their product."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.layers import Block, BlockConfig, Sight, Stack, make_norm
from mmx.layers.products import INITIAL
from mmx.layers.stack import drop_path_rates, relative_positions, scan_layers, sow_states
from mmx.topologies.stage import Stage, concatenate, fit, given, norm_each, sight
from mmx.topologies.stages import SHARED
from mmx.types import Streams, Tokens

BOTTLENECK = "shared tokens"  # no modality has such a name
LATENT = "latent"  # the stream of the latent tokens


class Bottleneck(Stage):
    """Every stream keeps to itself and a few shared tokens; they carry what streams tell each other (MBT, arXiv 2107.00135).

        [Z_m, F_m] <- Tf_m(C(Z_m, F))        F <- mean over the present m of F_m

    Cost: sum over m of (N_m + F)^2. The shared tokens do not leave the stage. Who is absent from an example has no share
    in the mean, and neither has a causal stream, which reads the shared tokens and writes nothing to them.

    Args:
        depth: layers.
        tokens: how many shared tokens, F.
        share: one set of weights for all streams instead of one each.
    """

    depth: int
    tokens: int = 4
    block: BlockConfig | None = None
    sublayers: str = "self mlp"
    share: bool = False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.depth == 0:
            return streams
        block = given(self.block, self)
        streams = {name: fit(tokens, block.width, name) for name, tokens in streams.items()}
        values = next(iter(streams.values())).values
        shared = self.param("token", INITIAL, (self.tokens, block.width)).astype(values.dtype)
        shared = jnp.broadcast_to(shared, (values.shape[0], *shared.shape))  # (B, F, D)
        with_shared = {n: {n: t, BOTTLENECK: Tokens(shared)} for n, t in streams.items()}
        owners = {name: SHARED if self.share else name for name in streams}
        relative = {owner: relative_positions(block, f"{owner}_relative") for owner in dict.fromkeys(owners.values())}
        sights = {n: relative[owners[n]](sight(pair)) for n, pair in with_shared.items()}
        writes = {name: t.present & (not t.causal) for name, t in streams.items()}
        layers = scan_layers(_BottleneckLayer, self.depth, block)(block, self.sublayers, owners, name="layers")
        carry = ({name: t.values for name, t in streams.items()}, shared)
        (new, _), _ = layers(carry, drop_path_rates(self.depth, block), (sights, writes))
        new = norm_each(new, owners, dict.fromkeys(new, block))
        return {name: dataclasses.replace(t, values=new[name]) for name, t in streams.items()}


class _BottleneckLayer(nn.Module):
    config: BlockConfig
    sublayers: str
    owners: dict[str, str]

    @nn.compact
    def __call__(
        self,
        carry: tuple[dict[str, jax.Array], jax.Array],
        rate: jax.Array,
        context: tuple[dict[str, Sight], dict[str, jax.Array]],
    ) -> tuple[tuple[dict[str, jax.Array], jax.Array], None]:
        (values, shared), (sights, writes) = carry, context
        relative = {o: relative_positions(self.config, f"{o}_relative", each=True) for o in dict.fromkeys(self.owners.values())}
        sights = {name: relative[owner](sights[name]) for name, owner in self.owners.items()}
        blocks = {o: Block(self.config, self.sublayers, name=o) for o in dict.fromkeys(self.owners.values())}
        new, written, writers = {}, jnp.zeros_like(shared), jnp.zeros((), shared.dtype)
        for name, owner in self.owners.items():
            x = blocks[owner](jnp.concatenate([values[name], shared], 1), sights[name], drop_path=rate)
            length = values[name].shape[1]
            new[name] = x[:, :length]
            part = writes[name][:, None, None]
            written += jnp.where(part, x[:, length:], 0)
            writers += part.astype(shared.dtype)
        sow_states(self, new)
        return (new, jnp.where(writers > 0, written / jnp.maximum(writers, 1), shared)), None


class Latent(Stage):
    """A few learned tokens read all streams, think, and are read by every stream (Perceiver IO, arXiv 2107.14795).

        X <- Tf(Q = X, KV = C(Z_1, ..., Z_M))      X <- Tf(X)      Z_m <- Tf(Q = Z_m, KV = X)

    Cost: X sum of N_m to read, X^2 for each layer, X sum of N_m to answer. A causal stream is answered and not read.

    Args:
        depth: layers of the latent tokens.
        tokens: how many latent tokens, X.
        block: of all three parts.
        read: of the part that reads the streams; None: `block`. Its width is that of `block`.
        answer: of the part that answers; None: `block`.
        blocks: how often the layers are gone through, with the same weights.
        queries: streams that are answered at this many learned places, instead of at their own tokens, which then need not
            have the width of `block`; others end here, and the latent tokens leave as a stream `latent` (Perceiver IO's
            decoders; {}: Perceiver itself). None: every stream is answered at its tokens.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("queries",)

    depth: int
    tokens: int = 64
    block: BlockConfig | None = None
    read: BlockConfig | None = None
    answer: BlockConfig | None = None
    blocks: int = 1
    queries: Mapping[str, int] | None = None

    @property
    def makes(self) -> tuple[str, ...]:
        return () if self.queries is None else (LATENT,)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        block = given(self.block, self)
        read, reply = (dataclasses.replace(own or block, dtype=block.dtype) for own in (self.read, self.answer))
        if self.queries is None or len({tokens.values.shape[-1] for tokens in streams.values()}) > 1:
            streams = {name: fit(tokens, block.width, name) for name, tokens in streams.items()}
        values = next(iter(streams.values())).values
        latent = self.param("token", INITIAL, (self.tokens, block.width)).astype(values.dtype)
        latent = jnp.broadcast_to(latent, (values.shape[0], *latent.shape))  # (B, X, D)
        seen = {name: tokens for name, tokens in streams.items() if not tokens.causal}
        joint = concatenate(seen) if seen else Tokens(None)  # type: ignore[arg-type]
        latent = Block(read, "cross mlp", name="read")(latent, Sight(), joint.values, joint.mask)
        sow_states(self, latent)
        latent = self._think(Stack(self.depth, block, name="stack"), latent)
        answer = Block(reply, "cross mlp", name="answer")
        norm = make_norm(reply.norm_kind, reply.eps, reply.dtype, "norm") if reply.ends_with_norm else lambda x: x
        if self.queries is None:
            return {n: dataclasses.replace(t, values=norm(answer(t.values, Sight(), latent))) for n, t in streams.items()}
        new = {LATENT: Tokens(latent)}
        for name in (name for name in streams if name in self.queries):
            query = self.param(f"{name}_query", INITIAL, (self.queries[name], reply.width)).astype(latent.dtype)
            new[name] = Tokens(norm(answer(jnp.broadcast_to(query, (len(latent), *query.shape)), Sight(), latent)))
        return new

    def _think(self, stack: Stack, latent: jax.Array) -> jax.Array:
        if self.blocks == 1:
            return stack(latent)
        again = nn.scan(
            lambda stack, x, _: (stack(x), None),
            variable_broadcast="params",
            variable_axes={"intermediates": 0, "attentions": 0},
            split_rngs={"params": False, "dropout": True},
            length=self.blocks,
        )
        return again(stack, latent, None)[0]
