"""Alignment: which part of one belongs to which of the other. Survey 3.4, "matching", and 4.3."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmx.losses.scores import LOWEST, Rows, masked_mean


def grounding_loss(
    scores: Float[Array, "... R"], named: Float[Array, "... R"], mask: Bool[Array, "... R"] | None = None
) -> Float[Array, "..."]:
    """Which regions a phrase names: `(..., R), (..., R) -> (...)` (soft token alignment of MDETR, arXiv 2104.12763, 2.2).

    Args:
        scores: of a phrase and every region.
        named: which regions it names, or how surely; 0 everywhere: nothing is asked, and the loss is 0.
        mask: which regions exist.
    """
    scores = scores.astype(jnp.float32) if mask is None else jnp.where(mask, scores.astype(jnp.float32), LOWEST)
    named = named if mask is None else jnp.where(mask, named, 0)
    share = named / jnp.maximum(named.sum(-1, keepdims=True), 1e-12)
    return -jnp.where(share > 0, share * jax.nn.log_softmax(scores), 0).sum(-1)


def word_region_alignment_loss(
    distance: Float[Array, "B"], matched: Bool[Array, "B"], mask: Rows | None = None
) -> Float[Array, ""]:
    """Brings the tokens of what belongs together near and of what does not apart, by `transport_distance` (UNITER's WRA).

    The mean over the pairs that exist, by `mask (B,)` or their weights; 0 where there is none.
    """
    return masked_mean(jnp.where(matched, distance, -distance), jnp.ones(distance.shape) if mask is None else mask)


def cosine_cost(
    text: Float[Array, "B N D"], image: Float[Array, "B M D"], text_mask: Bool[Array, "B N"], image_mask: Bool[Array, "B M"]
) -> Float[Array, "B N M"]:
    """1 - cosine of every token of a text and every one of an image, 0 where one of them does not exist: `(B, N, M)`."""
    text, image = (x.astype(jnp.float32) for x in (text, image))
    text, image = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-5) for x in (text, image))
    return jnp.where(text_mask[:, :, None] & image_mask[:, None, :], 1 - jnp.einsum("bnd,bmd->bnm", text, image), 0)


def transport_plan(
    cost: Float[Array, "B N M"],
    text_mask: Bool[Array, "B N"],
    image_mask: Bool[Array, "B M"],
    beta: float = 0.5,
    iterations: int = 50,
) -> Float[Array, "B N M"]:
    """How much of each token of a text goes to each of an image where the way is cheapest: `(B, N, M)`, the sum of each 1.

    By proximal points (IPOT, arXiv 1802.04307, algorithm 1); a constant to the gradient.

    Args:
        cost: of each pair.
        text_mask: which tokens of the text exist, `(B, N)`; an equal share leaves each.
        image_mask: likewise of the image, `(B, M)`.
        beta: weight of a step's distance to the step before.
        iterations: how many steps.
    """
    both = text_mask[:, :, None] & image_mask[:, None, :]  # (B, N, M)
    kernel = jnp.where(both, jnp.exp(-jax.lax.stop_gradient(cost) / beta), 0)
    words, regions = (mask.sum(1, keepdims=True).astype(jnp.float32) for mask in (text_mask, image_mask))  # (B, 1)

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        plan, sigma = carry
        plan = plan * kernel
        delta = jnp.where(image_mask, 1 / (regions * jnp.einsum("bnm,bn->bm", plan, sigma)), 0)
        sigma = jnp.where(text_mask, 1 / (words * jnp.einsum("bnm,bm->bn", plan, delta)), 0)
        return sigma[:, :, None] * plan * delta[:, None, :], sigma

    start = both.astype(jnp.float32), jnp.where(text_mask, 1 / words, 0)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, iterations, step, start)[0])


def transport_distance(
    text: Float[Array, "B N D"],
    image: Float[Array, "B M D"],
    text_mask: Bool[Array, "B N"],
    image_mask: Bool[Array, "B M"],
    beta: float = 0.5,
    iterations: int = 50,
) -> Float[Array, "B"]:
    """How far the tokens of a text are from those of an image: the cosine distance along the cheapest plan of transport.

    UNITER (arXiv 1909.11740, 3.2) aligns words and regions by it. Arguments are those of `cosine_cost` and `transport_plan`.
    """
    cost = cosine_cost(text, image, text_mask, image_mask)
    return (cost * transport_plan(cost, text_mask, image_mask, beta, iterations)).sum((1, 2))
