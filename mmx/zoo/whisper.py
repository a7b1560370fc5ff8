"""Whisper (arXiv 2212.04356): an encoder-decoder from log-mel spectrograms to text. Pre-norm, keys without a bias."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.heads import TiedDecoder
from mmx.modalities import Ids, Spectrogram
from mmx.model import MultimodalTransformer, build_model
from mmx.zoo import marian
from mmx.zoo.encoder_decoder import GENERATION, TARGET, forward, stages
from mmx.zoo.family import Family
from mmx.zoo.sounds import LogMelSteps
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, convolution, layers


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """The published fields of Whisper."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_ffn_dim: int = 1536
    encoder_attention_heads: int = 6
    decoder_layers: int = 4
    decoder_ffn_dim: int = 1536
    decoder_attention_heads: int = 6
    activation_function: str = "gelu"
    max_source_positions: int = 1500
    max_target_positions: int = 448
    scale_embedding: bool = False  # published, and read by nobody
    tie_word_embeddings: bool = True
    pad_token_id: int = 50256
    decoder_start_token_id: int | None = 50257

    without_effect: ClassVar[frozenset[str]] = frozenset({"num_hidden_layers"})  # a copy of encoder_layers


def _build(c: WhisperConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    sound = Spectrogram(2 * c.max_source_positions, c.num_mel_bins, "strided", width=c.d_model, position="learned")
    biases = ("query", "value", "out")
    encoder, decoder = (marian.block(c, side, dtype, attention_bias=biases) for side in ("encoder", "decoder"))
    scores = TiedDecoder(TARGET, transform=False, bias=False, own=not c.tie_word_embeddings)
    return build_model(
        {"audio": sound, TARGET: Ids(c.vocab_size, c.max_target_positions, width=c.d_model)},
        stages("audio", c.encoder_layers, encoder, c.decoder_layers, decoder),
        width=c.d_model,
        heads=c.encoder_attention_heads,
        embed=0,
        outputs={"captioning": scores} if "captioning" in heads else {},
        dtype=dtype,
    )


def _table(c: WhisperConfig) -> Table:
    return {
        "model.encoder.conv1": convolution("modalities_audio/conv_0", 3),
        "model.encoder.conv2": convolution("modalities_audio/conv_1", 3),
        "model.encoder.embed_positions.weight": "modalities_audio/position",
        **layers("model.encoder.layers.{}", "stages_0/audio/layers/block", marian.ENCODER_LAYER),
        "model.encoder.layer_norm": "stages_0/audio/norm",
        "model.decoder.embed_tokens": f"modalities_{TARGET}/token",
        "model.decoder.embed_positions.weight": f"modalities_{TARGET}/position",
        **layers("model.decoder.layers.{}", f"stages_1/layers/{TARGET}", marian.DECODER_LAYER),
        "model.decoder.layer_norm": f"stages_1/{TARGET}_norm",
        "proj_out": "heads_captioning/decoder",
    }


def _read(c: WhisperConfig, inputs: Mapping[str, Any]) -> Any:
    inputs.get("attention_mask")  # published for training only; every frame is read, silence too
    return jnp.swapaxes(inputs["input_features"], 1, 2)  # (B, mel, T) -> (B, T, mel)


def _sized(layers: int, width: int, heads: int, decoder_layers: int | None = None, **more: Any) -> dict[str, Any]:
    sides = {"ffn_dim": 4 * width, "attention_heads": heads}
    return {
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        "encoder_layers": layers,
        "decoder_layers": decoder_layers or layers,
        "d_model": width,
        "decoder_start_token_id": 50258,
        **more,
    }


_ENGLISH = {"vocab_size": 51864, "decoder_start_token_id": 50257}
_THIRD = {"vocab_size": 51866, "num_mel_bins": 128}
_SIZES = {"tiny": (4, 384, 6), "base": (6, 512, 8), "small": (12, 768, 12), "medium": (24, 1024, 16)}
FAMILIES = (
    Family(
        "whisper",
        WhisperConfig,
        _build,
        _table,
        forward("audio", _read),
        names={
            **{f"whisper-{name}": _sized(*size) for name, size in _SIZES.items()},
            **{f"whisper-{name}.en": _sized(*size, **_ENGLISH) for name, size in _SIZES.items()},
            "whisper-large": _sized(32, 1280, 20),
            "whisper-large-v2": _sized(32, 1280, 20),
            "whisper-large-v3": _sized(32, 1280, 20, **_THIRD),
            "whisper-large-v3-turbo": _sized(32, 1280, 20, 4, **_THIRD),
        },
        heads={"captioning": "model."},
        prefix="model",
        texts=Texts("<|startoftranscript|> <|notimestamps|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", mask=False),
        length=lambda c: c.max_target_positions,
        inputs={"input_features": "input_features", "attention_mask": "attention_mask", "decoder_input_ids": "input_ids"},
        known=(r"^proj_out\.weight$",),
        generation=GENERATION,
        sound=LogMelSteps,
    ),
)
