"""The mesh, and the one table from logical axes (what a dimension means) to mesh axes (where it lives).

    data    examples; parameters are copied            fsdp    examples; parameters are split over `embed`
    tensor  heads, mlp and vocabulary are split

Any size may be 1. Axis types are Auto: `jax.make_mesh` now defaults to Explicit, under which Linen does not run.
A mesh is always entered in a scope, `with jax.set_mesh(mesh):`, never set for the whole process.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmx.errors import InputError, unknown

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": ("fsdp",),
    "stream": (),  # the width of an activation: never split, or every layer would gather it
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "head": (),
    "vocab": ("tensor",),
    "layers": (),
    "pixels": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. At most one size may be -1: it takes the devices that are left."""

    data: int = -1
    """Copies of the model, each on its own part of the batch."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are split into; the batch is split over them too."""
    tensor: int = 1
    """Parts that heads, mlp and vocabulary are split into."""

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Returns the size of each axis on `devices` devices, or raises a ValueError that says what would fit."""
        sizes: dict[str, int] = dict(zip(AXES, (self.data, self.fsdp, self.tensor), strict=True))
        if bad := {axis: size for axis, size in sizes.items() if size == 0 or size < -1}:
            raise InputError(f"mesh: every size is a positive number, or -1 for 'the rest'; got {bad}")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise InputError(f"mesh: at most one size may be -1, got {sizes}; set mesh.{free[0]} to a number")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free:
            sizes[free[0]] = devices // fixed
        if math.prod(sizes.values()) != devices or (free and sizes[free[0]] == 0):
            asked = "x".join(str(size) for size in (self.data, self.fsdp, self.tensor))
            raise InputError(
                f"mesh: data x fsdp x tensor = {asked} does not use exactly the {devices} device(s) found. "
                f"Choose sizes whose product is {devices}"
                + ("; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 emulates 8 devices" if fixed > devices else "")
            )
        return tuple(sizes.values())


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over `devices` (all of them unless given)."""
    _give_emulated_devices_threads()
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _give_emulated_devices_threads() -> None:
    """Devices that XLA emulates wait for each other on threads of one pool. It has one for each core, which is too few:
    they lock, and the process is aborted. Has an effect only before JAX's first use of a device."""
    if emulated := re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("PJRT_NPROC", str(8 * int(emulated[1])))


def spec(*logical: str | None) -> PartitionSpec:
    """Logical names -> PartitionSpec. A mesh axis is used once, by the first that asks; an unknown name is an error."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for name in logical:
        if name is not None and name not in RULES:
            raise InputError(unknown("logical axis", name, RULES))
        axes = tuple(axis for axis in RULES.get(name or "", ()) if axis not in used)
        used.update(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Says how an activation lies on the mesh; the identity where no mesh is set, so that models are plain functions."""
    if x.ndim != len(logical):
        raise InputError(f"constrain: {len(logical)} logical axes {logical} for an array of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of anything whose first dimension is the batch."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the batch is split into; 1 where no mesh is set."""
    return math.prod(size for axis, size in mesh.shape.items() if axis in RULES["batch"])


def batch_axes(rows: int, axes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The axes of the current mesh that split a batch of so many rows; none where no mesh is set.

    Args:
        rows: of the batch.
        axes: their names, on a mesh that is not mmx's own.

    Raises:
        InputError: the mesh does not have them, or their devices do not divide the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and axes is None:
        return ()
    names = RULES["batch"] if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if mesh.empty:
        raise InputError(f"axes={names}: no mesh is set; enter one, `with jax.set_mesh(mesh):`")
    for name in names:
        if name not in mesh.shape:
            hint = "; name those of the batch by axes=" if axes is None else ""
            raise InputError(f"axes={names}: {unknown('mesh axis', name, mesh.shape)}{hint}")
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if explicit := [name for name in names if kinds[name] != AxisType.Auto]:
        raise InputError(f"axes={names}: {', '.join(explicit)} is not Auto; make the mesh with axis_types=(AxisType.Auto, ...)")
    if rows % (devices := math.prod(mesh.shape[name] for name in names)):
        raise InputError(
            f"a batch of {rows} rows cannot be split over {devices} devices, mesh axes {names}; take a multiple of {devices} rows"
        )
    return tuple(name for name in mesh.axis_names if name in names)  # a ring goes round in the order of the mesh
