"""Losses: pure functions of float32 arrays. One function, one idea; each says its shapes and its source.

Those of tokens or examples return one number for each, `(...)`, in nats; `masked_mean` brings them together, by a mask or by
weights. Those that compare the examples of a batch with each other return the mean, and take a mask of the rows that count.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Scalar: TypeAlias = Float[Array, ""] | float
LOWEST = float(jnp.finfo(jnp.float32).min)


def masked_mean(values: Float[Array, "..."], weights: Array) -> Float[Array, ""]:
    """The mean of `values (...)` where the mask or weights `(...)` are not 0, by these weights; 0 where there is none."""
    weights = jnp.asarray(weights, jnp.float32)
    total = weights.sum()
    return jnp.where(weights != 0, values * weights, 0).sum() / jnp.where(total == 0, 1, total)


# Classes, ids and scores


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


# Masking: features of regions, frames and patches


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


# Matching: what belongs to what


def unit_vectors(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Vectors of length 1, `(..., E) -> (..., E)`; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def similarity(a: Float[Array, "N E"], b: Float[Array, "M E"], logit_scale: Scalar = 1.0) -> Float[Array, "N M"]:
    """The scaled dot product of every a with every b, `(N, E), (M, E) -> (N, M)` float32."""
    return logit_scale * jnp.einsum("ie,je->ij", a, b, preferred_element_type=jnp.float32)


def symmetric_cross_entropy(
    to_text: Float[Array, "B B"], to_image: Float[Array, "B B"] | None = None, mask: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """InfoNCE in both directions of scores whose diagonal holds the partners: `(B, B) -> ()`.

    Args:
        to_text: scores of image i and text j.
        to_image: scores of text i and image j, where they are others (FILIP); None: the same ones.
        mask: rows whose two sides both exist `(B,)`; the others are neither partners nor negatives. 0 if there is none.
    """
    mask = jnp.ones(len(to_text), bool) if mask is None else mask
    each = [
        jax.nn.logsumexp(jnp.where(mask, scores, LOWEST), axis=1) - jnp.diagonal(scores)
        for scores in (x.astype(jnp.float32) for x in (to_text, to_text.T if to_image is None else to_image))
    ]
    return masked_mean((each[0] + each[1]) / 2, mask)


def clip_loss(
    image: Float[Array, "B E"], text: Float[Array, "B E"], logit_scale: Scalar, mask: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """Symmetric InfoNCE over the batch: the partner of row i is row i, all other rows are negatives.

        (CE(image -> text) + CE(text -> image)) / 2        (CLIP, arXiv 2103.00020, figure 3)

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature, a positive scalar.
        mask: rows whose two sides both exist `(B,)`; the others are neither partners nor negatives. 0 if there is none.
    """
    return symmetric_cross_entropy(similarity(image, text, logit_scale), mask=mask)


def sigmoid_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    logit_scale: Scalar,
    logit_bias: Scalar,
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
    logits = similarity(image, text, logit_scale) + logit_bias  # (B, B)
    mask = jnp.ones(len(logits), bool) if mask is None else mask
    losses = -jax.nn.log_sigmoid(logits * (2 * jnp.eye(len(logits)) - 1))
    return masked_mean(jnp.where(mask[None, :], losses, 0).sum(1), mask)


def momentum_contrastive_loss(
    to_text: Float[Array, "B N"],
    to_image: Float[Array, "B N"],
    to_text_teacher: Float[Array, "B N"],
    to_image_teacher: Float[Array, "B N"],
    alpha: Scalar,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE whose targets are in part what a slowly moving teacher believes (ALBEF, arXiv 2107.07651, 3.2 and 3.3).

    The N keys are the teacher's vectors of the batch, in its order, and those of earlier batches in a queue behind them.

    Args:
        to_text: scores of images and texts `(B, N)`.
        to_image: scores of texts and images.
        to_text_teacher: the same scores by the teacher's images; no gradient.
        to_image_teacher: by its texts.
        alpha: share of the teacher in the targets; the rest is on the partner.
        mask: rows whose two sides both exist `(B,)`; the others are not asked, and their keys are masked by the caller.
    """

    def one(scores: jax.Array, teacher: jax.Array) -> jax.Array:
        believed = jax.nn.softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)))
        target = alpha * believed + (1 - alpha) * jnp.eye(len(scores), scores.shape[1])
        return -(target * jax.nn.log_softmax(scores.astype(jnp.float32))).sum(-1)

    each = (one(to_text, to_text_teacher) + one(to_image, to_image_teacher)) / 2
    return masked_mean(each, jnp.ones(len(each)) if mask is None else mask)


def mil_nce_loss(scores: Float[Array, "T C"], bag: int = 1, mask: Bool[Array, "T C"] | None = None) -> Float[Array, ""]:
    """A clip belongs to a bag of texts, of which one at least tells of it (MIL-NCE, arXiv 1912.06430, 3.2; as UniVL counts it).

        - log (sum over the bag / (sum over all texts of the clip, and over clips of other bags and its own texts)), of e^score

    Args:
        scores: of text i and clip j `(T, C)`. Each clip has T / C texts of its own, and they lie in the order of the clips.
        bag: clips of a bag, which follow each other: 1, or several, whose texts are one bag and of which the middle one is asked
            (UniVL).
        mask: which pairs exist; a clip without a text in its bag is not asked. 0 if no clip is.
    """
    scores = scores.astype(jnp.float32)
    texts, clips = scores.shape
    same = jnp.arange(texts)[:, None] // (texts // clips * bag) == jnp.arange(clips) // bag  # (T, C)
    there = jnp.ones(scores.shape, bool) if mask is None else mask
    inside = jnp.where(same & there, scores, LOWEST).T  # (C, T)
    outside = jnp.where(~same & there, scores, LOWEST)
    both = jnp.concatenate([inside, outside.T, outside.reshape(clips, -1)], 1)
    each = jax.nn.logsumexp(both, 1) - jax.nn.logsumexp(inside, 1)
    asked = slice(bag // 2, None, bag)
    return masked_mean(each[asked], (same & there).any(0)[asked])


def late_interaction(
    image: Float[Array, "B N E"],
    text: Float[Array, "C L E"],
    image_mask: Bool[Array, "B N"] | None = None,
    text_mask: Bool[Array, "C L"] | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "C B"]]:
    """Each token asks for its best match in the other, and the mean of these counts (FILIP, arXiv 2111.07783, 3.1).

    Returns:
        Scores of images and texts `(B, C)`, by the images' tokens, and of texts and images `(C, B)`, by the texts'.
    """
    image_mask = jnp.ones(image.shape[:2], bool) if image_mask is None else image_mask
    text_mask = jnp.ones(text.shape[:2], bool) if text_mask is None else text_mask
    each = jnp.einsum("bne,cle->bcnl", image, text, preferred_element_type=jnp.float32)
    there = image_mask[:, None, :, None] & text_mask[None, :, None, :]

    def mean_of_best(scores: jax.Array, there: jax.Array) -> jax.Array:  # (..., asking, asked)
        best = jnp.where(there, scores, LOWEST).max(-1)
        asking = there.any(-1)
        return jnp.where(asking, best, 0).sum(-1) / jnp.maximum(asking.sum(-1), 1)

    return mean_of_best(each, there), mean_of_best(each.swapaxes(2, 3), there.swapaxes(2, 3)).T


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
    to_text: Float[Array, "B B"], to_image: Float[Array, "B B"], margin: float = 0.1, mask: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """`ranking_loss` against every other row of the batch, in both directions, of scores whose diagonal holds the partners.

    Args:
        to_text: scores of image i and text j `(B, B)`.
        to_image: scores of text i and image j.
        margin: by how much a partner is to score more.
        mask: rows whose two sides both exist `(B,)`; the others are neither partners nor negatives. 0 if there are no two.
    """
    mask = jnp.ones(len(to_text), bool) if mask is None else mask
    pairs = mask[:, None] & mask & ~jnp.eye(len(mask), dtype=bool)
    forth, back = (ranking_loss(jnp.diagonal(scores)[:, None], scores, margin) for scores in (to_text, to_image))
    return masked_mean((forth + back) / 2, pairs)


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
    distance: Float[Array, "B"], matched: Bool[Array, "B"], mask: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """Brings the tokens of what belongs together near and of what does not apart, by `transport_distance` (UNITER's WRA).

    The mean over the pairs that exist, by `mask (B,)`; 0 where there is none.
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


# Distillation: what another model knows


def distillation_loss(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """How far the student's softened answers are from the teacher's: `(..., V), (..., V) -> (...)`, times temperature squared.

    arXiv 1503.02531, 2. The teacher's scores have no gradient.
    """
    target = jax.nn.softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)) / temperature)
    return temperature**2 * kl_divergence(student / temperature, target)


def cosine_distance(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
    """1 - cosine: `(..., D), (..., D) -> (...)`; distillation of features whose length does not matter (DistilBERT, EVA)."""
    return optax.losses.cosine_distance(a.astype(jnp.float32), b.astype(jnp.float32), epsilon=1e-6)


def attention_distillation_loss(
    student: Float[Array, "... L M"], teacher: Float[Array, "... L M"], mask: Bool[Array, "... L"] | None = None
) -> Float[Array, "..."]:
    """The mean divergence of rows of attention weights: `(..., L, M), (..., L, M) -> (...)` (MiniLM, arXiv 2002.10957, 3.1).

    Args:
        student: weights, rows with sum 1.
        teacher: weights; they have no gradient.
        mask: which rows exist.
    """
    student, teacher = jnp.maximum(student.astype(jnp.float32), 1e-12), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    rows = optax.losses.kl_divergence(jnp.log(student), teacher)
    mask = jnp.ones(rows.shape, bool) if mask is None else mask
    return jnp.where(mask, rows, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
