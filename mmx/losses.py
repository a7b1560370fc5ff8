"""Losses: pure functions of float32 arrays. One function, one idea; each says its shapes and its source."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def clip_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    logit_scale: Float[Array, ""] | float,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE over the batch: the partner of row i is row i, all other rows are negatives.

        (CE(image -> text) + CE(text -> image)) / 2        (CLIP, arXiv 2103.00020, figure 3)

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature, a positive scalar.
        mask: rows whose two sides both exist `(B,)`; the others are neither partners nor negatives. 0 if there is none.
    """
    logits = logit_scale * jnp.einsum("ie,je->ij", image, text, preferred_element_type=jnp.float32)  # (B, B)
    diagonal = jnp.diagonal(logits)
    mask = jnp.ones(diagonal.shape, bool) if mask is None else mask
    lowest = jnp.finfo(jnp.float32).min
    rows = jax.nn.logsumexp(jnp.where(mask[None, :], logits, lowest), axis=1) - diagonal
    columns = jax.nn.logsumexp(jnp.where(mask[:, None], logits, lowest), axis=0) - diagonal
    return masked_mean((rows + columns) / 2, mask)


def sigmoid_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    logit_scale: Float[Array, ""] | float,
    logit_bias: Float[Array, ""] | float,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Every pair of the batch is a question of its own: does this text belong to that image? (SigLIP, arXiv 2303.15343, 3.2)

        - mean over i of sum over j of log sigmoid(z_ij (t x_i y_j + b)), z_ij = 1 where i = j, else -1

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature t, a positive scalar.
        logit_bias: what is added to every similarity, b.
        mask: rows whose two sides both exist `(B,)`; the others ask nothing. 0 if there is none.
    """
    logits = logit_scale * jnp.einsum("ie,je->ij", image, text, preferred_element_type=jnp.float32) + logit_bias  # (B, B)
    mask = jnp.ones(len(logits), bool) if mask is None else mask
    losses = -jax.nn.log_sigmoid(logits * (2 * jnp.eye(len(logits)) - 1))
    return masked_mean(jnp.where(mask[None, :], losses, 0).sum(1), mask)


def cross_entropy(logits: Float[Array, "... V"], labels: Int[Array, "..."], label_smoothing: float = 0.0) -> Float[Array, "..."]:
    """Cross-entropy of each label, in nats: `(..., V), (...) -> (...)`.

    With `label_smoothing` e, the target is 1 - e on the label and e / V everywhere (arXiv 1512.00567, 7).
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(-1)
    return normalizer - target


def reconstruction_loss(
    predicted: Float[Array, "B L P"], pixels: Float[Array, "B L P"], removed: Bool[Array, "B L"], normalised: bool = False
) -> Float[Array, ""]:
    """The mean squared distance of the patches that were removed (MAE, arXiv 2111.06377, 3).

    With `normalised`, each patch is first brought to mean 0 and variance 1, of its P - 1 degrees of freedom.
    """
    if normalised:
        variance = pixels.var(-1, keepdims=True, ddof=1)
        pixels = (pixels - pixels.mean(-1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-6)
    return masked_mean(jnp.square(predicted - pixels).mean(-1), removed)


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """The mean over the entries where `mask` is True; 0 where there is none."""
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def transport_distance(
    text: Float[Array, "B N D"],
    image: Float[Array, "B M D"],
    text_mask: Bool[Array, "B N"],
    image_mask: Bool[Array, "B M"],
    beta: float = 0.5,
    iterations: int = 50,
) -> Float[Array, "B"]:
    """How far the tokens of a text are from those of an image: the cosine distance along the cheapest plan of transport.

    The plan is found by proximal points (IPOT, arXiv 1802.04307, algorithm 1) and is a constant to the gradient; UNITER
    (arXiv 1909.11740, 3.2) aligns words and regions by it.

    Args:
        text: `(B, N, D)`.
        image: `(B, M, D)`.
        text_mask: which tokens of the text exist, `(B, N)`; the plan moves an equal share to each.
        image_mask: likewise of the image, `(B, M)`.
        beta: weight of a step's distance to the step before.
        iterations: how many steps.

    Returns:
        `(B,)`.
    """
    unit_text, unit_image = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-5) for x in (text, image))
    both = text_mask[:, :, None] & image_mask[:, None, :]  # (B, N, M)
    cost = jnp.where(both, 1 - jnp.einsum("bnd,bmd->bnm", unit_text, unit_image), 0)
    kernel = jnp.where(both, jnp.exp(-jax.lax.stop_gradient(cost) / beta), 0)
    words, regions = (mask.sum(1, keepdims=True).astype(jnp.float32) for mask in (text_mask, image_mask))  # (B, 1)

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        plan, sigma = carry
        plan = plan * kernel
        delta = jnp.where(image_mask, 1 / (regions * jnp.einsum("bnm,bn->bm", plan, sigma)), 0)
        sigma = jnp.where(text_mask, 1 / (words * jnp.einsum("bnm,bm->bn", plan, delta)), 0)
        return sigma[:, :, None] * plan * delta[:, None, :], sigma

    start = both.astype(jnp.float32), jnp.where(text_mask, 1 / words, 0)
    plan, _ = jax.lax.fori_loop(0, iterations, step, start)
    return (cost * jax.lax.stop_gradient(plan)).sum((1, 2))
