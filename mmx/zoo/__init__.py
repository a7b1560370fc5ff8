"""Published models by their published names, loading published weights.

    model = mmx.create_model("bert-base-uncased")             # a Linen module with parameters still to be made
    pretrained = mmx.load_pretrained("folder/with/weights")   # its parameters, and published names in and out

One file holds one family: its configuration, how it is assembled from modalities and stages, and its weight table.
"""

import fnmatch
import importlib
from collections.abc import Sequence
from typing import Any

from mmx.errors import InputError, unknown
from mmx.model import MultimodalTransformer
from mmx.zoo.config import override, parse
from mmx.zoo.family import Family, build
from mmx.zoo.folders import load_published, save_pretrained
from mmx.zoo.pretrained import Pretrained
from mmx.zoo.transplant import transplant

MODULES = (  # one for each family, or for several close kin
    "albef",
    "audio_spectrogram_transformer",
    "beit",
    "beit3",
    "bert",
    "blip",
    "blip2",
    "bridgetower",
    "clip",
    "coca",
    "flava",
    "gemma",
    "git",
    "gpt2",
    "hero",
    "interbert",
    "layoutlm",
    "layoutlmv3",
    "llama",
    "llava",
    "lxmert",
    "marian",
    "mbt",
    "mult",
    "paligemma",
    "perceiver",
    "roberta",
    "siglip",
    "t5",
    "tapas",
    "timesformer",
    "uniter",
    "univl",
    "videobert",
    "videomae",
    "vilbert",
    "vilt",
    "vision_text_dual_encoder",
    "visual_bert",
    "vit",
    "vit_mae",
    "wav2vec2",
    "whisper",
)
_MODULES = [importlib.import_module(f"mmx.zoo.{name}") for name in MODULES]
FAMILIES: dict[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}
NAMES: dict[str, Family] = {name: family for family in FAMILIES.values() for name in family.names}


def list_models(pattern: str | Sequence[str] = "*") -> list[str]:
    """The names that `create_model` knows, those that match a pattern such as "clip*", or any of several."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    return sorted(name for name in NAMES if any(fnmatch.fnmatch(name, p) for p in patterns))


def create_model(
    name: str,
    *,
    heads: Sequence[str] = (),
    dtype: str = "float32",
    remat: str | None = None,
    unroll: int | None = None,
    **fields: Any,
) -> MultimodalTransformer:
    """Builds a published model by its name: the bare one, as `AutoModel` would, and the heads that are named.

    Args:
        name: such as "bert-base-uncased"; `list_models` lists them.
        heads: published heads, such as ("masked-lm", "matching").
        dtype: type of the computation, float32 or bfloat16.
        remat: of its blocks, `mmx.layers.BlockConfig`: what a backward pass computes again.
        unroll: likewise: layers per iteration of a scan; as many as there are: none, for speed on a CPU.
        **fields: published fields of the configuration to change; those of a part as `vision_config={"image_size": 384}`.

    Raises:
        InputError: an unknown name, head or field, with the nearest known one.
    """
    family, config = configuration(name, **fields)
    return build(family, config, heads, dtype, remat=remat, unroll=unroll)


def configuration(name: str, **fields: Any) -> tuple[Family, Any]:
    """The family and the published configuration of a name, some fields changed."""
    if name not in NAMES:
        raise InputError(unknown("model", name, NAMES))
    family = NAMES[name]
    return family, override(parse(family.config, family.names[name], name), fields)


__all__ = [
    "FAMILIES",
    "NAMES",
    "Family",
    "Pretrained",
    "build",
    "configuration",
    "create_model",
    "list_models",
    "load_published",
    "parse",
    "save_pretrained",
    "transplant",
]
