"""Any image tower and any text tower of the zoo, contrasted in one space, as ALIGN (arXiv 2102.05918) and LiT (2111.07991) are.

    model = mmx.create_model("vision-text-dual-encoder", vision_config="vit-base-patch16-224", text_config="bert-base-uncased")

    towers = {"image": mmx.load_pretrained("folder of a ViT"), "text": mmx.load_pretrained("folder of a BERT")}
    model = mmx.create_model("vision-text-dual-encoder", vision_config=towers["image"], text_config=towers["text"])
    params = model.init(key, mmx.example_batch(model))["params"]
    for name, tower in towers.items():
        same = {path: path for path in (f"modalities_{name}", f"stages_0/{name}", f"poolers_{name}")}
        params = mmx.zoo.transplant(params, tower.params, same)

A tower is a family whose bare model reads one stream in one stack, and its parameters keep their paths. The published layout
is that of the `model_type` of this name. ALIGN's own image tower is an EfficientNet, a convolutional network, which mmx has not:
`align-vit-*` are its recipe and its text towers beside Vision Transformers of the same class, and no published models.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.errors import InputError, unknown
from mmx.model import MultimodalTransformer
from mmx.zoo import clip
from mmx.zoo.config import parse
from mmx.zoo.family import Family, Run, Runner
from mmx.zoo.pretrained import Pretrained
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table

TOWERS = {"image": ("vision", "vit"), "text": ("text", "bert")}  # stream -> published name, family where none is told


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """The published fields of a dual encoder.

    A tower is told by the fields of its own configuration, its `model_type` among them, by the name of a model of the zoo, or
    by a pretrained one; of a model with two towers, it is the one that fits.
    """

    vision_config: Any = "vit-base-patch16-224"
    text_config: Any = "bert-base-uncased"
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    def __post_init__(self) -> None:
        for tower, usual in TOWERS.values():
            field = f"{tower}_config"
            object.__setattr__(self, field, _config(getattr(self, field), tower, usual))


def _config(told: Any, tower: str, usual: str) -> Any:
    """The configuration of a tower as an object that knows its family."""
    from mmx.zoo import configuration

    field = f"{tower}_config"
    if isinstance(told, Mapping):
        return parse(_kind(told.get("model_type", usual)), told, field)
    if isinstance(told, str | Pretrained):
        family, config = configuration(told) if isinstance(told, str) else (told.family, told.config)
        name = f"{family.name}_{tower}_model" if hasattr(config, field) else family.name
        config = getattr(config, field, config)
        return _kind(name)(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | {"model_type": name})
    if not isinstance(told, _kind(getattr(told, "model_type", usual))):
        raise InputError(f"{field}={told!r}; name a model of the zoo, or give a pretrained one, or the fields of a configuration")
    return told


@functools.cache
def _kind(family: str) -> type:
    """The configuration of a family, with its name as a field."""
    from mmx.zoo import FAMILIES

    if family not in FAMILIES:
        raise InputError(unknown("family", family, FAMILIES))
    base = FAMILIES[family].config
    return dataclasses.make_dataclass(base.__name__, [("model_type", str, family)], bases=(base,), frozen=True)


def _family(c: DualEncoderConfig, stream: str) -> tuple[Family, Any]:
    from mmx.zoo import FAMILIES

    config = getattr(c, f"{TOWERS[stream][0]}_config")
    return FAMILIES[config.model_type], config


def _build(c: DualEncoderConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    parts = {stream: _family(c, stream) for stream in TOWERS}
    towers = {stream: family.build(config, (), dtype) for stream, (family, config) in parts.items()}
    return clip.meet(towers, c.projection_dim, dtype, math.exp(c.logit_scale_init_value))


def _table(c: DualEncoderConfig) -> Table:
    table = dict(clip.MEETING)
    for stream, (tower, _) in TOWERS.items():
        family, config = _family(c, stream)
        inside = {name: ours for name, ours in family.table(config).items() if name.startswith(family.prefix + ".")}
        table |= {f"{tower}_model{name.removeprefix(family.prefix)}": ours for name, ours in inside.items()}
    return table


def _forward(run: Runner, c: DualEncoderConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    embeds, scale = {}, None
    for stream, given in (("image", "pixel_values"), ("text", "input_ids")):
        if given in inputs:
            runs: list[Run] = []

            def kept(*args: Any, runs: list[Run] = runs, **more: Any) -> Run:
                runs.append(run(*args, **more))
                return runs[-1]

            family, config = _family(c, stream)
            fields[f"{TOWERS[stream][0]}_model_output"] = family.forward(kept, config, inputs)
            embeds[stream], scale = runs[-1].out.embeddings[stream], runs[-1].out.logit_scale
            fields[f"{stream}_embeds"] = embeds[stream]
    loss = inputs.get("return_loss", False)
    return {**fields, **clip.similarities(embeds.get("image"), embeds.get("text"), scale, loss)}


def _texts(c: DualEncoderConfig) -> Texts | None:
    family, config = _family(c, "text")
    return family.texts(config) if callable(family.texts) else family.texts


def _length(c: DualEncoderConfig) -> int | None:
    family, config = _family(c, "text")
    return family.length(config) if family.length else None


FAMILIES = (
    Family(
        "vision-text-dual-encoder",
        DualEncoderConfig,
        _build,
        _table,
        _forward,
        names={
            "vision-text-dual-encoder": {},
            "align-vit-base": {"projection_dim": 640, "logit_scale_init_value": 0.0},
            "align-vit-large": {
                "vision_config": "vit-large-patch16-224",
                "text_config": "bert-large-uncased",
                "projection_dim": 640,
                "logit_scale_init_value": 0.0,
            },
        },
        known=(r"position_ids$", r"mask_token$", r"relative_position_index$"),
        texts=_texts,
        length=_length,
        older={r"^(vision|text)_model\.(?=embeddings|encoder|pre_|post_|final_)": r"\1_model.\1_model."},
    ),
)
