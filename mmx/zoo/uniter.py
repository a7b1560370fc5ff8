"""UNITER (arXiv 1909.11740): a BERT over words and regions in one, and the five tasks it was trained with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmx.heads import Classifier, TiedDecoder, TokenClassifier
from mmx.losses import cross_entropy, region_labels, transport_distance
from mmx.modalities import Features
from mmx.model import MultimodalTransformer
from mmx.zoo import bert
from mmx.zoo.config import Unsaid, sized
from mmx.zoo.family import REGIONS, Family, Run, Runner, padded, padded_features
from mmx.zoo.order import Order
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, layers

BOX = 7  # x1 y1 x2 y2, width, height, area


@dataclasses.dataclass(frozen=True)
class UniterConfig(Unsaid):
    """The published fields of UNITER, and the two numbers that its code is called with."""

    vocab_size: int = 28996
    img_dim: int = 2048
    img_label_dim: int = 1601


def _build(c: UniterConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    eps = c.layer_norm_eps
    outputs = {  # those of regions have the erf GELU, whatever hidden_act is
        "masked-lm": bert.masked_lm_head(c),
        "region-features": TiedDecoder("image", activation="gelu", norm=eps),
        "region-classes": TokenClassifier(c.img_label_dim, "image", activation="gelu", norm=eps),
        "matching": Classifier(2, "text", transform=False),
    }
    image = Features(
        c.img_dim,
        REGIONS,
        tables={"segment": "text"},
        vectors={"box": BOX},
        each_norm=eps,
        norm=eps,
        marked=True,
    )
    return bert.joint(c, {"text": bert.text_embedder(c), "image": image}, {name: outputs[name] for name in heads}, dtype)


def _table(c: UniterConfig) -> Table:
    return {
        **bert.embeddings_table("uniter.embeddings", "modalities_text"),
        "uniter.img_embeddings.img_linear": "modalities_image/linear",
        "uniter.img_embeddings.img_layer_norm": "modalities_image/value_norm",
        "uniter.img_embeddings.pos_linear": "modalities_image/box_linear",
        "uniter.img_embeddings.pos_layer_norm": "modalities_image/box_norm",
        "uniter.img_embeddings.mask_embedding": "modalities_image/marked",
        "uniter.img_embeddings.LayerNorm": "modalities_image/norm",
        **layers("uniter.encoder.layer.{}", "stages_0/stack/layers/block", bert.LAYER),
        "uniter.pooler.dense": "poolers_text/transform",
        **bert.masked_lm_table("cls.predictions", "heads_masked-lm"),
        "feat_regress.net.0": "heads_region-features/transform",
        "feat_regress.net.2": "heads_region-features/norm",
        "feat_regress.bias": "heads_region-features/decoder_bias",
        "region_classifier.net.0": "heads_region-classes/transform",
        "region_classifier.net.2": "heads_region-classes/norm",
        "region_classifier.net.3": "heads_region-classes/classifier",
        "itm_output": "heads_matching/classifier",
    }


def _order(inputs: Mapping[str, Any]) -> Order:
    words = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    regions = inputs["img_feat"].shape[1] if "img_feat" in inputs else 0
    size = len(inputs["input_ids"] if words else inputs["img_feat"])
    return Order.of(size, words, regions, inputs.get("gather_index"), inputs.get("attn_masks"))


def _batch(inputs: Mapping[str, Any], order: Order, marks: Any = None) -> dict[str, Any]:
    exists, batch = order.exists, {}
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        beside = {"segment": inputs.get("txt_type_ids", jnp.zeros_like(ids))}
        if "position_ids" in inputs:
            beside["place"] = jnp.broadcast_to(inputs["position_ids"], ids.shape)
        batch["text"] = padded(ids, exists[:, : order.first], **beside)
    if "img_feat" in inputs:
        kinds = inputs.get("img_type_ids", jnp.ones(inputs["img_feat"].shape[:2], jnp.int32))
        beside = {"segment": kinds, "box": inputs["img_pos_feat"]} | ({} if marks is None else {"marked": marks})
        batch["image"] = padded_features(inputs["img_feat"], exists[:, order.first :], **beside)
    return batch


def _joint(r: Run) -> jax.Array:
    return jnp.concatenate([tokens.values for tokens in r.out.streams.values()], 1)


def _forward(run: Runner, c: UniterConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the published model is asked for task by task, all at once; scores and losses stand at every word or place.

    Words are scored, and matched with regions, as they stand; regions are asked for where `img_masks` hides them.
    """
    order = _order(inputs)
    batch = _batch(inputs, order)
    r = run(batch)
    sequence = order.fill(_joint(r))
    heads: Any = r.out.logits
    scores, loss, masked = {"mlm": heads.get("masked-lm"), "itm": heads.get("matching")}, {}, None
    if scores["mlm"] is not None and "txt_labels" in inputs:
        labels = inputs["txt_labels"]
        loss["mlm"] = jnp.where(labels == -1, 0, cross_entropy(scores["mlm"], jnp.maximum(labels, 0)))
    if scores["itm"] is not None and "targets" in inputs:
        loss["itm"] = cross_entropy(scores["itm"], inputs["targets"])
    if "img_masks" in inputs:
        hidden = run(_batch(inputs, order, inputs["img_masks"]))
        masked = {"sequence_output": order.fill(_joint(hidden))}
        more, losses = _regions(hidden.out.logits, order, inputs)
        scores, loss = {**scores, **more}, {**loss, **losses}
    return {
        "sequence_output": sequence,
        "pooled_output": r.out.pooled.get("text"),
        "encoded_layers": tuple(order.fill(x) for x in r.after("stages_0", next(iter(batch)))),
        "hidden_states": tuple(order.fill(x) for x in r.states("stages_0", *batch)),
        "masked_image": masked,
        "scores": scores,
        "loss": loss,
        "wra": _alignment(sequence, order, inputs) if "ot_scatter" in inputs else None,
    }


def _regions(heads: Any, order: Order, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores and losses of regions, at every slot; targets are published for those that `img_mask_tgt` marks, in their order."""
    scores, loss = {}, {}
    if "region-features" in heads:
        scores["mrfr"] = order.fill_second(heads["region-features"])
    if "region-classes" in heads:
        scores["mrc"] = scores["mrc-kl"] = order.fill_second(heads["region-classes"])
    if "img_mask_tgt" not in inputs:
        return scores, loss
    marked = inputs["img_mask_tgt"] != 0  # (B, S)
    number = jnp.maximum(jnp.cumsum(marked) - 1, 0).reshape(marked.shape)

    def where_marked(x: jax.Array) -> jax.Array:
        return jnp.where(marked.reshape(*marked.shape, *[1] * (x.ndim - 2)), x, 0)

    if "mrfr" in scores and "feat_targets" in inputs:
        loss["mrfr"] = where_marked((scores["mrfr"] - inputs["feat_targets"][number]) ** 2)
    if "mrc" in scores and "label_targets" in inputs:
        target = inputs["label_targets"][number]  # (B, S, classes)
        loss["mrc"] = where_marked(cross_entropy(scores["mrc"], region_labels(target)))
        # Published: class by class, where `kl_divergence` is their sum.
        away = jax.scipy.special.xlogy(target, target) - target * jax.nn.log_softmax(scores["mrc"])
        loss["mrc-kl"] = where_marked(away)
    return scores, loss


def _alignment(sequence: jax.Array, order: Order, inputs: Mapping[str, Any]) -> jax.Array:
    """The distance between the words and the regions of each example, `(B,)`."""
    places = order.first + order.second
    apart = jnp.zeros((len(sequence), places, sequence.shape[-1]), sequence.dtype)
    apart = apart.at[jnp.arange(len(sequence))[:, None], inputs["ot_scatter"]].set(sequence, mode="drop")
    text, image = apart[:, : order.first], apart[:, order.first :]
    return transport_distance(text, image, inputs["txt_pad"] == 0, inputs["img_pad"] == 0)


FAMILIES = (
    Family(
        "uniter",
        UniterConfig,
        _build,
        _table,
        _forward,
        names={
            "uniter-base": {},
            "uniter-large": sized(24, 1024, 16),
        },
        heads={
            "masked-lm": "cls.predictions",
            "region-features": "feat_regress",
            "region-classes": "region_classifier",
            "matching": "itm_output",
        },
        prefix="uniter",
        texts=Texts("[CLS]", "[SEP]"),
        length=lambda c: c.max_position_embeddings,
        inputs={"input_ids": "input_ids", "attn_masks": "attention_mask"},  # of texts alone; beside regions, theirs stand behind
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$", r"^feat_regress\.weight$"),
    ),
)
