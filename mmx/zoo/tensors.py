"""Published weights in safetensors files: views of what is read, one error for all that does not fit, our arrays and back."""

import concurrent.futures
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
from mmx.zoo.config import read_fields
from mmx.zoo.weights import Weight, flat

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

    What was there before of that layout goes, whole or in parts: a reader would take it for these weights.
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
    before = [folder / INDEX, folder / TITLE, *sorted(folder.glob("model-*-of-*.safetensors"))] if title == TITLE else []
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
