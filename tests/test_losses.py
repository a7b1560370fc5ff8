"""Losses: values against NumPy, masks, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import losses


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
