"""Some of one model's weights into another: a BERT into a text tower, a ViT into an image tower."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmx.errors import InputError
from mmx.layers.positions import resample
from mmx.types import Params
from mmx.zoo.weights import flat


def transplant(
    params: Params,
    source: Params,
    mapping: Mapping[str, str],
    grids: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
) -> Params:
    """Returns `params` with parts of `source` in them; the rest stays as it is.

    Args:
        params: of the model that is to be trained.
        source: of a pretrained model.
        mapping: part of the source -> part of the model, as paths: `{"stages_0/text": "stages_0/text"}`. Every parameter of
            the part on the right has to be in the part on the left; what more there is on the left stays out.
        grids: for a table of positions on the right its (old, new) grid, where they differ: it is resampled.

    Raises:
        InputError: one error with every parameter that is missing or of another shape.
    """
    old, new = flat(source), flat(params)
    problems = []
    for left, right in mapping.items():
        inside = [path for path in new if path == right or path.startswith(right + "/")]
        if not inside:
            problems.append(f"the model has nothing at {right}; it has {', '.join(sorted(params))}")
        for path in inside:
            value = old.get(left + path.removeprefix(right))
            if value is None:
                problems.append(f"the source lacks {left + path.removeprefix(right)}, for {path}")
                continue
            if path in (grids or {}):
                value = _resample(value, *(grids or {})[path])
            if value.shape != new[path].shape:
                problems.append(f"{left + path.removeprefix(right)} is {value.shape}, {path} is {new[path].shape}")
            new[path] = value
    if problems:
        raise InputError(f"transplant: {len(problems)} parameters do not fit:\n  " + "\n  ".join(problems))
    leaves = [new["/".join(str(key.key) for key in path)] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _resample(table: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Any:
    """A table of positions for another grid; rows in front of it are those of special tokens, and stay."""
    front = len(table) - int(np.prod(old))
    if front < 0:
        raise InputError(f"transplant: a table of {len(table)} positions is not one of the grid {old}")
    return jax.numpy.concatenate([table[:front], resample(table[front:], old, new)])
