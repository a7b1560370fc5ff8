"""Modality dropout hides what is there, never all of it, and nothing in evaluation."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.errors import InputError
from mmx.modalities.masking import drop_modalities, unmask
from mmx.train import Task
from mmx.types import Masked

NAMES = ("image", "text", "audio")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rate=st.sampled_from([0.1, 0.5, 0.99]))
def test_the_last_one_stays_and_the_absent_stay_absent(seed, rate):
    rng = np.random.default_rng(seed)
    here = rng.random((16, 3)) < 0.6
    tokens = rng.random((16, 5)) < 0.5
    batch = {
        "image": Masked(rng.random((16, 2)), here[:, 0]),  # over examples
        "text": Masked({"ids": rng.integers(0, 9, (16, 5))}, tokens & here[:, 1:2]),  # over tokens, of a dict
        "audio": rng.random((16, 4)),  # always there
        "label": rng.random(16),  # no modality
    }
    present = np.stack([here[:, 0], (tokens & here[:, 1:2]).any(1), np.ones(16, bool)], 1)
    out = drop_modalities(batch, NAMES, rate, jax.random.key(seed))
    after = np.stack([np.asarray(unmask(out[name])[1]).reshape(16, -1).any(1) for name in NAMES], 1)
    assert not (after & ~present).any()
    assert (after.any(1) == present.any(1)).all()
    assert out["label"] is batch["label"]
    kept = np.asarray(out["text"].mask)
    assert all((row == before).all() or not row.any() for row, before in zip(kept, batch["text"].mask, strict=True))


def test_the_rate_is_the_rate():
    batch = {name: np.zeros((4000, 1), "f") for name in NAMES}
    out = drop_modalities(batch, NAMES, 0.3, jax.random.key(0))
    share = np.mean([np.asarray(out[name].mask) for name in NAMES], 1)
    np.testing.assert_allclose(share, 1 - 0.3 + 0.3**3 / 3, atol=0.03)  # all three dropped: one of them comes back


def test_training_hides_and_evaluation_does_not(tiny, batch):
    """The task drops; the model, which evaluators call, has nothing to do with it."""
    task = Task(tiny.build_model(), tiny.active_objectives, 0.5)
    corrupted = task.corrupt(batch, jax.random.key(0))
    assert 0 < np.asarray(unmask(corrupted["image"])[1]).sum() < 8
    plain = Task(tiny.build_model(), tiny.active_objectives).corrupt(batch, jax.random.key(0))
    assert plain["image"] is batch["image"]


def test_every_objective_trains_on_what_is_left(tiny, batch):
    """Loss and gradient are finite, and what is hidden has no influence on them."""
    task = Task(tiny.build_model(), tiny.active_objectives, 0.5)
    params = jax.jit(task.model.init)(jax.random.key(0), batch)["params"]
    corrupted = task.corrupt(batch, jax.random.key(1))
    hidden = ~np.asarray(corrupted["image"].mask)
    assert hidden.any()

    @jax.jit
    def value_and_grad(corrupted):
        return jax.value_and_grad(lambda p: task.loss(task.forward(p, corrupted, None))[0])(params)

    noise = np.where(hidden[:, None, None, None], 255 - batch["image"], batch["image"])
    other = corrupted | {"image": Masked(noise, corrupted["image"].mask)}
    (a, ga), (b, gb) = value_and_grad(corrupted), value_and_grad(other)
    assert np.isfinite(a)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ga, gb)


def test_wrong_rates_are_refused(tiny):
    for rate in (-0.1, 1.0):
        with pytest.raises(InputError, match="modality_dropout"):
            dataclasses.replace(tiny, modality_dropout=rate)
