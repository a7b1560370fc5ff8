"""RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (1911.02116): a BERT whose places are counted over the ids that are no padding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Classifier, Pooler, TiedDecoder
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.types import Masked
from mmx.zoo import bert
from mmx.zoo.config import Words, only
from mmx.zoo.family import Family, Runner
from mmx.zoo.tokenizer import Texts
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class RobertaConfig(Words):
    """The published fields of RoBERTa."""

    vocab_size: int = 50265
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    tie_word_embeddings: bool = True
    num_labels: int = 2


def _build(c: RobertaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, position_embedding_type="absolute", is_decoder=False, tie_word_embeddings=True)
    outputs = {
        # The published activation of this head is the erf GELU, whatever hidden_act is.
        "masked-lm": TiedDecoder("text", activation="gelu", norm=c.layer_norm_eps),
        "classification": Classifier(c.num_labels, "text"),
    }
    # Published models with a head have no pooler.
    pooler = Pooler("first") if heads else Pooler("first", size=c.hidden_size, activation="tanh")
    return build_model(
        {"text": bert.text_embedder(c)},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"text": pooler},
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
        **bert.block(c),
    )


def _table(c: RobertaConfig) -> Table:
    return {
        **bert.embeddings_table("roberta.embeddings", "modalities_text"),
        **layers("roberta.encoder.layer.{}", "stages_0/text/layers/block", bert.LAYER),
        "roberta.pooler.dense": "poolers_text/transform",
        "lm_head.dense": "heads_masked-lm/transform",
        "lm_head.layer_norm": "heads_masked-lm/norm",
        "lm_head.bias": "heads_masked-lm/decoder_bias",
        "classifier.dense": "heads_classification/transform",
        "classifier.out_proj": "heads_classification/classifier",
    }


def places(ids: Any, padding: int) -> jax.Array:
    """The place of each id `(B, L)`: padding has the place `padding`, the others count on from there, whatever the mask says."""
    real = ids != padding
    return jnp.cumsum(real, 1) * real + padding


def read_text(c: Any, inputs: Mapping[str, Any]) -> Masked:
    """What `bert.read_text` reads, each id in the place that RoBERTa gives it where `position_ids` are not there."""
    raw = bert.read_text(inputs)
    if "place" not in raw.array:
        ids, longest = raw.array["ids"], length(c)
        if ids.shape[1] > longest:
            raise InputError(
                f"input_ids: {ids.shape[1]} tokens; places are counted from {c.pad_token_id + 1}, up to {longest} fit"
            )
        raw = dataclasses.replace(raw, array={**raw.array, "place": places(ids, c.pad_token_id)})
    return raw


def _forward(run: Runner, c: RobertaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"text": read_text(c, inputs)})
    heads: Any = r.out.logits
    words, classes = heads.get("masked-lm"), heads.get("classification")
    logits = words if words is not None else classes
    return {
        "loss": bert.token_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["text"].values,
        "pooler_output": r.out.pooled["text"] if logits is None else None,
        "hidden_states": tuple(r.states("stages_0", "text")),
    }


_PUBLISHED = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_MANY = {**_PUBLISHED, "vocab_size": 250002}


TEXTS = Texts("<s>", "</s>", "<pad>", "<unk>", twice=True)
MANY = dataclasses.replace(TEXTS, first=("<s>", "<pad>", "</s>", "<unk>"))


def length(c: Any) -> int:
    """The longest text, whose places begin behind that of padding."""
    return c.max_position_embeddings - c.pad_token_id - 1


def _family(name: str, names: Mapping[str, Mapping[str, Any]], texts: Texts) -> Family:
    return Family(
        name,
        RobertaConfig,
        _build,
        _table,
        _forward,
        names=names,
        heads={"masked-lm": "lm_head", "classification": "classifier"},
        prefix="roberta",
        texts=texts,
        length=length,
        known=(r"position_ids$", r"^lm_head\.decoder\.(weight|bias)$", r"pooler\.dense\.(weight|bias)$"),
    )


FAMILIES = (
    _family(
        "roberta",
        {
            "roberta-base": _PUBLISHED,
            "roberta-large": {**_PUBLISHED, **_LARGE},
            "distilroberta-base": {**_PUBLISHED, "num_hidden_layers": 6},
        },
        TEXTS,
    ),
    _family("xlm-roberta", {"xlm-roberta-base": _MANY, "xlm-roberta-large": {**_MANY, **_LARGE}}, MANY),
)
