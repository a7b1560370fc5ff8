"""Accumulation gives the gradient of the whole batch, for every objective and on any mesh."""

import functools

import jax
import numpy as np
import pytest

from mmx import objectives
from mmx.data.pipeline import put_batch
from mmx.parallel import MeshConfig, batch_sharding, make_mesh
from mmx.train import Task
from mmx.train.accumulate import value_and_grad


def gradients(task, params, batch, parts):
    batch = task.corrupt(batch, jax.random.key(0))
    step = functools.partial(value_and_grad, task.forward, task.loss, parts=parts)
    return jax.jit(step)(params, batch, None if parts is None else jax.random.key(1))


@pytest.fixture
def task(tiny):
    return Task(tiny.build_model(), tiny.active_objectives)


@pytest.fixture
def params(task):
    import mmx

    return jax.jit(lambda key: task.model.init(key, mmx.example_batch(task.model)))(jax.random.key(0))["params"]


@pytest.mark.parametrize("parts", [2, 4])
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


def test_accumulation_saves_memory(tiny):
    import dataclasses

    import mmx
    from mmx.train import ModelConfig

    big = dataclasses.replace(tiny, batch_size=128, model=ModelConfig(width=64, depth=4, heads=4, mlp=256))
    task = Task(big.build_model(), big.active_objectives)
    batch = mmx.example_batch(task.model, 128)
    params = jax.eval_shape(lambda: task.model.init(jax.random.key(0), batch))["params"]

    def temporary(parts):
        batch_ = task.corrupt(batch, jax.random.key(0))
        step = functools.partial(value_and_grad, task.forward, task.loss, parts=parts)
        return jax.jit(step).lower(params, batch_, jax.random.key(1)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)
