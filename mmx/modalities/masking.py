"""What every modality does with `Masked` input, with the tokens of what is not there, and with what training hides."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.types import Batch, Masked

WORDS = "words"  # ENTRY/words tells the word that each token of an entry belongs to; nobody embeds it


def modality_of(entry: str) -> str:
    """The modality that reads an entry of a batch: `text` for `text` and for `text/question`."""
    return entry.split("/")[0]


def unmask(raw: Any) -> tuple[Any, Any]:
    """Splits a raw value into its array and its mask, or None."""
    return (raw.array, raw.mask) if isinstance(raw, Masked) else (raw, None)


def ids_of(raw: Any) -> Any:
    """The ids of a raw value of `Ids`, whether or not other arrays stand beside them."""
    array, _ = unmask(raw)
    return array["ids"] if isinstance(array, Mapping) else array


def token_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """A mask over examples `(B,)` or over tokens `(B, L)` as one over tokens; None stays None."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    if mask.ndim == 1:
        mask = mask[:, None]
    if mask.shape[0] != shape[0] or mask.shape[1] not in (1, shape[1]):
        raise InputError(f"mask has shape {mask.shape}; expected (B,) or (B, L) for tokens of shape {shape}")
    return jnp.broadcast_to(mask, shape)


def shorter_mask(mask: Any, shape: tuple[int, ...], at: np.ndarray) -> tuple[jax.Array | None, jax.Array | None]:
    """A mask over `(B,)` or over what was put in, `(B, T)`, as one over that and one over the tokens made of it.

    `at (L,)` says for each token the place in T on which its existence hangs.
    """
    here = token_mask(mask, shape)
    return (None, None) if here is None else (here, here[:, at])


def drop_modalities(batch: Batch, names: Iterable[str], rate: float, key: jax.Array) -> Batch:
    """Hides each named modality of each example with probability `rate` (modality dropout), for training.

    A modality is hidden in all its entries (`text`, `text/question`). The last modality that an example has is never dropped,
    and one that it does not have stays absent.
    """
    entries = {name: [e for e in batch if modality_of(e) == name and not e.endswith(f"/{WORDS}")] for name in names}
    entries = {name: found for name, found in entries.items() if found}
    there = [functools.reduce(jnp.logical_or, [present(batch[e]) for e in found]) for found in entries.values()]
    here = jnp.stack(there, 1)  # (B, M)
    drawn = jax.random.uniform(key, here.shape)
    keep = here & (drawn >= rate)
    spared = jax.nn.one_hot(jnp.where(here, drawn, -1.0).argmax(1), len(entries), dtype=bool) & here
    keep = jnp.where(keep.any(1, keepdims=True), keep, spared)
    dropped = {}
    for i, found in enumerate(entries.values()):
        for entry in found:
            array, mask = unmask(batch[entry])
            kept = keep[:, i]
            mask = kept if mask is None else mask & kept.reshape(-1, *[1] * (mask.ndim - 1))
            dropped[entry] = Masked(array, mask)
    return {**batch, **dropped}


def present(raw: Any) -> jax.Array:
    """Which examples have any of a raw value: `(B,)`."""
    array, mask = unmask(raw)
    if mask is None:
        return jnp.ones(jax.tree.leaves(array)[0].shape[0], bool)
    return mask.reshape(mask.shape[0], -1).any(1)


def absent(raw: Any) -> Masked:
    """A raw value as one that no example has."""
    array, _ = unmask(raw)
    return Masked(array, jnp.zeros(jax.tree.leaves(array)[0].shape[0], bool))


def hide(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeros where the mask is False: `(B, L, ...)`. Even a NaN in an absent modality goes no further."""
    return values if mask is None else jnp.where(mask[..., None], values, 0)
