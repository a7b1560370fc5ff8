"""AST (arXiv 2104.01778): a ViT on overlapping patches of a spectrogram, read by two special tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler
from mmx.modalities import Patches
from mmx.modalities.patches import overlapping_grid
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo import vit
from mmx.zoo.config import Classes, Layers
from mmx.zoo.family import Family, Runner
from mmx.zoo.loss import class_loss
from mmx.zoo.sounds import FilterBankSteps
from mmx.zoo.weights import Table, convolution, layers, reshaped, row

SPECIAL = ("class", "distillation")
BODY = "audio_spectrogram_transformer"


@dataclasses.dataclass(frozen=True)
class ASTConfig(Classes, Layers):
    """The published fields of AST."""

    layer_norm_eps: float = 1e-12
    patch_size: int = 16
    qkv_bias: bool = True
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024
    num_mel_bins: int = 128

    @property
    def size(self) -> tuple[int, int]:
        """(mel bins, frames): patches are counted along time first."""
        return (self.num_mel_bins, self.max_length)

    @property
    def stride(self) -> tuple[int, int]:
        """From patch to patch, likewise."""
        return (self.frequency_stride, self.time_stride)


def _build(c: ASTConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    patches = Patches(
        c.size, (c.patch_size,) * 2, 1, width=c.hidden_size, stride=c.stride, special=SPECIAL, special_position=True
    )
    classifier = Classifier(c.num_labels, "audio", transform=False, norm=c.layer_norm_eps)
    return build_model(
        {"audio": patches},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"audio": Pooler("special")},
        outputs={"classification": classifier} if "classification" in heads else {},
        dtype=dtype,
        **vit.block(c),
    )


def _table(c: ASTConfig) -> Table:
    rows, columns = overlapping_grid(c.size, (c.patch_size,) * 2, c.stride)
    places, tokens = (1, rows * columns + len(SPECIAL), c.hidden_size), "modalities_audio/special"
    return {
        f"{BODY}.embeddings.cls_token": row(tokens, 0, 1, 1, c.hidden_size),
        f"{BODY}.embeddings.distillation_token": row(tokens, 1, 1, 1, c.hidden_size),
        f"{BODY}.embeddings.position_embeddings": reshaped("modalities_audio/position", *places),
        f"{BODY}.embeddings.patch_embeddings.projection": convolution("modalities_audio/patch", *(c.patch_size,) * 2),
        **layers(BODY + ".encoder.layer.{}", "stages_0/audio/layers/block", vit.LAYER),
        f"{BODY}.layernorm": "stages_0/audio/norm",
        "classifier.layernorm": "heads_classification/norm",
        "classifier.dense": "heads_classification/classifier",
    }


def _forward(run: Runner, c: ASTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"audio": jnp.swapaxes(inputs["input_values"], 1, 2)[..., None]})  # (B, T, mel) -> (B, mel, T, 1)
    logits = r.out.logits.get("classification")
    return {
        "loss": class_loss(logits, inputs["labels"], c.problem_type) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["audio"].values,
        "pooler_output": r.out.pooled["audio"],
        "hidden_states": tuple(r.states("stages_0", "audio")),
        "attentions": tuple(r.attentions("stages_0", "audio")),
    }


def _audioset(stride: int) -> dict[str, Any]:
    return {"frequency_stride": stride, "time_stride": stride, "num_labels": 527}


FAMILIES = (
    Family(
        "audio-spectrogram-transformer",
        ASTConfig,
        _build,
        _table,
        _forward,
        names={
            "ast-finetuned-audioset-10-10-0.4593": _audioset(10),
            "ast-finetuned-audioset-10-10-0.450": _audioset(10),
            "ast-finetuned-audioset-10-10-0.448": _audioset(10),
            "ast-finetuned-audioset-10-10-0.448-v2": _audioset(10),
            "ast-finetuned-audioset-12-12-0.447": _audioset(12),
            "ast-finetuned-audioset-14-14-0.443": _audioset(14),
            "ast-finetuned-audioset-16-16-0.442": _audioset(16),
            "ast-finetuned-speech-commands-v2": {"max_length": 128, "num_labels": 35},
        },
        heads={"classification": "classifier"},
        prefix=BODY,
        sound=FilterBankSteps,
        older=vit.RENAMED,
    ),
)
