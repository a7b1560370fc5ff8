"""Learned tokens that read a stream and stand for it: a few where there were many."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.layers.attention import PROJECTIONS, Attention, Sight
from mmx.layers.mlp import MLP
from mmx.layers.norms import make_norm
from mmx.layers.products import INITIAL


class AttentionPool(nn.Module):
    """Learned tokens X read `x (B, L, D)` by cross-attention, without a residual: `(B, tokens, W)`.

        Y = Attention(Q = N(X), KV = N(x))      Y <- Y + MLP(N(Y))

    SigLIP's head (arXiv 2303.15343) has one token and the MLP and no norm N before the attention; CoCa's pooler
    (2205.01917) the norms and no MLP.

    Args:
        heads: attention heads.
        tokens: how many.
        width: size of a token, W; None: that of what is read.
        norm: whether the tokens and what they read are normalised first.
        mlp: hidden size of the MLP; None: no MLP.
        activation: of the MLP.
        eps: of the norms.
    """

    heads: int
    tokens: int = 1
    width: int | None = None
    norm: bool = False
    mlp: int | None = None
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = self.width or x.shape[-1]
        y = self.param("token", INITIAL, (self.tokens, width)).astype(x.dtype)
        if self.norm:
            y, x = (make_norm("layer", self.eps, self.dtype, f"{n}_norm")(z) for n, z in (("token", y), ("context", x)))
        attention = Attention(
            heads=self.heads,
            head_size=width // self.heads,
            kv_heads=self.heads,
            bias=PROJECTIONS,
            scale=None,
            qk_norm=False,
            eps=self.eps,
            rotary=None,
            dtype=self.dtype,
            name="cross",
        )
        y = attention(jnp.broadcast_to(y, (len(x), *y.shape)), Sight(mask), x)
        if self.mlp is None:
            return y
        z = make_norm("layer", self.eps, self.dtype, "mlp_norm")(y)
        return y + MLP(self.mlp, self.activation, False, True, self.dtype, name="mlp")(z)
