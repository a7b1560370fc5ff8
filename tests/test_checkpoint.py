"""Checkpoints: what stays, what comes back, and what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from mmx.parallel import MeshConfig, make_mesh
from mmx.train import CheckpointConfig, make_optimizer, make_state
from mmx.train.checkpoint import CheckpointError, Checkpoints, find_checkpoint, open_checkpoints


def new_state(tiny, mesh_config=MeshConfig(), devices=1, seed=0):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    state, _ = make_state(tiny.build_model(), make_optimizer(tiny.optimizer, tiny.steps), True, seed, mesh)
    return state


def at_step(state, step):
    return dataclasses.replace(state, step=state.step + step)


def same(a, b):
    def raw(x):
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_restores_bit_for_bit_onto_any_mesh(tiny, tmp_path):
    state = new_state(tiny, MeshConfig(2, 2, 2), 8)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), {"x": 1})
    checkpoints.save(5, at_step(state, 5))
    checkpoints.wait()
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(1, 4, 2), 8), (MeshConfig(2, 1, 2), 4)):
        target = new_state(tiny, mesh, devices, seed=1)
        restored, position = checkpoints.restore(target)
        assert position == 5
        same(restored, at_step(state, 5))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    checkpoints.close()


def test_the_last_and_the_best_stay(tiny, tmp_path):
    state = new_state(tiny)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, best="r"), {})
    for step, value in enumerate([0.1, 0.9, 0.3, None, 0.2, 0.4], 1):
        checkpoints.save(step, state, None if value is None else {"r": value, "other": 1.0})
        checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.close()
    lowest = Checkpoints(tmp_path / "lowest", CheckpointConfig(keep=1, best="r", best_is="lowest"), {})
    for step, value in enumerate([0.5, 0.1, 0.3, 0.2], 1):
        lowest.save(step, state, {"r": value})
        lowest.wait()
    assert lowest.steps == [2, 4]
    lowest.close()


def test_by_steps_and_by_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("mmx.train.checkpoint.time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=4, every_minutes=10), {})
    assert [s for s in range(1, 9) if checkpoints.due(s)] == [4, 8]
    now = 601.0
    assert checkpoints.due(5)
    checkpoints.close()
    never = Checkpoints(tmp_path, CheckpointConfig(every_steps=0, every_minutes=0), {})
    now = 1e9
    assert not never.due(4)
    never.close()


@pytest.fixture
def saved(tiny, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), {})
    for step in (1, 2):
        checkpoints.save(step, at_step(new_state(tiny), step))
    checkpoints.wait()
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder, state):
    checkpoints = open_checkpoints(folder)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def test_missing(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        restore(tmp_path, new_state(tiny))
    with pytest.raises(CheckpointError, match="holds no checkpoint; name a run folder"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["metadata", "data", "file"])
def test_truncated(tiny, saved, damage):
    step = saved / "2"
    if damage == "metadata":
        shutil.rmtree(step / "state")
    elif damage == "data":
        shutil.rmtree(step / "state" / "d")
    else:
        largest = max((step / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(
        CheckpointError, match=rf"checkpoint {step} (is damaged|cannot be read).*delete that folder to go on from step 1"
    ):
        restore(saved, new_state(tiny))


def test_an_unfinished_save_is_no_checkpoint(tiny, saved):
    """What a process leaves that dies while saving: a folder under a temporary name."""
    shutil.copytree(saved / "2", saved / "3.orbax-checkpoint-tmp")
    assert restore(saved, new_state(tiny))[1] == 2


def test_foreign(tiny, saved):
    wider = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, width=64))
    with pytest.raises(CheckpointError, match=r"is of another model:\n  params/.*saved \(32, 32\), this run has \(64, 32\)"):
        restore(saved, new_state(wider))
    other = dataclasses.replace(tiny, topology="cross_attention")
    with pytest.raises(CheckpointError, match="this run has nothing"):
        restore(saved, new_state(other))


def test_a_path_names_a_run_its_checkpoints_or_one_of_them(saved):
    assert find_checkpoint(saved.parent) == find_checkpoint(saved) == (saved, None)
    assert find_checkpoint(saved / "1") == (saved, 1)
