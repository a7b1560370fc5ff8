"""HERO (arXiv 2005.00200): frames with the words said over them, clip by clip, then all frames of a video along time. Post-norm.

The stacks, their sizes and what goes from one to the other are the paper's (section 3.1); names of tensors and fields, epsilons,
and the norm, linear map and ReLU that make frames for the second stack are those of its code. The tower that reads queries for
video-subtitle matching, and the two poolers, which nothing reads, are not here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.heads import TiedDecoder, TokenClassifier
from mmx.layers import BlockConfig
from mmx.modalities import Features, Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Joint, PerStream, Scatter
from mmx.zoo import bert
from mmx.zoo.config import Words, activation, only, override
from mmx.zoo.family import Family, Run, Runner, padded, padded_features
from mmx.zoo.loss import token_loss
from mmx.zoo.order import Order
from mmx.zoo.roberta import places
from mmx.zoo.weights import Table, layers

EPS = 1e-5  # of every norm but those of the layers; no field of the configuration tells it
PADDING = 1  # the id that takes no place
ALONE = {  # a clip's inputs where there is no video -> beside one
    "input_ids": "f_sub_input_ids",
    "pos_ids": "f_sub_pos_ids",
    "v_feat": "f_v_feats",
    "f_pos_ids": "f_v_pos_ids",
    "attn_masks": "f_attn_masks",
    "gather_index": "f_gather_index",
}


@dataclasses.dataclass(frozen=True)
class HeroPart(Words):
    """The published fields of one of HERO's stacks."""

    layer_norm_eps: float = 1e-12


@dataclasses.dataclass(frozen=True)
class HeroConfig:
    """The published fields of HERO, and three numbers that its code is called with."""

    f_config: HeroPart = HeroPart(num_hidden_layers=6, vocab_size=50272, max_position_embeddings=514)
    c_config: HeroPart = HeroPart(num_hidden_layers=3, max_position_embeddings=514)
    vfeat_dim: int = 4352
    max_frm_seq_len: int = 100
    max_clip_len: int = 100

    without_effect: ClassVar[frozenset[str]] = frozenset({"q_config"})  # of the tower that reads queries


def _block(c: HeroPart, dtype: str) -> BlockConfig:
    return BlockConfig(width=c.hidden_size, dtype=dtype, **bert.block(c))


def _build(c: HeroConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    clip, video = c.f_config, c.c_config
    only(video, hidden_size=clip.hidden_size)
    types = max(clip.type_vocab_size, 2)  # words and frames have the second one, which its code adds to a RoBERTa's only one
    outputs = {
        "masked-lm": TiedDecoder("text", activation=activation(clip.hidden_act), norm=EPS),
        "frame-features": TokenClassifier(c.vfeat_dim, "video", activation="gelu", norm=EPS),
        "frame-order": TokenClassifier(c.max_clip_len, "video", size=2 * video.hidden_size, activation="gelu", norm=EPS),
    }
    return build_model(
        {
            "text": Ids(clip.vocab_size, clip.max_position_embeddings, tables={"segment": types}, norm=EPS),
            "frame": Features(
                c.vfeat_dim,
                c.max_frm_seq_len,
                input_norm=EPS,
                position="learned",
                tables={"segment": "text"},
                norm=EPS,
                marked=True,
            ),
            "video": Features(c.vfeat_dim, video.max_position_embeddings, input_norm=EPS, activation="relu", marked=True),
        },
        (
            Joint(clip.num_hidden_layers, _block(clip, dtype), streams=("frame", "text")),
            Scatter("frame", "video"),
            Adapt(("video",), positions=video.max_position_embeddings, norm=EPS),
            PerStream({"video": video.num_hidden_layers}, _block(video, dtype)),
        ),
        width=clip.hidden_size,
        embed=0,
        outputs={name: outputs[name] for name in heads},
        dtype=dtype,
    )


def _table(c: HeroConfig) -> Table:
    clip, video = "v_encoder.f_encoder", "v_encoder.c_encoder"
    return {
        **bert.embeddings_table(f"{clip}.embeddings", "modalities_text"),
        f"{clip}.img_embeddings.img_LayerNorm": "modalities_frame/input_norm",
        f"{clip}.img_embeddings.img_linear": "modalities_frame/linear",
        f"{clip}.img_embeddings.position_embeddings.weight": "modalities_frame/position",
        f"{clip}.img_embeddings.mask_embedding": "modalities_frame/marked",
        f"{clip}.img_embeddings.LayerNorm": "modalities_frame/norm",
        **layers(clip + ".encoder.layer.{}", "stages_0/stack/layers/block", bert.LAYER),
        f"{clip}.lm_head.dense": "heads_masked-lm/transform",
        f"{clip}.lm_head.LayerNorm": "heads_masked-lm/norm",
        f"{clip}.lm_head.bias": "heads_masked-lm/decoder_bias",
        "v_encoder.frame_transform.LayerNorm": "modalities_video/input_norm",
        "v_encoder.frame_transform.net.1": "modalities_video/linear",
        "v_encoder.mask_embedding": "modalities_video/marked",
        f"{video}.embeddings.position_embeddings.weight": "stages_2/video_position",
        f"{video}.embeddings.LayerNorm": "stages_2/video_norm",
        **layers(video + ".encoder.layer.{}", "stages_3/video/layers/block", bert.LAYER),
        "v_encoder.feat_regress.net.0": "heads_frame-features/transform",
        "v_encoder.feat_regress.net.2": "heads_frame-features/norm",
        "v_encoder.feat_regress.net.3": "heads_frame-features/classifier",
        "v_encoder.fom_output.linear_1": "heads_frame-order/transform",
        "v_encoder.fom_output.LayerNorm": "heads_frame-order/norm",
        "v_encoder.fom_output.linear_2": "heads_frame-order/classifier",
    }


def _infer(c: HeroConfig, shapes: Mapping[str, tuple[int, ...]]) -> HeroConfig:
    """What config.json does not tell, and the words and types that its code adds to those it tells of."""
    rows = {
        "f_config.vocab_size": "f_encoder.embeddings.word_embeddings.weight",
        "f_config.type_vocab_size": "f_encoder.embeddings.token_type_embeddings.weight",
        "max_frm_seq_len": "f_encoder.img_embeddings.position_embeddings.weight",
        "vfeat_dim": "frame_transform.LayerNorm.weight",
        "max_clip_len": "fom_output.linear_2.weight",
    }
    found = {field: shapes.get(f"v_encoder.{name}") for field, name in rows.items()}
    return override(c, {field: shape[0] for field, shape in found.items() if shape is not None})


def _clips(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Order | None]:
    """A row for each clip, its frames and its words, and the published order of both."""
    given: dict[str, Any] = {name: inputs.get(name, inputs.get(alone)) for alone, name in ALONE.items()}
    ids, features = given["f_sub_input_ids"], given["f_v_feats"]
    if ids is None and features is None:
        return {}, None
    size = len(features) if ids is None else len(ids)
    frames, words = (0 if x is None else x.shape[1] for x in (features, ids))
    order = Order.of(size, frames, words, given["f_gather_index"], given["f_attn_masks"])
    exists, batch = order.exists, {}
    if ids is not None:
        place = places(ids, PADDING) if given["f_sub_pos_ids"] is None else given["f_sub_pos_ids"]
        beside = {"segment": jnp.ones_like(ids), "place": jnp.broadcast_to(place, ids.shape)}
        batch["text"] = padded(ids, exists[:, frames:], **beside)
    if features is not None:
        place = jnp.arange(frames) if given["f_v_pos_ids"] is None else given["f_v_pos_ids"]
        beside = {"segment": jnp.ones((size, frames), jnp.int32), "place": jnp.broadcast_to(place, (size, frames))}
        marked = inputs.get("f_v_masks", jnp.zeros((size, frames), jnp.int32))
        batch["frame"] = padded_features(features, exists[:, :frames], marked=marked, **beside)
    return batch, order


def _videos(inputs: Mapping[str, Any], clips: dict[str, Any], order: Any = None) -> dict[str, Any]:
    """The clips, and a row for each video, if there are any; `order (B, F)`: where each frame stands, if not where it was."""
    if "c_v_feats" not in inputs:
        return clips
    features = inputs["c_v_feats"]
    size, length = features.shape[:2]
    order = jnp.broadcast_to(jnp.arange(length), (size, length)) if order is None else order
    hidden = inputs.get("c_v_masks", jnp.zeros((size, length), bool)) != 0
    features = jnp.where(hidden[..., None], 0, features)
    features, hidden = (jnp.zeros_like(x).at[jnp.arange(size)[:, None], order].set(x) for x in (features, hidden))
    batch = {**clips, "video": padded_features(features, inputs.get("c_attn_masks"), marked=hidden)}
    frame_of = inputs.get("sub_idx2frame_idx")
    if frame_of is not None and "frame" in clips:
        each = inputs.get("num_subs", jnp.full(size, len(frame_of) // size))
        video_of = jnp.searchsorted(jnp.cumsum(each), jnp.arange(len(frame_of)), side="right")[:, None]
        place = jnp.stack(jnp.broadcast_arrays(video_of, order[video_of, frame_of]), -1)  # (C, F, 2)
        slots = jnp.where(frame_of[..., None] < 0, -1, place)
        batch["frame"] = dataclasses.replace(clips["frame"], array={**clips["frame"].array, "slots": {"video": slots}})
    return batch


def _clip_states(r: Run, clips: Mapping[str, Any], laid: Order) -> tuple[Any, ...]:
    """Those of the clips' layers, whose words stand in front of the frames, in the published order."""
    return tuple(laid.fill(jnp.roll(state, laid.first, 1)) for state in r.states("stages_0", *clips))


def _forward(run: Runner, c: HeroConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The published inputs of a batch of clips, of videos, or of both.

    `sub_idx2frame_idx` is an array (clips, frames of a clip): the number in its video of each frame of each clip, -1 for none;
    clips of one video stand behind each other, `num_subs (B,)` of each. Words and frames are scored as they stand.
    """
    clips, laid = _clips(inputs)
    r = run(_videos(inputs, clips))
    tokens, heads = {name: stream.values for name, stream in r.out.streams.items()}, r.out.logits
    read = [tokens[name] for name in ("frame", "text") if name in tokens]
    order, loss = heads.get("frame-order"), None
    if order is not None and "shuffled_orders" in inputs:
        order = run(_videos(inputs, clips, inputs["shuffled_orders"])).out.logits["frame-order"]
        loss = token_loss(order, inputs["targets"], -1) if "targets" in inputs else None
    entered = r.intermediates["stages_2"]["states"].get("video")
    return {
        "sequence_output": None if laid is None else laid.fill(jnp.concatenate(read, 1)),
        "transformed_c_v_feats": r.intermediates["stages_2"]["entered"].get("video"),
        "clip_outputs": tokens.get("video"),
        "prediction_scores": heads.get("masked-lm"),
        "prediction_feat": heads.get("frame-features"),
        "frame_reorder_outputs": order,
        "fom_loss": loss,
        "clip_hidden_states": () if laid is None else _clip_states(r, clips, laid),
        "hidden_states": None if entered is None else (entered, *r.after("stages_3", "video")),
    }


FAMILIES = (
    Family(
        "hero",
        HeroConfig,
        _build,
        _table,
        _forward,
        names={"hero-base": {}, "hero-tv-ht100": {}},
        heads={
            "masked-lm": "v_encoder.f_encoder.lm_head",
            "frame-features": "v_encoder.feat_regress",
            "frame-order": "v_encoder.fom_output",
        },
        infer=_infer,
        known=(
            r"\.pad$",
            r"\.pooler\.dense\.",
            r"^v_encoder\.f_encoder\.lm_head\.decoder\.weight$",  # the words again
            r"^(q_feat_attn|video_query_linear|video_st_predictor|video_ed_predictor)\.",
        ),
    ),
)
