"""Schedules, decay masks, optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.errors import InputError
from mmx.train.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule, muon_dimensions


def test_cosine():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup=10), 110)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 60, 110)], [0, 1, 2, 1, 0], atol=1e-6)


def test_rsqrt_and_its_cooldown():
    config = OptimizerConfig(learning_rate=2.0, schedule="rsqrt", warmup=100, cooldown=100)
    schedule = make_schedule(config, 1000)
    np.testing.assert_allclose(
        [schedule(s) for s in (50, 100, 400, 950, 1000)], [1, 2, 1, 2 * (100 / 950) ** 0.5 / 2, 0], atol=1e-6
    )


def test_constant():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, schedule="constant", warmup=4), 10)
    np.testing.assert_allclose([schedule(s) for s in (0, 2, 4, 9, 1000)], [0, 1, 2, 2, 2])


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="warmup=50 and cooldown=0 do not fit into steps=40"):
        make_schedule(OptimizerConfig(warmup=50), 40)


PARAMS = {
    "stages_0": {"layers": {"query": {"kernel": jnp.ones((2, 8, 2, 4)), "bias": jnp.ones((2, 2, 4))}}},
    "norm": {"scale": jnp.ones(8)},
    "token": {"embedding": jnp.ones((16, 8))},
    "logit_scale": jnp.ones(()),
}


def test_decay_is_by_name():
    mask = decay_mask(OptimizerConfig(), PARAMS)
    assert mask["stages_0"]["layers"]["query"] == {"kernel": True, "bias": False}
    assert mask["token"]["embedding"] and not mask["norm"]["scale"] and not mask["logit_scale"]
    assert not any(jax.tree.leaves(decay_mask(OptimizerConfig(decay="nothing"), PARAMS)))


def test_only_what_the_mask_names_is_decayed():
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup=0, weight_decay=0.5, learning_rate=0.1), 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(zeros, state, PARAMS)
    np.testing.assert_allclose(updates["token"]["embedding"], -0.05)
    assert not np.any(updates["norm"]["scale"]) and not np.any(updates["stages_0"]["layers"]["query"]["bias"])


def test_muon_knows_its_matrices():
    dimensions = muon_dimensions(PARAMS)
    assert dimensions["stages_0"]["layers"]["query"]["kernel"] == ((1,), (2, 3))
    assert dimensions["token"]["embedding"] is None and dimensions["norm"]["scale"] is None
    optimizer = make_optimizer(OptimizerConfig(name="muon", schedule="constant", warmup=0, clip=0, weight_decay=0), 10)
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, PARAMS)
    for layer in np.asarray(updates["stages_0"]["layers"]["query"]["kernel"]).reshape(2, 8, 8):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.min() > 0.4 * singular.max()  # nearly orthogonal: every layer by itself


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_goes_down(name):
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.05, warmup=5), 100)
    target = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size + 1), p.shape), PARAMS)

    def loss(params):
        return sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.3 * loss(PARAMS)


def test_clipping_bounds_the_whole_gradient():
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", clip=1.0), 100)
    huge = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), PARAMS)
    clipped, _ = __import__("optax").clip_by_global_norm(1.0).update(huge, None)
    a, _ = optimizer.update(huge, optimizer.init(PARAMS), PARAMS)
    b, _ = optimizer.update(clipped, optimizer.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_allclose, a, b)
