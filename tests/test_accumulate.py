"""Accumulation gives the gradient of the whole batch, for every objective and on any mesh."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx import objectives
from mmx.data import Pipeline
from mmx.data.pipeline import put_batch
from mmx.errors import InputError
from mmx.objectives import needed_heads
from mmx.parallel import MeshConfig, batch_sharding, make_mesh, shardings
from mmx.train import ModelConfig, Task
from mmx.train.accumulate import part_sizes, value_and_grad


def gradients(task, params, batch, parts):
    batch = task.corrupt(batch, jax.random.key(0))
    step = functools.partial(value_and_grad, task.forward, task.loss, parts=parts)
    return jax.jit(step)(params, batch, None if parts is None else jax.random.key(1))


@pytest.fixture
def task(tiny):
    return Task(tiny.build_model(), tiny.active_objectives)


@pytest.fixture
def params(task):
    return jax.jit(lambda key: task.model.init(key, mmx.example_batch(task.model)))(jax.random.key(0))["params"]


@pytest.mark.parametrize("parts", [3, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (2, 4, (1, 5, 2)))])
def test_accumulated_equals_one_shot(task, params, batch, parts):
    (loss, metrics), whole = gradients(task, params, batch, 1)
    (other_loss, other_metrics), accumulated = gradients(task, params, batch, parts)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    assert metrics.keys() == other_metrics.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), accumulated, whole)


def test_the_usual_average_is_another_gradient(task, params, batch):
    """What would pass if accumulation averaged the losses of small batches: it does not."""
    task = Task(task.model, {"contrastive": objectives.Contrastive()})
    (_, _), whole = gradients(task, params, batch, 1)
    halves = [gradients(task, params, jax.tree.map(lambda x, h=h: x[h::2], batch), 1)[1] for h in (0, 1)]
    average = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    difference = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (average, whole)), strict=True))
    assert difference > 1e-3


@pytest.mark.slow
def test_accumulation_on_a_mesh(task, params, batch):
    (loss, _), whole = gradients(task, params, batch, 1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        (other, _), accumulated = gradients(task, params, put_batch(batch, batch_sharding(mesh)), 2)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), accumulated, whole)


def noisy(tiny):
    """A tiny task and its parameters, with dropout, a loss over all pairs in a ring, and one of each example by itself."""
    both = {"contrastive": objectives.Contrastive(form="ring"), "captioning": objectives.Captioning()}
    model = dataclasses.replace(tiny.model, dropout=0.5, depth=1).build(
        tiny.modalities, "early_concatenation", needed_heads(both, tiny.modalities)
    )
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    return Task(model, both), params


def with_the_keys_of_parts(task, params, batch, rows):
    """The loss and gradient of one pass in which the examples of each part (their `rows`) have the key that accumulation gives."""
    keys = [*jax.random.split(jax.random.key(1), len(rows))]
    back = np.argsort(np.concatenate(rows))

    def loss(params):
        parts = [task.forward(params, jax.tree.map(lambda x, r=r: x[r], batch), k) for r, k in zip(rows, keys, strict=True)]
        return task.loss(jax.tree.map(lambda *x: jnp.concatenate(x)[back], *parts))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def assert_same(one, other):
    np.testing.assert_allclose(one[0][0], other[0][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), one[1], other[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "rows"),
    [(2, [[0, 2, 4, 6], [1, 3, 5, 7]]), ((4, 2, 2), [[0, 1, 4, 5], [2, 6], [3, 7]])],
)
def test_dropout_is_that_of_each_part_with_its_key(tiny, batch, parts, rows):
    task, params = noisy(tiny)
    accumulated = gradients(task, params, batch, parts)
    assert_same(accumulated, with_the_keys_of_parts(task, params, batch, [np.asarray(r) for r in rows]))
    assert abs(accumulated[0][0] - gradients(task, params, batch, 1)[0][0]) > 1e-3  # the noise of other keys is seen


@pytest.mark.parametrize(
    ("mesh", "parts", "sizes"),
    [
        (MeshConfig(data=4, fsdp=2), 2, (16, 8)),
        pytest.param(MeshConfig(data=8), (8, 16), (8, 16), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), 3, (8, 8, 8), marks=pytest.mark.slow),
    ],
)
def test_uneven_parts_on_a_mesh(tiny, mesh, parts, sizes):
    """Eight devices, with dropout and a ring, against one device without parts."""
    task, params = noisy(tiny)
    batch = next(Pipeline(tiny.data, tiny.modalities, 24).train())
    starts = np.cumsum([0, *sizes]) // 8
    rows = [np.arange(24).reshape(8, 3)[:, a:b].ravel() for a, b in itertools.pairwise(starts)]
    expected = with_the_keys_of_parts(task, params, batch, rows)
    with jax.set_mesh(mesh := make_mesh(mesh)):
        assert part_sizes(24, parts) == sizes
        split = jax.device_put(params, shardings(mesh, params))
        accumulated = gradients(task, split, put_batch(batch, batch_sharding(mesh)), parts)
    assert_same(accumulated, expected)


def test_parts_are_as_equal_as_they_can_be():
    assert part_sizes(8, 4) == (2, 2, 2, 2) and part_sizes(8, 3) == (3, 3, 2) and part_sizes(8, 1) == (8,)
    assert part_sizes(8, (1, 7)) == (1, 7)
    for parts, message in [(9, "0, 0|1, 0"), (0, r"\(\)"), ((4, 3), "4, 3"), ((8, 0), "8, 0")]:
        with pytest.raises(InputError, match=rf"parts=.*: parts of .*{message}.* rows for a batch of 8"):
            part_sizes(8, parts)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
        assert part_sizes(24, 4) == (8, 8, 4, 4) and part_sizes(3, 1) == (3,)
        for parts in (7, (10, 14)):
            with pytest.raises(InputError, match="each has to be a multiple of 4, into which the mesh splits a batch"):
                part_sizes(24, parts)


@pytest.mark.slow
def test_accumulation_saves_memory(tiny):
    big = dataclasses.replace(tiny, batch_size=128, model=ModelConfig(width=64, depth=4, heads=4, mlp=256))
    task = Task(big.build_model(), big.active_objectives)
    batch = mmx.example_batch(task.model, 128)
    params = jax.eval_shape(lambda: task.model.init(jax.random.key(0), batch))["params"]

    def temporary(parts):
        batch_ = task.corrupt(batch, jax.random.key(0))
        step = functools.partial(value_and_grad, task.forward, task.loss, parts=parts)
        return jax.jit(step).lower(params, batch_, jax.random.key(1)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)
