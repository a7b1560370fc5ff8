"""BERT (arXiv 1810.04805) and its kin in size: RoBERTa, MiniLM. One text stream, post-norm, erf GELU, eps 1e-12."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, TiedDecoder
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Joint, PerStream
from mmx.zoo.config import Words, activation, only, sized
from mmx.zoo.family import Family, Run, Runner, padded, told_by_pooler
from mmx.zoo.loss import token_loss
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers

LAYER: Table = {  # of every model that copied BERT's
    "attention.self.query": "self/query",
    "attention.self.key": "self/key",
    "attention.self.value": "self/value",
    "attention.output.dense": "self/out",
    "attention.output.LayerNorm": "self_norm",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "output.LayerNorm": "mlp_norm",
}


KNOWN = (  # buffers, tied copies, a pooler in the file of a model that does not read it
    r"position_ids$",
    r"cls\.predictions\.decoder\.(weight|bias)$",
    r"(^|\.)pooler\.dense\.(weight|bias)$",
)


@dataclasses.dataclass(frozen=True)
class BertConfig(Words):
    """The published fields of BERT."""

    without_pooler: ClassVar[tuple[str, ...]] = ("masked-lm",)  # heads that are published without it
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    add_pooling_layer: bool = True  # an argument of the published class; here it lies beside the fields


def text_embedder(c: Any) -> Ids:
    """Words, positions and segments, and the norm on their sum."""
    return Ids(
        c.vocab_size,
        c.max_position_embeddings,
        width=c.hidden_size,
        tables={"segment": c.type_vocab_size},
        norm=c.layer_norm_eps,
    )


def block(c: Any) -> dict[str, Any]:
    """The fields of `BlockConfig` that BERT's configuration tells."""
    return {
        "heads": c.num_attention_heads,
        "mlp": c.intermediate_size,
        "activation": activation(c.hidden_act),
        "norm": "post",
        "eps": c.layer_norm_eps,
    }


def masked_lm_head(c: Any, modality: str = "text") -> TiedDecoder:
    """A dense layer, the activation, a norm, and the embedding as the matrix, unless it is not tied."""
    tied = getattr(c, "tie_word_embeddings", True)
    return TiedDecoder(modality, activation=activation(c.hidden_act), norm=c.layer_norm_eps, own=not tied)


def pools(c: Any, heads: Iterable[str]) -> bool:
    """Whether a model with these heads is published with a pooler."""
    return c.add_pooling_layer and not ({*heads} and {*heads} <= {*c.without_pooler})


def text_pooler(c: Any, heads: Sequence[str]) -> Pooler:
    """The published pooler, where there is one."""
    return Pooler("first", size=c.hidden_size, activation="tanh") if pools(c, heads) else Pooler("first")


def assemble(c: Any, text: Ids, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    """One post-norm stack over the tokens of `text`, the pooler, and the heads that are named."""
    only(c, position_embedding_type="absolute", is_decoder=False)
    outputs = {"masked-lm": masked_lm_head(c), "matching": Classifier(2, "text", transform=False)}
    return build_model(
        {"text": text},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"text": text_pooler(c, heads)},
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
        **block(c),
    )


def joint(c: Any, modalities: Mapping[str, nn.Module], outputs: Mapping[str, nn.Module], dtype: str) -> MultimodalTransformer:
    """BERT's layers over a text and another modality in one line; their vector is the text's first token behind a tanh."""
    return build_model(
        modalities,
        (Joint(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"text": Pooler("first", size=c.hidden_size, activation="tanh")},
        outputs=outputs,
        dtype=dtype,
        **block(c),
    )


def _build(c: BertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    return assemble(c, text_embedder(c), heads, dtype)


def embeddings_table(published: str, ours: str) -> Table:
    """The weights of `text_embedder`."""
    return {
        f"{published}.word_embeddings": f"{ours}/token",
        f"{published}.position_embeddings.weight": f"{ours}/position",
        f"{published}.token_type_embeddings": f"{ours}/segment",
        f"{published}.LayerNorm": f"{ours}/norm",
    }


def masked_lm_table(published: str, ours: str, tied: bool = True) -> Table:
    """The weights of `masked_lm_head`; a matrix of its own has a bias of its own, and the other one is not read."""
    own = {} if tied else {f"{published}.decoder": f"{ours}/decoder", f"{published}.decoder.bias": f"{ours}/decoder_bias"}
    return {
        f"{published}.transform.dense": f"{ours}/transform",
        f"{published}.transform.LayerNorm": f"{ours}/norm",
        **own,
        f"{published}.bias": f"{ours}/decoder_bias",
    }


def encoder_table(prefix: str, tied: bool = True) -> Table:
    """The weights of `assemble`, but for tables beside BERT's."""
    return {
        **embeddings_table(f"{prefix}.embeddings", "modalities_text"),
        **layers(prefix + ".encoder.layer.{}", "stages_0/text/layers/block", LAYER),
        f"{prefix}.pooler.dense": "poolers_text/transform",
        **masked_lm_table("cls.predictions", "heads_masked-lm", tied),
        "cls.seq_relationship": "heads_matching/classifier",
    }


def _table(c: BertConfig) -> Table:
    return encoder_table("bert", c.tie_word_embeddings)


def read_text(inputs: Mapping[str, Any]) -> Any:
    """`input_ids`, `attention_mask`, `token_type_ids`, `position_ids` as the raw value of `text_embedder`."""
    ids = inputs["input_ids"]
    beside = {"segment": inputs.get("token_type_ids", jnp.zeros_like(ids))}
    if "position_ids" in inputs:
        beside["place"] = jnp.broadcast_to(inputs["position_ids"], ids.shape)
    return padded(ids, inputs.get("attention_mask"), **beside)


def masked_lm_fields(c: Any, r: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model with the masked-lm head returns, or the bare one."""
    logits = r.out.logits.get("masked-lm")
    return {
        "loss": token_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": r.out.streams["text"].values,
        "pooler_output": r.out.pooled["text"] if pools(c, r.out.logits) else None,
        "hidden_states": tuple(r.states("stages_0", "text")),
        "attentions": tuple(r.attentions("stages_0", "text")),
    }


def _forward(run: Runner, c: BertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({"text": read_text(inputs)})
    words, relation = r.out.logits.get("masked-lm"), r.out.logits.get("matching")
    losses = []
    if words is not None and "labels" in inputs:
        losses.append(token_loss(words, inputs["labels"]))
    if relation is not None and "next_sentence_label" in inputs:
        losses.append(token_loss(relation, inputs["next_sentence_label"]))
    both = words is not None and relation is not None
    return {
        "loss": sum(losses) if losses else None,
        "last_hidden_state": r.out.streams["text"].values,
        "pooler_output": r.out.pooled["text"] if pools(c, r.out.logits) else None,
        "hidden_states": tuple(r.states("stages_0", "text")),
        "attentions": tuple(r.attentions("stages_0", "text")),
        "prediction_logits" if both else "logits": words if words is not None else relation,
        "seq_relationship_logits": relation if both else None,
    }


TEXTS = Texts("[CLS]", "[SEP]", lower=True, types=True)
FAMILIES = (
    Family(
        "bert",
        BertConfig,
        _build,
        _table,
        _forward,
        names={
            "bert-base-uncased": {},
            "bert-base-cased": {"vocab_size": 28996},
            "bert-base-multilingual-cased": {"vocab_size": 119547},
            "bert-large-uncased": sized(24, 1024, 16),
            "bert-large-cased": sized(24, 1024, 16, vocab_size=28996),
            "MiniLM-L6-H384-uncased": sized(6, 384, 12),
            "MiniLM-L12-H384-uncased": sized(12, 384, 12),
            "all-MiniLM-L6-v2": sized(6, 384, 12),
        },
        heads={"masked-lm": "cls.predictions", "matching": "cls.seq_relationship"},
        prefix="bert",
        texts=TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=KNOWN,
        infer=told_by_pooler,
    ),
)
