"""Meshes and shardings. `mesh` is the one file that names a mesh axis; `sharding` is the one table of parameters."""

from mmx.parallel.mesh import MeshConfig, batch_sharding, constrain, make_mesh, replicated, spec
from mmx.parallel.sharding import describe_leaf, logical_axes, shardings

__all__ = [
    "MeshConfig",
    "batch_sharding",
    "constrain",
    "describe_leaf",
    "logical_axes",
    "make_mesh",
    "replicated",
    "shardings",
    "spec",
]
