"""Contrasting: which of the batch belongs to this. Survey 3.4, "matching"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmx.losses.scores import LOWEST, Rows, Scalar, masked_mean
from mmx.parallel.mesh import batch_parts

TOKEN_SCORES = 2**24  # most scores of tokens that `late_interaction` makes at a time: 64 MiB


def unit_vectors(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Vectors of length 1, `(..., E) -> (..., E)`; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def similarity(a: Float[Array, "N E"], b: Float[Array, "M E"], logit_scale: Scalar = 1.0) -> Float[Array, "N M"]:
    """The scaled dot product of every a with every b, `(N, E), (M, E) -> (N, M)` float32."""
    return logit_scale * jnp.einsum("ie,je->ij", a, b, preferred_element_type=jnp.float32)


def symmetric_cross_entropy(
    to_text: Float[Array, "B B"], to_image: Float[Array, "B B"] | None = None, mask: Rows | None = None
) -> Float[Array, ""]:
    """InfoNCE in both directions of scores whose diagonal holds the partners: `(B, B) -> ()`.

    Args:
        to_text: scores of image i and text j.
        to_image: scores of text i and image j, where they are others (FILIP); None: the same ones.
        mask: rows whose two sides both exist, or their weights `(B,)`; the others are neither partners nor negatives. 0 if
            there is none.
    """
    mask = jnp.ones(len(to_text), bool) if mask is None else jnp.asarray(mask)
    each = [
        jax.nn.logsumexp(jnp.where(mask != 0, scores, LOWEST), axis=1) - jnp.diagonal(scores)
        for scores in (x.astype(jnp.float32) for x in (to_text, to_text.T if to_image is None else to_image))
    ]
    return masked_mean((each[0] + each[1]) / 2, mask)


def clip_loss(
    image: Float[Array, "B E"], text: Float[Array, "B E"], logit_scale: Scalar, mask: Rows | None = None
) -> Float[Array, ""]:
    """Symmetric InfoNCE over the batch: the partner of row i is row i, all other rows are negatives.

        (CE(image -> text) + CE(text -> image)) / 2        (CLIP, arXiv 2103.00020, figure 3)

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature, a positive scalar.
        mask: rows whose two sides both exist, or their weights `(B,)`; the others are neither partners nor negatives. 0 if
            there is none.
    """
    return symmetric_cross_entropy(similarity(image, text, logit_scale), mask=mask)


def sigmoid_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    logit_scale: Scalar,
    logit_bias: Scalar,
    mask: Rows | None = None,
) -> Float[Array, ""]:
    """Every pair of the batch is a question of its own: does this text belong to that image? (SigLIP, arXiv 2303.15343, 3.2)

        - mean over i of sum over j of log sigmoid(z_ij (t x_i y_j + b)), z_ij = 1 where i = j, else -1

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature t, a positive scalar.
        logit_bias: what is added to every similarity, b.
        mask: rows whose two sides both exist, or their weights `(B,)`; the others ask nothing. 0 if there is none.
    """
    logits = similarity(image, text, logit_scale) + logit_bias  # (B, B)
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask)
    losses = -jax.nn.log_sigmoid(logits * (2 * jnp.eye(len(logits)) - 1))
    return masked_mean(jnp.where(mask != 0, losses, 0).sum(1), mask)


def momentum_contrastive_loss(
    to_text: Float[Array, "B N"],
    to_image: Float[Array, "B N"],
    to_text_teacher: Float[Array, "B N"],
    to_image_teacher: Float[Array, "B N"],
    alpha: Scalar,
    mask: Rows | None = None,
) -> Float[Array, ""]:
    """InfoNCE whose targets are in part what a slowly moving teacher believes (ALBEF, arXiv 2107.07651, 3.2 and 3.3).

    The N keys are the teacher's vectors of the batch, in its order, and those of earlier batches in a queue behind them.

    Args:
        to_text: scores of images and texts `(B, N)`.
        to_image: scores of texts and images.
        to_text_teacher: the same scores by the teacher's images; no gradient.
        to_image_teacher: by its texts.
        alpha: share of the teacher in the targets; the rest is on the partner.
        mask: rows whose two sides both exist, or their weights `(B,)`; the others are not asked, and their keys are masked by the
            caller.
    """

    def one(scores: jax.Array, teacher: jax.Array) -> jax.Array:
        believed = jax.nn.softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)))
        target = alpha * believed + (1 - alpha) * jnp.eye(len(scores), scores.shape[1])
        return -(target * jax.nn.log_softmax(scores.astype(jnp.float32))).sum(-1)

    each = (one(to_text, to_text_teacher) + one(to_image, to_image_teacher)) / 2
    return masked_mean(each, jnp.ones(len(each)) if mask is None else mask)


def mil_nce_loss(
    scores: Float[Array, "T C"], bag: int = 1, mask: Bool[Array, "T C"] | Float[Array, "T C"] | None = None
) -> Float[Array, ""]:
    """A clip belongs to a bag of texts, of which one at least tells of it (MIL-NCE, arXiv 1912.06430, 3.2; as UniVL counts it).

        - log (sum over the bag / (sum over all texts of the clip, and over clips of other bags and its own texts)), of e^score

    Args:
        scores: of text i and clip j `(T, C)`. Each clip has T / C texts of its own, and they lie in the order of the clips.
        bag: clips of a bag, which follow each other: 1, or several, whose texts are one bag and of which the middle one is asked
            (UniVL).
        mask: which pairs exist, or their weights: a clip counts by the largest of its pairs in its bag, and one without a text
            there is not asked. 0 if no clip is.
    """
    scores = scores.astype(jnp.float32)
    texts, clips = scores.shape
    same = jnp.arange(texts)[:, None] // (texts // clips * bag) == jnp.arange(clips) // bag  # (T, C)
    mask = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask)
    inside = jnp.where(same & (mask != 0), scores, LOWEST).T  # (C, T)
    outside = jnp.where(~same & (mask != 0), scores, LOWEST)
    both = jnp.concatenate([inside, outside.T, outside.reshape(clips, -1)], 1)
    each = jax.nn.logsumexp(both, 1) - jax.nn.logsumexp(inside, 1)
    asked = slice(bag // 2, None, bag)
    return masked_mean(each[asked], jnp.where(same, mask, 0).max(0)[asked])


def late_interaction(
    image: Float[Array, "B N E"],
    text: Float[Array, "C L E"],
    image_mask: Bool[Array, "B N"] | None = None,
    text_mask: Bool[Array, "C L"] | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "C B"]]:
    """Each token asks for its best match in the other, and the mean of these counts (FILIP, arXiv 2111.07783, 3.1).

    The scores of all tokens of a block of images are made, read and forgotten, and made again in the backward pass: the memory is
    that of `(block, C, N, L)`.

    Args:
        image: unit vectors of tokens.
        text: likewise.
        image_mask: which exist.
        text_mask: likewise.
        block: images of a block, on each device that the batch is split over; None: as many as have `TOKEN_SCORES` scores.

    Returns:
        Scores of images and texts `(B, C)`, by the images' tokens, and of texts and images `(C, B)`, by the texts'.
    """
    image_mask = jnp.ones(image.shape[:2], bool) if image_mask is None else image_mask
    text_mask = jnp.ones(text.shape[:2], bool) if text_mask is None else text_mask
    rows, size = len(image), image.shape[1] * text_mask.size  # scores of an image
    block = max(TOKEN_SCORES // max(size, 1), 1) if block is None else block
    blocks = -(-rows // (block * batch_parts(jax.sharding.get_abstract_mesh())))

    def mean_of_best(scores: jax.Array, there: jax.Array) -> jax.Array:  # (..., asking, asked)
        best = jnp.where(there, scores, LOWEST).max(-1)
        asking = there.any(-1)
        return jnp.where(asking, best, 0).sum(-1) / jnp.maximum(asking.sum(-1), 1)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:  # (b, N, E), (b, N) -> (b, C), (b, C)
        each = jnp.einsum("bne,cle->bcnl", part[0], text, preferred_element_type=jnp.float32)
        there = part[1][:, None, :, None] & text_mask[None, :, None, :]
        return mean_of_best(each, there), mean_of_best(each.swapaxes(2, 3), there.swapaxes(2, 3))

    def cut(x: jax.Array) -> jax.Array:  # (B, ...) -> (blocks, b, ...): every device has some rows of each block
        x = jnp.pad(x, [(0, -rows % blocks)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1)

    if blocks <= 1:
        to_text, to_image = one((image, image_mask))
    else:
        parts = jax.lax.map(jax.checkpoint(one), (cut(image), cut(image_mask)))
        to_text, to_image = (x.swapaxes(0, 1).reshape(-1, len(text))[:rows] for x in parts)
    return to_text, to_image.T


def hard_negatives(scores: Float[Array, "B B"], key: jax.Array, mask: Bool[Array, "B"] | None = None) -> Int[Array, "B"]:
    """For each row another column, the likelier the higher its score: `(B, B) -> (B,)` (ALBEF, arXiv 2107.07651, 3.2).

    Columns that do not exist are never chosen. A row that has no other column gets its own.
    """
    mask = jnp.ones(len(scores), bool) if mask is None else mask
    allowed = mask & ~jnp.eye(len(scores), dtype=bool)
    chosen = jax.random.categorical(key, jnp.where(allowed, jax.lax.stop_gradient(scores), LOWEST))
    return jnp.where(allowed.any(1), chosen, jnp.arange(len(scores)))


def ranking_loss(positive: Float[Array, "..."], negative: Float[Array, "..."], margin: float = 0.1) -> Float[Array, "..."]:
    """By how much a wrong pair's score comes closer to the right one's than `margin`: `(...) -> (...)`.

    Whole subtitles and videos in HERO's VSM (arXiv 2005.00200, 3.2.3).
    """
    return jnp.maximum(margin + negative.astype(jnp.float32) - positive.astype(jnp.float32), 0)


def batch_ranking_loss(
    to_text: Float[Array, "B B"], to_image: Float[Array, "B B"], margin: float = 0.1, mask: Rows | None = None
) -> Float[Array, ""]:
    """`ranking_loss` against every other row of the batch, in both directions, of scores whose diagonal holds the partners.

    Args:
        to_text: scores of image i and text j `(B, B)`.
        to_image: scores of text i and image j.
        margin: by how much a partner is to score more.
        mask: rows whose two sides both exist, or their weights `(B,)`; the others are neither partners nor negatives. 0 if there
            are no two.
    """
    mask = jnp.ones(len(to_text), bool) if mask is None else jnp.asarray(mask)
    others = (mask != 0) & ~jnp.eye(len(mask), dtype=bool)
    forth, back = (ranking_loss(jnp.diagonal(scores)[:, None], scores, margin) for scores in (to_text, to_image))
    return masked_mean((forth + back) / 2, jnp.where(others, mask[:, None], 0))
