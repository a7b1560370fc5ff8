"""Of scores: classes, ids, answers, and how losses are brought together."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Scalar: TypeAlias = Float[Array, ""] | float
Rows: TypeAlias = Bool[Array, "B"] | Float[Array, "B"]  # which rows of a batch count, or how much each does; 0: it is not there
LOWEST = float(jnp.finfo(jnp.float32).min)


def masked_mean(values: Float[Array, "..."], weights: Array) -> Float[Array, ""]:
    """The mean of `values (...)` where the mask or weights `(...)` are not 0, by these weights; 0 where there is none."""
    weights = jnp.asarray(weights, jnp.float32)
    total = weights.sum()
    return jnp.where(weights != 0, values * weights, 0).sum() / jnp.where(total == 0, 1, total)


def cross_entropy(
    logits: Float[Array, "... V"], labels: Int[Array, "..."], label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Float[Array, "..."]:
    """Cross-entropy of each label: `(..., V), (...) -> (...)`. What a label outside of 0..V-1 gives is to be masked.

    Args:
        logits: scores.
        labels: ids or classes: masked words (BERT), visual codes (BEiT), the next word, matching or not, which sentence is next,
            the place of a frame (HERO), one of 9,500 answers (LXMERT).
        label_smoothing: e: the target is 1 - e on the label and e / V everywhere (arXiv 1512.00567, 7).
        z_loss: weight of the squared log of the softmax's normaliser, which keeps it from drifting (PaLM, arXiv 2204.02311, 5).
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(-1)
    return normalizer - target + (z_loss * jnp.square(normalizer) if z_loss else 0)


def chunked_cross_entropy(
    states: Float[Array, "B L D"],
    decode: Callable[[Array], Array],
    labels: Int[Array, "B L"],
    chunks: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """`cross_entropy` of scores that are never held at once, and the likeliest id of each token.

    The line of tokens is cut into pieces. The scores of one are made, read and forgotten, and made again in the backward
    pass: the memory is that of `(B, L / chunks, V)`.

    Args:
        states: what scores are made of.
        decode: `(B, l, D) -> (B, l, V)`.
        labels: ids.
        chunks: how many pieces; the last one is padded.
        label_smoothing, z_loss: those of `cross_entropy`.
    """
    batch, length = labels.shape
    piece = -(-length // chunks)

    def cut(x: jax.Array) -> jax.Array:  # (B, L, ...) -> (chunks, B, piece, ...)
        x = jnp.pad(x, [(0, 0), (0, chunks * piece - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, chunks, piece, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = decode(part[0])
        return cross_entropy(logits, part[1], label_smoothing, z_loss), logits.argmax(-1)

    parts = jax.lax.map(one, (cut(states), cut(labels)))
    losses, best = (x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in parts)
    return losses, best


def kl_divergence(logits: Float[Array, "... V"], target: Float[Array, "... V"]) -> Float[Array, "..."]:
    """How far the softmax of scores is from a distribution: `(..., V), (..., V) -> (...)`, sum of t (log t - log p).

    Masked region classification by what a detector saw (ViLBERT, arXiv 1908.02265, 3.2; UNITER's MRC-kl, InterBERT).
    """
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits.astype(jnp.float32)), target.astype(jnp.float32))


def binary_cross_entropy(logits: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, "..."]:
    """Each score a question of its own, `(...) -> (...)`; targets 0..1: the soft answers of VQA, regions that a phrase names."""
    return optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), jnp.asarray(target, jnp.float32))
