"""Normalisation: statistics in float32, result in the compute type."""

from typing import Any

import flax.linen as nn

from mmx.errors import InputError, unknown

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def make_norm(kind: str, eps: float, dtype: Any, name: str) -> nn.Module:
    """Returns the norm `kind` (`layer` or `rms`) with the given eps as a submodule called `name`."""
    if kind not in NORMS:
        raise InputError(unknown("norm", kind, NORMS))
    return NORMS[kind](epsilon=eps, dtype=dtype, name=name)
