"""Nodes of a graph, which hear of their neighbours before they become tokens.

Survey table 1: "word, GNN embedding" (MGNNS), "table node, column node" (SpeechSQLNet), "word node" (SADGA), "pose key
point, GCN embedding" (TriBERT), "ICD code, GNN embedding" (G-BERT).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, token_mask
from mmx.types import Masked, Tokens


class Graph(Embedder):
    """`{"nodes": (B, N, channels) or ids (B, N), "edges": (B, N, N)}` -> Tokens `(B, N, D)` through graph convolutions.

        H <- relu(A H W)    A = D^-1/2 (E + I) D^-1/2    (Kipf & Welling, arXiv 1609.02907)

    Args:
        nodes: most nodes of an example, N; fewer are welcome.
        channels: numbers of a node; None: nodes are ids.
        vocab: number of different ids, where nodes are ids.
        layers: graph convolutions; the last has no relu.
        position: usually none, since nodes have no order; "learned" where they do, as the joints of a skeleton.

    Edges are weights or booleans; where they are not symmetric, an edge (i, j) lets node i hear node j.
    """

    nodes: int
    channels: int | None = None
    vocab: int | None = None
    layers: int = 2

    usual_position = "none"
    mixes = True
    reads = ("nodes", "edges")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.nodes,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        nodes, edges, width = fields["nodes"], fields["edges"], self.width or 0
        if (self.channels is None) == (self.vocab is None):
            raise InputError(f"{self.name}: set channels (nodes are numbers) or vocab (nodes are ids), not both")
        shape = nodes.shape[:2]
        right = nodes.ndim == (2 if self.vocab else 3) and shape[1] <= self.nodes and edges.shape == (*shape, shape[1])
        if not right or (self.channels and nodes.shape[2] != self.channels):
            wanted = "(B, N)" if self.vocab else f"(B, N, {self.channels})"
            raise InputError(
                f"{self.name}: expected nodes {wanted} with N <= {self.nodes} and edges (B, N, N), "
                f"got {nodes.shape} and {edges.shape}"
            )
        mask = token_mask(mask, shape)
        if self.vocab:
            x = nn.Embed(self.vocab, width, dtype=self.dtype, embedding_init=INITIAL, name="token")(nodes)
        else:
            x = Dense(width, dtype=self.dtype, name="linear")(hide(jnp.asarray(nodes, self.dtype), mask))
        adjacency = normalised_adjacency(edges, mask).astype(self.dtype)
        for i in range(self.layers):
            x = jnp.einsum("bij,bjd->bid", adjacency, Dense(width, dtype=self.dtype, name=f"project_{i}")(hide(x, mask)))
            x = jax.nn.relu(x) if i < self.layers - 1 else x
        return self.fuse(x, mask, fields, (shape[1],))

    def content(self, raw: Any) -> jax.Array:
        return self.read(raw)[0]["nodes"]

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.nodes)
        nodes = jnp.zeros(shape, jnp.int32) if self.vocab else jnp.zeros((*shape, self.channels or 1), jnp.float32)
        edges = jnp.broadcast_to(jnp.eye(self.nodes, dtype=bool), (batch_size, self.nodes, self.nodes))
        return Masked(self.with_tables({"nodes": nodes, "edges": edges}, batch_size), jnp.ones(shape, bool))


def normalised_adjacency(edges: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """D^-1/2 (E + I) D^-1/2 of `edges (B, N, N)`, float32; what is masked has no edge."""
    weights = jnp.asarray(edges, jnp.float32)
    if mask is not None:
        weights = jnp.where(mask[:, :, None] & mask[:, None, :], weights, 0)
    weights = jnp.maximum(weights, jnp.eye(weights.shape[-1]))  # a loop that is already there is not counted twice
    root = jax.lax.rsqrt(weights.sum(-1))
    return weights * root[:, :, None] * root[:, None, :]
