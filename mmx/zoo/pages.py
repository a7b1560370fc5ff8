"""A page of every family of published models, made from the code: `docs/models.md`."""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.modalities import PackedPatches, Patches
from mmx.modalities.catalogue import example_shape
from mmx.zoo import MODULES, create_model
from mmx.zoo.family import Family, build

PAPER = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
COUNT = re.compile(r"^\| `(\S+)` \| ([\d,]+) \|$", re.M)
HEAD = """# Published models

Made from the code by `python tests/test_pages.py`; what stands here is what `mmx.create_model` and `mmx.load_pretrained` know.
Parameters are those of the bare model, without heads. Inputs and outputs are those that the parity tests compare.
"""
Call = tuple[Sequence[str], Sequence[str]]


def markdown(counts: Mapping[str, int], calls: Mapping[str, Call]) -> str:
    """The pages of all families, one after the other.

    Args:
        counts: parameters by published name.
        calls: by family, the published inputs and outputs of a call.
    """
    pages = [HEAD]
    for module in (importlib.import_module(f"mmx.zoo.{name}") for name in MODULES):
        pages += [_page(str(module.__doc__), family, counts, calls.get(family.name)) for family in module.FAMILIES]
    return "\n".join(pages)


def counts_of(text: str) -> dict[str, int]:
    """The parameters by published name that stand in pages."""
    return {name: int(count.replace(",", "")) for name, count in COUNT.findall(text)}


def _page(about: str, family: Family, counts: Mapping[str, int], call: Call | None) -> str:
    model = create_model(next(iter(family.names))) if family.names else build(family, family.config(), (), "float32")
    streams = [f"`{name}` ({type(m).__name__}: {example_shape(m)})" for name, m in model.modalities.items()]  # type: ignore[arg-type]
    lines = [f"- streams of `{next(iter(family.names), family.config.__name__)}`: {', '.join(streams)}"]
    if call is not None:
        lines += [f"- {kind}: {_code(names)}" for kind, names in zip(("inputs", "outputs"), call, strict=True)]
    lines += [f"- heads: {_code(family.heads)}"] if family.heads else []
    lines += [f"- writes: `generate` continues `{family.generation.ids}`"] if family.generation else []
    lines += [f"- `preprocess`: {'; '.join(steps)}"] if (steps := _steps(family, model.modalities)) else []
    lines += [f"- configuration: {_fields(family.config())}"]
    table = ["| name | parameters |", "|---|---|", *(f"| `{name}` | {counts.get(name, 0):,} |" for name in family.names)]
    about = PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", about.strip())
    return "\n".join(
        [f"## `{family.name}`", "", about, "", *lines, "", *(table if family.names else ["No published names."]), ""]
    )


def _steps(family: Family, modalities: Mapping[str, Any]) -> list[str]:
    """What is prepared of each kind of raw value, where the folder has the files for it."""
    steps = []
    if callable(family.texts):
        steps.append("`texts` (as the tower that reads them)")
    elif family.texts is not None:
        rules = ", ".join(f"{f.name} {value!r}" for f, value in _changed(family.texts))
        steps.append(f"`{'words, boxes' if family.texts.page is not None else 'texts'}`" + (f" ({rules})" if rules else ""))
    if family.video:
        steps.append("`videos`")
    elif "image" in modalities and type(modalities["image"]) in (Patches, PackedPatches):
        steps.append("`images`")
    if family.sound is not None:
        steps.append(f"`audio` ({str(family.sound.__doc__).strip().splitlines()[0].rstrip('.')})")
    return steps


def _changed(value: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields that are not what they are by default."""
    return [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]


def _fields(config: Any) -> str:
    """The fields of a configuration and their defaults, those of its parts in brackets."""
    return ", ".join(
        f"`{f.name}` ({_fields(value)})" if dataclasses.is_dataclass(value) else f"`{f.name}={value!r}`"
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    )


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
