"""Normalisation: statistics in float32, result in the compute type."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, unknown


class OffsetRMSNorm(nn.Module):
    """RMS norm `(..., D) -> (..., D)` with a scale of 1 + parameter, which decay pulls towards 1 (Gemma, arXiv 2403.08295)."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = nn.RMSNorm(epsilon=self.epsilon, use_scale=False, dtype=jnp.float32)(x)
        return (x * (1 + scale)).astype(self.dtype)


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms_offset": OffsetRMSNorm}


def make_norm(kind: str, eps: float, dtype: Any, name: str) -> nn.Module:
    """Returns the norm `kind` (`layer`, `rms` or `rms_offset`) with the given eps as a submodule called `name`."""
    if kind not in NORMS:
        raise InputError(unknown("norm", kind, NORMS))
    return NORMS[kind](epsilon=eps, dtype=dtype, name=name)
