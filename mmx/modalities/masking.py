"""What every modality does with `Masked` input, and with the tokens of what is not there."""

from typing import Any

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.types import Masked


def unmask(raw: Any) -> tuple[Any, Any]:
    """Splits a raw value into its array and its mask, or None."""
    return (raw.array, raw.mask) if isinstance(raw, Masked) else (raw, None)


def token_mask(mask: Any, shape: tuple[int, int]) -> jax.Array | None:
    """A mask over examples `(B,)` or over tokens `(B, L)` as one over tokens; None stays None."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    if mask.ndim == 1:
        mask = mask[:, None]
    if mask.shape[0] != shape[0] or mask.shape[1] not in (1, shape[1]):
        raise InputError(f"mask has shape {mask.shape}; expected (B,) or (B, L) for tokens of shape {shape}")
    return jnp.broadcast_to(mask, shape)


def hide(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeros where the mask is False: `(B, L, ...)`. Even a NaN in an absent modality goes no further."""
    return values if mask is None else jnp.where(mask[..., None], values, 0)
