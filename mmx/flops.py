"""Counting the work of a program, and knowing what the device could do."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RULE = "matrix products of the forward passes x 3, attention in full, recomputation not counted"

DATASHEET = {  # dense bfloat16 FLOP/s of one device as JAX counts devices, by its device_kind
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the floating-point operations of the matrix products and convolutions of `function(*args)`.

    2 m n k for a product (m, k) x (k, n). Reads the traced program: a scan counts as often as it runs, a branch as its
    dearest arm, a loop of which the program does not tell how often it runs as once. Arguments may be shapes
    (`jax.ShapeDtypeStruct`); nothing is computed.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inner = [sub for value in eqn.params.values() for sub in _sub_jaxprs(value)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * sum(map(_count, inner))
        elif eqn.primitive.name == "cond":
            total += max(map(_count, inner), default=0)
        else:
            total += sum(map(_count, inner))
    return total


def _sub_jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in _sub_jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def peak_flops(devices: int) -> tuple[float, str]:
    """Returns the FLOP/s that many devices could reach together, and where the number comes from.

    Where the device is in no datasheet it is measured; emulated CPU devices share the cores that are measured.
    """
    device = jax.devices()[0]
    if device.device_kind in DATASHEET:
        return DATASHEET[device.device_kind] * devices, f"{device.device_kind} datasheet, bfloat16"
    together = 1 if device.platform == "cpu" else devices
    return _measured_peak() * together, f"measured, float32 matrix product of size {_SIZE}"


_SIZE = 1024


def _measured_peak() -> float:
    """FLOP/s of a large matrix product on the default device; the best of a few tries."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((_SIZE, _SIZE), np.float32))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best
