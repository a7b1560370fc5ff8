"""VisualBERT (arXiv 1908.03557): a BERT that reads the regions of an image behind the words, as if they were words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Classifier
from mmx.modalities import Features
from mmx.model import MultimodalTransformer
from mmx.zoo import bert
from mmx.zoo.config import Words, only
from mmx.zoo.family import REGIONS, Family, Runner, padded_features
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class VisualBertConfig(Words):
    """The published fields of VisualBERT."""

    visual_embedding_dim: int = 512
    layer_norm_eps: float = 1e-12
    bypass_transformer: bool = False
    special_visual_initialize: bool = True
    tie_word_embeddings: bool = True


def _build(c: VisualBertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, bypass_transformer=False)
    words = bert.masked_lm_head(c).clone(streams=("text", "image"))  # regions are asked for words too
    outputs = {"masked-lm": words, "matching": Classifier(2, "text", transform=False)}
    # A region has a table of positions, of which it is always given the first row.
    tables = {"segment": c.type_vocab_size, "line": c.max_position_embeddings}
    image = Features(c.visual_embedding_dim, REGIONS, tables=tables, norm="text", aligned="text")
    return bert.joint(c, {"text": bert.text_embedder(c), "image": image}, {name: outputs[name] for name in heads}, dtype)


def _table(c: VisualBertConfig) -> Table:
    return {
        **bert.embeddings_table("visual_bert.embeddings", "modalities_text"),
        "visual_bert.embeddings.visual_projection": "modalities_image/linear",
        "visual_bert.embeddings.visual_token_type_embeddings": "modalities_image/segment",
        "visual_bert.embeddings.visual_position_embeddings": "modalities_image/line",
        **layers("visual_bert.encoder.layer.{}", "stages_0/stack/layers/block", bert.LAYER),
        "visual_bert.pooler.dense": "poolers_text/transform",
        **bert.masked_lm_table("cls.predictions", "heads_masked-lm", c.tie_word_embeddings),
        "cls.seq_relationship": "heads_matching/classifier",
    }


def _forward(run: Runner, c: VisualBertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch = {"text": bert.read_text(inputs)}
    if "visual_embeds" in inputs:
        regions = inputs["visual_embeds"]
        ones = jnp.ones(regions.shape[:2], jnp.int32)
        beside = {"segment": inputs.get("visual_token_type_ids", ones), "line": 0 * ones}
        if "image_text_alignment" in inputs:  # the places of the words that belong to a region
            beside["aligned"] = inputs["image_text_alignment"][:, : regions.shape[1]]
        batch["image"] = padded_features(regions, inputs.get("visual_attention_mask"), **beside)
    r = run(batch)
    heads: Any = r.out.logits
    words, relation = heads.get("masked-lm"), heads.get("matching")
    loss = None
    if words is not None and "labels" in inputs:
        loss = token_loss(words, inputs["labels"])
        if relation is not None and "sentence_image_labels" in inputs:
            loss = loss + token_loss(relation, inputs["sentence_image_labels"])
    entered = jnp.concatenate([r.intermediates["states"][name] for name in batch], 1)
    return {
        "loss": loss,
        "last_hidden_state": jnp.concatenate([tokens.values for tokens in r.out.streams.values()], 1),
        "pooler_output": r.out.pooled["text"],
        "hidden_states": (entered, *r.after("stages_0", "text")),
        "prediction_logits": words,
        "seq_relationship_logits": relation,
    }


FAMILIES = (
    Family(
        "visual_bert",
        VisualBertConfig,
        _build,
        _table,
        _forward,
        names={
            "visualbert-vqa-coco-pre": {"visual_embedding_dim": 2048},
            "visualbert-nlvr2-coco-pre": {"visual_embedding_dim": 1024},
            "visualbert-vcr-coco-pre": {},
        },
        heads={"masked-lm": "cls.predictions", "matching": "cls.seq_relationship"},
        prefix="visual_bert",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$"),
    ),
)
