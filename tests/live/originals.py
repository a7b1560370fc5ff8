"""Published classes as the original libraries have them, with random weights, written in the form that `golden.compare` reads."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import golden
import numpy as np
import safetensors.torch
import torch
import transformers

PUBLISHED = Path(__file__).parent.parent / "published"
STEPS, GAP, SEEDS = 6, 5e-3, 20  # of what is written: how many ids; how far the likeliest is ahead; how often that is tried


@dataclasses.dataclass(frozen=True)
class Variant:
    """A configuration that differs from the fixture's, and what the model is called with.

    Args:
        fields: of the configuration; those of a part by a mapping.
        batch: examples.
        length: of a text.
        side: where it is padded; None: nowhere.
        image: (height, width); None: as the configuration says.
        without: inputs that are left out.
        refused: mmx does not have it and says so: the field that its error names.
    """

    fields: Mapping[str, Any]
    batch: int = 3
    length: int = 9
    side: str | None = "right"
    image: tuple[int, int] | None = None
    without: tuple[str, ...] = ()
    refused: str | None = None


def variant(
    batch: int = 3,
    length: int = 9,
    side: str | None = "right",
    image: tuple[int, int] | None = None,
    without: tuple[str, ...] = (),
    refused: str | None = None,
    **fields: Any,
) -> Variant:
    """A `Variant`, its configuration's fields by name."""
    return Variant(fields, batch, length, side, image, without, refused)


class Draw:
    """Random inputs of a variant."""

    def __init__(self, v: Variant, seed: int):
        self.v, self.random = v, np.random.default_rng(seed)
        self.there: dict[int, np.ndarray] = {}

    def integers(self, high: int, *shape: int, low: int = 0) -> np.ndarray:
        return self.random.integers(low, high, (self.v.batch, *shape))

    def numbers(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=(self.v.batch, *shape)).astype(np.float32)

    def mask(self, length: int | None = None, side: str | None = "") -> np.ndarray:
        """The first example is whole."""
        length, side = length or self.v.length, self.v.side if side == "" else side
        if side is None:
            return np.ones((self.v.batch, length), np.int64)
        counts = np.append(length, self.integers(length + 1, low=max(1, length // 3))[1:])
        mask = (np.arange(length) < counts[:, None]).astype(np.int64)
        return mask if side == "right" else mask[:, ::-1].copy()

    def text(self, vocab: int, pad: int | None = None, length: int | None = None, low: int = 4) -> dict[str, np.ndarray]:
        length = length or self.v.length
        ids, mask = self.integers(vocab, length, low=low), self.mask(length)
        return {"input_ids": ids if pad is None else np.where(mask, ids, pad), "attention_mask": mask}

    def labels(self, vocab: int, length: int | None = None) -> np.ndarray:
        length = length or self.v.length
        labels = np.where(self.random.random((self.v.batch, length)) < 0.4, -100, self.integers(vocab, length))
        labels[:, -1] = self.integers(vocab)
        return labels

    def pixels(self, c: Any, *frames: int) -> np.ndarray:
        size = self.v.image or getattr(c, "image_size", None) or c.input_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return self.numbers(*frames, getattr(c, "num_channels", 3), *size)


@dataclasses.dataclass(frozen=True)
class Reference:
    """How a published class is called, and what is recorded beside the fields that it returns.

    Args:
        inputs: `(config, draw) -> inputs`.
        calls: (what is given beside the inputs, field -> recorded name) of each call; fields are recorded under their names,
            and not at all where that is "-".
        inside: inner module -> recorded name -> field of what it returned in the first call.
        writes: how it generates: "own", by its method, from the inputs `generate.*`; or `(model, inputs) -> (first ids, step)`.
        more: `(model, inputs) -> more to record`.
        build: `fields -> model` where it is not of transformers.
        unread: weights that no output reads, which mmx does not have.
    """

    inputs: Callable[[Any, Draw], dict[str, Any]]
    calls: tuple[tuple[Mapping[str, Any], Mapping[str, str]], ...] = (({}, {}),)
    inside: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    writes: Any = None
    more: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = lambda model, inputs: {}
    build: Callable[[Mapping[str, Any]], torch.nn.Module] | None = None
    unread: tuple[str, ...] = ()


DERIVED = ("out_features", "out_indices", "stage_names")  # of a configuration, from its other fields
UNRECORDED = ("attentions", "cross_attentions", "past_key_values", "encoder_attentions", "decoder_attentions")


def tensors(value: Any) -> Any:
    """NumPy arrays as tensors, at any depth."""
    if isinstance(value, Mapping):
        return {n: tensors(x).bool() if n == "bool_masked_pos" else tensors(x) for n, x in value.items()}
    if isinstance(value, tuple):
        return tuple(map(tensors, value))
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def change(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration fields with some changed."""
    changed = {name: value for name, value in fields.items() if name not in DERIVED}
    for name, value in changes.items():
        changed[name] = (
            change(fields[name], value) if isinstance(value, Mapping) and isinstance(fields.get(name), Mapping) else value
        )
    if "num_labels" in changes:
        changed["id2label"] = {i: f"LABEL_{i}" for i in range(changes["num_labels"])}
        changed["label2id"] = {name: i for i, name in changed["id2label"].items()}
        del changed["num_labels"]
    return changed


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Every parameter that is trained, and the biases that are buffers: norms around one, matrices that keep sizes."""
    random = torch.Generator().manual_seed(seed)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, p in [*named, *((n, b) for n, b in model.named_buffers() if n.endswith("final_logits_bias"))]:
        scale = 0.2 if p.ndim < 2 or p[0].numel() <= 64 else 1.6 / p[0].numel() ** 0.5
        one = (p.ndim == 1 and name.endswith("weight")) or "lambda_" in name or name.endswith("gamma")
        p.data = torch.randn(p.shape, generator=random) * scale + one


@contextlib.contextmanager
def in_order() -> Any:
    """Draws of patches (ViLT) in their order."""
    drawn = torch.multinomial
    torch.multinomial = lambda weights, count, replacement=False: torch.arange(int(count)) % len(weights)
    try:
        yield
    finally:
        torch.multinomial = drawn


def build(name: str, v: Variant, reference: Reference) -> tuple[torch.nn.Module, Any]:
    """The model of a variant and its configuration."""
    fields = change(json.loads((PUBLISHED / name / "config.json").read_text()), v.fields)
    if reference.build is not None:
        return reference.build(fields), fields
    cls = getattr(transformers, name)
    config = cls.config_class.from_dict(fields)
    return cls._from_config(config, attn_implementation="eager").eval(), config


def record(name: str, model: torch.nn.Module, inputs: Mapping[str, np.ndarray], reference: Reference) -> dict[str, torch.Tensor]:
    """Every number that the original returns, by the name under which mmx is asked for it."""
    names, recorded = golden.CLASSES.get(name, golden.Class()), {}

    def call(given: Mapping[str, Any], prefix: str = "", rename: Mapping[str, str] = {}) -> None:
        with torch.no_grad(), in_order():
            states = {} if reference.build else {"output_hidden_states": True}
            out = model(**tensors(given), **states)
        flat = golden.flatten(dict(out.items()) if hasattr(out, "items") else out)
        for field, value in flat.items():
            head, _, last = field.rpartition(".")
            new = f"{rename.get(head, head)}.{last}" if last.isdigit() else rename.get(field, field)
            if isinstance(value, torch.Tensor) and not new.startswith(("-", *UNRECORDED)):
                recorded[prefix + new] = value.clone().contiguous()

    hooks = []
    for module, fields in reference.inside.items():

        def seen(_: Any, __: Any, out: Any, fields: Any = fields) -> None:
            for new, field in fields.items():
                value = out if field == "" else out[field]
                recorded.setdefault(new, value.clone().contiguous())

        hooks.append(model.get_submodule(module).register_forward_hook(seen))
    given = golden.first_call(inputs, names.nested)
    for beside, rename in reference.calls:
        call({**given, **names.call, **beside}, rename=rename)
        for hook in hooks:
            hook.remove()
    for prefix, inputs_of in names.calls.items():
        with contextlib.suppress(KeyError):  # inputs that this variant does not have
            if further := inputs_of(inputs):
                call({**names.call, **further}, prefix)
    for prefix, fields in names.configs.items():
        before = {field: getattr(model.config, field) for field in fields}
        model.config.update(fields)
        recorded[prefix] = model(**tensors(given)).loss.detach()
        model.config.update(before)
    with torch.no_grad(), in_order():
        recorded |= reference.more(model, tensors(given))
        if reference.writes is not None:
            recorded |= write(model, inputs, names, reference)
    return recorded


def write(model: Any, inputs: Mapping[str, np.ndarray], names: golden.Class, reference: Reference) -> dict[str, torch.Tensor]:
    """What the model writes, always the likeliest id."""
    prompt = {n.removeprefix("generate."): x for n, x in inputs.items() if n.startswith("generate.")}
    given = tensors({**{n: x for n, x in inputs.items() if n in names.source}, **prompt})
    if reference.writes != "own":
        ids, step = reference.writes(model, given)
        scores = []
        for _ in range(STEPS):
            scores.append(step(ids)[:, -1])
            ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], 1)
        return {"generate.sequences": ids, "generate.logits": torch.stack(scores, 1)}
    config = getattr(model.config, "text_config", model.config)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = transformers.GenerationConfig(pad_token_id=pad, decoder_start_token_id=start)
    out = model.generate(
        **given, do_sample=False, num_beams=1, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
    )
    return {"generate.sequences": out.sequences, "generate.logits": torch.stack(out.logits, 1)}


def decided(recorded: Mapping[str, torch.Tensor]) -> bool:
    """Whether every id that was written is likelier than the next by more than rounding."""
    if "generate.logits" not in recorded:
        return True
    best = recorded["generate.logits"].topk(2).values
    return bool((best[..., 0] - best[..., 1]).min() > GAP)


def make(name: str, v: Variant, reference: Reference, folder: Path) -> torch.nn.Module:
    """Writes config.json, model, inputs and outputs of a variant; returns the model."""
    model, config = build(name, v, reference)
    for seed in range(SEEDS):
        redraw(model, seed)
        inputs = reference.inputs(config, Draw(v, seed))
        inputs = {n: x for n, x in inputs.items() if n not in v.without}
        recorded = {} if v.refused else record(name, model, inputs, reference)
        if decided(recorded):
            break
    folder.mkdir(parents=True, exist_ok=True)
    if reference.build is None:
        model.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file({n: x.contiguous() for n, x in model.state_dict().items()}, folder / "model.safetensors")
    safetensors.torch.save_file({n: torch.tensor(x).contiguous() for n, x in inputs.items()}, folder / "inputs.safetensors")
    recorded = {n: x.detach().clone().contiguous() for n, x in recorded.items()}
    safetensors.torch.save_file(recorded, folder / "outputs.safetensors")
    return model


def again(name: str, folder: Path, reference: Reference, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same of a folder in the published layout, which has to hold every weight and nothing else."""
    if reference.build is not None:
        model = reference.build(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=True)
    else:
        cls = getattr(transformers, name)
        model, found = cls.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
        assert set(found.pop("missing_keys")) <= set(reference.unread) and not any(found.values()), found
    return record(name, model.eval(), inputs, reference)
