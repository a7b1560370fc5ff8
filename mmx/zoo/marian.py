"""Marian (arXiv 1804.00344), the translators of OPUS-MT: the vanilla encoder-decoder, post-norm, fixed sines and cosines."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmx.errors import InputError
from mmx.heads import TiedDecoder
from mmx.layers import BlockConfig
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.zoo.config import activation, only
from mmx.zoo.encoder_decoder import GENERATION, TARGET, forward, stages
from mmx.zoo.family import Family, padded
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers, reshaped

ENCODER_LAYER: Table = {  # of every model that copied BART's names
    "self_attn.q_proj": "self/query",
    "self_attn.k_proj": "self/key",
    "self_attn.v_proj": "self/value",
    "self_attn.out_proj": "self/out",
    "self_attn_layer_norm": "self_norm",
    "fc1": "mlp/up",
    "fc2": "mlp/down",
    "final_layer_norm": "mlp_norm",
}
DECODER_LAYER: Table = {
    **ENCODER_LAYER,
    "encoder_attn.q_proj": "cross/query",
    "encoder_attn.k_proj": "cross/key",
    "encoder_attn.v_proj": "cross/value",
    "encoder_attn.out_proj": "cross/out",
    "encoder_attn_layer_norm": "cross_norm",
}


@dataclasses.dataclass(frozen=True)
class MarianConfig:
    """The published fields of Marian."""

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    scale_embedding: bool = False
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int = 58100
    decoder_start_token_id: int | None = 58100
    normalize_before: bool = False  # older files say this and the next three
    normalize_embedding: bool = False
    add_final_layer_norm: bool = False
    static_position_embeddings: bool = True

    without_effect: ClassVar[frozenset[str]] = frozenset({"num_hidden_layers"})  # a copy of encoder_layers

    @property
    def shared(self) -> bool:
        """Whether both sides have the same embedding."""
        return self.share_encoder_decoder_embeddings and self.tie_word_embeddings

    @property
    def target_vocab(self) -> int:
        """How many ids the target has."""
        own = None if self.share_encoder_decoder_embeddings else self.decoder_vocab_size
        return self.vocab_size if own is None else own


def block(c: Any, side: str, dtype: str, **more: Any) -> BlockConfig:
    """The block of one side, "encoder" or "decoder"."""
    return BlockConfig(
        width=c.d_model,
        heads=getattr(c, f"{side}_attention_heads"),
        mlp=getattr(c, f"{side}_ffn_dim"),
        activation=activation(c.activation_function, "activation_function"),
        eps=1e-5,
        dtype=dtype,
        **more,
    )


def _build(c: MarianConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    if c.d_model % 2:
        raise InputError(f"MarianConfig: d_model={c.d_model}; sines and cosines share an even one")
    only(c, normalize_before=False, normalize_embedding=False, add_final_layer_norm=False, static_position_embeddings=True)
    scale = c.d_model**0.5 if c.scale_embedding else 1.0
    source, target = (
        Ids(vocab, c.max_position_embeddings, width=c.d_model, scale=scale, position="sincos")
        for vocab in (c.vocab_size, c.target_vocab)
    )
    source = target if c.shared else source
    encoder, decoder = (block(c, side, dtype, norm="post") for side in ("encoder", "decoder"))
    scores = TiedDecoder(TARGET, transform=False, own=not c.tie_word_embeddings)
    return build_model(
        {"text": source, TARGET: target},
        stages("text", c.encoder_layers, encoder, c.decoder_layers, decoder),
        width=c.d_model,
        heads=c.encoder_attention_heads,
        embed=0,
        outputs={"captioning": scores} if "captioning" in heads else {},
        dtype=dtype,
    )


def _table(c: MarianConfig) -> Table:
    words = {}
    if not c.shared:
        words = {
            "model.encoder.embed_tokens": "modalities_text/token",
            "model.decoder.embed_tokens": f"modalities_{TARGET}/token",
        }
    if c.share_encoder_decoder_embeddings:  # stored, and read by nobody, where it is not tied
        words["model.shared"] = f"modalities_{TARGET}/token"
    return {
        **words,
        **layers("model.encoder.layers.{}", "stages_0/text/layers/block", ENCODER_LAYER),
        **layers("model.decoder.layers.{}", f"stages_1/layers/{TARGET}", DECODER_LAYER),
        "final_logits_bias": reshaped("heads_captioning/decoder_bias", 1, c.target_vocab),
        "lm_head": "heads_captioning/decoder",
    }


def _read(c: MarianConfig, inputs: Mapping[str, Any]) -> Any:
    return padded(inputs["input_ids"], inputs.get("attention_mask"))


def _opus(vocab: int) -> dict[str, Any]:
    sides = {"layers": 6, "ffn_dim": 2048, "attention_heads": 8}
    return {
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        "d_model": 512,
        "max_position_embeddings": 512,
        "activation_function": "swish",
        "scale_embedding": True,
        "vocab_size": vocab,
        "decoder_vocab_size": vocab,
        "pad_token_id": vocab - 1,
        "decoder_start_token_id": vocab - 1,
    }


FAMILIES = (
    Family(
        "marian",
        MarianConfig,
        _build,
        _table,
        forward("text", _read),
        names={
            f"opus-mt-{pair}": _opus(vocab)
            for vocab, pairs in {
                58101: ("en-de", "de-en"),
                59514: ("en-fr", "fr-en"),
                62518: ("en-ru", "ru-en"),
                65001: ("en-es", "es-en", "en-zh", "zh-en"),
            }.items()
            for pair in pairs
        },
        heads={"captioning": "final_logits_bias"},
        prefix="model",
        texts=Texts(end="</s>", pad="<pad>", unknown="<unk>"),
        length=lambda c: c.max_position_embeddings,
        # The sines and cosines are fixed; tied copies of the words are the same tensor.
        known=(r"(en|de)coder\.embed_(tokens|positions)\.weight$", r"^lm_head\.weight$"),
        generation=GENERATION,
    ),
)
