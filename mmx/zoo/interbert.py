"""InterBERT (arXiv 2003.13198): regions and words in one stream, then each by itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.losses import kl_divergence, masked_mean
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Joint, PerStream
from mmx.zoo import bert, vilbert
from mmx.zoo.config import Unsaid, only
from mmx.zoo.family import Family, Runner
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class InterBertConfig(Unsaid):
    """The published fields of InterBERT."""

    t_num_hidden_layers: int = 6
    v_feature_size: int = 2048
    v_target_size: int = 1601
    v_hidden_size: int = 768
    v_num_hidden_layers: int = 3
    v_num_attention_heads: int = 12
    v_intermediate_size: int = 3072
    v_hidden_act: str = "gelu"
    bi_hidden_size: int = 1024
    predict_feature: bool = False
    fusion_method: str = "mul"
    # ViLBERT's, whose configuration this was; nothing reads them.
    bi_num_attention_heads: int = 16
    v_biattention_id: tuple = (0, 1)
    t_biattention_id: tuple = (10, 11)
    fast_mode: bool = False
    in_batch_pairs: bool = False
    with_coattention: bool = True


def _build(c: InterBertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, fusion_method=tuple(vilbert.FUSE), v_hidden_size=c.hidden_size)
    own = vilbert.blocks(c, dtype)
    depth = {"image": c.v_num_hidden_layers, "text": c.t_num_hidden_layers}
    return build_model(
        {"image": vilbert.region_embedder(c), "text": bert.text_embedder(c)},  # regions come first
        (Joint(c.num_hidden_layers, own["text"]), PerStream(depth, own)),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        embed=0,
        poolers=vilbert.poolers(c),
        outputs={name: head for name, head in vilbert.heads_of(c).items() if name in heads},
        dtype=dtype,
    )


def _table(c: InterBertConfig) -> Table:
    return {
        **vilbert.ends_table(),
        **layers("bert.encoder.layer.{}", "stages_0/stack/layers/block", bert.LAYER),
        **layers(f"bert.encoder.layer.{{{c.num_hidden_layers}+1}}", "stages_1/text/layers/block", bert.LAYER),
        **layers("bert.encoder.v_layer.{}", "stages_1/image/layers/block", bert.LAYER),
    }


def _forward(run: Runner, c: InterBertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`multimodal_mask`, where it is given, is that of regions and words, one behind the other, in all layers."""
    batch = vilbert.read(inputs)
    if "multimodal_mask" in inputs:
        regions = inputs["image_feat"].shape[1]
        masks = {"image": inputs["multimodal_mask"][:, :regions], "text": inputs["multimodal_mask"][:, regions:]}
        batch = {name: dataclasses.replace(raw, mask=masks[name] != 0) for name, raw in batch.items()}
    r = run(batch)
    result = vilbert.fields(r, inputs)
    result["hidden_states"] = tuple(r.states("stages_0", "image", "text"))  # regions, then words
    result |= {f"{name}_hidden_states": tuple(r.after("stages_1", name)) for name in batch}
    if result["prediction_scores_v"] is not None and "image_target" in inputs:
        scores, target = result["prediction_scores_v"][:, 1:], inputs["image_target"]  # the whole image has no target
        away = ((scores - target) ** 2).sum(-1) if c.predict_feature else kl_divergence(scores, target)
        paired = inputs["next_sentence_label"] == 0  # a region is asked for where text and image belong together
        result["masked_img_loss"] = masked_mean(away, (inputs["image_label"] == 1) & paired[:, None])[None]
    return result


FAMILIES = (
    Family(
        "interbert",
        InterBertConfig,
        _build,
        _table,
        _forward,
        names={
            "interbert-base": {
                "num_hidden_layers": 6,
                "t_num_hidden_layers": 6,
                "v_num_hidden_layers": 6,
                "v_num_attention_heads": 8,
            },
        },
        heads={"masked-lm": "cls.predictions", "region-classes": "cls.imagePredictions", "matching": "cls.bi_seq_relationship"},
        prefix="bert",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"cls\.predictions\.decoder\.(weight|bias)$"),
    ),
)
