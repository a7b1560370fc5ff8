"""Published classes through mmx's public names, beside what the reference implementation returned.

    python tests/golden.py FOLDER...        prints the worst tensor of each folder

A folder holds config.json, model.safetensors, inputs.safetensors and outputs.safetensors (and a README that says which call
gave which output). Nothing of a model is here: only which call has which name.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import mmx

TOLERANCE = 2e-5  # x max(1, largest value)


@dataclasses.dataclass(frozen=True)
class Class:
    """Names of one published class: of the family, where config.json tells none, and of outputs, recorded name -> ours."""

    family: str | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what is given beside the inputs
    without: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  # prefix of a further call's outputs -> not given


CLASSES = {
    "CLIPModel": Class(
        rename={
            **{f"text_{n}": f"text_model_output.{n}" for n in ("last_hidden_state", "hidden_states")},
            **{f"vision_{n}": f"vision_model_output.{n}" for n in ("last_hidden_state", "hidden_states")},
            "text_pooler_output": "text_features",
            "vision_pooler_output": "image_features",
        },
        call={"return_loss": True},
    ),
    "PaliGemmaForConditionalGeneration": Class(without={"notype_": ("token_type_ids", "labels")}),
}


def run(folder: str | Path) -> dict[str, np.ndarray]:
    """Every recorded output, computed by mmx: the recorded names."""
    folder = Path(folder)
    inputs, recorded = (safetensors.numpy.load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    names = CLASSES.get(class_of(folder), Class())
    pretrained = mmx.load_pretrained(folder, family=names.family)
    given = {name: value for name, value in inputs.items() if "." not in name}
    fields = flatten(pretrained(**given, **names.call, output_hidden_states=True))
    for prefix, absent in names.without.items():
        made = pretrained(**{n: v for n, v in given.items() if n not in absent}, **names.call)
        fields |= {f"{prefix}{name}": value for name, value in flatten(made).items()}
    if "generate.sequences" in recorded:
        prompt = {name.removeprefix("generate."): value for name, value in inputs.items() if name.startswith("generate.")}
        others = {n: v for n, v in given.items() if n in ("pixel_values", "input_features")}
        steps = recorded["generate.logits"].shape[1]
        made = pretrained.generate(**{**others, **prompt}, max_new_tokens=steps)
        fields |= {f"generate.{name}": value for name, value in flatten(made).items()}
    return {name: np.asarray(fields[ours(name, names.rename)]) for name in recorded if ours(name, names.rename) in fields}


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
