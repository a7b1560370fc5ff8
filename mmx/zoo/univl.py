"""UniVL (arXiv 2002.06353): a text and a video encoder, a cross encoder over both, and a decoder that reads it. Post-norm."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Pooler, TiedDecoder
from mmx.layers import BlockConfig
from mmx.modalities import Features, Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import FUSED, Cross, Gather, PerStream
from mmx.zoo import bert
from mmx.zoo.config import Unsaid, activation
from mmx.zoo.family import Family, Runner, padded, padded_features
from mmx.zoo.weights import Layout, Table, layers

DECODER_LAYER: Table = {
    "slf_attn.att.query": "self/query",
    "slf_attn.att.key": "self/key",
    "slf_attn.att.value": "self/value",
    "slf_attn.output.dense": "self/out",
    "slf_attn.output.LayerNorm": "self_norm",
    "enc_attn.att.query": "cross/query",
    "enc_attn.att.key": "cross/key",
    "enc_attn.att.value": "cross/value",
    "enc_attn.output.dense": "cross/out",
    "enc_attn.output.LayerNorm": "cross_norm",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "output.LayerNorm": "mlp_norm",
}


@dataclasses.dataclass(frozen=True)
class UniVLPart(Unsaid):
    """The published fields of one of UniVL's four parts; of the video, `vocab_size` is how many numbers a frame has."""

    max_target_embeddings: int = 512
    num_decoder_layers: int = 3


@dataclasses.dataclass(frozen=True)
class UniVLConfig:
    """The published fields of UniVL."""

    bert: UniVLPart = UniVLPart()
    visual: UniVLPart = UniVLPart(vocab_size=1024, num_hidden_layers=6)
    cross: UniVLPart = UniVLPart(vocab_size=768, num_hidden_layers=2, max_position_embeddings=1024)
    decoder: UniVLPart = UniVLPart()


def _block(c: UniVLPart, dtype: str) -> BlockConfig:
    return BlockConfig(width=c.hidden_size, dtype=dtype, **bert.block(c))


def _build(c: UniVLConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    text, video, both, writer = c.bert, c.visual, c.cross, c.decoder
    modalities: dict[str, Any] = {
        "text": bert.text_embedder(text),
        "video": Features(
            video.vocab_size,
            video.max_position_embeddings,
            width=video.hidden_size,
            position="learned",
            norm=video.layer_norm_eps,
        ),
    }
    stages: tuple[Any, ...] = (
        PerStream(
            {"text": text.num_hidden_layers, "video": video.num_hidden_layers},
            {"text": _block(text, dtype), "video": _block(video, dtype)},
        ),
        Gather(
            ("text", "video"),
            keep=True,
            width=both.hidden_size,
            positions=both.max_position_embeddings,
            type=True,
            norm=both.layer_norm_eps,
        ),
        PerStream({FUSED: both.num_hidden_layers}, {FUSED: _block(both, dtype)}),
    )
    outputs = {}
    if "captioning" in heads:
        words = (text.vocab_size, text.max_position_embeddings)
        modalities["caption"] = Ids(*words, lender="text", width=writer.hidden_size, norm=writer.layer_norm_eps)
        block = {"caption": _block(writer, dtype)}
        stages += (Cross(writer.num_decoder_layers, block, "self cross mlp", {"caption": (FUSED,)}, ("caption",)),)
        outputs["captioning"] = TiedDecoder("caption", activation=activation(writer.hidden_act), norm=writer.layer_norm_eps)
    poolers = {name: Pooler("first", size=p.hidden_size, activation="tanh") for name, _, p in _encoders(c)}
    return build_model(modalities, stages, width=both.hidden_size, embed=0, poolers=poolers, outputs=outputs, dtype=dtype)


def _encoders(c: UniVLConfig) -> tuple[tuple[str, str, UniVLPart], ...]:
    """Our stream, the published name, and the configuration of each."""
    return (("text", "bert", c.bert), ("video", "visual", c.visual), (FUSED, "cross", c.cross))


def _table(c: UniVLConfig) -> Table:
    table: dict[str, Any] = {
        **bert.embeddings_table("bert.embeddings", "modalities_text"),
        "visual.embeddings.word_embeddings": "modalities_video/linear",
        "visual.embeddings.position_embeddings.weight": "modalities_video/position",
        "visual.embeddings.LayerNorm": "modalities_video/norm",
        "cross.embeddings.position_embeddings.weight": "stages_1/position",
        "cross.embeddings.token_type_embeddings.weight": Layout(
            ("stages_1/text_type_bias", "stages_1/video_type_bias"), shape=(1, c.cross.hidden_size)
        ),
        "cross.embeddings.LayerNorm": "stages_1/norm",
        "decoder.embeddings.LayerNorm": "modalities_caption/norm",
        **layers("decoder.decoder.layer.{}", "stages_3/layers/caption", DECODER_LAYER),
        **bert.masked_lm_table("decoder.classifier.cls.predictions", "heads_captioning"),
    }
    for stream, name, _ in _encoders(c):
        stage = "stages_2" if stream == FUSED else "stages_0"
        table |= layers(name + ".encoder.layer.{}", f"{stage}/{stream}/layers/block", bert.LAYER)
        table[f"{name}.pooler.dense"] = f"poolers_{stream}/transform"
    return table


def _forward(run: Runner, c: UniVLConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    if "input_ids" in inputs:
        batch["text"] = bert.read_text(inputs)
    if "video" in inputs:
        batch["video"] = padded_features(inputs["video"], inputs.get("video_mask"))
    if "decoder_input_ids" in inputs:
        batch["caption"] = padded(inputs["decoder_input_ids"], inputs.get("decoder_mask"))
    r = run(batch, causal=("caption",) if "caption" in batch else ())
    names = {"text": "text", "video": "visual", FUSED: "cross"}
    names = {stream: name for stream, name in names.items() if stream in r.out.streams}
    states = {n: r.gathered("stages_1", "stages_2") if s == FUSED else r.states("stages_0", s) for s, n in names.items()}
    if "caption" in batch:
        states["decoder"] = r.states("stages_3", "caption")
    return {
        **{f"{name}_output": r.out.streams[stream].values for stream, name in names.items()},
        **{f"{name}_pooled": r.out.pooled[stream] for stream, name in names.items()},
        "decoder_scores": r.out.logits.get("captioning") if "caption" in batch else None,
        **{f"{name}_hidden_states": tuple(left) for name, left in states.items()},
    }


FAMILIES = (
    Family(
        "univl",
        UniVLConfig,
        _build,
        _table,
        _forward,
        names={"univl-base": {}},
        heads={"captioning": "decoder."},
        texts=bert.TEXTS,
        length=lambda c: c.bert.max_position_embeddings,
        known=(
            r"^decoder\.embeddings\.(word|position)_embeddings\.weight$",
            r"^decoder\.classifier\.cls\.predictions\.decoder\.weight$",
        ),
    ),
)
