"""Contrastive losses over all pairs of a batch that is split over a mesh: gathered, and in a ring.

The matrix of scores of B images and B texts has B^2 numbers. Over n devices, the gathered form gives each device all vectors and
lets it score its own B / n rows: B^2 / n numbers. In a ring the texts of one device at a time pass by, with what has been
found out about them so far, and go on to the neighbour; after n steps they are home:

    step 0:   device 0 scores texts 0     device 1 scores texts 1     device 2 scores texts 2
    step 1:   device 0 scores texts 2     device 1 scores texts 0     device 2 scores texts 1
    step 2:   device 0 scores texts 1     device 1 scores texts 2     device 2 scores texts 0

A block of scores is made, read and forgotten, and made again in the backward pass, so that memory is that of one block and of
the device's own vectors, however many devices and blocks there are. These two forms and the dense one of `mmx.losses` are the
same number with the same gradient.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmx.errors import InputError, unknown
from mmx.losses import LOWEST, clip_loss, masked_mean, sigmoid_loss, similarity
from mmx.parallel.mesh import batch_axes

FORMS = ("dense", "gather", "ring")
BLOCK = 1024  # most rows of a block of scores

Side: TypeAlias = tuple[jax.Array, jax.Array, Any]  # vectors (b, E), which exist (b,), what is known of each (b,)


class Pairs(NamedTuple):
    """What is found out from blocks of scores `(r, c)`, of which `both (r, c)` exist and `partner (r, c)` belong together.

    Args:
        start: what is known of a row or column before any block: one number or several.
        block: `(scores, partner, both) -> (of rows, of columns)`: what a block adds to it.
        join: of what is known and what a block adds: what is known.
        total: `(rows, columns, scores of partners) -> (b,)`: what it comes to for each row in the end.
        pull: `(scores, partner, rows (r, 1), columns (c,), of_rows (r, 1), of_columns (c,)) -> (r, c)`: the derivative by each
            score, from those by what is known of its row and column; None: there is none.
    """

    start: Any
    block: Callable[..., tuple[Any, Any]]
    join: Callable[..., Any]
    total: Callable[..., Any]
    pull: Callable[..., jax.Array] | None = None


def _normalizers(scores: jax.Array, partner: jax.Array, both: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = jnp.where(both, scores, LOWEST)
    return jax.nn.logsumexp(scores, 1), jax.nn.logsumexp(scores, 0)


def _questions(scores: jax.Array, partner: jax.Array, both: jax.Array) -> tuple[jax.Array, jax.Array]:
    each = jnp.where(both, jax.nn.softplus(jnp.where(partner, -scores, scores)), 0)
    return each.sum(1), jnp.zeros(scores.shape[1])


SOFTMAX = Pairs(
    LOWEST,
    _normalizers,
    jnp.logaddexp,
    lambda rows, columns, partners: (rows + columns) / 2 - partners,
    lambda scores, partner, rows, columns, of_rows, of_columns: (
        jnp.exp(scores - rows) * of_rows + jnp.exp(scores - columns) * of_columns
    ),
)
SIGMOID = Pairs(
    0.0,
    _questions,
    jnp.add,
    lambda rows, columns, partners: rows,
    lambda scores, partner, rows, columns, of_rows, of_columns: (jax.nn.sigmoid(scores) - partner) * of_rows,
)


def _best(scores: jax.Array, partner: jax.Array, both: jax.Array) -> tuple[Any, Any]:
    """Of rows and of columns: the highest score but the partner's, and the partner's."""
    others, own = jnp.where(both & ~partner, scores, LOWEST), jnp.where(both & partner, scores, 0)
    return (others.max(1), own.sum(1)), (others.max(0), own.sum(0))


BEST = Pairs(
    (LOWEST, 0.0),
    _best,
    lambda known, new: (jnp.maximum(known[0], new[0]), known[1] + new[1]),
    lambda rows, columns, partners: tuple((own > best).astype(jnp.float32) for best, own in (rows, columns)),
)


def contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    logit_scale: Any,
    logit_bias: Any = None,
    mask: jax.Array | None = None,
    form: str = "dense",
    block: int = BLOCK,
    axes: Sequence[str] | None = None,
) -> jax.Array:
    """`clip_loss` or, with a bias, `sigmoid_loss` of rows that are split over a mesh.

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature.
        logit_bias: what a sigmoid loss adds to every score; None: softmax.
        mask: rows whose two sides both exist, or their weights `(B,)`.
        form: dense (XLA divides the matrix of all scores), gather or ring. All are the same number.
        block: most rows of scores that the ring makes at a time.
        axes: of the current mesh, those that rows are split over, for gather and ring; None: mmx's own of the batch.

    Raises:
        InputError: an unknown form or axis, or rows that the devices do not divide.
    """
    _check_form(form)
    if form == "dense":
        if logit_bias is None:
            return clip_loss(image, text, logit_scale, mask)
        return sigmoid_loss(image, text, logit_scale, logit_bias, mask)
    kind = SOFTMAX if logit_bias is None else SIGMOID
    scale, bias = (jnp.asarray(0 if x is None else x, jnp.float32) for x in (logit_scale, logit_bias))
    mask = jnp.ones(len(image), bool) if mask is None else jnp.asarray(mask)
    image, text = (x.astype(jnp.float32) for x in (image, text))  # a partner's share of the gradient nearly cancels the others'
    each = _each(kind, image, text, scale, bias, mask != 0, form, block, batch_axes(len(image), axes))
    return masked_mean(jnp.where(mask != 0, each, 0), mask)


def recall(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """How often the partner, on the diagonal of `(B, B)`, scores more than any other of its row; `mask (B,)`: who exists."""
    (best, own), _ = _best(scores, jnp.eye(len(scores), dtype=bool), mask[:, None] & mask)
    return masked_mean((own > best).astype(jnp.float32), mask)


def contrastive_recall(
    image: jax.Array,
    text: jax.Array,
    mask: jax.Array,
    form: str = "dense",
    block: int = BLOCK,
    axes: Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`recall` of images' texts and of texts' images, without a gradient. Arguments are those of `contrastive_loss`, mask a bool.

    Gathered or in a ring, scores are made once more: a fifth matrix product beside the four of the ring's loss and gradient.
    """
    _check_form(form)
    image, text = jax.lax.stop_gradient((image, text))
    if form == "dense":
        scores = similarity(image, text)
        return recall(scores, mask), recall(scores.T, mask)
    scale, bias = jnp.float32(1), jnp.float32(0)
    forth, back = _each(BEST, image, text, scale, bias, mask, form, block, batch_axes(len(image), axes))
    return masked_mean(forth, mask), masked_mean(back, mask)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise InputError("contrastive: " + unknown("form", form, FORMS))


def _each(
    kind: Pairs,
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    there: jax.Array,
    form: str,
    block: int,
    axes: tuple[str, ...],
) -> Any:
    """What the scores come to for each row, `(B,)`."""
    whole: Any = _gathered if form == "gather" else _ring
    rows, columns = whole(kind, block, axes, image, text, scale, bias, there)
    partners = scale * jnp.einsum("ie,ie->i", image, text, preferred_element_type=jnp.float32) + bias
    return kind.total(rows, columns, partners)


def _gathered(
    kind: Pairs,
    block: int,
    axes: tuple[str, ...],
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    there: jax.Array,
) -> tuple[Any, Any]:
    """What is known of all rows and columns; each device scores its own against all."""

    def local(image: jax.Array, text: jax.Array, there: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        size = len(image)
        images, texts, all_there = (jax.lax.all_gather(x, axes, tiled=True) if axes else x for x in (image, text, there))
        partner = _own_rows(size, axes)[:, None] == jnp.arange(len(texts))
        both = there[:, None] & all_there
        rows, _ = kind.block(similarity(image, texts, scale) + bias, partner, both)
        columns, _ = kind.block(similarity(text, images, scale) + bias, partner, both)
        return rows, columns

    return _on_shards(local, "bbb..", "bb", axes)(image, text, there, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(
    kind: Pairs,
    block: int,
    axes: tuple[str, ...],
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    there: jax.Array,
) -> tuple[Any, Any]:
    """What is known of all rows and columns."""

    def local(image: jax.Array, text: jax.Array, there: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        def visit(home: bool, rows: Any, guest: Side) -> tuple[Any, Side]:
            texts, there_too, columns = guest

            def one(columns: Any, part: tuple[Any, ...]) -> tuple[Any, Any]:
                images, here, rows, number = part
                partner = home & (number[:, None] == jnp.arange(len(texts)))
                found = kind.block(similarity(images, texts, scale) + bias, partner, here[:, None] & there_too)
                return kind.join(columns, found[1]), kind.join(rows, found[0])

            columns, rows = _by_blocks(one, columns, (image, there, rows, jnp.arange(len(image))), block)
            return rows, (texts, there_too, columns)

        start = jax.tree.map(lambda x: jnp.full(len(image), x), kind.start)
        rows, (_, _, columns) = _around(visit, start, (text, there, start), axes)
        return rows, columns

    return _on_shards(local, "bbb..", "bb", axes)(image, text, there, scale, bias)


def _ring_forward(kind: Pairs, block: int, axes: tuple[str, ...], *given: jax.Array) -> tuple[Any, Any]:
    known = _ring(kind, block, axes, *given)
    return known, (*given, known)


def _ring_backward(kind: Pairs, block: int, axes: tuple[str, ...], saved: Any, cotangents: Any) -> tuple[Any, ...]:
    def local(
        image: jax.Array, text: jax.Array, there: jax.Array, rows: Any, columns: Any, scale: jax.Array, bias: jax.Array
    ) -> Any:
        def visit(home: bool, mine: Any, guest: Any) -> tuple[Any, Any]:
            (texts, there_too, columns), of_texts = guest
            of_images, of_scale, of_bias = mine

            def one(carry: Any, part: tuple[Any, ...]) -> tuple[Any, jax.Array]:
                of_texts, of_scale, of_bias = carry
                images, here, rows, number, of_images = part
                cosine = similarity(images, texts)
                partner = home & (number[:, None] == jnp.arange(len(texts)))
                (row, of_row), (column, of_column) = (x[:, None] for x in rows), columns
                pull = kind.pull(scale * cosine + bias, partner, row, column, of_row, of_column)  # type: ignore[misc]
                pull = jnp.where(here[:, None] & there_too, pull, 0)
                of_texts += scale * jnp.einsum("ij,ie->je", pull, images, preferred_element_type=jnp.float32)
                of_images += scale * jnp.einsum("ij,je->ie", pull, texts, preferred_element_type=jnp.float32)
                return (of_texts, of_scale + (pull * cosine).sum(), of_bias + pull.sum()), of_images

            parts = (image, there, rows, jnp.arange(len(image)), of_images)
            (of_texts, *rest), of_images = _by_blocks(one, (of_texts, of_scale, of_bias), parts, block)
            return (of_images, *rest), ((texts, there_too, columns), of_texts)

        zero, nothing = jnp.zeros(image.shape, jnp.float32), jnp.float32(0)
        mine, (_, of_texts) = _around(visit, (zero, nothing, nothing), ((text, there, columns), zero), axes)
        of_images, of_scale, of_bias = mine
        return of_images, of_texts, jax.lax.psum(of_scale, axes), jax.lax.psum(of_bias, axes)

    image, text, scale, bias, there, known = saved
    rows, columns = zip(known, cotangents, strict=True)  # each with the derivative by it
    of_image, of_text, *rest = _on_shards(local, "bbbbb..", "bb..", axes)(image, text, there, rows, columns, scale, bias)
    return of_image.astype(image.dtype), of_text.astype(text.dtype), *rest, None


_ring.defvjp(_ring_forward, _ring_backward)


def _around(visit: Callable[..., tuple[Any, Any]], mine: Any, guest: Any, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """Lets every device's `guest` visit all devices, `visit(home, mine, guest) -> (mine, guest)`, and come home."""
    count = math.prod(jax.lax.axis_size(axis) for axis in axes)

    def step(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        mine, guest = visit(number == 0, *carry)
        if count > 1:
            guest = jax.lax.ppermute(guest, axes, [(i, (i + 1) % count) for i in range(count)])
        return mine, guest

    return jax.lax.fori_loop(0, count, step, (mine, guest))


def _by_blocks(one: Callable[..., tuple[Any, Any]], carry: Any, rows: Any, block: int) -> tuple[Any, Any]:
    """Scans `one(carry, part) -> (carry, part)` over blocks of rows, the last of which may be a shorter one."""
    size = len(jax.tree.leaves(rows)[0])
    count, whole = size // block, size // block * block
    outs = []
    if count:
        parts = jax.tree.map(lambda x: x[:whole].reshape(count, block, *x.shape[1:]), rows)
        carry, out = jax.lax.scan(one, carry, parts)
        outs.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out))
    if size > whole:
        carry, out = one(carry, jax.tree.map(lambda x: x[whole:], rows))
        outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *outs)


def _own_rows(size: int, axes: tuple[str, ...]) -> jax.Array:
    """The numbers of this device's rows among all, `(size,)`."""
    return (jax.lax.axis_index(axes) if axes else 0) * size + jnp.arange(size)


def _on_shards(local: Callable[..., Any], inputs: str, outputs: str, axes: tuple[str, ...]) -> Callable[..., Any]:
    """Runs `local` on every device's part of what is marked "b", rows of the batch, and on the whole of what is marked "."."""
    if not axes:
        return local
    spec = {"b": PartitionSpec(axes), ".": PartitionSpec()}
    ins, outs = (tuple(spec[mark] for mark in marks) for marks in (inputs, outputs))
    return jax.shard_map(local, in_specs=ins, out_specs=outs, check_vma=False)
