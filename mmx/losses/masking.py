"""Masking: features of regions, frames and patches that were hidden. Survey 3.4."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mmx.losses.contrasting import similarity
from mmx.losses.scores import LOWEST, Scalar, cross_entropy, masked_mean


def region_labels(detected: Float[Array, "... C"]) -> Int[Array, "..."]:
    """The class that a detector found likeliest, 1..C-1; class 0 is the background (UNITER, arXiv 1909.11740, 3.2, MRC)."""
    return detected[..., 1:].argmax(-1) + 1


def regression_loss(
    predicted: Float[Array, "... D"], features: Float[Array, "... D"], huber: bool = False
) -> Float[Array, "..."]:
    """The mean squared distance of the numbers of a feature: `(..., D), (..., D) -> (...)` (UNITER's MRFR, HERO's MFFR).

    With `huber`, half the square up to a distance of 1, and the distance less 1/2 beyond (LXMERT, arXiv 1908.07490, 3.2).
    """
    predicted, features = predicted.astype(jnp.float32), features.astype(jnp.float32)
    each = optax.losses.huber_loss(predicted, features) if huber else jnp.square(predicted - features)
    return each.mean(-1)


def reconstruction_loss(
    predicted: Float[Array, "B L P"], pixels: Float[Array, "B L P"], removed: Bool[Array, "B L"], normalised: bool = False
) -> Float[Array, ""]:
    """The mean squared distance of the patches that were removed (MAE, arXiv 2111.06377, 3).

    With `normalised`, each patch is first brought to mean 0 and variance 1, of its P - 1 degrees of freedom.
    """
    pixels = normalised_each(pixels) if normalised else pixels.astype(jnp.float32)
    return masked_mean(jnp.square(predicted.astype(jnp.float32) - pixels).mean(-1), removed)


def normalised_each(x: Float[Array, "... P"]) -> Float[Array, "... P"]:
    """Each row of numbers with mean 0 and variance 1, of its P - 1 degrees of freedom."""
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)


def info_nce(
    queries: Float[Array, "N D"],
    keys: Float[Array, "M D"],
    labels: Int[Array, "N"],
    temperature: Scalar = 1.0,
    key_mask: Bool[Array, "M"] | None = None,
) -> Float[Array, "N"]:
    """Which of the keys belongs to a query: `(N, D), (M, D), (N,) -> (N,)` (CPC, arXiv 1807.03748, 2.3).

    Masked frames among what stood in all masked places and the other frames (HERO, arXiv 2005.00200, 3.2.2), or among all
    frames of the batch (UniVL, arXiv 2002.06353, 3.4).
    """
    logits = similarity(queries, keys, 1 / temperature)
    return cross_entropy(logits if key_mask is None else jnp.where(key_mask, logits, LOWEST), labels)


def sampled_nce(
    predicted: Float[Array, "... D"],
    target: Float[Array, "... D"],
    negatives: Float[Array, "... K D"],
    temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
    """Which feature was masked, that one or K others: `(..., D), (..., D), (..., K, D) -> (...)` (ViLBERT, 12-in-1)."""
    keys = jnp.concatenate([target[..., None, :], negatives], -2)
    logits = jnp.einsum("...d,...kd->...k", predicted, keys, preferred_element_type=jnp.float32) / temperature
    return cross_entropy(logits, jnp.zeros(logits.shape[:-1], jnp.int32))
