"""Contrastive losses over a mesh: three forms of the same number, and what the ring holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmx.contrastive import contrastive_loss, contrastive_recall
from mmx.errors import InputError
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
@pytest.mark.parametrize("rows", ["all", "masked", "weighted"])
def test_every_form_is_the_dense_one(rng, form, block, mesh, bias, rows):
    image, text = vectors(rng)
    mask = None if rows == "all" else rng.random(32) < 0.7
    if rows == "weighted":
        mask = np.where(mask, 3 * rng.random(32), 0).astype("f")

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
            split = batch_sharding(grid)
            found = loss(form, block)(jax.device_put(image, split), jax.device_put(text, split), *given[2:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), expected, found)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_weights_have_the_dense_gradient(rng, form):
    image, text = vectors(rng)
    weights = np.where(rng.random(32) < 0.7, rng.random(32), 0).astype("f")
    dense, found = (
        jax.jit(jax.grad(lambda w, form=form: contrastive_loss(image, text, 7.0, None, w, form, 8)))(weights)
        for form in ("dense", form)
    )
    np.testing.assert_allclose(found, dense, atol=1e-6)
    assert np.abs(dense).max() > 1e-3


@pytest.mark.parametrize("mesh", ["one", "two"])
@pytest.mark.parametrize(("form", "block"), [("dense", 8), ("gather", 8), ("ring", 8), ("ring", 3)])
def test_partners_are_found_both_ways_in_every_form(rng, form, block, mesh):
    """As argmax finds them; where all vectors are one, nobody is found."""
    image, noise = vectors(rng)
    text, mask = 0.3 * image + noise, rng.random(32) < 0.7
    here = np.flatnonzero(mask)
    scores = image[here] @ text[here].T
    expected = [np.mean(s.argmax(1) == np.arange(len(here))) for s in (scores, scores.T)]
    assert 0.1 < expected[0] != expected[1] > 0.1
    with jax.set_mesh(make_mesh(MESHES[mesh] or MeshConfig(), jax.devices()[: 8 if MESHES[mesh] else 1])):
        found = jax.jit(lambda *x: contrastive_recall(*x, form, block))(image, text, mask)
        same = jax.jit(lambda x: contrastive_recall(x, x, mask, form, block))(jnp.ones((32, 16)) / 4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.any(same)


@pytest.fixture
def own_mesh():
    """Eight devices on three axes of one's own names."""
    return jax.make_mesh((2, 2, 2), ("pod", "host", "chip"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("bias", [None, -1.5], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["dense", "gather", "ring"])
def test_any_axes_of_any_mesh(rng, own_mesh, form, bias):
    """Rows over all three axes, or over two in another order, with the third holding copies."""
    image, text = vectors(rng)
    weights = rng.random(32).astype("f")
    expected = jax.value_and_grad(lambda *x: contrastive_loss(*x, 7.0, bias, weights), (0, 1))(image, text)
    for axes in (("pod", "host", "chip"), ("chip", "pod")):

        def loss(image, text, axes=axes):
            return contrastive_loss(image, text, 7.0, bias, weights, form, 3, axes)

        with jax.set_mesh(own_mesh):
            split = NamedSharding(own_mesh, PartitionSpec(axes))
            found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*(jax.device_put(x, split) for x in (image, text)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), expected, found)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_what_no_mesh_can_split_is_refused(rng, own_mesh, form):
    image, text = vectors(rng, rows=6)
    with pytest.raises(InputError, match=r"axes=\('pod',\): no mesh is set"):
        contrastive_loss(image, text, 7.0, form=form, axes=("pod",))
    with jax.set_mesh(own_mesh):
        with pytest.raises(InputError, match="unknown mesh axis 'hots'; did you mean 'host'"):
            contrastive_loss(image, text, 7.0, form=form, axes=("pod", "hots"))
        with pytest.raises(InputError, match="unknown mesh axis 'data'.*name those of the batch by axes="):
            contrastive_loss(image, text, 7.0, form=form)
    with jax.set_mesh(make_mesh(MeshConfig(data=8))), pytest.raises(InputError, match="6 rows cannot be split over 8 devices"):
        contrastive_loss(image, text, 7.0, form=form)


@pytest.mark.parametrize("bias", [None, -1.5], ids=["softmax", "sigmoid"])
def test_the_ring_holds_one_block_however_many_devices_and_blocks(bias):
    """Compiled memory of value and gradient: per device, the same vectors of its own each time."""

    def held(devices, block, form):
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        rows = jax.ShapeDtypeStruct((devices * 512, 16), jnp.float32, sharding=batch_sharding(mesh))
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(lambda a, b, s: contrastive_loss(a, b, s, bias, form=form, block=block), (0, 1, 2)))
            return step.lower(rows, rows, scale).compile().memory_analysis().temp_size_in_bytes

    two, eight = held(2, 128, "ring"), held(8, 128, "ring")
    assert eight <= 1.05 * two and held(8, 32, "ring") < eight
    assert eight < held(8, 128, "gather") / 5


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_a_small_gradient_of_half_precision_is_that_of_float32(rng, form):
    """Where pairs are told apart already, a partner's share of the gradient and that of all others nearly cancel."""
    image, _ = vectors(rng)
    image = jnp.asarray(image, jnp.bfloat16)

    def gradient(image, form):
        return jax.jit(jax.grad(lambda x: contrastive_loss(x, image, 20.0, form=form, block=8)))(image).astype("f")

    expected = gradient(image.astype("f"), "dense")
    np.testing.assert_allclose(gradient(image, form), expected, atol=0.01 * float(jnp.abs(expected).max()))


def test_axes_that_xla_may_not_divide_are_refused(rng):
    image, text = vectors(rng)
    with (
        jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))),
        pytest.raises(InputError, match=r"axes=\('data',\): data is not Auto; make the mesh with axis_types="),
    ):
        contrastive_loss(image, text, 7.0, form="ring", axes="data")
