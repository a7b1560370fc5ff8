"""BridgeTower (arXiv 2206.08657): a RoBERTa and a CLIP, of which each upper layer is read by a layer of a cross-modal encoder."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, Similarity, TiedDecoder
from mmx.layers import BlockConfig
from mmx.losses import cross_entropy
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Bridge, PerStream
from mmx.zoo import bert, blip, clip, open_clip, roberta
from mmx.zoo.config import Words, activation, only, sized
from mmx.zoo.family import Family, Run, Runner, channels_last
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Layout, Table, convolution, layers, reshaped

STREAMS = ("text", "image")
TEXT_POOLER = "text-pooler"  # the tower's own: stored, and read by no published class
IGNORED = ("token_type_ids", "pixel_mask", "image_token_type_idx", "interpolate_pos_encoding")  # published, and change nothing


@dataclasses.dataclass(frozen=True)
class BridgeTowerTextConfig(Words):
    """The published fields of the text tower, which are those of the cross-modal layers, too."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"is_decoder"})  # never called as one

    vocab_size: int = 50265
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    position_embedding_type: str = "absolute"
    add_cross_attention: bool = False


@dataclasses.dataclass(frozen=True)
class BridgeTowerVisionConfig:
    """The published fields of the image tower; its heads are 64 wide, its MLP is 4 times as wide as a token, its GELU quick."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"share_layernorm", "stop_gradient"})

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_channels: int = 3
    patch_size: int = 16
    image_size: int = 288
    layer_norm_eps: float = 1e-5
    remove_last_layer: bool = False

    @property
    def depth(self) -> int:
        """The layers that there are."""
        return self.num_hidden_layers - self.remove_last_layer


@dataclasses.dataclass(frozen=True)
class BridgeTowerConfig:
    """The published fields of BridgeTower."""

    without_effect: ClassVar[frozenset[str]] = frozenset(  # of how it was trained, and of names that were given up
        {
            "classifier_drop_rate",
            "cross_modal_transform_shared",
            "downstream_fusion",
            "downstream_fusion_layers",
            "downstream_fusion_method",
            "drop_rate",
            "freeze_RoBERTa",
            "freeze_ViT",
            "freeze_layer_count_roberta",
            "freeze_layer_count_vit",
            "head_hidden_scale",
            "image_size",
            "init_layernorm_from_vision_encoder",
            "init_layernorm_from_vit",
            "input_image_embed_size",
            "input_text_embed_size",
            "intermediate_size",
            "link_tower_shared",
            "max_text_len",
            "mlp_ratio",
            "nlvr2_head_format",
            "num_attention_heads",
            "patch_size",
            "resolution_before",
            "stop_gradient",
            "task_head_layers",
            "unfreeze_RoBERTa_attention",
            "unfreeze_RoBERTa_embeddings",
            "unfreeze_RoBERTa_encoder",
            "unfreeze_RoBERTa_layernorm",
            "unfreeze_ViT_attention",
            "unfreeze_ViT_layernorm",
            "vit_embed_dim",
            "vit_layernorm_init_from_vit",
            "vit_layernorm_shared",
            "vit_num_hidden_layers",
            "vit_remove_last",
            "vocab_size",
        }
    )

    text_config: BridgeTowerTextConfig = BridgeTowerTextConfig()
    vision_config: BridgeTowerVisionConfig = BridgeTowerVisionConfig()
    hidden_size: int = 768
    num_hidden_layers: int = 6
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    share_cross_modal_transformer_layers: bool = True
    share_link_tower_layers: bool = False
    link_tower_type: str = "add"
    tie_word_embeddings: bool = False
    contrastive_hidden_size: int = 512
    logit_scale_init_value: float = 2.6592


def _build(c: BridgeTowerConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    text, image, depth, contrastive = c.text_config, c.vision_config, c.num_hidden_layers, "contrastive" in heads
    only(c, share_link_tower_layers=False, link_tower_type="add")
    only(text, hidden_size=c.hidden_size, position_embedding_type="absolute", add_cross_attention=False)
    if contrastive:
        only(c, share_cross_modal_transformer_layers=True)
    blocks = {
        "text": BlockConfig(width=text.hidden_size, dtype=dtype, **bert.block(text)),
        "image": BlockConfig(
            width=image.hidden_size,
            heads=image.hidden_size // 64,
            activation="quick_gelu",
            eps=image.layer_norm_eps,
            final_norm=False,
            dtype=dtype,
        ),
    }
    outputs = {
        "masked-lm": TiedDecoder(
            "text", activation=activation(c.hidden_act), norm=c.layer_norm_eps, own=not c.tie_word_embeddings
        ),
        "matching": Classifier(2, STREAMS, transform=False),
        "contrastive": Similarity(
            c.contrastive_hidden_size,
            {"text": "text_tower", "image": "image_tower", "cross": STREAMS},
            math.exp(c.logit_scale_init_value),
        ),
    }
    read = tuple(range(text.num_hidden_layers - depth + 1, text.num_hidden_layers + 1))  # in both towers
    return build_model(
        {
            "text": bert.text_embedder(text),
            "image": clip.image_embedder(image),
        },
        (
            PerStream({"text": text.num_hidden_layers, "image": image.depth}, blocks, taken=dict.fromkeys(STREAMS, read)),
            Bridge(
                depth,
                sublayers="self cross mlp",
                eps=c.layer_norm_eps,
                norms={"image": image.layer_norm_eps},
                each=not c.share_cross_modal_transformer_layers,
                towers={"text": False} | ({"image": True} if contrastive else {}),
            ),
        ),
        width=c.hidden_size,
        embed=0,
        poolers={
            **dict.fromkeys(STREAMS, Pooler("first", size=c.hidden_size, activation="tanh")),
            **dict.fromkeys(("text_tower", "image_tower"), Pooler("first")),
        },
        outputs={TEXT_POOLER: Classifier(text.hidden_size, "text_tower", transform=False), **{n: outputs[n] for n in heads}},
        dtype=dtype,
        **bert.block(text),
    )


def _table(c: BridgeTowerConfig) -> Table:
    visual, image = "bridgetower.vision_model.visual", c.vision_config
    table: dict[str, Any] = {
        **bert.embeddings_table("bridgetower.text_model.embeddings", "modalities_text"),
        **layers("bridgetower.text_model.encoder.layer.{}", "stages_0/text/layers/block", bert.LAYER),
        f"{visual}.embeddings.class_embedding": reshaped("modalities_image/special", image.hidden_size),
        f"{visual}.embeddings.patch_embedding": convolution("modalities_image/patch", *(image.patch_size,) * 2),
        f"{visual}.embeddings.position_embedding.weight": "modalities_image/position",
        f"{visual}.ln_pre": "modalities_image/norm",
        **layers(visual + ".transformer.resblocks.{}", "stages_0/image/layers/block", open_clip.BLOCK),
        f"{visual}.ln_post": "stages_1/image_tower_norm",
        "bridgetower.token_type_embeddings.weight": Layout(
            tuple(f"stages_1/{stream}_type_bias" for stream in STREAMS), shape=(1, c.hidden_size)
        ),
        "bridgetower.text_model.pooler.dense": f"heads_{TEXT_POOLER}/classifier",
        "mlm_score.transform.dense": "heads_masked-lm/transform",
        "mlm_score.transform.LayerNorm": "heads_masked-lm/norm",
        "mlm_score.bias": "heads_masked-lm/decoder_bias",
        "mlm_score.decoder": "heads_masked-lm/decoder",
        "itm_score.fc": "heads_matching/classifier",
        "itc_text_head.fc": "heads_contrastive/text/projection",
        "itc_image_head.fc": "heads_contrastive/image/projection",
        "itc_cross_modal_head.fc": "heads_contrastive/cross/projection",
        "logit_scale": "heads_contrastive/logit_scale",
    }
    every = "" if c.share_cross_modal_transformer_layers else ".{}"
    for stream in STREAMS:
        cross, bridge = f"bridgetower.cross_modal_{stream}", (f"stages_1/layers/{stream}_bridge_norm",)
        table[f"{cross}_transform{every}"] = f"stages_1/{stream}_project"
        table[f"{cross}_layernorm"] = Layout(bridge, row=0)  # what the first layer takes in has nothing to be added to
        for i in range(c.num_hidden_layers - 1):
            table[f"{cross}_link_tower.{i}.LayerNorm"] = Layout(bridge, row=i + 1)
        table |= layers(cross + "_layers.{}", f"stages_1/layers/{stream}", {**bert.LAYER, **blip.CROSS})
        table[f"{cross}_pooler.dense"] = f"poolers_{stream}/transform"
    return table


def _forward(run: Runner, c: BridgeTowerConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    for name in IGNORED:
        inputs.get(name)
    image, words = c.vision_config, {"input_ids": inputs["input_ids"], "attention_mask": inputs.get("attention_mask")}
    r = run(
        {
            "text": roberta.read_text(c.text_config, words),
            "image": channels_last(inputs["pixel_values"]),
        }
    )
    text, image = (r.out.streams[name].values for name in STREAMS)
    fields = {
        "text_features": text,
        "image_features": image,
        "pooler_output": jnp.concatenate([r.out.pooled[name] for name in STREAMS], -1),
        "hidden_states": _states(r, c.text_config.num_hidden_layers),
        "attentions": tuple(zip(*(r.attentions("stages_1", name) for name in STREAMS), strict=True)),
    }
    answers = {"masked-lm": _labelled, "matching": _labelled, "contrastive": _contrastive}
    given = {head: answer(r.out.logits[head], inputs) for head, answer in answers.items() if head in r.out.logits}
    for head, answer in given.items():  # a published class has one of them
        fields |= answer if len(given) == 1 else {f"{head}_{name}": value for name, value in answer.items()}
    return fields


def _states(r: Run, depth: int) -> tuple[Any, ...]:
    """Those of the text, of the image, with the tokens in front, and of both in the cross-modal layers."""
    image = [jnp.swapaxes(state, 0, 1) for state in r.states("stages_0", "image")[: depth + 1]]
    crossed = zip(*(r.after("stages_1", name) for name in STREAMS), strict=True)
    return tuple(r.states("stages_0", "text")), tuple(image), tuple(crossed)


def _labelled(logits: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits": logits, "loss": token_loss(logits, inputs["labels"]) if "labels" in inputs else None}


def _contrastive(space: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Texts are told from images, and both from the pairs that they make."""
    text, image, cross, loss = space["text"], space["image"], space["cross"], None
    if inputs.get("return_loss"):
        pairs = ((text, image), (text, cross), (image, cross))
        loss = sum(cross_entropy(space["scale"] * a @ b.T, jnp.arange(len(a))).mean() for a, b in pairs) / len(pairs)
    embeds = {"text_embeds": text, "image_embeds": image, "cross_embeds": cross}
    return {**embeds, "logits": jnp.stack([text, image, cross], -2), "loss": loss}


_LARGE = {
    "hidden_size": 1024,
    "text_config": sized(24, 1024, 16),
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 294},
}
FAMILIES = (
    Family(
        "bridgetower",
        BridgeTowerConfig,
        _build,
        _table,
        _forward,
        names={
            "bridgetower-base": {},
            "bridgetower-base-itm-mlm": {},
            "bridgetower-large-itm-mlm": _LARGE,
            "bridgetower-large-itm-mlm-itc": _LARGE,
        },
        heads={"masked-lm": "mlm_score", "matching": "itm_score", "contrastive": "itc_"},
        prefix="bridgetower",
        texts=roberta.TEXTS,
        length=lambda c: roberta.length(c.text_config),
        known=(
            r"position_ids$",
            r"token_type_ids$",
            r"visual\.ln_separate\.",
            r"^mlm_score\.decoder\.weight$",
        ),
    ),
)
