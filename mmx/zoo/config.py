"""Published configurations: frozen dataclasses with the published names; what is not supported is named, not ignored."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmx.errors import InputError, unknown
from mmx.zoo.ignored import WITHOUT_EFFECT

Config = TypeVar("Config")

ACTIVATION = {  # published name -> ours
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """The published fields of a stack of layers, as most encoders have them."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"


@dataclasses.dataclass(frozen=True)
class Words(Layers):
    """Those of an encoder of text of BERT's kind."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2


@dataclasses.dataclass(frozen=True)
class Unsaid(Words):
    """Likewise, of code in which the eps of every norm is BERT's, and no field tells it."""

    @property
    def layer_norm_eps(self) -> float:
        return 1e-12


@dataclasses.dataclass(frozen=True)
class Pixels(Layers):
    """Those of an encoder of images of ViT's kind."""

    image_size: int | tuple = 224
    patch_size: int | tuple = 16
    num_channels: int = 3


@dataclasses.dataclass(frozen=True)
class Classes:
    """Those of a head that tells classes."""

    num_labels: int = 2
    problem_type: str | None = None  # which `mmx.zoo.loss.class_loss`; None: what the labels look like


def sized(layers: int, width: int, heads: int, mlp: int | None = None, **more: Any) -> dict[str, Any]:
    """The fields of `Layers` of one size; an MLP that is not told is four times as wide."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": mlp or 4 * width, **more}


def activation(name: str, field: str = "hidden_act") -> str:
    """Our name of a published activation."""
    if name not in ACTIVATION:
        raise InputError(f"{field}: " + unknown("activation", name, ACTIVATION))
    return ACTIVATION[name]


def only(config: Any, **supported: Any) -> None:
    """Raises an InputError for a field whose value is not among the supported ones, given as a tuple or a single one."""
    for name, values in supported.items():
        values = values if isinstance(values, tuple) else (values,)
        if getattr(config, name) not in values:
            raise InputError(
                f"{type(config).__name__}: {name}={getattr(config, name)!r} is not supported; "
                f"it has to be {' or '.join(map(repr, values))}"
            )


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        InputError: it is not JSON, or has no fields.
    """
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{file} is a {type(fields).__name__}; expected an object with named fields")
    return fields


def parse(cls: type[Config], fields: Mapping[str, Any], where: str = "config.json") -> Config:
    """A configuration from published fields, those that have no effect left out.

    Raises:
        InputError: a field that mmx does not know, by its name, or one of another type.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    if "num_labels" in known and "id2label" in fields:  # where a published configuration tells how many
        fields = {**fields, "num_labels": len(fields["id2label"])}
    for name, value in fields.items():
        if name not in known:
            if name in WITHOUT_EFFECT or name in getattr(cls, "without_effect", ()):
                continue
            raise InputError(f"{where}: {cls.__name__} has " + unknown("field", name, known) + ". It is not supported")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = parse(hint, value, f"{where}: {name}")  # type: ignore[arg-type]
        values[name] = _checked(value, hint, f"{where}: {cls.__name__}.{name}")
    return cls(**values)


def to_published(config: Any) -> dict[str, Any]:
    """The fields of a configuration as published: what `parse` reads."""
    return {
        f.name: to_published(value) if dataclasses.is_dataclass(value) else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def changed(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from the defaults of their class, as published."""
    values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    nested = {n: changed(value) for n, (value, _) in values.items() if dataclasses.is_dataclass(value)}
    return {n: value for n, (value, default) in values.items() if n not in nested and value != default} | nested


def override(config: Config, fields: Mapping[str, Any]) -> Config:
    """The configuration with some fields changed; those of a part by a mapping or as `part.field`, after it was replaced."""
    whole: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        part, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(part, {})[rest] = value
        elif isinstance(value, Mapping):
            nested.setdefault(name, {}).update(value)
        else:
            whole[name] = _frozen(value)
    known = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in (*whole, *nested):
        if name not in known:
            raise InputError(f"{type(config).__name__}: " + unknown("field", name, known))
    hints = typing.get_type_hints(type(config))

    def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _checked(value, hints[name], f"{type(config).__name__}.{name}") for name, value in fields.items()}

    config = dataclasses.replace(config, **checked(whole))  # type: ignore[type-var]
    parts = {name: getattr(config, name) for name in nested}
    parts = {n: override(part, nested[n]) if dataclasses.is_dataclass(part) else nested[n] for n, part in parts.items()}
    return dataclasses.replace(config, **checked(parts))  # type: ignore[type-var]


class Frozen(dict[Any, Any]):
    """A mapping that a configuration holds, so that it can be hashed; equal, and written, as any other mapping."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _frozen(value: Any) -> Any:
    """A published value as one that can be hashed."""
    if isinstance(value, Mapping):
        return Frozen({name: _frozen(v) for name, v in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value of a field if its type is right, such that it can be hashed."""
    value = value if dataclasses.is_dataclass(value) else _frozen(value)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(c) or c for c in choices if c is not Any)
    kinds += (int,) if float in kinds else ()
    if Any not in choices and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise InputError(f"{where}={value!r}; expected {expected}")
    return value
