"""Published classes through mmx's public names, beside what the reference implementation returned.

    python tests/golden.py FOLDER...        prints the worst tensor of each folder

A folder holds config.json, model.safetensors, inputs.safetensors and outputs.safetensors (and a README that says which call
gave which output). Nothing of a model is here: only which call has which name.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.numpy

import mmx

TOLERANCE = 2e-5  # x max(1, largest value)


Arrays: TypeAlias = Mapping[str, np.ndarray]


def without(*names: str) -> Callable[[Arrays], Arrays]:
    """The inputs of a further call: all of the first one but these."""
    return lambda inputs: {name: x for name, x in inputs.items() if name not in names and "." not in name}


def zeros(*names: str) -> Callable[[Arrays], Arrays]:
    """The inputs of a further call: these are all zeros, and labels are left out."""
    return lambda inputs: {n: np.zeros_like(x) if n in names else x for n, x in without("labels")(inputs).items()}


@dataclasses.dataclass(frozen=True)
class Class:
    """Names of one published class: of the family, where config.json tells none, and of outputs, recorded name -> ours."""

    family: str | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what is given beside the inputs
    calls: Mapping[str, Callable[[Arrays], Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    # further calls: what the names of their recorded outputs begin with, and their inputs made from all that are stored
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # further calls with another configuration: what the names of their outputs begin with, and the fields that differ


CLASSES = {
    "BeitForMaskedImageModeling": Class(calls={"unmasked_": zeros("bool_masked_pos")}),
    "ViTMAEForPreTraining": Class(
        rename={"": "loss", **{f"encoder_{n}": n for n in ("last_hidden_state", "hidden_states")}},
        configs={f"loss_norm_pix_{normalised}": {"norm_pix_loss": normalised} for normalised in (False, True)},
    ),
    "MBT": Class(family="mbt", configs={"nobottleneck_test_": {"test_with_bottlenecks": False}}),
    "MBTCrossModal": Class(family="mbt"),
    "CLIPModel": Class(
        rename={
            **{f"text_{n}": f"text_model_output.{n}" for n in ("last_hidden_state", "hidden_states")},
            **{f"vision_{n}": f"vision_model_output.{n}" for n in ("last_hidden_state", "hidden_states")},
            "text_pooler_output": "text_features",
            "vision_pooler_output": "image_features",
        },
        call={"return_loss": True},
    ),
}


def run(folder: str | Path) -> dict[str, np.ndarray]:
    """Every recorded output, computed by mmx: the recorded names."""
    folder = Path(folder)
    inputs, recorded = (safetensors.numpy.load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    names = CLASSES.get(class_of(folder), Class())
    pretrained = mmx.load_pretrained(folder, family=names.family)
    given = {name: value for name, value in inputs.items() if "." not in name}
    fields = {"": flatten(pretrained(**given, **names.call, output_hidden_states=True))}
    for prefix, inputs_of in names.calls.items():
        fields[prefix] = flatten(pretrained(**{**names.call, **inputs_of(inputs)}, output_hidden_states=True))
    for prefix, change in ((p, c) for p, c in names.configs.items() if any(n.startswith(p) for n in recorded)):
        fields[prefix] = flatten(load(folder, names.family, change)(**given, **names.call, output_hidden_states=True))
    if "generate.sequences" in recorded:
        prompt = {name.removeprefix("generate."): value for name, value in inputs.items() if name.startswith("generate.")}
        others = {n: v for n, v in given.items() if n in ("pixel_values", "input_features")}
        steps = recorded["generate.logits"].shape[1]
        made = pretrained.generate(**{**others, **prompt}, max_new_tokens=steps)
        fields["generate."] = flatten(made)
    found = {}
    for name in recorded:
        prefix = max((p for p in fields if name.startswith(p)), key=len)
        field = ours(name.removeprefix(prefix), names.rename)
        if field in fields[prefix]:
            found[name] = np.asarray(fields[prefix][field])
    return found


def load(folder: Path, family: str | None, change: Mapping[str, Any]) -> mmx.zoo.Pretrained:
    """The weights of a folder with some fields of its configuration changed."""
    with tempfile.TemporaryDirectory() as other:
        for path in folder.glob("*.safetensors"):
            (Path(other) / path.name).symlink_to(path.resolve())
        fields = json.loads((folder / "config.json").read_text())
        (Path(other) / "config.json").write_text(json.dumps({**fields, **change}))
        return mmx.load_pretrained(other, family=family)


def class_of(folder: Path) -> str:
    """The published class: what config.json says, else the folder's name."""
    return json.loads((folder / "config.json").read_text()).get("architectures", [folder.name])[0]


def ours(name: str, rename: Mapping[str, str]) -> str:
    """The name of a recorded output in mmx's answer; those that end in numbers are members of a tuple."""
    head, _, last = name.rpartition(".")
    if last.isdigit() and head:
        return f"{rename.get(head, head)}.{last}"
    return rename.get(name, name)


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and tuples as one: `a.b.0`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = dict(enumerate(value)) if isinstance(value, tuple) else value
        if isinstance(inner, Mapping):
            flat |= flatten({str(n): v for n, v in inner.items()}, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def compare(folder: str | Path) -> dict[str, float]:
    """Recorded name -> difference as a share of what is allowed: above 1 it is too large, infinite where there is no answer."""
    recorded = safetensors.numpy.load_file(Path(folder) / "outputs.safetensors")
    found = run(folder)
    shares = {}
    for name, expected in recorded.items():
        if name not in found or found[name].shape != expected.shape:
            shares[name] = np.inf
        elif np.issubdtype(expected.dtype, np.integer):
            shares[name] = 0.0 if np.array_equal(found[name], expected) else np.inf
        else:
            allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
            shares[name] = float(np.abs(found[name] - expected).max()) / allowed
    return shares


def main() -> None:
    for folder in sys.argv[1:]:
        shares = compare(folder)
        worst = max(shares, key=lambda name: shares[name])
        print(
            f"{Path(folder).name:<36}{len(shares):>4} tensors, worst {worst}: {shares[worst]:.2f} of what is allowed", flush=True
        )


if __name__ == "__main__":
    main()
