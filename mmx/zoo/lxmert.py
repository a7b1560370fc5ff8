"""LXMERT (arXiv 1908.07490): a text and an image of regions, each by itself, then cross-attention whose weights they share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, TokenClassifier
from mmx.losses import cross_entropy, regression_loss
from mmx.modalities import Features
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Cross, PerStream
from mmx.zoo import bert
from mmx.zoo.config import Unsaid, activation
from mmx.zoo.family import REGIONS, Family, Runner, padded_features
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Table, layers

_OWN: Table = {
    "_self_att.self.query": "self/query",
    "_self_att.self.key": "self/key",
    "_self_att.self.value": "self/value",
    "_self_att.output.dense": "self/out",
    "_self_att.output.LayerNorm": "self_norm",
    "_inter.dense": "mlp/up",
    "_output.dense": "mlp/down",
    "_output.LayerNorm": "mlp_norm",
}
_SHARED: Table = {
    "visual_attention.att.query": "cross/query",
    "visual_attention.att.key": "cross/key",
    "visual_attention.att.value": "cross/value",
    "visual_attention.output.dense": "cross/out",
    "visual_attention.output.LayerNorm": "cross_norm",
}


@dataclasses.dataclass(frozen=True)
class LxmertConfig(Unsaid):
    """The published fields of LXMERT."""

    num_qa_labels: int = 9500
    num_object_labels: int = 1600
    num_attr_labels: int = 400
    l_layers: int = 9
    x_layers: int = 5
    r_layers: int = 5
    visual_feat_dim: int = 2048
    visual_pos_dim: int = 4
    visual_loss_normalizer: float = 6.67
    task_matched: bool = True
    task_mask_lm: bool = True
    task_obj_predict: bool = True
    task_qa: bool = True
    visual_obj_loss: bool = True
    visual_attr_loss: bool = True
    visual_feat_loss: bool = True
    num_hidden_layers: Any = dataclasses.field(default=None, hash=False)  # the three depths again
    tie_word_embeddings: bool = True

    @property
    def answers(self) -> dict[str, int]:
        """What is asked about every region, and how many numbers the answer has."""
        sizes = {"obj": self.num_object_labels, "attr": self.num_attr_labels, "feat": self.visual_feat_dim}
        return {name: size for name, size in sizes.items() if getattr(self, f"visual_{name}_loss")}


def _build(c: LxmertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    act, eps, width = activation(c.hidden_act), c.layer_norm_eps, c.hidden_size
    outputs = {
        "masked-lm": bert.masked_lm_head(c),
        "matching": Classifier(2, "text", transform=False),
        "regions": TokenClassifier(c.answers, "image", activation=act, norm=eps),
        # The published activation of this head is the erf GELU, whatever hidden_act is.
        "answering": Classifier(c.num_qa_labels, "text", size=2 * width, activation="gelu", norm=eps),
    }
    return build_model(
        {
            "text": bert.text_embedder(c),
            "image": Features(c.visual_feat_dim, REGIONS, vectors={"box": c.visual_pos_dim}, each_norm=eps, average=True),
        },
        (PerStream({"text": c.l_layers, "image": c.r_layers}), Cross(c.x_layers, share=("cross",))),
        width=width,
        embed=0,
        poolers={"text": Pooler("first", size=width, activation="tanh")},
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
        **bert.block(c),
    )


def _table(c: LxmertConfig) -> Table:
    crossed = {"lang": "text", "visn": "image"}
    return {
        **bert.embeddings_table("lxmert.embeddings", "modalities_text"),
        "lxmert.encoder.visn_fc.visn_fc": "modalities_image/linear",
        "lxmert.encoder.visn_fc.visn_layer_norm": "modalities_image/value_norm",
        "lxmert.encoder.visn_fc.box_fc": "modalities_image/box_linear",
        "lxmert.encoder.visn_fc.box_layer_norm": "modalities_image/box_norm",
        **layers("lxmert.encoder.layer.{}", "stages_0/text/layers/block", bert.LAYER),
        **layers("lxmert.encoder.r_layers.{}", "stages_0/image/layers/block", bert.LAYER),
        **layers("lxmert.encoder.x_layers.{}", "stages_1/layers/shared", _SHARED),
        **{
            f"lxmert.encoder.x_layers.{{}}.{theirs}{name}": f"stages_1/layers/{ours}/{path}"
            for theirs, ours in crossed.items()
            for name, path in _OWN.items()
        },
        "lxmert.pooler.dense": "poolers_text/transform",
        **bert.masked_lm_table("cls.predictions", "heads_masked-lm"),
        "cls.predictions.decoder": "heads_masked-lm/decoder",  # where it is not tied
        "cls.seq_relationship": "heads_matching/classifier",
        "obj_predict_head.transform.dense": "heads_regions/transform",
        "obj_predict_head.transform.LayerNorm": "heads_regions/norm",
        **{f"obj_predict_head.decoder_dict.{name}": f"heads_regions/classifier_{name}" for name in c.answers},
        "answer_head.logit_fc.0": "heads_answering/transform",
        "answer_head.logit_fc.2": "heads_answering/norm",
        "answer_head.logit_fc.3": "heads_answering/classifier",
    }


def _region_loss(c: LxmertConfig, scores: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
    """What the objective asks about regions, each with the detector's confidence in its label `(B, L)`."""
    total = jnp.float32(0)
    for name in c.answers:
        label, confidence = labels[name]
        if name == "feat":
            loss = regression_loss(scores[name], label, huber=True)
        else:
            loss = jnp.where(label == -100, 0, cross_entropy(scores[name], jnp.maximum(label, 0)))
        total += (loss * confidence).mean() * c.visual_loss_normalizer
    return total


def _forward(run: Runner, c: LxmertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    image = padded_features(inputs["visual_feats"], inputs.get("visual_attention_mask"), box=inputs["visual_pos"])
    r = run({"text": bert.read_text(inputs), "image": image})
    heads: Any = r.out.logits
    words, relation, regions, answer = (heads.get(n) for n in ("masked-lm", "matching", "regions", "answering"))
    tasks = {
        "mlm": (c.task_mask_lm, words, "labels"),
        "matched": (c.task_matched, relation, "matched_label"),
        "obj": (c.task_obj_predict, regions, "obj_labels"),
        "qa": (c.task_qa, answer, "ans"),
    }
    losses = {}
    for name, (asked, scores, labels) in tasks.items():
        if asked and scores is None:
            continue  # these labels are no input of a model without the head; those of a task that is off are, and do nothing
        if labels in inputs and asked:
            loss = _region_loss(c, scores, inputs[labels]) if name == "obj" else token_loss(scores, inputs[labels])
            losses[f"loss_{name}"] = loss
    return {
        "loss": sum(losses.values()) if losses else None,
        **losses,
        "prediction_logits": words,
        "cross_relationship_score": relation,
        # Published: where nothing is asked, one number that means nothing.
        "question_answering_score": answer if c.task_qa or not heads else r.out.pooled["text"][0, 0],
        "obj_predict_head": regions,
        "language_output": r.out.streams["text"].values,
        "vision_output": r.out.streams["image"].values,
        "pooled_output": r.out.pooled["text"],
        "language_hidden_states": (*r.after("stages_0", "text"), *r.after("stages_1", "text")),
        "vision_hidden_states": (*r.after("stages_0", "image"), *r.after("stages_1", "image")),
    }


FAMILIES = (
    Family(
        "lxmert",
        LxmertConfig,
        _build,
        _table,
        _forward,
        names={"lxmert-base-uncased": {}},
        heads={
            "masked-lm": "cls.predictions",
            "matching": "cls.seq_relationship",
            "regions": "obj_predict_head",
            "answering": "answer_head",
        },
        prefix="lxmert",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$"),
    ),
)
