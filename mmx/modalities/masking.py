"""What every modality does with `Masked` input, and with the tokens of what is not there."""

from typing import Any

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.types import Masked, Tokens


def unmask(raw: Any) -> tuple[Any, Any]:
    """Splits a raw value into its array and its mask, or None."""
    return (raw.array, raw.mask) if isinstance(raw, Masked) else (raw, None)


def make_tokens(values: jax.Array, mask: Any) -> Tokens:
    """Builds Tokens `(B, L, D)` from a mask over examples `(B,)`, over tokens `(B, L)`, or None.

    What is masked becomes zero here, so that even a NaN in an absent modality goes no further.
    """
    if mask is None:
        return Tokens(values)
    mask = jnp.asarray(mask, bool)
    if mask.ndim == 1:
        mask = mask[:, None]
    if mask.shape[0] != values.shape[0] or mask.shape[1] not in (1, values.shape[1]):
        raise InputError(f"mask has shape {mask.shape}; expected (B,) or (B, L) for tokens of shape {values.shape[:2]}")
    mask = jnp.broadcast_to(mask, values.shape[:2])
    return Tokens(jnp.where(mask[..., None], values, 0), mask)
