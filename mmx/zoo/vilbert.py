"""ViLBERT (arXiv 1908.02265, 1912.02315): a text and an image of regions, with co-attention between their last layers."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Classifier, Pooler, TokenClassifier
from mmx.layers import BlockConfig
from mmx.losses import kl_divergence, masked_mean, regression_loss
from mmx.modalities import Features
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Cross, PerStream, Stage
from mmx.zoo import bert
from mmx.zoo.config import Unsaid, activation, only, sized
from mmx.zoo.family import REGIONS, Family, Runner, padded_features
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Table, layers

BOX = 5  # x1 y1 x2 y2, area
FUSE = {"mul": "product", "sum": "sum"}  # published name of how pooled vectors are fused -> ours
_CROSS = {"image": ("1", "2", "v"), "text": ("2", "1", "t")}  # published: own number, number of what is read, letter


@dataclasses.dataclass(frozen=True)
class VilbertConfig(Unsaid):
    """The published fields of ViLBERT."""

    v_feature_size: int = 2048
    v_target_size: int = 1601
    v_hidden_size: int = 768
    v_num_hidden_layers: int = 3
    v_num_attention_heads: int = 12
    v_intermediate_size: int = 3072
    v_hidden_act: str = "gelu"
    bi_hidden_size: int = 1024
    bi_num_attention_heads: int = 16
    v_biattention_id: tuple = (0, 1)
    t_biattention_id: tuple = (10, 11)
    visual_target: int = 0
    fusion_method: str = "mul"
    model: str = "bert"
    fast_mode: bool = False
    in_batch_pairs: bool = False
    dynamic_attention: bool = False
    with_coattention: bool = True
    task_specific_tokens: bool = False

    @property
    def spans(self) -> tuple[dict[str, range], ...]:
        """The layers of each stream before each co-attention, and behind the last one."""
        ends = {
            "text": (*self.t_biattention_id, self.num_hidden_layers),
            "image": (*self.v_biattention_id, self.v_num_hidden_layers),
        }
        spans = {name: [range(a, b) for a, b in itertools.pairwise((0, *numbers))] for name, numbers in ends.items()}
        return tuple({"text": text, "image": image} for text, image in zip(spans["text"], spans["image"], strict=True))


def blocks(c: Any, dtype: str) -> dict[str, BlockConfig]:
    """The blocks of the text and of the image."""
    image = {
        "heads": c.v_num_attention_heads,
        "mlp": c.v_intermediate_size,
        "activation": activation(c.v_hidden_act, "v_hidden_act"),
        "norm": "post",
        "eps": c.layer_norm_eps,
    }
    return {
        "text": BlockConfig(width=c.hidden_size, dtype=dtype, **bert.block(c)),
        "image": BlockConfig(width=c.v_hidden_size, dtype=dtype, **image),
    }


def region_embedder(c: Any) -> Features:
    """Regions, their boxes, and a norm on the sum."""
    return Features(c.v_feature_size, REGIONS, vectors={"box": BOX}, width=c.v_hidden_size, norm=c.layer_norm_eps)


def poolers(c: Any) -> dict[str, Pooler]:
    """Of each stream its first token: of regions that is the whole image."""
    return {name: Pooler("first", size=c.bi_hidden_size, activation="relu") for name in ("text", "image")}


def heads_of(c: Any) -> dict[str, Any]:
    """The pretraining heads."""
    act = activation(c.hidden_act)  # of regions too: published code does not read v_hidden_act here
    return {
        "masked-lm": bert.masked_lm_head(c),
        "region-classes": TokenClassifier(c.v_target_size, "image", activation=act, norm=c.layer_norm_eps),
        "matching": Classifier(2, transform=False, fuse=FUSE[c.fusion_method]),
    }


def _build(c: VilbertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, model="bert", fast_mode=False, in_batch_pairs=False, dynamic_attention=False, with_coattention=True)
    only(c, task_specific_tokens=False, fusion_method=tuple(FUSE))
    own, between = blocks(c, dtype), {}
    for name, block in own.items():
        size = c.bi_hidden_size // c.bi_num_attention_heads
        between[name] = dataclasses.replace(block, heads=c.bi_num_attention_heads, head_size=size)
    stages: list[Stage] = []
    for span in c.spans:
        stages += [PerStream({name: len(numbers) for name, numbers in span.items()}, own), Cross(1, between, "cross mlp")]
    return build_model(
        {"text": bert.text_embedder(c), "image": region_embedder(c)},
        tuple(stages[:-1]),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        embed=0,
        poolers=poolers(c),
        outputs={name: head for name, head in heads_of(c).items() if name in heads},
        dtype=dtype,
    )


def ends_table() -> Table:
    """The weights before and behind the layers."""
    return {
        **bert.embeddings_table("bert.embeddings", "modalities_text"),
        "bert.v_embeddings.image_embeddings": "modalities_image/linear",
        "bert.v_embeddings.image_location_embeddings": "modalities_image/box_linear",
        "bert.v_embeddings.LayerNorm": "modalities_image/norm",
        "bert.t_pooler.dense": "poolers_text/transform",
        "bert.v_pooler.dense": "poolers_image/transform",
        **bert.masked_lm_table("cls.predictions", "heads_masked-lm"),
        "cls.imagePredictions.transform.dense": "heads_region-classes/transform",
        "cls.imagePredictions.transform.LayerNorm": "heads_region-classes/norm",
        "cls.imagePredictions.decoder": "heads_region-classes/classifier",
        "cls.bi_seq_relationship": "heads_matching/classifier",
    }


def _table(c: VilbertConfig) -> Table:
    table = dict(ends_table())
    for i, span in enumerate(c.spans):
        for name, published in (("text", "layer"), ("image", "v_layer")):
            first = f"bert.encoder.{published}.{{{span[name].start}+1}}"
            table |= layers(first, f"stages_{2 * i}/{name}/layers/block", bert.LAYER)
        for name, (own, other, letter) in _CROSS.items():
            co_attention = {
                f"biattention.query{own}": "cross/query",
                f"biattention.key{other}": "cross/key",
                f"biattention.value{other}": "cross/value",
                f"biOutput.dense{own}": "cross/out",
                f"biOutput.LayerNorm{own}": "cross_norm",
                f"{letter}_intermediate.dense": "mlp/up",
                f"{letter}_output.dense": "mlp/down",
                f"{letter}_output.LayerNorm": "mlp_norm",
            }
            table |= layers(f"bert.encoder.c_layer.{{{i}+1}}", f"stages_{2 * i + 1}/layers/{name}", co_attention)
    return table


def read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Words and regions as both streams' raw values."""
    image = padded_features(inputs["image_feat"], inputs.get("image_attention_mask"), box=inputs["image_loc"])
    return {"text": bert.read_text(inputs), "image": image}


def fields(r: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What all heads answer, and the losses that need no further thought."""
    heads: Any = r.out.logits
    words, regions, relation = (heads.get(name) for name in ("masked-lm", "region-classes", "matching"))
    result = {
        **{f"sequence_output_{letter}": r.out.streams[name].values for name, letter in (("text", "t"), ("image", "v"))},
        **{f"pooled_output_{letter}": r.out.pooled[name] for name, letter in (("text", "t"), ("image", "v"))},
        "prediction_scores_t": words,
        "prediction_scores_v": regions,
        "seq_relationship_score": relation,
    }
    if words is not None and "masked_lm_labels" in inputs:
        result["masked_lm_loss"] = token_loss(words, inputs["masked_lm_labels"], -1)[None]
    if relation is not None and "next_sentence_label" in inputs:
        result["next_sentence_loss"] = token_loss(relation, inputs["next_sentence_label"], -1)[None]
    return result


def _forward(run: Runner, c: VilbertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """With `output_all_encoded_layers`, as published, the sequences and what is pooled of them end at the last co-attention."""
    batch, stages = read(inputs), 2 * len(c.spans) - 1
    r = run(batch)
    result = fields(r, inputs)
    for name in batch:
        left = [state for i in range(stages) for state in r.after(f"stages_{i}", name)]
        result[f"{name}_hidden_states"] = (r.intermediates["states"][name], *left)
    if result["prediction_scores_v"] is not None and "image_target" in inputs:
        only(c, visual_target=(0, 1))  # 2 draws other regions by chance
        scores, target = result["prediction_scores_v"][:, 1:], inputs["image_target"]  # the whole image has no target
        away = kl_divergence(scores, target) if c.visual_target == 0 else regression_loss(scores, target)
        result["masked_img_loss"] = masked_mean(away, inputs["image_label"] == 1)[None]
    if "output_all_encoded_layers" in inputs:
        r = run(batch, stages=stages - 1)
        for name, letter in (("text", "t"), ("image", "v")):
            left = [r.after(f"stages_{i}", name)[-1] for i in range(1, stages - 1, 2)]
            result[f"encoded_layers_{letter}"] = tuple(left)
            result[f"sequence_output_{letter}"], result[f"pooled_output_{letter}"] = left[-1], r.out.pooled[name]
    return result


def _sized(count: int, depth: int = 12, width: int = 768, heads: int = 12) -> dict[str, Any]:
    """`count` co-attentions, before the last layers of the text and before each layer of the image."""
    return {
        **sized(depth, width, heads),
        "v_hidden_size": 1024,
        "v_num_hidden_layers": count,
        "v_num_attention_heads": 8,
        "v_intermediate_size": 1024,
        "bi_num_attention_heads": 8,
        "v_biattention_id": tuple(range(count)),
        "t_biattention_id": tuple(range(depth - count, depth)),
    }


FAMILIES = (
    Family(
        "vilbert",
        VilbertConfig,
        _build,
        _table,
        _forward,
        names={
            "vilbert-base-4layer": _sized(4),
            "vilbert-base-6layer": _sized(6),
            "vilbert-base-8layer": _sized(8),
            "vilbert-large-6layer": _sized(6, 24, 1024, 16),
        },
        heads={"masked-lm": "cls.predictions", "region-classes": "cls.imagePredictions", "matching": "cls.bi_seq_relationship"},
        prefix="bert",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$", r"\.biOutput\.q_dense[12]\."),
    ),
)
