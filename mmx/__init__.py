"""mmx: multimodal Transformers in JAX. Every way of letting modalities attend to each other, as pure functions.

    model = mmx.build_model({"image": mmx.modalities.Patches((32, 32), (8, 8)), "text": mmx.modalities.Ids(4096, 32)})
    variables = model.init(jax.random.key(0), mmx.example_batch(model))
    out = model.apply(variables, batch)          # Outputs: .streams .pooled .embeddings .logits

The names below are the public ones. They are loaded when they are first used: importing mmx touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmx import data, evaluate, heads, layers, losses, modalities, objectives, parallel, topologies, train, zoo
    from mmx.decoding import Decoding
    from mmx.evaluate import build_zero_shot_classifier
    from mmx.flops import count_flops
    from mmx.generation import generate
    from mmx.model import MultimodalTransformer, build_model, count_parameters, example_batch
    from mmx.pretrained import load_pretrained
    from mmx.profiling import profile
    from mmx.train.experiment import Experiment
    from mmx.types import Masked, Outputs, Tokens
    from mmx.zoo import Pretrained, create_model, list_models, save_pretrained

__version__ = "0.1.0"

_MODULES = (
    "data",
    "evaluate",
    "heads",
    "layers",
    "losses",
    "modalities",
    "objectives",
    "parallel",
    "topologies",
    "train",
    "zoo",
)
_NAMES = {
    "Experiment": "mmx.train.experiment",
    "Masked": "mmx.types",
    "MultimodalTransformer": "mmx.model",
    "Outputs": "mmx.types",
    "Tokens": "mmx.types",
    "build_model": "mmx.model",
    "build_zero_shot_classifier": "mmx.evaluate",
    "count_flops": "mmx.flops",
    "count_parameters": "mmx.model",
    "example_batch": "mmx.model",
    "Decoding": "mmx.decoding",
    "generate": "mmx.generation",
    "Pretrained": "mmx.zoo",
    "create_model": "mmx.zoo",
    "list_models": "mmx.zoo",
    "load_pretrained": "mmx.pretrained",
    "profile": "mmx.profiling",
    "save_pretrained": "mmx.zoo",
}
__all__ = [
    "Decoding",
    "Experiment",
    "Masked",
    "MultimodalTransformer",
    "Outputs",
    "Pretrained",
    "Tokens",
    "build_model",
    "build_zero_shot_classifier",
    "count_flops",
    "count_parameters",
    "create_model",
    "data",
    "evaluate",
    "example_batch",
    "generate",
    "heads",
    "layers",
    "list_models",
    "load_pretrained",
    "losses",
    "modalities",
    "objectives",
    "parallel",
    "profile",
    "save_pretrained",
    "topologies",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mmx.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'mmx' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
