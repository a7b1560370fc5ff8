"""Boxes: what is named in an image, as a set of boxes that nobody has put in an order. Survey 3.4, "matching".

A box is its centre and its size as shares of the image, `(x, y, width, height)`, or its corners `(x1, y1, x2, y2)`.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mmx.errors import InputError
from mmx.losses.scores import masked_mean

UNMATCHED = 0.1  # what a query counts that belongs to no box (DETR, arXiv 2005.12872, A.4)


def corners(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """The corners `(x1, y1, x2, y2)` of boxes that are told by centre and size, `(..., 4) -> (..., 4)`."""
    centre, half = boxes[..., :2].astype(jnp.float32), boxes[..., 2:].astype(jnp.float32) / 2
    return jnp.concatenate([centre - half, centre + half], -1)


def generalized_iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Intersection over union, less the share of the box around both that neither fills (arXiv 1902.09630, algorithm 1).

    -1..1, 1 for equal boxes; of corners `(..., 4), (..., 4) -> (...)`, each with x1 <= x2 and y1 <= y2.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def area(first: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.maximum(last - first, 0).prod(-1)

    own = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:])
    both = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    around = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    union = own - both
    return both / jnp.maximum(union, 1e-9) - (around - union) / jnp.maximum(around, 1e-9)


def set_assignment(cost: Float[Array, "B Q G"], mask: Bool[Array, "B G"] | None = None) -> Int[Array, "B G"]:
    """For each box the query that is its own where all together cost least, by the Hungarian algorithm: `(B, Q, G) -> (B, G)`.

    Boxes that do not exist, by `mask`, get one of the queries that are left over.

    Raises:
        InputError: fewer queries than boxes.
    """
    if cost.shape[1] < cost.shape[2]:
        raise InputError(f"{cost.shape[1]} queries for {cost.shape[2]} boxes, each of which wants one; give as many or more")
    cost = jax.lax.stop_gradient(cost) if mask is None else jnp.where(mask[:, None], jax.lax.stop_gradient(cost), 0)
    queries, boxes = jax.vmap(optax.assignment.hungarian_algorithm)(cost)
    return jnp.take_along_axis(queries, jnp.argsort(boxes, 1), 1)


def set_grounding_loss(
    logits: Float[Array, "B Q V"],
    predicted: Float[Array, "B Q 4"],
    named: Float[Array, "B G V"],
    boxes: Float[Array, "B G 4"],
    mask: Bool[Array, "B G"] | None = None,
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
) -> Float[Array, ""]:
    """Queries name words of a text and tell boxes, and each box is to be told by one of them (MDETR, arXiv 2104.12763, 2.2).

    The queries that are cheapest for the boxes, by the same three terms, are theirs; all others are to name nothing.

        sum over the queries of CE(named) (nothing: x 0.1) + 5 sum of |box - predicted| + 2 sum of (1 - generalised IoU), by boxes

    Args:
        logits: of each query and token of a text, the last one: nothing.
        predicted: its box, centre and size.
        named: how surely each token is what a box is named by, with sum 1.
        boxes: centre and size.
        mask: which boxes exist. Where there are none, all queries are to name nothing; the sum is divided by 1 at least.
        weights: of the three terms, in the loss and in the cost.
    """
    logits, predicted, named = (x.astype(jnp.float32) for x in (logits, predicted, named))
    mask = jnp.ones(boxes.shape[:2], bool) if mask is None else mask
    boxes = jnp.where(mask[..., None], boxes.astype(jnp.float32), 0)
    named = jnp.where(mask[..., None], named, 0)
    of_name, of_box, of_overlap = weights
    overlap = generalized_iou(corners(predicted)[:, :, None], corners(boxes)[:, None])
    apart = jnp.abs(predicted[:, :, None] - boxes[:, None]).sum(-1)
    cost = of_box * apart - of_overlap * overlap - of_name * jnp.einsum("bqv,bgv->bqg", jax.nn.softmax(logits), named)
    own = set_assignment(cost, mask)  # (B, G)
    rows = jnp.arange(len(own))[:, None]
    matched = jnp.zeros(logits.shape[:2], bool).at[rows, own].max(mask)
    nothing = jnp.zeros_like(logits).at[..., -1].set(1)
    target = jnp.where(matched[..., None], jnp.zeros_like(logits).at[rows, own].add(named), nothing)
    each = -(target * jax.nn.log_softmax(logits)).sum(-1) * jnp.where(matched, 1, UNMATCHED)

    def of_their_own(x: jax.Array) -> jax.Array:  # (B, Q, G) -> (B, G)
        return jnp.take_along_axis(x, own[:, None], 1)[:, 0]

    told = of_box * of_their_own(apart) + of_overlap * (1 - of_their_own(overlap))
    count = jnp.maximum(mask.sum(), 1)
    return of_name * each.sum() / count + masked_mean(told, mask)
