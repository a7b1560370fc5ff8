"""What fits onto a described pod, by compiling for it: no TPU is needed, only its compiler (`pip install -e '.[tpu]'`)."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmx.contrastive import contrastive_loss
from mmx.parallel import batch_sharding
from mmx.parallel.mesh import AXES

pytest.importorskip("libtpu")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def peak(pairs, form):
    """GiB per chip of value and gradient of the loss over so many pairs of 768 numbers, on a v5e-256."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    mesh = Mesh(np.array(chips).reshape(32, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    rows = jax.ShapeDtypeStruct((pairs, 768), jnp.float32, sharding=batch_sharding(mesh))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(lambda a, b, s: contrastive_loss(a, b, s, form=form), (0, 1, 2)))
        return step.lower(rows, rows, scale).compile().memory_analysis().peak_memory_in_bytes / 2**30


@pytest.fixture(autouse=True)
def compiled_anew():
    """A program for a pod that is not there can be compiled, kept in the cache, and not be read again."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_million_pairs_fit_onto_a_pod_in_a_ring_only():
    assert peak(1_048_576, "ring") < 1.6
    for form in ("dense", "gather"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            peak(1_048_576, form)
