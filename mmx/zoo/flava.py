"""FLAVA (arXiv 2112.04482): an image and a text encoder, and a multimodal one that reads both. Pre-norm, also in the text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.heads import Classifier, Pooler, Projection, TokenClassifier
from mmx.layers import BlockConfig
from mmx.losses import cross_entropy, masked_mean
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import FUSED, Adapt, Gather, PerStream
from mmx.zoo import bert, vit
from mmx.zoo.config import Layers, Pixels, Words, activation, only
from mmx.zoo.family import Chosen, Family, Run, Runner, channels_last
from mmx.zoo.weights import Table, layers, reshaped

LOGIT_SCALE = (1.0, float(np.exp(4.6052)))  # where the original keeps the inverse temperature


@dataclasses.dataclass(frozen=True)
class FlavaImageConfig(Pixels):
    """The published fields of FLAVA's image encoder."""

    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    mask_token: bool = True
    vocab_size: int = 8192


@dataclasses.dataclass(frozen=True)
class FlavaTextConfig(Words):
    """The published fields of FLAVA's text encoder."""

    position_embedding_type: str = "absolute"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class FlavaMultimodalConfig(Layers):
    """The published fields of FLAVA's multimodal encoder."""

    num_hidden_layers: int = 6
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    use_cls_token: bool = True


@dataclasses.dataclass(frozen=True)
class FlavaConfig:
    """The published fields of FLAVA; labels of patches are given, and the codebook that makes them is not read."""

    image_config: FlavaImageConfig = FlavaImageConfig()
    text_config: FlavaTextConfig = FlavaTextConfig()
    multimodal_config: FlavaMultimodalConfig = FlavaMultimodalConfig()
    hidden_size: int = 768
    layer_norm_eps: float = 1e-12
    projection_dim: int = 768
    logit_scale_init_value: float = 2.6592
    ce_ignore_index: int = -100
    mim_weight: float = 1.0
    mlm_weight: float = 1.0
    global_contrastive_weight: float = 1.0
    itm_weight: float = 1.0
    mmm_image_weight: float = 1.0
    mmm_text_weight: float = 1.0
    skip_unmasked_multimodal_encoder: bool = True
    return_loss: bool = True


HEADS = {"masked-image": "mim", "masked-lm": "mlm", "joint-masked-image": "mmm_image", "joint-masked-lm": "mmm_text"}


def _build(c: FlavaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text, joint = c.image_config, c.text_config, c.multimodal_config
    only(text, position_embedding_type="absolute")
    blocks = {name: BlockConfig(width=t.hidden_size, dtype=dtype, final_norm=False, **vit.block(t)) for name, t in _towers(c)}
    widths = {"image": image, "text": text, FUSED: joint}
    answers: dict[str, Any] = {  # the joint ones have the widths of one modality: the original wants them all equal
        f"{name}-pooler": Classifier(part.hidden_size, name, transform=False) for name, part in widths.items()
    }
    for name in heads:
        if name == "matching":
            answers[name] = Classifier(2, FUSED)
        else:
            part = image if name.endswith("image") else text
            stream = FUSED if name.startswith("joint") else "image" if part is image else "text"
            act = activation(part.hidden_act)
            answers[name] = TokenClassifier(part.vocab_size, stream, activation=act, norm=part.layer_norm_eps)
    return build_model(
        {
            "image": dataclasses.replace(vit.image_embedder(image, ("class",)), mask_token=image.mask_token),
            "text": bert.text_embedder(text),
        },
        (
            PerStream({name: t.num_hidden_layers for name, t in _towers(c)}, blocks),
            Gather(keep=True, width=joint.hidden_size, project=True, special=("class",) if joint.use_cls_token else ()),
            Adapt(norm={name: t.layer_norm_eps for name, t in _towers(c)}),
            PerStream({FUSED: joint.num_hidden_layers}),
        ),
        width=joint.hidden_size,
        embed=c.projection_dim,
        poolers=dict.fromkeys(widths, Pooler("first")),
        projections={name: Projection(c.projection_dim, bias=True) for name, _ in _towers(c)},
        outputs=answers,
        dtype=dtype,
        **vit.block(joint),
    )


def _towers(c: FlavaConfig) -> tuple[tuple[str, Any], ...]:
    return (("image", c.image_config), ("text", c.text_config))


def _table(c: FlavaConfig) -> Table:
    image = c.image_config
    table: dict[str, Any] = {
        "flava.logit_scale": "logit_scale",
        **vit.embeddings_table("flava.image_model.embeddings", image),
        **bert.embeddings_table("flava.text_model.embeddings", "modalities_text"),
        **layers("flava.multimodal_model.encoder.layer.{}", f"stages_3/{FUSED}/layers/block", vit.LAYER),
        "flava.multimodal_model.layernorm": f"stages_3/{FUSED}/norm",
        "flava.multimodal_model.pooler.dense": f"heads_{FUSED}-pooler/classifier",
        "itm_head.pooler.dense": "heads_matching/transform",
        "itm_head.seq_relationship": "heads_matching/classifier",
    }
    if image.mask_token:
        table["flava.image_model.embeddings.mask_token"] = reshaped("modalities_image/mask_token", 1, 1, image.hidden_size)
    if c.multimodal_config.use_cls_token:
        table["flava.multimodal_model.cls_token"] = reshaped("stages_1/special", 1, 1, c.multimodal_config.hidden_size)
    for name, _ in _towers(c):
        table |= layers(f"flava.{name}_model.encoder.layer.{{}}", f"stages_0/{name}/layers/block", vit.LAYER)
        table[f"flava.{name}_model.layernorm"] = f"stages_2/{name}_norm"
        table[f"flava.{name}_model.pooler.dense"] = f"heads_{name}-pooler/classifier"
        table[f"flava.{name}_projection"] = f"projections_{name}/projection"
        table[f"flava.{name}_to_mm_projection"] = f"stages_1/{name}_project"
    for ours, published in HEADS.items():
        table[f"{published}_head.transform.dense"] = f"heads_{ours}/transform"
        table[f"{published}_head.transform.LayerNorm"] = f"heads_{ours}/norm"
        table[f"{published}_head.decoder"] = f"heads_{ours}/classifier"
    return table


def _read(inputs: Mapping[str, Any], ids: str, hidden: bool) -> dict[str, Any]:
    """The batch of one pass, over the given ids, some patches hidden or none."""
    batch: dict[str, Any] = {}
    if "pixel_values" in inputs:
        batch["image"] = {"image": channels_last(inputs["pixel_values"])}
        if hidden and "bool_masked_pos" in inputs:
            batch["image"]["hidden"] = inputs["bool_masked_pos"].reshape(len(inputs["pixel_values"]), -1)
    if ids in inputs:
        names = ("attention_mask", "token_type_ids") + (() if ids == "input_ids_masked" else ("position_ids",))
        batch["text"] = bert.read_text({"input_ids": inputs[ids], **{n: inputs[n] for n in names if n in inputs}})
    return batch


def _model_fields(r: Run, joint: bool) -> dict[str, Any]:
    """What the bare model returns of a pass; `joint` says whether of the multimodal encoder too."""
    fields: dict[str, Any] = {}
    both = "image" in r.out.streams and "text" in r.out.streams
    for stream, name in (("image", "image"), ("text", "text"), (FUSED, "multimodal")):
        if stream not in r.out.streams or (stream == FUSED and not (both and joint)):
            continue
        last = r.out.streams[stream].values
        states = r.gathered("stages_1", "stages_3") if stream == FUSED else r.states("stages_0", stream)
        fields[f"{name}_embeddings"] = last
        fields[f"{name}_output"] = {
            "last_hidden_state": last,
            "pooler_output": jnp.tanh(r.out.logits[f"{stream}-pooler"]),
            "hidden_states": tuple(states),
        }
    return fields


def _chosen(c: FlavaConfig, logits: jax.Array, labels: Any, rows: Any, weight: float) -> tuple[Any, Any]:
    """The logits where there is a label, in the rows that count, and the loss over them; `(B, L, V), (B, L), (B,)`."""
    if labels is None:
        return logits if rows is None else Chosen(logits, rows), None
    keep = labels != c.ce_ignore_index
    keep = keep if rows is None else keep & rows[:, None]
    loss = masked_mean(cross_entropy(logits, jnp.where(keep, labels, 0)), keep) * weight
    return Chosen(logits.reshape(-1, logits.shape[-1]), keep.reshape(-1)), loss


def _forward(run: Runner, c: FlavaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    skip = inputs.get("skip_unmasked_multimodal_encoder")
    return_loss = inputs.get("return_loss", c.return_loss)
    itm, text_labels, patch_labels = (inputs.get(f"{n}_labels") for n in ("itm", "mlm", "mim"))
    ids = "input_ids_masked" if "input_ids_masked" in inputs else "input_ids"
    hidden = run(_read(inputs, ids, hidden=True))
    if not any(name in hidden.out.logits for name in (*HEADS, "matching")):  # the bare model
        return _model_fields(hidden, joint=not inputs.get("skip_multimodal_encoder", False))
    plain = run(_read(inputs, "input_ids", hidden=False))
    fields = _model_fields(plain, joint=not (c.skip_unmasked_multimodal_encoder if skip is None else skip))
    for name, value in _model_fields(hidden, joint=True).items():
        fields[name.replace("_embeddings", "_masked_embeddings").replace("_output", "_masked_output")] = value
    logits, losses, rows = hidden.out.logits, {}, None
    if patch_labels is not None:
        patch_labels = patch_labels.reshape(len(patch_labels), -1)
        shown = inputs["bool_masked_pos"].reshape(patch_labels.shape) == 0
        patch_labels = jnp.where(shown, c.ce_ignore_index, patch_labels)
    both = "multimodal_masked_embeddings" in fields
    if both and c.itm_weight > 0:
        fields["itm_logits"] = logits["matching"]
        if itm is not None:
            rows = (itm != 0) | ~(itm != 0).any()  # the pairs that belong together, or all
            losses["itm"] = cross_entropy(logits["matching"], itm).mean() * c.itm_weight
            fields["multimodal_masked_embeddings"] = Chosen(fields["multimodal_masked_embeddings"], rows)
    patches = hidden.out.streams["image"].values.shape[1] - 1 if "image" in hidden.out.streams else 0
    words = hidden.out.streams["text"].values.shape[1] if "text" in hidden.out.streams else 0
    for ours, name in HEADS.items():
        joint, labels = ours.startswith("joint"), patch_labels if ours.endswith("image") else text_labels
        weight = getattr(c, f"{name}_weight")
        if ours not in logits or joint != both or weight <= 0:
            continue
        scores = logits[ours]
        if joint:  # behind two class tokens patches, and the words at the end
            scores = scores[:, 2 : 2 + patches] if ours.endswith("image") else scores[:, -words:]
        elif labels is not None:
            scores = scores[:, -labels.shape[1] :]
        fields[f"{name}_logits"], losses[name] = _chosen(c, scores, labels, rows if joint else None, weight)
    image, text = (plain.out.embeddings.get(name) for name in ("image", "text"))
    if image is not None and text is not None and c.global_contrastive_weight > 0:
        scale: Any = plain.out.logit_scale
        similarity, pairs = jnp.clip(scale, *LOGIT_SCALE) * image @ text.T, jnp.arange(len(image))
        counts = jnp.ones(len(image), bool) if rows is None else rows
        each = [masked_mean(cross_entropy(x, pairs), counts) for x in (similarity, similarity.T)]
        losses["global_contrastive"] = sum(each) / 2 * c.global_contrastive_weight
        fields["contrastive_logits_per_image"] = Chosen(similarity, counts)
        fields["contrastive_logits_per_text"] = Chosen(similarity.T, counts)
    losses = {name: loss for name, loss in losses.items() if loss is not None} if return_loss else {}
    return {**fields, "loss_info": losses, "loss": sum(losses.values()) if losses else None}


FAMILIES = (
    Family(
        "flava",
        FlavaConfig,
        _build,
        _table,
        _forward,
        names={"flava-full": {}},
        heads={**{ours: f"{name}_head." for ours, name in HEADS.items()}, "matching": "itm_head."},
        prefix="flava",
        texts=bert.TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$", r"^m\w+_head\.bias$", r"^image_codebook\."),
    ),
)
