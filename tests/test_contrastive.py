"""Contrastive losses over a mesh: three forms of the same number, and what the ring holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmx.contrastive import contrastive_loss
from mmx.parallel import MeshConfig, batch_sharding, make_mesh

MESHES = {
    "one": None,
    "data": MeshConfig(data=8),
    "two": MeshConfig(data=2, fsdp=4),
    "three": MeshConfig(data=2, fsdp=2, tensor=2),
}


def vectors(rng, rows=32, size=16):
    x = rng.standard_normal((2, rows, size)).astype("f")
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("bias", [None, -1.5], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("form", "block"), [("gather", 8), ("ring", 8), ("ring", 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_is_the_dense_one(rng, form, block, mesh, bias, masked):
    image, text = vectors(rng)
    mask = rng.random(32) < 0.7 if masked else None

    def loss(form, block=8):
        def one(image, text, scale, bias):
            return contrastive_loss(image, text, scale, bias, mask, form, block)

        of = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        return jax.jit(jax.value_and_grad(lambda *given: 2 * one(*given), of))

    given = (image, text, jnp.float32(7.0), None if bias is None else jnp.float32(bias))
    expected = loss("dense")(*given)
    if MESHES[mesh] is None:
        found = loss(form, block)(*given)
    else:
        grid = make_mesh(MESHES[mesh])
        with jax.set_mesh(grid):
            rows = batch_sharding(grid)
            found = loss(form, block)(jax.device_put(image, rows), jax.device_put(text, rows), *given[2:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), expected, found)


def test_the_ring_holds_one_block_however_many_devices_and_blocks():
    """Compiled memory of value and gradient: per device, the same vectors of its own each time."""

    def held(devices, block, form):
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        rows = jax.ShapeDtypeStruct((devices * 512, 16), jnp.float32, sharding=batch_sharding(mesh))
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(lambda a, b, s: contrastive_loss(a, b, s, form=form, block=block), (0, 1, 2)))
            return step.lower(rows, rows, scale).compile().memory_analysis().temp_size_in_bytes

    two, eight = held(2, 128, "ring"), held(8, 128, "ring")
    assert eight <= 1.05 * two and held(8, 32, "ring") < eight
    assert eight < held(8, 128, "gather") / 5
