"""The feed-forward sublayer and the activations published models use."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.layers.norms import make_norm
from mmx.layers.products import Dense
from mmx.parallel import constrain

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # erf: BERT, ViT, LXMERT, ViLT, FLAVA
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2, SigLIP, MBT
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "relu": jax.nn.relu,  # the vanilla Transformer, MulT
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """Two dense layers with an activation between them, multiplied by a gate if there is one: `(B, L, D) -> (B, L, D)`.

    `inner_norm` is the kind of a norm before the last matrix; None: none.
    """

    hidden: int
    activation: str
    gated: bool
    bias: bool
    dtype: Any
    inner_norm: str | None = None
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(self.hidden, use_bias=self.bias, dtype=self.dtype, name="up")(x)  # (B, L, F)
        # The backward pass takes the activation again: cheaper than to keep all that it went through, in a scan over layers.
        h = jax.checkpoint(ACTIVATIONS[self.activation], prevent_cse=False)(h)
        if self.gated:
            h = h * Dense(self.hidden, use_bias=self.bias, dtype=self.dtype, name="gate")(x)
        h = constrain(h, "batch", "length", "mlp")
        if self.inner_norm is not None:
            h = make_norm(self.inner_norm, self.eps, self.dtype, "norm")(h)
        return Dense(x.shape[-1], use_bias=self.bias, dtype=self.dtype, name="down")(h)
