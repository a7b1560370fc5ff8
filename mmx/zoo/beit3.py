"""BEiT-3 (arXiv 2208.10442): image and text in one stack of multiway blocks, each with projections, MLP and norms of its own.

Attention is over both, with norms inside it and the MLP, too (Magneto). Fields and names of weights are those of torchscale's
encoder, heads those of the authors' fine-tuned models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.heads import Classifier, Pooler, Projection, TokenClassifier
from mmx.layers import MULTIWAY
from mmx.losses import clip_loss
from mmx.modalities import Ids, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Joint
from mmx.types import Masked
from mmx.zoo import roberta
from mmx.zoo.config import activation, only
from mmx.zoo.family import Chosen, Family, Runner, channels_last
from mmx.zoo.weights import Table, convolution, layers, reshaped

WAYS = {"A": "image", "B": "text"}  # published, and our stream
EPS = 1e-5  # of the norms in heads
FIRST = 2  # the first row of positions that is read


@dataclasses.dataclass(frozen=True)
class Beit3Config:
    """The fields of torchscale's encoder, and how many classes or answers there are."""

    without_effect: ClassVar[frozenset[str]] = frozenset(  # of training, and of experts and positions that are refused below
        {
            "bert_init",
            "checkpoint_activations",
            "ddp_rank",
            "flash_attention",
            "fsdp",
            "max_rel_pos",
            "moe_eval_capacity_token_fraction",
            "moe_expert_count",
            "moe_gating_use_fp32",
            "moe_normalize_gate_prob_before_dropping",
            "moe_second_expert_policy",
            "moe_top1_expert",
            "scale_length",
            "use_xmoe",
            "xpos_scale_base",
        }
    )

    vocab_size: int = 64010
    encoder_embed_dim: int = 768
    encoder_layers: int = 12
    encoder_attention_heads: int = 12
    encoder_ffn_embed_dim: int = 3072
    encoder_normalize_before: bool = True
    normalize_output: bool = True
    subln: bool = True
    layernorm_eps: float = 1e-5
    layernorm_embedding: bool = False
    activation_fn: str = "gelu"
    drop_path_rate: float = 0.0
    max_source_positions: int = 1024
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    multiway: bool = True
    no_output_layer: bool = True
    no_scale_embedding: bool = True
    share_encoder_input_output_embed: bool = False
    deepnorm: bool = False
    moe_freq: int = 0
    rel_pos_buckets: int = 0
    xpos_rel_pos: bool = False


def _build(c: Beit3Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, multiway=True, no_output_layer=True, no_scale_embedding=True, share_encoder_input_output_embed=False)
    only(c, deepnorm=False, moe_freq=0, rel_pos_buckets=0, xpos_rel_pos=False)
    width, before = c.encoder_embed_dim, c.encoder_normalize_before or c.subln
    shared: dict[str, Any] = {
        "width": width,
        "position_from": FIRST,
        "norm": c.layernorm_eps if c.layernorm_embedding else None,
    }
    outputs = {
        "classification": Classifier(c.num_classes, "image", transform=False, pooler=Pooler("content", norm=EPS, dtype=dtype)),
        "answering": Classifier(
            c.num_classes,
            "image",
            size=2 * width,
            activation="gelu",
            norm=EPS,
            norm_first=True,
            pooler=Pooler("first", norm=EPS, size=width, activation="tanh", dtype=dtype),
        ),
        "captioning": TokenClassifier(c.vocab_size, "text", transform=False),
    }
    return build_model(
        {
            "image": Patches(
                (c.img_size,) * 2,
                (c.patch_size,) * 2,
                c.in_chans,
                special=("class",),
                special_position=True,
                mask_token=True,
                resize=True,
                crop=True,
                **shared,
            ),
            "text": Ids(c.vocab_size, c.max_source_positions - FIRST, **shared),
        },
        (Joint(c.encoder_layers, multiway=MULTIWAY),),
        width=width,
        heads=c.encoder_attention_heads,
        mlp=c.encoder_ffn_embed_dim,
        activation=activation(c.activation_fn, "activation_fn"),
        norm="pre" if before else "post",
        final_norm=before and c.normalize_output,
        inner_norm=c.subln,
        eps=c.layernorm_eps,
        drop_path=c.drop_path_rate,
        embed=width if "retrieval" in heads else 0,
        poolers=dict.fromkeys(WAYS.values(), Pooler("first")),
        projections=dict.fromkeys(WAYS.values(), Projection(width)) if "retrieval" in heads else None,
        outputs={name: outputs[name] for name in heads if name in outputs},
        dtype=dtype,
    )


def _layer(way: str, stream: str) -> Table:
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out", "inner_attn_ln": "norm"}
    return {
        **{f"self_attn.{name}.{way}": f"self/{ours}_{stream}" for name, ours in attention.items()},
        f"self_attn_layer_norm.{way}": f"self_norm_{stream}",
        f"ffn.{way}.fc1": f"mlp_{stream}/up",
        f"ffn.{way}.ffn_layernorm": f"mlp_{stream}/norm",
        f"ffn.{way}.fc2": f"mlp_{stream}/down",
        f"final_layer_norm.{way}": f"mlp_norm_{stream}",
    }


def _table(c: Beit3Config) -> Table:
    table: dict[str, Any] = {
        "beit3.text_embed": "modalities_text/token",
        "beit3.vision_embed.proj": convolution("modalities_image/patch", c.patch_size, c.patch_size),
        "beit3.vision_embed.cls_token": reshaped("modalities_image/special", 1, 1, c.encoder_embed_dim),
        "beit3.vision_embed.mask_token": reshaped("modalities_image/mask_token", 1, 1, c.encoder_embed_dim),
        "fc_norm": "heads_classification/pooler/norm",
        "head": "heads_classification/classifier",
        "pooler.norm": "heads_answering/pooler/norm",
        "pooler.dense": "heads_answering/pooler/transform",
        "head.0": "heads_answering/transform",
        "head.1": "heads_answering/norm",
        "head.3": "heads_answering/classifier",
        "mlm_head": "heads_captioning/classifier",
        "vision_head": "projections_image/projection",
        "language_head": "projections_text/projection",
        "logit_scale": "logit_scale",
    }
    for way, stream in WAYS.items():
        table[f"beit3.encoder.embed_positions.{way}.weight"] = f"modalities_{stream}/position"
        table[f"beit3.encoder.layernorm_embedding.{way}"] = f"modalities_{stream}/norm"
        table |= layers("beit3.encoder.layers.{}", "stages_0/stack/layers/block", _layer(way, stream))
        table[f"beit3.encoder.layer_norm.{way}"] = f"stages_0/stack/norm_{stream}"
    return table


def _given(inputs: Mapping[str, Any], *names: str) -> Any:
    """The input that goes by one of these names, which differ between the published classes."""
    return next((inputs[name] for name in names if name in inputs), None)


def _read(c: Beit3Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of image and text. Padding begins as zeros, unlike that of other families."""
    batch: dict[str, Any] = {}
    if (pixels := _given(inputs, "visual_tokens", "image")) is not None:
        batch["image"] = {"image": channels_last(pixels)}
        if "vision_masked_position" in inputs:
            batch["image"]["hidden"] = inputs["vision_masked_position"].reshape(len(pixels), -1)
    if (ids := _given(inputs, "textual_tokens", "text_description", "question", "text_ids")) is not None:
        padding = _given(inputs, "text_padding_position", "padding_mask")
        batch["text"] = Masked(ids, jnp.ones(ids.shape, bool) if padding is None else padding == 0)
    return batch


def _forward(run: Runner, c: Beit3Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch = _read(c, inputs)
    r = run(batch)
    if "captioning" in r.out.logits:  # a word sees the image and what is before it
        r = run(batch, causal=("text",))
    fields: dict[str, Any] = {}
    if not r.out.embeddings or r.out.logits:  # no retrieval, for which each is read alone
        fields["encoder_out"] = jnp.concatenate([r.out.streams[name].values for name in batch], 1)
        fields["hidden_states"] = tuple(r.states("stages_0", *batch))
    for name, kind in (("image", "vision"), ("text", "language")) if r.out.embeddings else ():
        if name in batch:
            alone = run({name: batch[name]})
            fields[f"{kind}_cls"] = alone.out.embeddings[name]
            fields[f"{kind}_hidden_states"] = tuple(alone.states("stages_0", name))
    if r.out.embeddings and len(batch) == 2:
        scale: Any = r.out.logit_scale
        fields["logits_per_image"] = scale * fields["vision_cls"] @ fields["language_cls"].T
        fields["logits_per_text"] = fields["logits_per_image"].T
        fields["loss"] = clip_loss(fields["vision_cls"], fields["language_cls"], scale)
    for name, logits in r.out.logits.items():
        if name == "captioning" and "language_masked_pos" in inputs:
            logits = Chosen(logits.reshape(-1, c.vocab_size), inputs["language_masked_pos"].reshape(-1) != 0)
        fields["logits" if len(r.out.logits) == 1 else f"{name}_logits"] = logits
    return fields


_LARGE = {
    "encoder_embed_dim": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_embed_dim": 4096,
}
_PLAIN = {"normalize_output": False}
FAMILIES = (
    Family(
        "beit3",
        Beit3Config,
        _build,
        _table,
        _forward,
        names={
            f"beit3_{size}_patch16_{name}": {**fields, **more}
            for size, fields in (("base", {}), ("large", _LARGE))
            for name, more in {
                "224": {},
                "224_imageclassification": _PLAIN,
                "384_retrieval": {"img_size": 384},
                "480_captioning": {"img_size": 480},
                "480_vqav2": {**_PLAIN, "img_size": 480, "num_classes": 3129},
            }.items()
        },
        heads={
            "classification": "fc_norm.",
            "answering": "pooler.",
            "captioning": "mlm_head.",
            "retrieval": "language_head.",
        },
        texts=roberta.MANY,
        length=lambda c: 64,  # what it was trained with
        inputs={"visual_tokens": "pixel_values", "textual_tokens": "input_ids", "text_padding_position": "not attention_mask"},
    ),
)
