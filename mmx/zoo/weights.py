"""Weights in published layouts: tables of names as data, for both directions.

A family's table maps a published module, or a single tensor, to ours:

    {"bert.encoder.layer.{}.attention.self.query": "stages_0/text/layers/block/self/query", ...}

`{}` is the number of a layer, and the leading axis of our array. A module's tensors follow from our leaves: `weight` is our
kernel, scale or embedding, `bias` our bias. A dense weight is published as (out, in); which dimensions of our kernel are
which is what `mmx.parallel.sharding` knows of its path. What is not so simple has a `Layout`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from mmx.parallel.sharding import logical_axes

SUFFIX = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LAYER = re.compile(r"\{(?:(\d+)\+(\d+))?\}")  # {} every layer; {6+1} from the seventh on; {0+2} every second one


@dataclasses.dataclass(frozen=True)
class Layout:
    """How published tensors lie that are not one dense (out, in), norm or embedding.

    Args:
        paths: ours; several ones lie side by side along the published output.
        window: of a convolution whose weight is (out, in, *window).
        transposed: whether a dense weight is (out, in); False: (in, out), as GPT-2's Conv1D and bare matrices are.
        shape: of a tensor that has other dimensions than ours, such as (1, 1, D); None: ours.
        row: which row of our leaf it is, where our rows are published as tensors of their own (special tokens).
    """

    paths: tuple[str, ...]
    window: tuple[int, ...] = ()
    transposed: bool = True
    shape: tuple[int, ...] | None = None
    row: int | None = None


def fused(*paths: str) -> Layout:
    """Several of our modules side by side in one published dense layer (out, in)."""
    return Layout(paths)


def conv1d(*paths: str) -> Layout:
    """GPT-2's Conv1D: a dense layer published as (in, out), of one or several of ours."""
    return Layout(paths, transposed=False)


def convolution(path: str, *window: int) -> Layout:
    """A convolution whose window moves by its own size: our dense layer over patches."""
    return Layout((path,), window=window)


def reshaped(path: str, *shape: int) -> Layout:
    """A tensor that is published with other dimensions."""
    return Layout((path,), shape=shape)


def row(path: str, number: int, *shape: int) -> Layout:
    """One row of our leaf that is published on its own, with other dimensions."""
    return Layout((path,), shape=shape, row=number)


Table = Mapping[str, str | Layout]


def flat(tree: Any) -> dict[str, Any]:
    """Nested dicts as one: `{"a/b/kernel": leaf}`."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def layers(published: str, ours: str, table: Table) -> Table:
    """A table for the modules of a layer, with their prefixes on both sides."""

    def put(target: str | Layout) -> str | Layout:
        if isinstance(target, str):
            return f"{ours}/{target}"
        return dataclasses.replace(target, paths=tuple(f"{ours}/{path}" for path in target.paths))

    return {f"{published}.{name}": put(target) for name, target in table.items()}


def attention_table(published: str, ours: str) -> Table:
    """The weights of torch's MultiheadAttention, whose queries, keys and values lie in one matrix."""
    return {
        f"{published}.in_proj_weight": Layout(tuple(f"{ours}/{n}/kernel" for n in ("query", "key", "value"))),
        f"{published}.in_proj_bias": fused(*(f"{ours}/{n}/bias" for n in ("query", "key", "value"))),
        f"{published}.out_proj": f"{ours}/out",
    }


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our leaves, or one layer of it, and the published tensor that holds it."""

    name: str  # of the published tensor
    path: str  # of our leaf
    layer: int | None  # of our leaf's leading axis, be it a layer or a row
    form: tuple[int, ...]  # of our leaf, without layers
    layout: Layout
    matrix: tuple[int, int] | None  # (in, out) of a dense weight
    start: int = 0  # of a part of a fused tensor, along its output
    whole: int | None = None  # length of the fused tensor's output

    @property
    def axis(self) -> int:
        """The published tensor's output axis."""
        return 1 if self.matrix and not self.layout.transposed else 0

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The published shape, without the neighbours in a fused tensor."""
        if self.layout.shape is not None:
            return self.layout.shape
        if self.matrix is None:
            return (math.prod(self.form),) if self.path.endswith(("/bias", "/scale")) else self.form
        inputs, outputs = self.matrix
        if self.layout.window:
            return (outputs, inputs // math.prod(self.layout.window), *self.layout.window)
        return (outputs, inputs) if self.layout.transposed else (inputs, outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        shape = list(self.part_shape)
        if self.whole is not None:
            shape[self.axis] = self.whole
        return tuple(shape)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The published tensor, or what it is fused of, as our leaf; where that can be, a view of it."""
        return self.lies_as_ours(array).reshape(self.form)

    def lies_as_ours(self, array: np.ndarray) -> np.ndarray:
        """Likewise, of a dense weight as a matrix (in, out)."""
        if self.whole is not None:
            ours = slice(self.start, self.start + self.part_shape[self.axis])
            array = array[(slice(None),) * self.axis + (ours,)]
        if self.matrix and self.layout.window:
            return np.moveaxis(array, (0, 1), (-1, -2)).reshape(self.matrix)
        return array.T if self.matrix and self.layout.transposed else array

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`, of the part."""
        if self.matrix and self.layout.window:
            outputs, inputs = self.part_shape[:2]
            array = np.moveaxis(array.reshape(*self.layout.window, inputs, outputs), (-1, -2), (0, 1))
        elif self.matrix and self.layout.transposed:
            array = array.reshape(self.matrix).T
        return np.asarray(array.reshape(self.part_shape), order="C")


def resolve(table: Table, params: Any) -> list[Weight]:
    """Every leaf of `params` (arrays or shapes) that the table names, layer by layer."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(params).items()}
    weights: list[Weight] = []
    for published, target in table.items():
        layout = target if isinstance(target, Layout) else Layout((target,))
        for suffix, leaves in _leaves(layout.paths, shapes).items():
            weights += _weights(published + suffix, leaves, layout, shapes)
    return weights


def _leaves(paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Published suffix -> our leaves: the leaf itself, or those of a module."""
    if paths[0] in shapes:
        return {"": list(paths)}
    return {f".{SUFFIX[leaf]}": [f"{path}/{leaf}" for path in paths] for leaf in SUFFIX if f"{paths[0]}/{leaf}" in shapes}


def _weights(name: str, leaves: Sequence[str], layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Weight]:
    match = LAYER.search(name)
    parts = []
    for path in leaves:
        form = shapes[path][1:] if match or layout.row is not None else shapes[path]
        axes = logical_axes(path) if path.endswith("/kernel") else None
        count = len(axes.inputs) if axes else 0
        dense = axes and (name.endswith("weight") or layout.window)
        matrix = (math.prod(form[:count]), math.prod(form[count:])) if dense else None
        parts.append(Weight(name, path, layout.row, form, layout, matrix))
    if len(parts) > 1:
        starts = np.cumsum([0] + [part.part_shape[part.axis] for part in parts])
        parts = [dataclasses.replace(p, start=int(s), whole=int(starts[-1])) for p, s in zip(parts, starts, strict=False)]
    if not match:
        return parts
    first, step = int(match[1] or 0), int(match[2] or 1)
    return [
        dataclasses.replace(part, name=LAYER.sub(str(first + step * i), name), layer=i)
        for part in parts
        for i in range(shapes[part.path][0])
    ]
