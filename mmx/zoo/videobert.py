"""VideoBERT (arXiv 1904.01766): a BERT that reads words and visual words, each alone or in one sequence.

    [CLS] words [>] visual words [SEP]        [CLS] words [SEP]        [CLS] visual words [SEP]

A visual word is the code of 1.5 s of video: its S3D features by hierarchical k-means, 4 levels of 12, so 12^4 = 20736 codes.
Words, [>] and codes have one table of embeddings, in this order, and are asked for by one head; from [CLS] it is told whether
text and video belong together. Neither code nor weights were published: the layout is our own, BERT's with a longer table.
So are `videobert-base` and the segments, of which the paper says nothing: words are of the first, visual words of the second.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Classifier
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer
from mmx.zoo import bert
from mmx.zoo.config import only, sized
from mmx.zoo.family import Family, Runner, padded
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class VideoBertConfig(bert.BertConfig):
    """The fields of VideoBERT: BERT's, and how many visual words there are. Ids are those of one vocabulary."""

    visual_vocab_size: int = 12**4

    @property
    def joint_token_id(self) -> int:
        """[>], behind the words of a text with a video; the ids of words are smaller."""
        return self.vocab_size

    @property
    def first_code(self) -> int:
        """The id of the first visual word."""
        return self.vocab_size + 1


def _build(c: VideoBertConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, position_embedding_type="absolute", is_decoder=False, tie_word_embeddings=True)
    whole = c.first_code + c.visual_vocab_size
    text = bert.text_embedder(dataclasses.replace(c, vocab_size=whole))
    video = Ids(whole, text.length, width=c.hidden_size, lender="text", tables={"segment": "text"}, norm="text")
    outputs = {
        "masked-lm": bert.masked_lm_head(c).clone(streams=("text", "video")),
        "matching": Classifier(2, "text", transform=False),
    }
    return bert.joint(c, {"text": text, "video": video}, {name: outputs[name] for name in heads}, dtype)


def _table(c: VideoBertConfig) -> Table:
    return {
        **bert.embeddings_table("videobert.embeddings", "modalities_text"),
        **layers("videobert.encoder.layer.{}", "stages_0/stack/layers/block", bert.LAYER),
        "videobert.pooler.dense": "poolers_text/transform",
        **bert.masked_lm_table("cls.predictions", "heads_masked-lm"),
        "cls.seq_relationship": "heads_matching/classifier",
    }


def _video(c: VideoBertConfig, inputs: Mapping[str, Any], text: Any) -> Any:
    """`video_ids (B, M)`, its places counted on from the last word that is no padding, and `video_attention_mask`."""
    ids, before = inputs["video_ids"], 0 if text is None else text.mask.sum(1, keepdims=True)
    length = ids.shape[1] + (0 if text is None else text.mask.shape[1])
    if length > c.max_position_embeddings:
        raise InputError(f"videobert: {length} words and visual words; up to {c.max_position_embeddings} fit")
    place = jnp.broadcast_to(before + jnp.arange(ids.shape[1]), ids.shape)
    return padded(ids, inputs.get("video_attention_mask"), segment=jnp.ones_like(ids), place=place)


def _forward(run: Runner, c: VideoBertConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch = {"text": bert.read_text(inputs)} if "input_ids" in inputs else {}
    if "video_ids" in inputs or not batch:
        batch["video"] = _video(c, inputs, batch.get("text"))
    r = run(batch)
    heads: Any = r.out.logits
    words, together = heads.get("masked-lm"), heads.get("matching") if len(batch) == 2 else None
    named = {"text": "labels", "video": "video_labels"}
    losses = []
    if words is not None and any(named[stream] in inputs for stream in batch):
        nothing = {stream: jnp.full(raw.mask.shape, -100) for stream, raw in batch.items()}
        labels = [inputs.get(named[stream], nothing[stream]) for stream in batch]
        losses.append(token_loss(words, jnp.concatenate(labels, 1)))
    if together is not None and "alignment_labels" in inputs:
        losses.append(token_loss(together, inputs["alignment_labels"]))
    last = [tokens.values for tokens in r.out.streams.values()]
    return {
        "loss": sum(losses) if losses else None,
        "prediction_logits": words,
        "alignment_logits": together,
        "last_hidden_state": jnp.concatenate(last, 1),
        "pooler_output": r.out.pooled.get("text"),
        "hidden_states": tuple(r.states("stages_0", *batch)),
    }


FAMILIES = (
    Family(
        "videobert",
        VideoBertConfig,
        _build,
        _table,
        _forward,
        names={"videobert-base": {}, "videobert-large": sized(24, 1024, 16)},
        heads={"masked-lm": "cls.predictions", "matching": "cls.seq_relationship"},
        prefix="videobert",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=bert.KNOWN,
    ),
)
