"""wav2vec 2.0 (arXiv 2006.11477): samples through convolutions, positions by a convolution, one stream of sound."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.modalities import Waveform
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.types import Masked
from mmx.zoo.config import Layers, activation, only, sized
from mmx.zoo.family import Family, Runner
from mmx.zoo.sounds import WaveSteps
from mmx.zoo.weights import Table, convolution, layers, reshaped

LAYER: Table = {
    "attention.q_proj": "self/query",
    "attention.k_proj": "self/key",
    "attention.v_proj": "self/value",
    "attention.out_proj": "self/out",
    "layer_norm": "self_norm",
    "feed_forward.intermediate_dense": "mlp/up",
    "feed_forward.output_dense": "mlp/down",
    "final_layer_norm": "mlp_norm",
}
SAMPLES = 160_000  # ten seconds, which is usual; there is no limit


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config(Layers):
    """The published fields of wav2vec 2.0."""

    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple = (512,) * 7
    conv_stride: tuple = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_feat_extract_layers: int | None = None  # follows from conv_dim
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    add_adapter: bool = False
    adapter_attn_dim: int | None = None

    without_effect: ClassVar[frozenset[str]] = frozenset(  # of heads, of adapters that are not there, of training
        {
            "adapter_kernel_size",
            "adapter_stride",
            "codevector_dim",
            "contrastive_logits_temperature",
            "ctc_loss_reduction",
            "ctc_zero_infinity",
            "diversity_loss_weight",
            "feat_proj_dropout",
            "feat_quantizer_dropout",
            "final_dropout",
            "freeze_feat_extract_train",
            "hidden_dropout",
            "mask_channel_length",
            "mask_channel_min_space",
            "mask_channel_other",
            "mask_channel_prob",
            "mask_channel_selection",
            "mask_time_min_space",
            "mask_time_other",
            "mask_time_selection",
            "no_mask_channel_overlap",
            "no_mask_time_overlap",
            "num_adapter_layers",
            "num_codevector_groups",
            "num_codevectors_per_group",
            "num_negatives",
            "output_hidden_size",
            "proj_codevector_dim",
            "tdnn_dilation",
            "tdnn_dim",
            "tdnn_kernel",
            "vocab_size",
            "xvector_output_dim",
        }
    )


def _build(c: Wav2Vec2Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, add_adapter=False, adapter_attn_dim=None, feat_extract_norm=("group", "layer"))
    only(c, num_feat_extract_layers=(None, len(c.conv_dim)))
    if not len(c.conv_dim) == len(c.conv_stride) == len(c.conv_kernel):
        raise InputError("Wav2Vec2Config: conv_dim, conv_stride and conv_kernel have different lengths")
    sound = Waveform(
        SAMPLES,
        tuple(zip(c.conv_kernel, c.conv_stride, strict=True)),
        c.conv_dim,
        width=c.hidden_size,
        position="none",
        conv_bias=c.conv_bias,
        conv_norm="group" if c.feat_extract_norm == "group" else "layer",
        activation=activation(c.feat_extract_activation, "feat_extract_activation"),
        eps=1e-5,
        feature_norm=c.layer_norm_eps,
        position_window=(c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups),
        norm=None if c.do_stable_layer_norm else c.layer_norm_eps,
    )
    return build_model(
        {"audio": sound},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        mlp=c.intermediate_size,
        activation=activation(c.hidden_act),
        norm="pre" if c.do_stable_layer_norm else "post",
        eps=c.layer_norm_eps,
        embed=0,
        dtype=dtype,
    )


def _table(c: Wav2Vec2Config) -> Table:
    embedder, place = "modalities_audio", "wav2vec2.encoder.pos_conv_embed.conv"
    table: dict[str, Any] = {
        "wav2vec2.feature_projection.layer_norm": f"{embedder}/feature_norm",
        "wav2vec2.feature_projection.projection": f"{embedder}/linear",
        f"{place}.bias": f"{embedder}/conv_position/bias",
        f"{place}.parametrizations.weight.original0": reshaped(
            f"{embedder}/conv_position/scale", 1, 1, c.num_conv_pos_embeddings
        ),
        f"{place}.parametrizations.weight.original1": convolution(f"{embedder}/conv_position/kernel", c.num_conv_pos_embeddings),
        "wav2vec2.encoder.layer_norm": "stages_0/audio/norm" if c.do_stable_layer_norm else f"{embedder}/norm",
        **layers("wav2vec2.encoder.layers.{}", "stages_0/audio/layers/block", LAYER),
    }
    for i, kernel in enumerate(c.conv_kernel):
        published = f"wav2vec2.feature_extractor.conv_layers.{i}"
        table[f"{published}.conv"] = convolution(f"{embedder}/conv_{i}", kernel)
        table[f"{published}.layer_norm"] = f"{embedder}/conv_norm_{i}"
    return table


def _forward(run: Runner, c: Wav2Vec2Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    samples, mask = inputs["input_values"], inputs.get("attention_mask")
    if mask is not None:  # published as what there is to count: sound is padded at its end
        here = jnp.arange(samples.shape[1]) < mask.sum(-1, keepdims=True)
        samples = Masked(samples, here, keep=True)
    r = run({"audio": samples})
    tokens = r.out.streams["audio"]
    return {
        "last_hidden_state": tokens.values,
        "extract_features": r.intermediates["modalities_audio"]["features"],
        "hidden_states": tuple(r.states("stages_0", "audio")),
        "feature_attention_mask": None if mask is None else tokens.dense_mask.astype(jnp.int32),
    }


_LARGE = sized(24, 1024, 16)
_STABLE = {**_LARGE, "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
FAMILIES = (
    Family(
        "wav2vec2",
        Wav2Vec2Config,
        _build,
        _table,
        _forward,
        names={
            "wav2vec2-base": {},
            "wav2vec2-base-960h": {},
            "wav2vec2-large": _LARGE,
            "wav2vec2-large-960h": _LARGE,
            "wav2vec2-large-lv60": _STABLE,
            "wav2vec2-large-960h-lv60": _STABLE,
            "wav2vec2-large-960h-lv60-self": _STABLE,
            "wav2vec2-large-xlsr-53": _STABLE,
            "wav2vec2-xls-r-300m": _STABLE,
        },
        prefix="wav2vec2",
        # What only pretraining or recognition reads.
        known=(r"masked_spec_embed$", r"^(quantizer|project_hid|project_q|lm_head)\."),
        sound=WaveSteps,
    ),
)
