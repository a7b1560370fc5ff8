"""GIT (arXiv 2205.14100): an image as the prefix of a text, which one stack writes.

The image is CLIP's, mapped and normalised, and sees only itself; the text is BERT's, post-norm, and sees the image and its own
past. What is scored are all tokens, the image's too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmx.heads import TokenClassifier
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Adapt, Joint, PerStream
from mmx.zoo import bert, clip
from mmx.zoo.config import Layers, only, sized
from mmx.zoo.family import Family, Generation, Runner, channels_last, padded
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Table, layers


@dataclasses.dataclass(frozen=True)
class GitVisionConfig(clip.CLIPVisionConfig):
    """The published fields of GIT's image tower, CLIP's."""

    patch_size: int = 16


@dataclasses.dataclass(frozen=True)
class GitConfig(Layers):
    """The published fields of GIT."""

    vision_config: GitVisionConfig = GitVisionConfig()
    vocab_size: int = 30522
    num_hidden_layers: int = 6
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    num_image_with_embedding: int | None = None
    tie_word_embeddings: bool = False


def _build(c: GitConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, position_embedding_type="absolute", num_image_with_embedding=None)
    image = c.vision_config
    scores = TokenClassifier(c.vocab_size, None, transform=False, tied="text" if c.tie_word_embeddings else None)
    return build_model(
        {
            "image": clip.image_embedder(image),
            "text": Ids(c.vocab_size, c.max_position_embeddings, width=c.hidden_size, norm=c.layer_norm_eps),
        },
        (
            PerStream({"image": image.num_hidden_layers}, {"image": clip.block(image, dtype)}),
            Adapt(("image",), width=c.hidden_size, norm=image.layer_norm_eps),
            Joint(c.num_hidden_layers),
        ),
        width=c.hidden_size,
        embed=0,
        outputs={"captioning": scores} if "captioning" in heads else {},
        dtype=dtype,
        **bert.block(c),
    )


def _table(c: GitConfig) -> Table:
    tower = "git.image_encoder.vision_model"
    return {
        **clip.image_table(tower, c.vision_config),
        f"{tower}.post_layernorm": "stages_0/image/norm",
        "git.visual_projection.visual_projection.0": "stages_1/image_project",
        "git.visual_projection.visual_projection.1": "stages_1/image_norm",
        "git.embeddings.word_embeddings": "modalities_text/token",
        "git.embeddings.position_embeddings.weight": "modalities_text/position",
        "git.embeddings.LayerNorm": "modalities_text/norm",
        **layers("git.encoder.layer.{}", "stages_2/stack/layers/block", bert.LAYER),
        "output": "heads_captioning/classifier",
        "output.bias": "heads_captioning/bias",  # where the matrix is tied
    }


def _forward(run: Runner, c: GitConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    beside = {"place": jnp.broadcast_to(inputs["position_ids"], inputs["input_ids"].shape)} if "position_ids" in inputs else {}
    batch = {"text": padded(inputs["input_ids"], inputs.get("attention_mask"), **beside)}
    if "pixel_values" in inputs:
        batch = {"image": channels_last(inputs["pixel_values"]), **batch}
    r = run(batch, causal=("text",))
    streams = r.out.streams
    entered = [r.intermediates["stages_1"]["states"][name] for name in streams]
    states = (jnp.concatenate(entered, 1), *r.intermediates["stages_2"]["stack"]["layers"]["states"])
    logits, labels, loss = r.out.logits.get("captioning"), inputs.get("labels"), None
    if logits is not None and labels is not None:
        written = logits[:, -labels.shape[1] :]
        loss = token_loss(written[:, :-1], labels[:, 1:])
    seen = None
    if "image" in streams:
        last = r.intermediates["stages_1"]["entered"]["image"]
        seen = {"last_hidden_state": last, "hidden_states": tuple(r.states("stages_0", "image"))}
    return {
        "loss": loss,
        "logits": logits,
        "last_hidden_state": states[-1],
        "hidden_states": states,
        "vision_model_output": seen,
    }


def _large(size: int = 224) -> dict[str, Any]:
    return {"vision_config": sized(24, 1024, 16, patch_size=14, image_size=size)}


_CAPTIONS, _QUESTIONS = ("", "-coco", "-textcaps"), ("-vqav2", "-textvqa")
FAMILIES = (
    Family(
        "git",
        GitConfig,
        _build,
        _table,
        _forward,
        names={
            **{f"git-base{task}": {} for task in _CAPTIONS},
            **{f"git-base{task}": {"vision_config": {"image_size": 480}} for task in _QUESTIONS},
            **{f"git-large{kind}{task}": _large() for kind in ("", "-r") for task in _CAPTIONS},
            **{f"git-large{task}": _large(420) for task in _QUESTIONS},
        },
        heads={"captioning": "output."},
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"^output\.weight$"),
        generation=Generation(),
    ),
)
