"""One table says what every dimension of every parameter means.

A pattern is searched in the path of a leaf; the arrow separates what a matrix reads from what it writes. The same
table serves parameters, their moving average, every optimizer moment, imported weights, and Muon, which has to know
which dimensions form the matrix. A stack of layers adds `layers` in front, and no pattern has to say so.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.errors import InputError
from mmx.parallel.mesh import spec

TABLE = (
    (r"(^|/)(query|key|value)(_[^/]*)?/kernel$", "embed -> heads head"),
    (r"(^|/)(query|key|value)(_[^/]*)?/bias$", "-> heads head"),
    (r"(^|/)out(_[^/]*)?/kernel$", "heads head -> embed"),
    (r"(^|/)(up|gate)/kernel$", "embed -> mlp"),
    (r"(^|/)(up|gate)/bias$", "-> mlp"),
    (r"(^|/)down/kernel$", "mlp -> embed"),
    (r"(^|/)patch/kernel$", "pixels -> embed"),
    (r"(^|/)conv[^/]*/kernel$", "pixels pixels -> embed"),
    (r"(^|/)plane[^/]*/kernel$", "pixels pixels pixels -> embed"),
    (r"(_linear|(^|/)linear)/kernel$", "pixels -> embed"),
    (r"(^|/)token/embedding$", "vocab -> embed"),
    (r"(^|/)embedding$", "length -> embed"),  # a small table: segments, rows, states of a pen
    (r"(^|/)decoder/kernel$", "embed -> vocab"),
    (r"decoder_bias$", "-> vocab"),
    (r"(^|/)(position|special|token|[^/]*_query|[^/]*_position)$", "length -> embed"),
    (r"(project|projection|transform)[^/]*/kernel$", "embed -> stream"),
    (r"(^|/)classifier[^/]*/kernel$", "embed -> head"),
    (r"(^|/)queue/", ""),  # negatives of earlier batches
    (r"(scale|bias|logit_scale|weight)[^/]*$", ""),  # small vectors and scalars: every device holds them
)
LARGE = 2**16  # elements; a leaf of this size or more must be named by the table


class Axes(NamedTuple):
    """The logical axes a parameter reads and writes, without the leading `layers`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.inputs + self.outputs


def logical_axes(path: str) -> Axes | None:
    """Returns the logical axes of the leaf at `path` (`a/b/kernel`, or `a/b/kernel/3` of one layer), or None if none names it."""
    path = re.sub(r"/\d+$", "", path)
    for pattern, axes in TABLE:
        if re.search(pattern, path):
            left, _, right = axes.partition("->")
            return Axes(tuple(left.split()), tuple(right.split()))
    return None


def path_of(key_path: Any) -> str:
    """The path of a leaf as text: `a/b/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def describe_leaf(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Returns a logical name (or None) for each dimension of a leaf.

    Raises:
        ValueError: the leaf is large and no pattern names it, or the pattern does not fit its shape.
    """
    axes = logical_axes(path)
    if axes is None or not axes.all:
        if axes is None and math.prod(shape) >= LARGE:
            raise InputError(
                f"sharding: {path} with shape {shape} is large ({math.prod(shape):,} elements) and no pattern of "
                f"mmx/parallel/sharding.py names its dimensions; add a line for it to TABLE"
            )
        return (None,) * len(shape)
    if not 0 <= len(shape) - len(axes.all) <= 1:
        raise InputError(f"sharding: {path} has shape {shape}, which does not fit its pattern {axes.all}")
    return ("layers",) * (len(shape) - len(axes.all)) + axes.all


def shardings(mesh: Mesh, tree: Any, params: Any = None) -> Any:
    """Returns the NamedSharding of every leaf of `tree` (arrays or shapes), found by its path.

    Where `tree` holds more than parameters, `params` says what their shapes are: a leaf that is named like a parameter
    and shaped otherwise is a reduced statistic (Adafactor's rows and columns), which every device holds whole.

    Raises:
        ValueError: a dimension is not divisible by the mesh axes that split it; says which, and what would divide it.
    """
    shapes = {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(key_path: Any, leaf: Any) -> NamedSharding:
        path, shape = path_of(key_path), tuple(leaf.shape)
        parameter = next((shapes[name] for name in _suffixes(path) if name in shapes), shape)
        names = describe_leaf(path, shape) if parameter == shape else (None,) * len(shape)
        parts = spec(*names)
        for size, name, part in zip(shape, names, parts, strict=True):
            axes = (part,) if isinstance(part, str) else part or ()
            pieces = math.prod(mesh.shape[axis] for axis in axes)
            if size % pieces:
                raise InputError(
                    f"sharding: dimension {name!r} of {path} has size {size}, which the mesh splits into {pieces} "
                    f"parts ({' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}). Choose a mesh size that "
                    f"divides {size}, or a model whose {name!r} is a multiple of {pieces}"
                )
        while parts and parts[-1] is None:
            parts = PartitionSpec(*parts[:-1])
        return NamedSharding(mesh, parts)

    return jax.tree_util.tree_map_with_path(one, tree)


def _suffixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]
