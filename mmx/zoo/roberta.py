"""RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (1911.02116): a BERT whose places are counted over the ids that are no padding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Classifier, TiedDecoder
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.types import Masked
from mmx.zoo import bert
from mmx.zoo.config import Classes, Words, only, sized
from mmx.zoo.family import Family, Runner, told_by_pooler
from mmx.zoo.loss import class_loss, token_loss
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class RobertaConfig(Classes, Words):
    """The published fields of RoBERTa."""

    without_pooler: ClassVar[tuple[str, ...]] = ("masked-lm", "classification")
    vocab_size: int = 50265
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    tie_word_embeddings: bool = True
    add_pooling_layer: bool = True  # an argument of the published class; here it lies beside the fields


def _build(c: RobertaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, position_embedding_type="absolute", is_decoder=False, tie_word_embeddings=True)
    outputs = {
        # The published activation of this head is the erf GELU, whatever hidden_act is.
        "masked-lm": TiedDecoder("text", activation="gelu", norm=c.layer_norm_eps),
        "classification": Classifier(c.num_labels, "text"),
    }
    return build_model(
        {"text": bert.text_embedder(c)},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"text": bert.text_pooler(c, heads)},
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
    logits, loss = words if words is not None else classes, None
    if logits is not None and "labels" in inputs:
        labels = inputs["labels"]
        loss = token_loss(words, labels) if words is not None else class_loss(classes, labels, c.problem_type)
    return {
        "loss": loss,
        "logits": logits,
        "last_hidden_state": r.out.streams["text"].values,
        "pooler_output": r.out.pooled["text"] if bert.pools(c, heads) else None,
        "hidden_states": tuple(r.states("stages_0", "text")),
        "attentions": tuple(r.attentions("stages_0", "text")),
    }


_PUBLISHED = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LARGE = sized(24, 1024, 16)
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
        infer=told_by_pooler,
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
