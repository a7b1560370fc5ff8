"""Published classes through mmx's public names, beside what the reference implementation returned.

    python tests/golden.py FOLDER...        prints the worst tensor of each folder

A folder holds config.json, model.safetensors, inputs.safetensors and outputs.safetensors (and a README that says which call
gave which output). Nothing of a model is here: only which call has which name.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
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
    rows: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)  # inputs -> which of ours were recorded
    nested: tuple[str, ...] = ()  # inputs that are dicts of tuples: the recorded a.b.c is member c of a["b"]


MASKED_WORDS = {name: lambda inputs: inputs["txt_labels"] != -1 for name in ("scores.mlm", "loss.mlm")}
MASKED_REGIONS = {
    f"{kind}.{task}": lambda inputs: inputs["img_mask_tgt"] == 1
    for kind in ("scores", "loss")
    for task in ("mrfr", "mrc", "mrc-kl")
}
CLASSES = {
    "InterBertForMultiModalPreTraining": Class(family="interbert"),
    "BertForMultiModalPreTraining": Class(family="vilbert", call={"output_all_encoded_layers": True}),
    "UniterForPretraining": Class(
        family="uniter",
        rename={"wra.ot_pos_dist": "wra", "wra.ot_neg_dist": "wra"},
        rows={
            **MASKED_WORDS,
            **MASKED_REGIONS,
            "wra.ot_pos_dist": lambda inputs: inputs["targets"] == 1,
            "wra.ot_neg_dist": lambda inputs: inputs["targets"] == 0,
        },
    ),
    "LxmertForPreTraining": Class(
        rename={f"visual_head.{n}": f"obj_predict_head.{n}" for n in ("obj", "attr", "feat")},
        nested=("obj_labels",),
    ),
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
    given: dict[str, Any] = {name: value for name, value in inputs.items() if "." not in name}
    for name, _, last in (name.partition(".") for name in inputs):
        if name in names.nested:
            key = last.partition(".")[0]
            members = {n: x for n, x in inputs.items() if n.startswith(f"{name}.{key}.")}
            given.setdefault(name, {})[key] = tuple(members[n] for n in sorted(members, reverse=True))
    fields = flatten(pretrained(**given, **names.call, output_hidden_states=True))
    if "generate.sequences" in recorded:
        prompt = {name.removeprefix("generate."): value for name, value in inputs.items() if name.startswith("generate.")}
        others = {n: v for n, v in given.items() if n in ("pixel_values", "input_features")}
        steps = recorded["generate.logits"].shape[1]
        made = pretrained.generate(**{**others, **prompt}, max_new_tokens=steps)
        fields |= {f"generate.{name}": value for name, value in flatten(made).items()}
    found = {name: np.asarray(fields[ours(name, names.rename)]) for name in recorded if ours(name, names.rename) in fields}
    return {name: value[names.rows[name](inputs)] if name in names.rows else value for name, value in found.items()}


def class_of(folder: Path) -> str:
    """The published class: what config.json says, else the folder's name."""
    fields = json.loads((folder / "config.json").read_text())
    named = [*fields.get("architectures", ()), fields.get("reference_class"), folder.name]
    return next((name for name in named if name in CLASSES), folder.name)


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
