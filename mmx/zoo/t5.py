"""T5 (arXiv 1910.10683), T5 1.1 and Flan-T5 (2210.11416): an encoder-decoder of text with relative positions.

Pre-norm with RMS norms, no biases, no scaling of scores; one embedding for both sides; the later ones have gated MLPs and a
matrix of their own for the scores of ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.errors import InputError
from mmx.heads import TiedDecoder
from mmx.layers import BlockConfig, Buckets
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.zoo.config import activation
from mmx.zoo.encoder_decoder import GENERATION, TARGET, forward, stages
from mmx.zoo.family import Family, padded
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers, reshaped


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The published fields of T5."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None  # this and the next follow from feed_forward_proj
    is_gated_act: bool | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # None: as the embeddings are tied
    n_positions: int = 512  # what is usual; there is no limit
    pad_token_id: int = 0
    decoder_start_token_id: int | None = None

    @property
    def gated(self) -> bool:
        """Whether MLPs have a gate."""
        return self.feed_forward_proj.startswith("gated-") if self.is_gated_act is None else self.is_gated_act

    @property
    def activation(self) -> str:
        """Our name of the MLPs' activation; the published gated-gelu means the one with tanh."""
        kind = "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.removeprefix("gated-")
        return activation(self.dense_act_fn or kind, "feed_forward_proj")


def _build(c: T5Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    if "untied" in heads and "captioning" not in heads:
        raise InputError("t5: the head 'untied' is the matrix of the head 'captioning'; name both")
    encoder = BlockConfig(
        width=c.d_model,
        heads=c.num_heads,
        head_size=c.d_kv,
        mlp=c.d_ff,
        activation=c.activation,
        gated=c.gated,
        norm_kind="rms",
        eps=c.layer_norm_epsilon,
        bias=False,
        scale=1.0,
        relative=Buckets(c.relative_attention_num_buckets, c.relative_attention_max_distance),
        dtype=dtype,
    )
    past = Buckets(c.relative_attention_num_buckets, c.relative_attention_max_distance, past=True)
    decoder = dataclasses.replace(encoder, relative=past)
    words = Ids(c.vocab_size, c.n_positions, width=c.d_model, position="none")
    scaled = c.tie_word_embeddings if c.scale_decoder_outputs is None else c.scale_decoder_outputs
    scores = TiedDecoder(
        TARGET,
        transform=False,
        bias=False,
        own="untied" in heads or not c.tie_word_embeddings,
        scale=c.d_model**-0.5 if scaled else 1.0,
    )
    return build_model(
        {"text": words, TARGET: words},
        stages("text", c.num_layers, encoder, c.num_decoder_layers or c.num_layers, decoder),
        width=c.d_model,
        heads=c.num_heads,
        head_size=c.d_kv,
        embed=0,
        outputs={"captioning": scores} if "captioning" in heads else {},
        dtype=dtype,
    )


def _layer(sublayers: Sequence[str], gated: bool) -> Table:
    """The weights of a block: its sublayers are published by their numbers."""
    table: dict[str, str] = {}
    for number, name in enumerate(sublayers):
        table[f"layer.{number}.layer_norm"] = f"{name}_norm"
        if name == "mlp":
            names = {"wi_0": "up", "wi_1": "gate", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
            published = "DenseReluDense"
        else:
            names = {"q": "query", "k": "key", "v": "value", "o": "out"}
            published = "SelfAttention" if name == "self" else "EncDecAttention"
        table |= {f"layer.{number}.{published}.{theirs}": f"{name}/{ours}" for theirs, ours in names.items()}
    return table


def _table(c: T5Config) -> Table:
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    size = (c.relative_attention_num_buckets, c.num_heads)
    return {
        "shared": f"modalities_{TARGET}/token",  # one embedder under two names goes by the first of them in the alphabet
        **layers("encoder.block.{}", "stages_0/text/layers/block", _layer(("self", "mlp"), c.gated)),
        f"encoder.{bias}": reshaped("stages_0/text/relative/bias", *size),
        "encoder.final_layer_norm": "stages_0/text/norm",
        **layers("decoder.block.{}", "stages_1/layers/target", _layer(("self", "cross", "mlp"), c.gated)),
        f"decoder.{bias}": reshaped("stages_1/target_relative/bias", *size),
        "decoder.final_layer_norm": "stages_1/target_norm",
        "lm_head": "heads_captioning/decoder",
    }


def _read(c: T5Config, inputs: Mapping[str, Any]) -> Any:
    return padded(inputs["input_ids"], inputs.get("attention_mask"))


def _sized(layers: int, width: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": mlp, **more}


_LATER = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LATER_SIZES = {
    "small": _sized(8, 512, 6, 1024, **_LATER),
    "base": _sized(12, 768, 12, 2048, **_LATER),
    "large": _sized(24, 1024, 16, 2816, **_LATER),
    "xl": _sized(24, 2048, 32, 5120, **_LATER),
    "xxl": _sized(24, 4096, 64, 10240, **_LATER),
}
FAMILIES = (
    Family(
        "t5",
        T5Config,
        _build,
        _table,
        forward("text", _read),
        names={
            "t5-small": {},
            "t5-base": _sized(12, 768, 12, 3072),
            "t5-large": _sized(24, 1024, 16, 4096),
            "t5-3b": _sized(24, 1024, 32, 16384, d_kv=128),
            "t5-11b": _sized(24, 1024, 128, 65536, d_kv=128),
            **{f"{name}-{size}": fields for name in ("t5-v1_1", "flan-t5") for size, fields in _LATER_SIZES.items()},
        },
        # Whether the matrix is tied is what the file says: transformers 5 writes tie_word_embeddings=true in either case.
        heads={"captioning": "shared.", "untied": "lm_head."},
        texts=Texts(end="</s>", pad="<pad>", unknown="<unk>", more=100),
        length=lambda c: 512,  # it has no longest; this is what it was trained with
        known=(r"^(en|de)coder\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias\.weight$"),
        generation=GENERATION,
    ),
)
