"""Folders in published layouts to `Pretrained` and back: whose they are, what tensors are called, what lies beside them."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mmx.errors import InputError, unknown, writing
from mmx.model import MultimodalTransformer, abstract_params
from mmx.parallel import shardings
from mmx.types import Params
from mmx.zoo import preprocess, tensors
from mmx.zoo.config import parse, read_fields
from mmx.zoo.family import Family, build
from mmx.zoo.preprocess import FILES
from mmx.zoo.pretrained import Pretrained
from mmx.zoo.weights import Layout, Weight, resolve

CONFIG = "config.json"
OLDER = {  # of all families
    r"LayerNorm\.weight$": "LayerNorm.gamma",
    r"LayerNorm\.bias$": "LayerNorm.beta",
    r"parametrizations\.weight\.original0$": "weight_g",
    r"parametrizations\.weight\.original1$": "weight_v",
}


def load_published(
    folder: str | Path,
    *,
    family: str | None = None,
    heads: Sequence[str] | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    remat: str | None = None,
    unroll: int | None = None,
) -> Pretrained:
    """`mmx.load_pretrained` of a folder in a published layout: `config.json` and safetensors, sharded index included.

    Or in the layout of another library that publishes models of the family, such as `open_clip_config.json` and its file.
    """
    folder = Path(folder)
    found, fields, file = _recognise(folder, family)
    library = found.library
    config = parse(found.config, library.read(fields) if library else fields, str(file))
    stored = tensors.Tensors(folder, library.titles if library else (tensors.TITLE,))
    config = config if found.infer is None else found.infer(config, stored.shapes)
    bare = bool(found.prefix) and not any(n.startswith(found.prefix + ".") for n in stored.shapes)
    if heads is None:
        begins = {head: tuple(_names(beginning, found.older)) for head, beginning in found.heads.items()}
        heads = tuple(head for head, names in begins.items() if any(n.startswith(names) for n in stored.shapes))
    model = build(found, config, heads, dtype, remat=remat, unroll=unroll)
    weights, params = _weights(found, config, model)
    names = {w.name: w.name.removeprefix(found.prefix + ".") for w in weights} if bare else {}
    for w in weights:
        name = names.get(w.name, w.name)
        names[w.name] = next((n for n in _names(name, found.older) if n in stored.shapes), name)
    known = [*found.known, *_of_others(found, config, heads)]
    tensors.check(weights, params, stored, known, names)
    where = shardings(mesh, params) if mesh is not None else None
    params = tensors.read(weights, params, stored, names, where)
    return as_published(folder, found, config, fields, tuple(heads), model, params)


def as_published(
    folder: Path,
    family: Family,
    config: Any,
    fields: Mapping[str, Any],
    heads: tuple[str, ...],
    model: MultimodalTransformer,
    params: Params,
) -> Pretrained:
    """A model with its weights, the tokenizer and the preprocessing that lie in a folder, and the fields it does not read."""
    library = family.library
    own = set() if library else {f.name for f in dataclasses.fields(family.config)}
    extra = {n: value for n, value in fields.items() if n not in own}
    files = {file: (folder / file).read_bytes() for file in FILES if (folder / file).exists()}
    length = family.length(config) if family.length else None
    rules = family.texts(config) if callable(family.texts) else family.texts
    steps = preprocess.read(folder, length, rules, family.video, family.sound)
    images = (library.images(fields) if library else None) or steps.images
    places = family.places(config) if family.places else None
    steps = dataclasses.replace(steps, images=images, names=family.prepared, places=places)
    return Pretrained(model, params, config, family, heads, steps, extra, files)


def _recognise(folder: Path, name: str | None) -> tuple[Family, dict[str, Any], Path]:
    """The family of a folder, under the names of the library that published it, and what the configuration in which file says."""
    from mmx.zoo import FAMILIES

    file = folder / CONFIG
    fields = read_fields(file) if file.exists() else {}
    name = name or fields.get("model_type")
    if name is not None and name not in FAMILIES:
        raise InputError(f"{folder}: " + unknown("family", name, FAMILIES))
    if fields.get("model_type") is None:
        for family in FAMILIES.values() if name is None else (FAMILIES[name],):
            for library in family.libraries:
                other = folder / library.file
                if other.exists() and library.holds(said := read_fields(other)):
                    return family.under(library), said, other
    if not file.exists():
        raise InputError(f"{folder}: no config.json; expected a folder with config.json and *.safetensors")
    if name is None:
        raise InputError(
            f"{file} has no model_type, and is of no model that mmx knows by another library's names; "
            f"name one: family={' or '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name], fields, file


def _of_others(family: Family, config: Any, heads: Sequence[str]) -> list[str]:
    """Patterns of the tensors of heads that are not among these."""
    others, patterns = [head for head in family.heads if head not in heads], []
    for name, target in family.table(config).items():
        paths = target.paths if isinstance(target, Layout) else (target,)
        if paths[0].startswith(tuple(f"heads_{head}/" for head in others)):
            patterns += [f"^{re.escape(n)}(\\.|$)" for n in _names(name, family.older)]
    return patterns + [f"^{re.escape(n)}" for head in others for n in _names(family.heads[head], family.older)]


def _names(name: str, older: Mapping[str, str]) -> list[str]:
    """What a tensor, or the beginning of its name, is called in files of any age: each change has been made since, or not."""
    names = [name]
    for pattern, before in {**older, **OLDER}.items():
        names += [changed for n in names if (changed := re.sub(pattern, before, n)) != n]
    return names


def save_pretrained(folder: str | Path, pretrained: Pretrained, dtype: str = "float32", shard: int = tensors.SHARD) -> None:
    """Writes a folder in the published layout, which `load_pretrained` and the original library read.

    Args:
        folder: created if it is not there.
        pretrained: what is written.
        dtype: of the file: float32, float16 or bfloat16.
        shard: the most bytes of a file; what is more is written into several.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family, library = pretrained.family, pretrained.family.library
    weights, _ = _weights(family, pretrained.config, pretrained.model)
    if not pretrained.heads:  # the bare model, whose names have no prefix
        weights = [dataclasses.replace(w, name=w.name.removeprefix(family.prefix + ".")) for w in weights]
    params = jax.device_get(pretrained.params)
    whole: dict[str, Any] = {"shard": shard} if library is None else {"shard": math.inf, "title": library.titles[0]}
    tensors.write(folder, weights, params, dtype, **whole)
    for name, content in pretrained.files.items():
        with writing(folder / name) as path:
            path.write_bytes(content)
    fields = pretrained.fields
    if library is not None:
        images = getattr(pretrained.preprocess, "images", None)
        fields = library.write(pretrained.config, pretrained.heads, images, pretrained.extra)
    with writing(folder / (library.file if library else CONFIG)) as path:
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _weights(family: Family, config: Any, model: MultimodalTransformer) -> tuple[list[Weight], Any]:
    params = abstract_params(model)
    return resolve(family.table(config), params), params
