"""Weights in published layouts: tables of names as data, read and written as safetensors, in both directions.

A family's table maps a published module, or a single tensor, to ours:

    {"bert.encoder.layer.{}.attention.self.query": "stages_0/text/layers/block/self/query", ...}

`{}` is the number of a layer, and the leading axis of our array. A module's tensors follow from our leaves: `weight` is our
kernel, scale or embedding, `bias` our bias. A dense weight is published as (out, in); which dimensions of our kernel are
which is what `mmx.parallel.sharding` knows of its path. What is not so simple has a `Layout`.
"""

import concurrent.futures
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mmx.errors import InputError, writing
from mmx.parallel.sharding import logical_axes
from mmx.zoo.config import read_fields

SUFFIX = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LAYER = re.compile(r"\{(?:(\d+)\+(\d+))?\}")  # {} every layer; {6+1} from the seventh on; {0+2} every second one
TITLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
KINDS = {  # types by their names in a safetensors file
    "BOOL": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}".lower()) for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
THREADS = 8  # that read; more than a core has, because a disk makes them wait
TILE = 64  # columns that are transposed at once, so that what was read is still in the cache when it is read again
ALIGNED = 64  # bytes; an array that begins so is put on a CPU without a copy
SHARD = 5 * 2**30  # bytes of a file that is written


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


class Tensors:
    """The tensors of a folder by their names, of one safetensors file or of several with an index; read when asked for.

    Args:
        folder: where they lie.
        titles: of the file, by preference.
    """

    def __init__(self, folder: Path, titles: Sequence[str] = (TITLE,)):
        self.folder = folder
        files = [folder / title for title in titles if (folder / title).exists()][:1]
        if (folder / INDEX).exists() and TITLE in titles:
            names = sorted(set(read_fields(folder / INDEX)["weight_map"].values()))
            if absent := [name for name in names if not (folder / name).exists()]:
                raise InputError(f"{folder}: {INDEX} names {', '.join(absent)}, which is not there; fetch every part")
            files = [folder / name for name in names]
        if not files:
            raise InputError(
                f"{folder}: no {' or '.join(titles)} and no {INDEX}; expected published weights beside the configuration"
            )
        self._views: dict[str, np.ndarray] = {}
        for file in files:
            try:
                safetensors.safe_open(str(file), "numpy")  # for what it checks; its tensors would be copies
            except Exception as error:
                raise InputError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
            self._views |= _views(file)
        self.shapes = {name: view.shape for name, view in self._views.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """A view of the file."""
        return self._views[name]


def _views(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of it: 8 bytes for the length of a header, the header in JSON, the numbers."""
    content = np.memmap(file, np.uint8, "r")
    begin = 8 + int(content[:8].view("<u8")[0])
    header = json.loads(content[8:begin].tobytes())
    return {
        name: content[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
        .view(KINDS[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def check(weights: Sequence[Weight], params: Any, tensors: Tensors, known: Iterable[str], names: Mapping[str, str]) -> None:
    """Raises one error with every name that is missing, unexpected, or of another shape.

    Args:
        weights: what is wanted.
        params: our leaves.
        tensors: what there is.
        known: patterns of names that may be there and are not read: buffers, copies, heads that were not asked for.
        names: wanted name -> name in the file.
    """
    wanted = {names.get(w.name, w.name): w for w in weights}
    ours = set(flat(params)) - {w.path for w in weights}
    problems = [f"missing: {name} {w.shape}" for name, w in wanted.items() if name not in tensors.shapes]
    problems += [f"without a published name: {path}" for path in sorted(ours)]
    problems += [
        f"of another shape: {name} is {tensors.shapes[name]}, the configuration asks for {w.shape}"
        for name, w in wanted.items()
        if name in tensors.shapes and tensors.shapes[name] != w.shape
    ]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in known) or r"(?!)")
    problems += [f"unexpected: {n} {s}" for n, s in tensors.shapes.items() if n not in wanted and not ignored.search(n)]
    if problems:
        raise InputError(
            f"{tensors.folder}: the weights do not fit the configuration ({len(problems)} tensors):\n  " + "\n  ".join(problems)
        )


def read(weights: Sequence[Weight], params: Any, tensors: Tensors, names: Mapping[str, str], shardings: Any = None) -> Any:
    """Our parameters from published tensors, as float32, one leaf (or one layer of it) at a time.

    With `shardings`, every device gets its part of a leaf and nothing else.
    """
    by_path: dict[str, dict[int | None, Weight]] = {}
    for weight in weights:  # of several published names of one leaf, the first one of the table is read
        by_path.setdefault(weight.path, {}).setdefault(weight.layer, weight)
    targets = flat(shardings) if shardings is not None else {}

    def load(path: str, leaf: Any) -> jax.Array:
        parts = list(by_path[path].values())
        arrays = [tensors[names.get(w.name, w.name)] for w in parts]

        def part(index: Any) -> np.ndarray:
            if parts[0].layer is None:
                return _gather([parts[0].to_ours(arrays[0])[index]])[0]
            chosen = index[0] if index else slice(None)
            return _gather([w.to_ours(a)[index[1:]] for w, a in zip(parts[chosen], arrays[chosen], strict=True)])

        if path in targets:
            return jax.make_array_from_callback(leaf.shape, targets[path], part)
        whole = _gather([w.lies_as_ours(a) for w, a in zip(parts, arrays, strict=True)])
        return jax.device_put(whole.reshape(leaf.shape))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        shapes = flat(params)
        leaves = dict(zip(shapes, pool.map(load, shapes, shapes.values()), strict=True))
    return traverse_util.unflatten_dict(leaves, sep="/")


def _gather(views: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one shape as one in float32, in a new row each."""
    shape = (len(views), *views[0].shape)
    size = 4 * math.prod(shape)
    room = np.empty(size + ALIGNED, np.uint8)
    begin = -room.ctypes.data % ALIGNED
    new = room[begin : begin + size].view(np.float32).reshape(shape)
    for i, view in enumerate(views):
        step = TILE if view.ndim > 1 and not view.flags.c_contiguous else max(shape)
        for start in range(0, shape[-1] if view.ndim else 1, step):
            tile = (..., slice(start, start + step)) if view.ndim else ()
            new[(i, *tile)] = view[tile]
    return new


def write(
    folder: Path, weights: Sequence[Weight], params: Any, dtype: str = "float32", shard: float = SHARD, title: str = TITLE
) -> None:
    """Writes our parameters in the published layout: one file, or several `model-...` of `shard` bytes and their index.

    An index and parts of that layout that were there before go: a reader would take them for these weights.
    """
    leaves = flat(params)
    parts: dict[str, list[tuple[Weight, np.ndarray]]] = {}
    for weight in weights:
        array = np.asarray(leaves[weight.path] if weight.layer is None else leaves[weight.path][weight.layer])
        parts.setdefault(weight.name, []).append((weight, weight.to_published(array)))
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name: np.ascontiguousarray(np.concatenate([a for _, a in several], several[0][0].axis).astype(kind))
        if len(several) > 1
        else several[0][1].astype(kind)
        for name, several in parts.items()
    }
    files: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if files[-1] and sum(a.nbytes for a in files[-1].values()) + array.nbytes > shard:
            files.append({})
        files[-1][name] = array
    titles = [title]
    if len(files) > 1:
        titles = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    before = [folder / INDEX, *sorted(folder.glob("model-*-of-*.safetensors"))] if title == TITLE else []
    for path in before:
        with writing(path):
            path.unlink(missing_ok=True)
    for title, content in zip(titles, files, strict=True):
        with writing(folder / title) as path:
            safetensors.numpy.save_file(content, str(path), {"format": "pt"})
    if len(files) > 1:
        index = {name: title for title, content in zip(titles, files, strict=True) for name in content}
        total = sum(array.nbytes for array in tensors.values())
        with writing(folder / INDEX) as path:
            path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2))
