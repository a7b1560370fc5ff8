"""BEiT (arXiv 2106.08254): a ViT with relative positions on the grid of patches and scaled residuals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, TokenClassifier
from mmx.layers import Grid
from mmx.losses import cross_entropy, masked_mean
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo import timm
from mmx.zoo.config import Classes, Pixels, activation, only, sized
from mmx.zoo.family import Family, Runner, channels_last, grid, pair, told_by_pooler
from mmx.zoo.loss import class_loss
from mmx.zoo.vit import LAYER as VIT_LAYER
from mmx.zoo.vit import RENAMED, embeddings_table
from mmx.zoo.weights import Table, layers, reshaped

LAYER: Table = {**VIT_LAYER, "lambda_1": "self_scale", "lambda_2": "mlp_scale"}


@dataclasses.dataclass(frozen=True)
class BeitConfig(Classes, Pixels):
    """The published fields of BEiT; those of its segmentation heads are known and not read."""

    vocab_size: int = 8192
    layer_norm_eps: float = 1e-12
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    add_pooling_layer: bool = True  # an argument of the published class; here it lies beside the fields


def _build(c: BeitConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    shared = c.use_shared_relative_position_bias
    if shared:
        only(c, use_relative_position_bias=False)
    rows, columns = grid(c)  # the tables are published as if it was turned, and read as if resampled
    image = Patches(
        pair(c.image_size),
        pair(c.patch_size),
        c.num_channels,
        width=c.hidden_size,
        special=("class",),
        special_position=c.use_absolute_position_embeddings,
        position=None if c.use_absolute_position_embeddings else "none",
        mask_token=c.use_mask_token,
        resize=True,
        crop=True,
    )
    outputs = {
        "masked-image": TokenClassifier(c.vocab_size, "image", transform=False, norm=c.layer_norm_eps),
        "classification": Classifier(c.num_labels, "image", transform=False),
    }
    mean = c.use_mean_pooling and c.add_pooling_layer and tuple(heads) != ("masked-image",)
    return build_model(
        {"image": image},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        mlp=c.intermediate_size,
        activation=activation(c.hidden_act),
        eps=c.layer_norm_eps,
        attention_bias=("query", "value", "out"),
        relative=Grid(columns, rows, linear=True, each=not shared) if shared or c.use_relative_position_bias else None,
        layer_scale=c.layer_scale_init_value if c.layer_scale_init_value > 0 else None,
        drop_path=c.drop_path_rate,
        final_norm=not c.use_mean_pooling,
        embed=0,
        poolers={"image": Pooler("content", norm=c.layer_norm_eps) if mean else Pooler("first")},
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
    )


def _table(c: BeitConfig) -> Table:
    rows, columns = grid(c)
    bias = ((2 * rows - 1) * (2 * columns - 1) + 3, c.num_attention_heads)
    relative = "relative_position_bias.relative_position_bias_table"
    return {
        **embeddings_table("beit.embeddings", c),
        "beit.embeddings.mask_token": reshaped("modalities_image/mask_token", 1, 1, c.hidden_size),
        **layers("beit.encoder.layer.{}", "stages_0/image/layers/block", LAYER),
        "beit.encoder.layer.{}.attention.attention." + relative: reshaped("stages_0/image/layers/relative/bias", *bias),
        "beit.encoder." + relative: reshaped("stages_0/image/relative/bias", *bias),
        "beit.layernorm": "stages_0/image/norm",
        "beit.pooler.layernorm": "poolers_image/norm",
        "layernorm": "heads_masked-image/norm",
        "lm_head": "heads_masked-image/classifier",
        "classifier": "heads_classification/classifier",
    }


def _infer(c: BeitConfig, shapes: Mapping[str, Any]) -> BeitConfig:
    return told_by_pooler(c, shapes) if c.use_mean_pooling else c  # a pooler that takes the first token has no weights


def _forward(run: Runner, c: BeitConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    image, hidden = channels_last(inputs["pixel_values"]), inputs.get("bool_masked_pos")
    r = run({"image": image if hidden is None else {"image": image, "hidden": hidden.reshape(len(image), -1)}})
    codes, classes = r.out.logits.get("masked-image"), r.out.logits.get("classification")
    loss = None
    if codes is not None:
        codes = codes[:, 1:]
        if "labels" in inputs and hidden is not None:  # one label for each hidden patch, row by row through the batch
            here = hidden.reshape(-1) != 0
            labels = inputs["labels"].reshape(-1)[jnp.maximum(jnp.cumsum(here) - 1, 0)]
            loss = masked_mean(cross_entropy(codes.reshape(-1, codes.shape[-1]), labels), here)
    elif classes is not None and "labels" in inputs:
        loss = class_loss(classes, inputs["labels"], c.problem_type)
    return {
        "loss": loss,
        "logits": classes if codes is None else codes,
        "last_hidden_state": r.out.streams["image"].values,
        "pooler_output": r.out.pooled["image"] if not r.out.logits and c.add_pooling_layer else None,
        "hidden_states": tuple(r.states("stages_0", "image")),
        "attentions": tuple(r.attentions("stages_0", "image")),
    }


_BASE = {"use_relative_position_bias": True}
_LARGE = sized(24, 1024, 16, **_BASE, layer_scale_init_value=1e-5)
_PRETRAINING = {
    "use_mask_token": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": True,
    "use_mean_pooling": False,
}
FAMILIES = (
    Family(
        "beit",
        BeitConfig,
        _build,
        _table,
        _forward,
        names={
            "beit-base-patch16-224": {**_BASE, "num_labels": 1000},
            "beit-base-patch16-224-pt22k": {**_BASE, **_PRETRAINING},
            "beit-base-patch16-224-pt22k-ft22k": {**_BASE, "num_labels": 21841},
            "beit-base-patch16-384": {**_BASE, "num_labels": 1000, "image_size": 384},
            "beit-large-patch16-224": {**_LARGE, "num_labels": 1000},
            "beit-large-patch16-224-pt22k": {**_LARGE, **_PRETRAINING},
            "beit-large-patch16-224-pt22k-ft22k": {**_LARGE, "num_labels": 21841},
            "beit-large-patch16-384": {**_LARGE, "num_labels": 1000, "image_size": 384},
            "beit-large-patch16-512": {**_LARGE, "num_labels": 1000, "image_size": 512},
            **timm.names(timm.beit_fields, "beit_{}", {"base": "16_224 16_384", "large": "16_224 16_384 16_512"}),
            **timm.names(timm.beit_fields, "beitv2_{}", {"base": "16_224", "large": "16_224"}),
        },
        heads={"masked-image": "lm_head", "classification": "classifier"},
        prefix="beit",
        known=(r"relative_position_index$",),
        older={**RENAMED, r"attention\.attention\.relative_position": "relative_position"},
        infer=_infer,
        libraries=(timm.BEIT,),
    ),
)
