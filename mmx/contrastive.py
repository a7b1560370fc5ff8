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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmx.errors import InputError, unknown
from mmx.losses import LOWEST, clip_loss, sigmoid_loss, similarity
from mmx.parallel.mesh import RULES

FORMS = ("dense", "gather", "ring")
BLOCK = 1024  # most rows of a block of scores

Side: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # vectors (b, E), which exist (b,), what is known of each (b,)


class Pairs(NamedTuple):
    """What a loss makes of a block of scores `(r, c)`, of which `both (r, c)` exist and `partner (r, c)` belong together.

    Args:
        start: what is known of a row or column before any block.
        block: `(scores, partner, both) -> (of rows, of columns)`: what a block adds to it.
        join: of what is known and what a block adds: what is known.
        total: `(rows, columns, scores of partners) -> (b,)`: what a row adds to the loss in the end.
        pull: `(scores, partner, rows (r, 1), columns (1, c)) -> (r, c)`: the loss's derivative by each score.
    """

    start: float
    block: Callable[..., tuple[jax.Array, jax.Array]]
    join: Callable[..., jax.Array]
    total: Callable[..., jax.Array]
    pull: Callable[..., jax.Array]


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
    lambda scores, partner, rows, columns: (jnp.exp(scores - rows) + jnp.exp(scores - columns)) / 2 - partner,
)
SIGMOID = Pairs(
    0.0,
    _questions,
    jnp.add,
    lambda rows, columns, partners: rows,
    lambda scores, partner, rows, columns: jax.nn.sigmoid(scores) - partner,
)


def contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    logit_scale: Any,
    logit_bias: Any = None,
    mask: jax.Array | None = None,
    form: str = "dense",
    block: int = BLOCK,
) -> jax.Array:
    """`clip_loss` or, with a bias, `sigmoid_loss` of rows that are split over the mesh's axes of the batch.

    Args:
        image: unit vectors `(B, E)`.
        text: unit vectors `(B, E)`.
        logit_scale: the inverse temperature.
        logit_bias: what a sigmoid loss adds to every score; None: softmax.
        mask: rows whose two sides both exist `(B,)`.
        form: dense (XLA divides the matrix of all scores), gather or ring. All are the same number.
        block: most rows of scores that the ring makes at a time.
    """
    if form not in FORMS:
        raise InputError("contrastive: " + unknown("form", form, FORMS))
    if form == "dense":
        if logit_bias is None:
            return clip_loss(image, text, logit_scale, mask)
        return sigmoid_loss(image, text, logit_scale, logit_bias, mask)
    kind = SOFTMAX if logit_bias is None else SIGMOID
    scalars = [jnp.asarray(0 if x is None else x, jnp.float32) for x in (logit_scale, logit_bias)]
    mask = jnp.ones(len(image), bool) if mask is None else mask
    whole: Any = _gathered if form == "gather" else _ring
    return whole(kind, block, image, text, *scalars, mask) / jnp.maximum(mask.sum(), 1)


def _gathered(
    kind: Pairs, block: int, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array
) -> jax.Array:
    """The sum over all rows; each device scores its own against all."""

    def local(image: jax.Array, text: jax.Array, mask: jax.Array, scale: jax.Array, bias: jax.Array, axes: Any) -> jax.Array:
        size = len(image)
        images, texts, there = (jax.lax.all_gather(x, axes, tiled=True) if axes else x for x in (image, text, mask))
        partner = _own_rows(size, axes)[:, None] == jnp.arange(len(texts))
        both = mask[:, None] & there
        rows, _ = kind.block(similarity(image, texts, scale) + bias, partner, both)
        columns, _ = kind.block(similarity(text, images, scale) + bias, partner, both)
        partners = scale * (image * text).sum(-1) + bias
        return jax.lax.psum(jnp.where(mask, kind.total(rows, columns, partners), 0).sum(), axes)

    return _on_shards(local, "bbb..", ".")(image, text, mask, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    kind: Pairs, block: int, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array
) -> jax.Array:
    """The sum over all rows."""
    return _ring_forward(kind, block, image, text, scale, bias, mask)[0]


def _ring_forward(
    kind: Pairs, block: int, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Any]:
    def local(image: jax.Array, text: jax.Array, mask: jax.Array, scale: jax.Array, bias: jax.Array, axes: Any) -> Any:
        def visit(home: bool, rows: jax.Array, guest: Side) -> tuple[jax.Array, Side]:
            texts, there, columns = guest

            def one(columns: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
                images, here, rows, number = part
                partner = home & (number[:, None] == jnp.arange(len(texts)))
                found = kind.block(similarity(images, texts, scale) + bias, partner, here[:, None] & there)
                return kind.join(columns, found[1]), kind.join(rows, found[0])

            columns, rows = _by_blocks(one, columns, (image, mask, rows, jnp.arange(len(image))), block)
            return rows, (texts, there, columns)

        start = jnp.full(len(image), kind.start)
        rows, (_, _, columns) = _around(visit, start, (text, mask, start), axes)
        partners = scale * (image * text).sum(-1) + bias
        total = jnp.where(mask, kind.total(rows, columns, partners), 0).sum()
        return jax.lax.psum(total, axes), rows, columns

    total, rows, columns = _on_shards(local, "bbb..", ".bb")(image, text, mask, scale, bias)
    return total, (image, text, scale, bias, mask, rows, columns)


def _ring_backward(kind: Pairs, block: int, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    def local(
        image: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        rows: jax.Array,
        columns: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        axes: Any,
    ) -> Any:
        def visit(home: bool, mine: Any, guest: Any) -> tuple[Any, Any]:
            (texts, there, columns), of_texts = guest
            of_images, of_scale, of_bias = mine

            def one(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
                of_texts, of_scale, of_bias = carry
                images, here, rows, number, of_images = part
                cosine = similarity(images, texts)
                partner = home & (number[:, None] == jnp.arange(len(texts)))
                pull = kind.pull(scale * cosine + bias, partner, rows[:, None], columns)
                pull = jnp.where(here[:, None] & there, pull, 0)
                of_texts += scale * jnp.einsum("ij,ie->je", pull, images, preferred_element_type=jnp.float32)
                of_images += scale * jnp.einsum("ij,je->ie", pull, texts, preferred_element_type=jnp.float32)
                return (of_texts, of_scale + (pull * cosine).sum(), of_bias + pull.sum()), of_images

            parts = (image, mask, rows, jnp.arange(len(image)), of_images)
            (of_texts, *rest), of_images = _by_blocks(one, (of_texts, of_scale, of_bias), parts, block)
            return (of_images, *rest), ((texts, there, columns), of_texts)

        zero, nothing = jnp.zeros(image.shape, jnp.float32), jnp.float32(0)
        mine, (_, of_texts) = _around(visit, (zero, nothing, nothing), ((text, mask, columns), zero), axes)
        of_images, of_scale, of_bias = mine
        return of_images, of_texts, jax.lax.psum(of_scale, axes), jax.lax.psum(of_bias, axes)

    image, text, scale, bias, mask, rows, columns = saved
    found = _on_shards(local, "bbbbb..", "bb..")(image, text, mask, rows, columns, scale, bias)
    of_image, of_text, of_scale, of_bias = (cotangent * x for x in found)
    return of_image.astype(image.dtype), of_text.astype(text.dtype), of_scale, of_bias, None


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


def _on_shards(local: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
    """Runs `local` on every device's part of what is marked "b", rows of the batch, and on the whole of what is marked "."."""
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(local, axes=())
    axes = RULES["batch"]
    spec = {"b": PartitionSpec(axes), ".": PartitionSpec()}
    ins, outs = (tuple(spec[mark] for mark in marks) for marks in (inputs, outputs))
    out: Any = outs if len(outputs) > 1 else spec[outputs]
    return jax.shard_map(functools.partial(local, axes=axes), in_specs=ins, out_specs=out, check_vma=False)
