"""Any mesh gives the losses of one device; the table leaves nothing large unnamed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmx.data import Pipeline
from mmx.data.pipeline import put_batch
from mmx.errors import InputError
from mmx.objectives import Contrastive, Matching
from mmx.parallel import MeshConfig, batch_sharding, constrain, make_mesh, shardings, spec
from mmx.topologies import TOPOLOGIES
from mmx.train import OptimizerConfig, Task, compile_step, make_optimizer, make_schedule, make_state, train_step


def train(experiment, mesh_config, devices, steps=3, parts=1):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    task = Task(experiment.build_model(), experiment.active_objectives)
    config = experiment.optimizer
    optimizer, schedule = make_optimizer(config, experiment.steps), make_schedule(config, experiment.steps)
    batches = Pipeline(experiment.data, experiment.modalities, experiment.batch_size).train()
    losses = []
    with jax.set_mesh(mesh):
        state, layout = make_state(task.model, optimizer, True, 0, mesh)
        step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule, ema=0.9, parts=parts)
        step = compile_step(step, mesh, layout)
        for _ in range(steps):
            state, metrics = step(state, put_batch(next(batches), batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return losses, state


QUICK = ("multi_to_one",)


@pytest.mark.parametrize("topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES])
def test_eight_devices_give_the_losses_of_one(tiny, topology):
    objectives = tiny.objectives if topology == tiny.topology else {"contrastive": Contrastive(), "matching": Matching()}
    experiment = dataclasses.replace(tiny, topology=topology, objectives=objectives)
    expected, _ = train(experiment, MeshConfig(), 1)
    losses, state = train(experiment, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(expected)) == 3
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema))}
    assert any("fsdp" in s and "tensor" in s for s in specs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(1, 8, 1), MeshConfig(2, 1, 4), MeshConfig(-1, 4, 1)])
def test_every_shape_of_the_mesh(tiny, mesh):
    tiny = dataclasses.replace(tiny, objectives={"contrastive": Contrastive()})
    expected, _ = train(tiny, MeshConfig(), 1)
    np.testing.assert_allclose(train(tiny, mesh, 8)[0], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_every_optimizer_on_a_mesh(tiny, name):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, warmup=2)
    experiment = dataclasses.replace(tiny, optimizer=optimizer, objectives={"contrastive": Contrastive()})
    expected, _ = train(experiment, MeshConfig(), 1)
    np.testing.assert_allclose(train(experiment, MeshConfig(2, 2, 2), 8)[0], expected, rtol=2e-5)


def test_state_is_split_and_moments_lie_like_their_parameters(tiny):
    cheap = dataclasses.replace(tiny, objectives={"contrastive": Contrastive()})
    _, state = train(cheap, MeshConfig(1, 4, 2), 8, steps=1)
    kernel = state.params["stages_1"]["stack"]["layers"]["block"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (1, 32 // 4, 64 // 2)
    mu = state.opt_state[1].mu["stages_1"]["stack"]["layers"]["block"]["mlp"]["up"]["kernel"]
    ema = state.ema["stages_1"]["stack"]["layers"]["block"]["mlp"]["up"]["kernel"]
    assert mu.sharding == ema.sharding == kernel.sharding


def test_the_state_is_donated(tiny, batch):
    """The new state takes the memory of the old one: aliased bytes are those of the state."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    task = Task(tiny.build_model(), {"contrastive": Contrastive()})
    optimizer, schedule = make_optimizer(tiny.optimizer, 6), make_schedule(tiny.optimizer, 6)
    state, layout = make_state(task.model, optimizer, True, 0, mesh)
    step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule, ema=0.9)
    compiled = compile_step(step, mesh, layout).lower(state, put_batch(batch, batch_sharding(mesh))).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_activations_are_constrained(tiny):
    """On a mesh the lowered program says how activations lie; without one the model is a plain function."""
    task = Task(tiny.build_model(), tiny.active_objectives)
    import mmx

    batch = mmx.example_batch(task.model, 8)
    params = jax.eval_shape(lambda: task.model.init(jax.random.key(0), batch))["params"]

    def text():
        return jax.jit(lambda p, b: task.model.apply({"params": p}, b).embeddings).lower(params, batch).as_text()

    def count(text):
        return text.count("sharding_constraint") + text.count("@Sharding")

    assert count(text()) == 0
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert count(text()) >= 10


def test_a_large_leaf_without_a_pattern_is_an_error():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with pytest.raises(InputError, match=r"mystery/matrix with shape \(512, 512\) is large.*add a line for it to TABLE"):
        shardings(mesh, {"mystery": {"matrix": jnp.zeros((512, 512))}})
    assert shardings(mesh, {"mystery": {"matrix": jnp.zeros((8, 8))}})["mystery"]["matrix"].spec == PartitionSpec()


def test_what_does_not_divide_is_an_error():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(InputError, match=r"dimension 'heads' of a/query/kernel has size 4.*tensor=8"):
        shardings(mesh, {"a": {"query": {"kernel": jnp.zeros((32, 4, 8))}}})
    with pytest.raises(InputError, match="does not fit its pattern"):
        shardings(mesh, {"a": {"query": {"kernel": jnp.zeros((32, 8))}}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=16), "16x1x1 does not use exactly the 8 device"),
        (MeshConfig(data=2, fsdp=2), "2x2x1 does not use exactly the 8"),
        (MeshConfig(-1, -1, 1), "at most one size may be -1"),
        (MeshConfig(-1, 3, 1), "does not use exactly"),
        (MeshConfig(0, 1, 1), "positive"),
    ],
)
def test_wrong_meshes_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(config)


def test_logical_names():
    assert spec("batch", "length", "heads") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert spec("embed", "batch") == PartitionSpec("fsdp", "data")  # a mesh axis is used once
    with pytest.raises(InputError, match="did you mean 'embed'"):
        spec("embd")
    with pytest.raises(InputError, match="2 logical axes"):
        constrain(jnp.zeros((1, 2, 3)), "batch", "length")
