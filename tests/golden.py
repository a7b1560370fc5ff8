"""Published classes through mmx's public names, beside what the reference implementation returned.

    python tests/golden.py FOLDER...        prints the worst tensor of each folder

A folder of a model holds config.json, model.safetensors, inputs.safetensors and outputs.safetensors (and a README that says which call
gave which output). Nothing of a model is here: only which call has which name. Folders of losses: `golden_losses`.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import golden_losses
import numpy as np
import safetensors.numpy

import mmx

TOLERANCE = 2e-5  # x max(1, largest value)
Arrays: TypeAlias = Mapping[str, np.ndarray]


def without(*names: str) -> Callable[[Arrays], Arrays]:
    """The inputs of a further call: all of the first one but these."""
    return lambda inputs: {name: x for name, x in inputs.items() if name not in names and "." not in name}


def those(*names: str) -> Callable[[Arrays], Arrays]:
    """The inputs of a further call: these of the first one."""
    return lambda inputs: {name: inputs[name] for name in names if name in inputs}


def zeros(*names: str) -> Callable[[Arrays], Arrays]:
    """The inputs of a further call: these are all zeros, and labels are left out."""
    return lambda inputs: {n: np.zeros_like(x) if n in names else x for n, x in without("labels")(inputs).items()}


@dataclasses.dataclass(frozen=True)
class Class:
    """Names of one published class.

    Args:
        family: where config.json tells none.
        rename: recorded output -> ours.
        call: what is given beside the inputs.
        source: the inputs of the call that are given to generation too.
        calls: further calls: what the names of their recorded outputs begin with, and their inputs from all that are stored.
        configs: further calls with other fields in the configuration: what the names of their outputs begin with.
        nested: inputs that are dicts of tuples: the recorded a.b.c is member c of a["b"].
        rows: recorded output -> from the inputs, which of ours were recorded.
    """

    family: str | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: tuple[str, ...] = ("pixel_values", "input_features")
    calls: Mapping[str, Callable[[Arrays], Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    nested: tuple[str, ...] = ()
    rows: Mapping[str, Callable[[Arrays], Any]] = dataclasses.field(default_factory=dict)


TOWERS = {f"{t}_{n}": f"{t}_model_output.{n}" for t in ("text", "vision") for n in ("last_hidden_state", "hidden_states")}
POOLED = {f"{tower}_pooler_output": f"{tower}_model_output.pooler_output" for tower in ("text", "vision")}
MASKED_WORDS = {name: lambda inputs: inputs["txt_labels"] != -1 for name in ("scores.mlm", "loss.mlm")}
MASKED_REGIONS = {
    f"{kind}.{task}": lambda inputs: inputs["img_mask_tgt"] == 1
    for kind in ("scores", "loss")
    for task in ("mrfr", "mrc", "mrc-kl")
}
CLASSES = {
    "ALBEFMultimodalEncoder": Class("albef"),
    "BEiT3": Class(
        "beit3",
        calls={"text.": those("textual_tokens", "text_padding_position"), "image.": those("visual_tokens")},
    ),
    "BeitForMaskedImageModeling": Class(calls={"unmasked_": zeros("bool_masked_pos")}),
    "BertForMultiModalPreTraining": Class("vilbert", call={"output_all_encoded_layers": True}),
    "Blip2QFormerModel": Class(
        calls={
            "text.": lambda x: {
                "query_embeds": x["text.query_embeds"],
                "attention_mask": x["text.attention_mask"],
                "encoder_hidden_states": x["encoder_hidden_states"],
                "query_length": x["query_embeds"].shape[1],
            },
            "textonly.": lambda x: {
                "query_embeds": x["text.query_embeds"][:, x["query_embeds"].shape[1] :],
                "attention_mask": x["text.attention_mask"][:, x["query_embeds"].shape[1] :],
                "query_length": 0,
            },
        }
    ),
    "BlipForConditionalGeneration": Class(rename={"text_last_hidden_state": "text_model_output.last_hidden_state"}),
    "BlipForImageTextRetrieval": Class(
        rename={"question_embeds_itm": "question_embeds", "question_embeds_itc": "question_embeds_alone"}
    ),
    **{
        name: Class(call={"output_attentions": True})
        for name in ("BridgeTowerModel", "BridgeTowerForMaskedLM", "BridgeTowerForImageAndTextRetrieval")
    },
    "BridgeTowerForContrastiveLearning": Class(call={"output_attentions": True, "return_loss": True}),
    "CLIPModel": Class(
        rename={**TOWERS, "text_pooler_output": "text_features", "vision_pooler_output": "image_features"},
        call={"return_loss": True},
    ),
    "CoCa": Class("coca", rename={"loss_contrastive": "contrastive_loss", "loss_caption_x2": "caption_loss"}),
    "FlavaForPreTraining": Class(
        rename={
            **{f"{n}_pooler_output": f"{n}_output.pooler_output" for n in ("image", "text", "multimodal")},
            **{f"unimodal.{n}_loss": f"loss_info.{n}" for n in ("mim", "mlm")},
            **{f"unimodal.{n}_logits": f"{n}_logits" for n in ("mim", "mlm")},
        },
        call={"skip_unmasked_multimodal_encoder": False, "return_loss": True},
        calls={
            "unimodal.mim_": those("pixel_values", "bool_masked_pos", "mim_labels"),
            "unimodal.mlm_": those("input_ids", "input_ids_masked", "attention_mask", "token_type_ids", "mlm_labels"),
        },
    ),
    "GitForCausalLM": Class(rename={"vision_last_hidden_state": "vision_model_output.last_hidden_state"}),
    "InterBertForMultiModalPreTraining": Class("interbert"),
    "LayoutLMv3Model": Class(calls={"textonly_": without("pixel_values"), "imageonly_": those("pixel_values")}),
    "LxmertForPreTraining": Class(
        rename={f"visual_head.{n}": f"obj_predict_head.{n}" for n in ("obj", "attr", "feat")}, nested=("obj_labels",)
    ),
    "MBT": Class("mbt", configs={"nobottleneck_test_": {"test_with_bottlenecks": False}}),
    "MBTCrossModal": Class("mbt"),
    "MarianMTModel": Class(source=("input_ids", "attention_mask")),
    "MULTModel": Class("mult"),
    "PaliGemmaForConditionalGeneration": Class(calls={"notype_": without("token_type_ids", "labels")}),
    "Siglip2Model": Class(rename=TOWERS | POOLED, call={"return_loss": True}),
    "SiglipModel": Class(rename=TOWERS | POOLED, call={"return_loss": True}, calls={"nomask_": without("attention_mask")}),
    "T5ForConditionalGeneration": Class(source=("input_ids", "attention_mask")),
    "UniVL": Class("univl"),
    "UniterForPretraining": Class(
        "uniter",
        rename={"wra.ot_pos_dist": "wra", "wra.ot_neg_dist": "wra"},
        rows={
            **MASKED_WORDS,
            **MASKED_REGIONS,
            "wra.ot_pos_dist": lambda inputs: inputs["targets"] == 1,
            "wra.ot_neg_dist": lambda inputs: inputs["targets"] == 0,
        },
    ),
    "ViTMAEForPreTraining": Class(
        rename={"": "loss", **{f"encoder_{n}": n for n in ("last_hidden_state", "hidden_states")}},
        configs={f"loss_norm_pix_{normalised}": {"norm_pix_loss": normalised} for normalised in (False, True)},
    ),
    "ViltModel": Class(rename={f"raster.{n}": n for n in ("image_mask", "image_last_hidden_state")}),
    "VisionTextDualEncoderModel": Class(rename=TOWERS | POOLED, call={"return_loss": True}),
    "Wav2Vec2Model": Class(calls={"nomask_": without("attention_mask")}),
}


def recorded(folder: Path) -> dict[str, np.ndarray]:
    """What the reference returned."""
    return safetensors.numpy.load_file(folder / "outputs.safetensors")


def given(folder: Path) -> dict[str, Any]:
    """The inputs of the first call."""
    inputs = safetensors.numpy.load_file(folder / "inputs.safetensors")
    return first_call(inputs, CLASSES.get(class_of(folder), Class()).nested)


def run(folder: str | Path) -> dict[str, np.ndarray]:
    """Every recorded output, computed by mmx: the recorded names."""
    folder = Path(folder)
    if golden_losses.call_of(folder):
        return golden_losses.run(folder)
    inputs, wanted, first = safetensors.numpy.load_file(folder / "inputs.safetensors"), recorded(folder), given(folder)
    names = CLASSES.get(class_of(folder), Class())
    pretrained = mmx.load_pretrained(folder, family=names.family)
    fields = {"": flatten(pretrained(**first, **names.call, output_hidden_states=True))}
    for prefix, inputs_of in ((p, c) for p, c in names.calls.items() if any(n.startswith(p) for n in wanted)):
        fields[prefix] = flatten(pretrained(**{**names.call, **inputs_of(inputs)}, output_hidden_states=True))
    for prefix, change in ((p, c) for p, c in names.configs.items() if any(n.startswith(p) for n in wanted)):
        fields[prefix] = flatten(load(folder, names.family, change)(**first, **names.call, output_hidden_states=True))
    if "generate.sequences" in wanted:
        prompt = {name.removeprefix("generate."): value for name, value in inputs.items() if name.startswith("generate.")}
        others = {n: v for n, v in first.items() if n in names.source}
        steps = wanted["generate.logits"].shape[1]
        endless = mmx.Decoding(end=())  # as they were recorded
        fields["generate."] = flatten(pretrained.generate(steps, endless, **{**others, **prompt}))
    found = {}
    for name in wanted:
        prefix = max((p for p in fields if name.startswith(p)), key=len)
        field = names.rename.get(name, ours(name.removeprefix(prefix), names.rename))
        if field in fields[prefix]:
            value = np.asarray(fields[prefix][field])
            found[name] = value[names.rows[name](inputs)] if name in names.rows else value
    return found


def first_call(inputs: Arrays, nested: Sequence[str]) -> dict[str, Any]:
    """What is stored under names without a dot, and what is `nested`."""
    given: dict[str, Any] = {name: value for name, value in inputs.items() if "." not in name}
    for name, _, last in (name.partition(".") for name in inputs):
        if name in nested:
            key = last.partition(".")[0]
            members = {n: x for n, x in inputs.items() if n.startswith(f"{name}.{key}.")}
            given.setdefault(name, {})[key] = tuple(members[n] for n in sorted(members, reverse=True))
    return given


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
    config = folder / "config.json"
    fields = json.loads(config.read_text()) if config.exists() else {}
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


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """The difference as a share of what is allowed: above 1 it is too large."""
    if not np.issubdtype(expected.dtype, np.inexact):
        return 0.0 if np.array_equal(found, expected) else np.inf
    finite = np.isfinite(expected)
    if not (np.isfinite(found[finite]).all() and np.array_equal(found[~finite], expected[~finite], equal_nan=True)):
        return np.inf
    largest = float(np.abs(expected[finite]).max(initial=1.0))
    return float(np.abs(found[finite] - expected[finite]).max(initial=0.0)) / (TOLERANCE * largest)


def compare(folder: str | Path) -> dict[str, float]:
    """Recorded name -> the share of what is allowed, infinite where there is no answer."""
    found, wanted = run(folder), recorded(Path(folder))
    there = {name for name, expected in wanted.items() if name in found and found[name].shape == expected.shape}
    return {name: share(found[name], expected) if name in there else np.inf for name, expected in wanted.items()}


def main() -> None:
    for folder in sys.argv[1:]:
        shares = compare(folder)
        worst = max(shares, key=lambda name: shares[name])
        print(
            f"{Path(folder).name:<36}{len(shares):>4} tensors, worst {worst}: {shares[worst]:.2f} of what is allowed", flush=True
        )


if __name__ == "__main__":
    main()
