"""Losses: values against NumPy, masks, gradients against finite differences, float32 inside."""

import functools
import inspect
import itertools
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import losses
from mmx.errors import InputError
from mmx.parallel import MeshConfig, batch_sharding, make_mesh


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_cross_entropy(logits, labels):
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


@pytest.mark.parametrize("mask", [None, [True, False, True, True, False], [False] * 5])
def test_clip_loss_equals_numpy(rng, mask):
    image, text = unit(rng, 5, 4), unit(rng, 5, 4)
    rows = np.arange(5) if mask is None else np.flatnonzero(mask)
    logits = 3.0 * image[rows] @ text[rows].T
    labels = np.arange(len(rows))
    expected = (numpy_cross_entropy(logits, labels) + numpy_cross_entropy(logits.T, labels)).mean() / 2 if len(rows) else 0
    value = losses.clip_loss(image, text, 3.0, None if mask is None else jnp.array(mask))
    np.testing.assert_allclose(value, expected, atol=1e-6)
    gradient = jax.grad(lambda x: losses.clip_loss(x, text, 3.0, None if mask is None else jnp.array(mask)))(image)
    assert np.isfinite(gradient).all() and bool(np.any(gradient)) == (len(rows) > 1)


def test_clip_loss_knows_partners(rng):
    x = unit(rng, 8, 16)
    assert losses.clip_loss(x, x, 50.0) < 0.01 < losses.clip_loss(x, np.roll(x, 1, 0), 50.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_numpy(rng, smoothing):
    logits, labels = rng.standard_normal((6, 7)), rng.integers(0, 7, 6)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    expected = -(target * log_probability).sum(-1)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, smoothing), expected, atol=1e-5)


def test_masked_mean_is_zero_where_nothing_is_and_ignores_nan():
    values = jnp.array([1.0, 3.0, jnp.nan])
    assert losses.masked_mean(values, jnp.array([True, True, False])) == 2
    assert losses.masked_mean(values, jnp.zeros(3, bool)) == 0
    assert np.isfinite(jax.grad(lambda v: losses.masked_mean(v, jnp.array([True, True, False])))(values)).all()


@pytest.mark.parametrize("mask", [None, [True, False, True, True, False], [False] * 5])
def test_sigmoid_loss_equals_numpy(rng, mask):
    image, text = unit(rng, 5, 4), unit(rng, 5, 4)
    rows = np.arange(5) if mask is None else np.flatnonzero(mask)
    logits = 3.0 * image[rows] @ text[rows].T - 2.0
    expected = np.log1p(np.exp(-logits * (2 * np.eye(len(rows)) - 1))).sum() / max(len(rows), 1)
    value = losses.sigmoid_loss(image, text, 3.0, -2.0, None if mask is None else jnp.array(mask))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


WEIGHTS = np.asarray([2, 0, 0.5, 1, 0], "f")
WEIGHTED = np.flatnonzero(WEIGHTS)


@pytest.mark.parametrize("name", ["clip_loss", "symmetric_cross_entropy", "sigmoid_loss", "batch_ranking_loss"])
def test_rows_are_left_out_or_count_by_their_weights(rng, name):
    """What has no weight is not there; what has any is a negative like all, and counts in the mean by its weight."""
    image, text = unit(rng, 2, 5, 4)
    scores = 3.0 * image[WEIGHTED] @ text[WEIGHTED].T - (1.0 if name == "sigmoid_loss" else 0.0)
    own, others = np.diagonal(scores)[:, None], ~np.eye(3, dtype=bool)
    if name == "sigmoid_loss":
        each = np.log1p(np.exp(np.where(others, scores, -scores))).sum(1)
    elif name == "batch_ranking_loss":
        each = sum(np.maximum(0.3 + s - own, 0)[others].reshape(3, 2).mean(1) for s in (scores, scores.T)) / 2
    else:
        each = sum(numpy_cross_entropy(s, np.arange(3)) for s in (scores, scores.T)) / 2
    whole = 3.0 * image @ text.T
    found = {
        "clip_loss": lambda: losses.clip_loss(image, text, 3.0, WEIGHTS),
        "symmetric_cross_entropy": lambda: losses.symmetric_cross_entropy(whole, whole.T, WEIGHTS),
        "sigmoid_loss": lambda: losses.sigmoid_loss(image, text, 3.0, -1.0, WEIGHTS),
        "batch_ranking_loss": lambda: losses.batch_ranking_loss(whole, whole.T, 0.3, WEIGHTS),
    }[name]()
    np.testing.assert_allclose(found, np.average(each, weights=WEIGHTS[WEIGHTED]), rtol=1e-5)


def test_a_teachers_rows_and_matched_pairs_count_by_their_weights(rng):
    scores = rng.standard_normal((4, 5, 7)).astype("f")
    each = [losses.momentum_contrastive_loss(*scores, 0.4, np.arange(5) == i) for i in WEIGHTED]
    found = losses.momentum_contrastive_loss(*scores, 0.4, WEIGHTS)
    np.testing.assert_allclose(found, np.average(each, weights=WEIGHTS[WEIGHTED]), rtol=1e-5)
    distance, matched = np.asarray([0.5, 9, 0.25, 2, 9], "f"), np.asarray([1, 1, 0, 1, 0], bool)
    for weights, expected in ((WEIGHTS, (2 * 0.5 - 0.5 * 0.25 + 2) / 3.5), (WEIGHTS != 0, (0.5 - 0.25 + 2) / 3)):
        np.testing.assert_allclose(losses.word_region_alignment_loss(distance, matched, weights), expected, rtol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
def test_reconstruction_loss_counts_what_was_removed(rng, normalised):
    predicted, pixels = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    removed = np.asarray([[True, False, True], [False, True, False]])
    target = pixels
    if normalised:
        target = (pixels - pixels.mean(-1, keepdims=True)) / np.sqrt(pixels.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = np.square(predicted - target)[removed].mean()
    value = losses.reconstruction_loss(predicted, pixels, jnp.array(removed), normalised)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_transport_distance_equals_numpy(rng):
    """Against the algorithm on the tokens that exist, one example at a time; what does not exist has no gradient."""
    text, image = rng.standard_normal((3, 5, 4)).astype("f"), rng.standard_normal((3, 6, 4)).astype("f")
    words, regions = np.arange(5) < [[5], [3], [1]], np.arange(6) < [[6], [2], [4]]
    expected = []
    for example in range(3):
        x, y = text[example, words[example]], image[example, regions[example]]
        n, m = len(x), len(y)
        cost = 1 - x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
        plan, sigma = np.ones((n, m)), np.full(n, 1 / n)
        for _ in range(50):
            step = np.exp(-cost / 0.5) * plan
            delta = 1 / (m * (sigma @ step))
            sigma = 1 / (n * (step @ delta))
            plan = sigma[:, None] * step * delta
        np.testing.assert_allclose(plan.sum(1), 1 / n, atol=1e-6)
        expected.append((cost * plan).sum())

    def total(text):
        distance = losses.transport_distance(text, image, words, regions)
        return distance.sum(), distance

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(text)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isfinite(gradient).all() and np.abs(gradient[words]).min() > 0 and not gradient[~words].any()


@pytest.mark.parametrize("folder", sorted((Path(__file__).parent / "losses").iterdir()), ids=lambda folder: folder.name)
def test_the_reference_losses_in_value_and_gradient(folder):
    assert {name: share for name, share in golden.compare(folder).items() if share > 1} == {}


def test_a_mean_by_weights(rng):
    values, weights = rng.standard_normal(5).astype("f"), np.asarray([0, 0.5, 2, 0.25, 0], "f")
    np.testing.assert_allclose(losses.masked_mean(values, weights), (values * weights).sum() / weights.sum(), rtol=1e-6)


def chunked(rng, length, vocab, chunks):
    """The gradient of a chunked and of the dense loss by states and matrix, as functions; and their arguments."""
    labels, weights = rng.integers(0, vocab, (2, length)), rng.random((2, length)).astype("f")

    def dense(states, matrix):
        return (losses.cross_entropy(states @ matrix, labels, 0.1, 1e-2) * weights).sum()

    def pieces(states, matrix):
        each, best = losses.chunked_cross_entropy(states, lambda x: x @ matrix, labels, chunks, 0.1, 1e-2)
        return (each * weights).sum(), best

    given = rng.standard_normal((2, length, 4)).astype("f"), rng.standard_normal((4, vocab)).astype("f")
    return jax.value_and_grad(dense, (0, 1)), jax.value_and_grad(pieces, (0, 1), has_aux=True), given


@pytest.mark.parametrize("chunks", [1, 3, 7, 9])
def test_chunked_cross_entropy_is_the_dense_one(rng, chunks):
    dense, pieces, (states, matrix) = chunked(rng, 7, 11, chunks)
    value, gradient = dense(states, matrix)
    (found, best), found_gradient = pieces(states, matrix)
    np.testing.assert_array_equal(best, (states @ matrix).argmax(-1))
    for a, b in zip((value, *gradient), (found, *found_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunked_cross_entropy_never_holds_all_scores(rng):
    dense, pieces, given = chunked(rng, 256, 4096, 16)
    whole, parts = (jax.jit(f).lower(*given).compile().memory_analysis().temp_size_in_bytes for f in (dense, pieces))
    scores = 2 * 256 * 4096 * 4
    assert parts < scores / 4 < scores < whole


def test_z_loss_and_divergence_and_regression(rng):
    logits, target = rng.standard_normal((3, 5)).astype("f"), rng.dirichlet(np.ones(5), 3).astype("f")
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    extra = losses.cross_entropy(logits, np.zeros(3, int), z_loss=0.5) - losses.cross_entropy(logits, np.zeros(3, int))
    np.testing.assert_allclose(extra, 0.5 * np.log(np.exp(logits).sum(-1)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(losses.kl_divergence(logits, target), (target * (np.log(target) - log)).sum(-1), rtol=1e-5)
    bits = losses.binary_cross_entropy(logits, target)
    np.testing.assert_allclose(bits, np.log1p(np.exp(logits)) - target * logits, rtol=1e-5)
    away = np.abs(logits - target)
    np.testing.assert_allclose(losses.regression_loss(logits, target), (away**2).mean(-1), rtol=1e-5)
    huber = np.where(away < 1, away**2 / 2, away - 0.5).mean(-1)
    np.testing.assert_allclose(losses.regression_loss(logits, target, huber=True), huber, rtol=1e-5)


def test_late_interaction_asks_token_by_token(rng):
    image, text = unit(rng, 2, 4, 3), unit(rng, 3, 5, 3)
    regions, words = np.arange(4) < [[4], [2]], np.arange(5) < [[1], [5], [3]]
    to_text, to_image = losses.late_interaction(image, text, regions, words)
    for i in range(2):
        for j in range(3):
            each = image[i, regions[i]] @ text[j, words[j]].T
            np.testing.assert_allclose(to_text[i, j], each.max(1).mean(), rtol=1e-5)
            np.testing.assert_allclose(to_image[j, i], each.max(0).mean(), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.late_interaction(x, text, regions, words)[1].sum())(image)
    assert np.isfinite(gradient).all() and not gradient[~regions].any()
    nobody = losses.late_interaction(image, text, np.zeros((2, 4), bool), words)
    assert not np.any(nobody[0]) and not np.any(nobody[1])


@pytest.mark.parametrize("block", [1, 3, 8])
def test_late_interaction_block_by_block_is_that_of_one(rng, block):
    """Eight images, whole blocks or not."""
    image, text, weights = unit(rng, 8, 4, 3), unit(rng, 5, 6, 3), rng.standard_normal((2, 8, 5)).astype("f")
    regions, words = np.arange(4) < rng.integers(0, 5, 8)[:, None], np.arange(6) < rng.integers(1, 7, 5)[:, None]

    def total(image, text, block=None):
        to_text, to_image = losses.late_interaction(image, text, regions, words, block)
        return (to_text * weights[0] + to_image.T * weights[1]).sum(), (to_text, to_image)

    step = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), step(image, text), step(image, text, block))


@pytest.mark.parametrize("devices", [1, 8])
def test_late_interaction_holds_the_scores_of_a_block(devices):
    """Compiled memory of value and gradient, on each device: that of one block, which by default has at most so many scores."""
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    side = jax.ShapeDtypeStruct((64 * devices, 64, 4), jnp.float32, sharding=batch_sharding(mesh))

    def held(block):
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(lambda a, b: sum(x.sum() for x in losses.late_interaction(a, b, block=block)), (0, 1)))
            return step.lower(side, side).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 64 * 64 * devices * 64 * 64  # of a device's images and all texts, in bytes
    whole, half, few, default = held(64), held(32), held(4), held(None)
    assert whole > scores and half < 0.7 * whole and few < 0.1 * whole
    assert default == (whole if scores <= 4 * losses.contrasting.TOKEN_SCORES else held(64 // devices))


def test_hard_negatives_are_others_that_exist_and_follow_the_scores(rng):
    scores, mask = np.asarray([[9, 2, 0, 5], [0, 9, 0, 5], [0, 0, 9, 5], [0, 0, 0, 9]], "f"), np.asarray([1, 1, 1, 0], bool)
    chosen = np.stack([losses.hard_negatives(scores, jax.random.key(i), mask) for i in range(400)])
    assert not (chosen[:, :3] == np.arange(3)).any() and (chosen < 3).all()
    np.testing.assert_allclose((chosen[:, 0] == 1).mean(), np.e**2 / (np.e**2 + 1), atol=0.05)
    alone = losses.hard_negatives(scores, jax.random.key(0), np.asarray([False, True, False, False]))
    assert alone[1] == 1


def test_grounding_and_ranking(rng):
    scores, named = rng.standard_normal((2, 3, 4)).astype("f"), np.zeros((2, 3, 4), "f")
    named[0, 0, 1], named[1, 2, [0, 2]] = 1, 1
    mask = np.asarray([[1, 1, 1, 0], [1, 0, 1, 1]], bool)[:, None]
    found = losses.grounding_loss(scores, named, mask)
    log = scores - np.log(np.where(mask, np.exp(scores), 0).sum(-1, keepdims=True))
    np.testing.assert_allclose(found[0, 0], -log[0, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(found[1, 2], -(log[1, 2, 0] + log[1, 2, 2]) / 2, rtol=1e-5)
    assert np.count_nonzero(found) == 2
    assert np.isfinite(jax.grad(lambda x: losses.grounding_loss(x, named, mask).sum())(scores)).all()
    np.testing.assert_allclose(losses.ranking_loss(np.asarray([1.0, 0.2]), np.asarray([0.5, 0.15])), [0, 0.05], atol=1e-6)


def test_overlap_of_boxes():
    a = np.asarray([0, 0, 2, 2], "f")
    for b, expected in [
        ([0, 0, 2, 2], 1),
        ([1, 0, 3, 2], 1 / 3),
        ([2, 0, 4, 2], 0),
        ([3, 0, 4, 1], -3 / 8),
        ([0, 0, 1, 1], 1 / 4),
    ]:
        np.testing.assert_allclose(losses.generalized_iou(a, np.asarray(b, "f")), expected, atol=1e-6)
    np.testing.assert_allclose(losses.corners(np.asarray([3, 2, 4, 2], "f")), [1, 1, 5, 3])


def test_boxes_are_told_by_the_queries_that_are_cheapest_for_them(rng):
    """Against every way to give boxes their queries, by the paper's formula; what does not exist, and any order, changes nothing."""
    logits, named = normal(rng, 2, 4, 5), soft(rng, 2, 3, 5)
    predicted, told, there = boxes(rng, 2, 4, 4), boxes(rng, 2, 3, 4), np.asarray([[1, 1, 1], [0, 1, 0]], bool)
    log, total = np.asarray(jax.nn.log_softmax(logits)), 0.0
    overlap = np.asarray(losses.generalized_iou(losses.corners(predicted)[:, :, None], losses.corners(told)[:, None]))
    for i in range(2):
        real = np.flatnonzero(there[i])
        ways = []
        for queries in itertools.permutations(range(4), len(real)):
            apart = [np.abs(predicted[i, q] - told[i, g]).sum() for q, g in zip(queries, real, strict=True)]
            of_box = sum(5 * x + 2 * (1 - overlap[i, q, g]) for x, q, g in zip(apart, queries, real, strict=True))
            cost = of_box - sum(np.exp(log[i, q]) @ named[i, g] for q, g in zip(queries, real, strict=True))
            names = -sum(log[i, q] @ named[i, g] for q, g in zip(queries, real, strict=True))
            names -= sum(0.1 * log[i, q, -1] for q in range(4) if q not in queries)
            ways.append((cost, names + of_box))
        total += min(ways)[1]
    found = losses.set_grounding_loss(logits, predicted, named, told, there)
    np.testing.assert_allclose(found, total / 4, rtol=1e-5)
    noise = np.where(there[..., None], told, np.nan)
    np.testing.assert_allclose(losses.set_grounding_loss(logits, predicted, named, noise, there), found, rtol=1e-6)
    order = [2, 0, 1]
    np.testing.assert_allclose(
        losses.set_grounding_loss(logits[:, ::-1], predicted[:, ::-1], named[:, order], told[:, order], there[:, order]),
        found,
        rtol=1e-6,
    )
    with pytest.raises(InputError, match="2 queries for 3 boxes"):
        losses.set_grounding_loss(logits[:, :2], predicted[:, :2], named, told, there)
    none = losses.set_grounding_loss(logits, predicted, named, told, np.zeros_like(there))
    np.testing.assert_allclose(none, -0.1 * log[..., -1].sum(), rtol=1e-5)


def test_every_other_row_is_ranked_below_the_partner(rng):
    forth, back = rng.standard_normal((2, 4, 4)).astype("f")
    mask = np.asarray([True, False, True, True])
    pairs = [(i, j) for i in (0, 2, 3) for j in (0, 2, 3) if i != j]
    expected = np.mean([max(0, 0.3 + x[i, j] - x[i, i]) for x in (forth, back) for i, j in pairs])
    np.testing.assert_allclose(losses.batch_ranking_loss(forth, back, 0.3, mask), expected, rtol=1e-5)
    assert losses.batch_ranking_loss(forth, back, 0.3, np.zeros(4, bool)) == 0


def test_a_clip_without_a_text_is_not_asked(rng):
    scores, mask = rng.standard_normal((6, 3)).astype("f"), np.ones((6, 3), bool)
    mask[2:4] = False  # both texts of the second clip
    e = np.where(mask, np.exp(scores), 0)
    each = [-np.log((own := e[2 * i : 2 * i + 2, i].sum()) / (e[:, i].sum() + e[2 * i : 2 * i + 2].sum() - own)) for i in (0, 2)]
    np.testing.assert_allclose(losses.mil_nce_loss(scores, mask=mask), np.mean(each), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.mil_nce_loss(x, mask=mask))(scores)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[2:4].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_middle_clip_of_a_bag_is_asked_for_texts_that_exist(rng, weighted):
    """Two bags of three clips with two texts each. The middle clip of the second has one text left of the bag's six."""
    scores, mask = rng.standard_normal((12, 6)).astype("f"), rng.random((12, 6)) < 0.8
    mask[6:, 4], mask[9, 4] = False, True
    mask = np.where(mask, 0.1 + rng.random((12, 6)), 0).astype("f") if weighted else mask
    e, each, counts = np.where(mask != 0, np.exp(scores), 0), [], []
    for clip, bag in ((1, slice(0, 6)), (4, slice(6, 12))):
        own_clips = slice(clip - 1, clip + 2)
        elsewhere = np.delete(e, own_clips, 1).reshape(12, 3)
        outside = e[:, clip].sum() - e[bag, clip].sum() + elsewhere[2 * clip : 2 * clip + 2].sum()
        each.append(-np.log(e[bag, clip].sum() / (e[bag, clip].sum() + outside)))
        counts.append(float(mask[bag, clip].max()))
    np.testing.assert_allclose(losses.mil_nce_loss(scores, 3, mask), np.average(each, weights=counts), rtol=1e-5)


def test_distillation_reaches_its_teacher_and_gives_it_no_gradient(rng):
    teacher, student = rng.standard_normal((2, 3, 5)).astype("f"), rng.standard_normal((2, 3, 5)).astype("f")
    soft = jax.nn.softmax
    weights = np.asarray(soft(teacher))
    for distance, same in (
        (lambda s, t: losses.distillation_loss(s, t, 2.0), teacher),
        (lambda s, t: losses.attention_distillation_loss(soft(s), soft(t), np.arange(3) < [[3], [2]]), teacher),
        (lambda s, t: losses.cosine_distance(s, jax.lax.stop_gradient(t)), 3 * teacher),
    ):
        np.testing.assert_allclose(distance(same, teacher), 0, atol=1e-6)
        of_student, of_teacher = jax.grad(lambda s, t: distance(s, t).sum(), (0, 1))(student, teacher)  # noqa: B023
        assert np.abs(of_student).max() > 1e-3 and not of_teacher.any()
    log = np.asarray(jax.nn.log_softmax(student / 2))
    target = np.asarray(soft(teacher / 2))
    expected = 4 * (target * (np.log(target) - log)).sum(-1)
    np.testing.assert_allclose(losses.distillation_loss(student, teacher, 2.0), expected, rtol=1e-4)
    rows = (weights * (np.log(weights) - np.log(np.asarray(soft(student))))).sum(-1)
    found = losses.attention_distillation_loss(soft(student), weights, np.arange(3) < [[3], [2]])
    np.testing.assert_allclose(found, [rows[0].mean(), rows[1, :2].mean()], rtol=1e-4)


B, L, V, D = 6, 4, 7, 5
MASK = np.arange(L) < np.asarray([4, 3, 2, 4, 1, 4])[:, None]
ROWS = np.asarray([1, 1, 0, 1, 1, 1], bool)
LABELS = np.arange(B * L).reshape(B, L) % V
BELIEVED = np.sin(np.arange(B * 9.0, dtype=np.float32)).reshape(B, 9)
NAMED = (np.arange(L) == np.asarray([0, 2, 1, 3, 0, 2])[:, None]) * 0.7


def soft(rng, *shape):
    x = np.exp(rng.standard_normal(shape).astype(np.float32))
    return x / x.sum(-1, keepdims=True)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def matrix(rng):
    return normal(rng, D, V)


THREE = np.arange(3) < np.array([3, 0, 2, 1, 3, 2])[:B, None]  # boxes of each example


def boxes(rng, *shape):
    """Boxes of many sizes, centre and size."""
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape[:-1], 2)), rng.uniform(0.1, 0.6, (*shape[:-1], 2))], -1).astype("f")


GRADIENTS = {  # name: the loss of what has a gradient, and that, each by its shape
    "cross_entropy": (lambda x: losses.cross_entropy(x, LABELS, 0.1, 1e-2), [(normal, B, L, V)]),
    "chunked_cross_entropy": (lambda x, w: losses.chunked_cross_entropy(x, lambda s: jnp.einsum("...d,dv->...v", s, w, preferred_element_type=jnp.float32), LABELS, 3, 0.1, 1e-2)[0], [(normal, B, L, D), (normal, D, V)]),
    "kl_divergence": (lambda x: losses.kl_divergence(x, soft(np.random.default_rng(7), B, V)), [(normal, B, V)]),
    "binary_cross_entropy": (losses.binary_cross_entropy, [(normal, B), (soft, B)]),
    "regression_loss": (functools.partial(losses.regression_loss, huber=True), [(normal, B, D), (normal, B, D)]),
    "reconstruction_loss": (lambda x, y: losses.reconstruction_loss(x, y, MASK, normalised=True), [(normal, B, L, D), (normal, B, L, D)]),
    "info_nce": (lambda q, k: losses.info_nce(q, k, np.arange(B) * (np.arange(B) != 2), 0.5, ROWS), [(normal, B, D), (normal, B, D)]),
    "sampled_nce": (lambda *x: losses.sampled_nce(*x, temperature=0.5), [(normal, B, D), (normal, B, D), (normal, B, 3, D)]),
    "symmetric_cross_entropy": (lambda a, b: losses.symmetric_cross_entropy(a, b, ROWS), [(normal, B, B), (normal, B, B)]),
    "clip_loss": (lambda a, b: losses.clip_loss(a, b, 3.0, ROWS), [(unit, B, D), (unit, B, D)]),
    "sigmoid_loss": (lambda a, b: losses.sigmoid_loss(a, b, 3.0, -1.0, ROWS), [(unit, B, D), (unit, B, D)]),
    "momentum_contrastive_loss": (lambda a, b: losses.momentum_contrastive_loss(a, b, BELIEVED, BELIEVED[::-1], 0.4, ROWS), [(normal, B, 9), (normal, B, 9)]),
    "mil_nce_loss": (lambda s: losses.mil_nce_loss(s, 1, np.repeat(ROWS, 2)[:, None] & ROWS), [(normal, 2 * B, B)]),
    "late_interaction": (lambda a, b: losses.late_interaction(a, b, MASK, MASK[::-1])[1], [(unit, B, L, 3), (unit, B, L, 3)]),
    "ranking_loss": (losses.ranking_loss, [(normal, B), (normal, B)]),
    "batch_ranking_loss": (lambda a, b: losses.batch_ranking_loss(a, b, 0.3, ROWS), [(normal, B, B), (normal, B, B)]),
    "grounding_loss": (lambda s: losses.grounding_loss(s, NAMED, MASK), [(normal, B, L)]),
    "word_region_alignment_loss": (lambda d: losses.word_region_alignment_loss(d, np.arange(B) > 1, ROWS), [(normal, B)]),
    "cosine_cost": (lambda a, b: losses.cosine_cost(a, b, MASK, MASK[::-1]), [(normal, B, L, D), (normal, B, L, D)]),
    "distillation_loss": (lambda s: losses.distillation_loss(s, np.sin(np.arange(V)) + jnp.zeros((B, V)), 2.0), [(normal, B, V)]),
    "cosine_distance": (losses.cosine_distance, [(normal, B, D), (normal, B, D)]),
    "attention_distillation_loss": (lambda w: losses.attention_distillation_loss(w, soft(np.random.default_rng(7), B, L, L), MASK), [(soft, B, L, L)]),
    "normalised_each": (losses.normalised_each, [(normal, B, D)]),
    "unit_vectors": (losses.unit_vectors, [(normal, B, D)]),
    "similarity": (lambda a, b: losses.similarity(a, b, 3.0), [(normal, B, D), (normal, B, D)]),
    "masked_mean": (lambda x: losses.masked_mean(x, ROWS), [(normal, B)]),
    "corners": (losses.corners, [(boxes, B, 4)]),
    "generalized_iou": (lambda a, b: losses.generalized_iou(losses.corners(a), losses.corners(b)), [(boxes, B, 4), (boxes, B, 4)]),
    "set_grounding_loss": (lambda x, y: losses.set_grounding_loss(x, y, soft(np.random.default_rng(7), B, 3, V), boxes(np.random.default_rng(8), B, 3, 4), THREE), [(normal, B, 5, V), (boxes, B, 5, 4)]),
}  # fmt: skip
OTHERS = {
    "region_labels",
    "hard_negatives",
    "set_assignment",
    "transport_plan",
    "transport_distance",
}  # choices, and a plan held fixed


def test_what_is_held_fixed_has_no_gradient(rng):
    """A teacher's scores, and the plan of transport: the gradient is the finite difference along the plan of the start."""
    scores = normal(rng, 4, B, 9)
    gradient = jax.grad(lambda x: losses.momentum_contrastive_loss(*x, 0.4, ROWS))(scores)
    assert np.abs(gradient[:2]).max() > 1e-3 and not np.any(gradient[2:])

    text, image, there = normal(rng, B, L, D), normal(rng, B, L, D), (MASK, MASK[::-1])
    plan = losses.transport_plan(losses.cosine_cost(text, image, *there), *there)
    slopes = jax.grad(lambda a, b: losses.transport_distance(a, b, *there).sum(), (0, 1))(text, image)
    for _ in range(3):
        steps = 1e-3 * normal(rng, 2, B, L, D)
        up, down = (
            (losses.cosine_cost(text + sign * steps[0], image + sign * steps[1], *there) * plan).sum() for sign in (1, -1)
        )
        expected = sum(float((g * s).sum()) for g, s in zip(slopes, steps, strict=True))
        np.testing.assert_allclose((up - down) / 2, expected, rtol=2e-2, atol=2e-5)


def test_every_loss_is_among_them():
    public = {name for name, _ in inspect.getmembers(losses, inspect.isfunction)}
    assert public | {"LOWEST"} == set(losses.__all__)
    assert public == {*GRADIENTS, *OTHERS}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_is_the_finite_difference(rng, name):
    """Along three directions drawn at random, of the loss and, where it is not a number but many, of their weighted sum."""
    loss, shapes = GRADIENTS[name]
    inputs = [make(rng, *shape) for make, *shape in shapes]
    weights = normal(rng, *jax.eval_shape(loss, *inputs).shape)
    total = jax.jit(lambda *x: (loss(*x) * weights).sum())
    slopes = jax.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
    for _ in range(3):
        steps = [1e-3 * normal(rng, *x.shape) for x in inputs]
        up, down = (total(*(x + sign * s for x, s in zip(inputs, steps, strict=True))) for sign in (1, -1))
        expected = sum(float((g * s).sum()) for g, s in zip(slopes, steps, strict=True))
        np.testing.assert_allclose((up - down) / 2, expected, rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_loss_computes_in_float32(rng, name):
    """What comes in bfloat16 gives the loss of the same numbers in float32."""
    loss, shapes = GRADIENTS[name]
    short = [jnp.asarray(make(rng, *shape), jnp.bfloat16) for make, *shape in shapes]
    found = loss(*short)
    assert found.dtype == jnp.float32 or name in ("unit_vectors", "masked_mean")
    np.testing.assert_allclose(
        found, loss(*(x.astype(jnp.float32) for x in short)), rtol=1e-2 if name == "unit_vectors" else 1e-5, atol=1e-6
    )
