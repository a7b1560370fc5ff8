"""Published models as stages, by the survey's axes: how many streams (structure) and when they meet (timing).

Sizes are those of the base models. A model's other parts (embedders, heads, weights) are not here; where the stages alone
are not yet the model, `differs` says how.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmx.topologies.bridge import Bridge
from mmx.topologies.cross_attention import cross_attention
from mmx.topologies.cross_to_concatenation import cross_to_concatenation
from mmx.topologies.early_concatenation import early_concatenation
from mmx.topologies.early_summation import early_summation
from mmx.topologies.insert import Scatter
from mmx.topologies.latents import Bottleneck, Latent
from mmx.topologies.multi_to_one import multi_to_one
from mmx.topologies.one_to_multi import one_to_multi
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Cross, Joint, PerStream

STRUCTURES = ("single-stream", "multi-stream", "hybrid-stream")
TIMINGS = ("early", "middle", "late", "throughout")


@dataclasses.dataclass(frozen=True)
class Published:
    """Models that share their stages, up to the number of layers."""

    models: str
    structure: str
    timing: str
    streams: str
    stages: tuple[Stage, ...]
    differs: str = ""


PUBLISHED = (
    Published("BERT, ViT, DeiT, GPT-2 (causal)", "single-stream", "early", "text", (PerStream(12),)),
    Published("Actor-Transformers", "single-stream", "early", "video pose", early_summation(12)),
    Published("VideoBERT", "single-stream", "early", "text video", early_concatenation(24)),
    Published(
        "VisualBERT, UNITER, Unicoder-VL, Oscar, VL-BERT",
        "single-stream",
        "early",
        "text image",
        early_concatenation(12),
        "VL-BERT also adds the image's feature to every word",
    ),
    Published("ViLT, Pixel-BERT, LayoutLM v2 and v3", "single-stream", "early", "text image", early_concatenation(12)),
    Published(
        "GraphCodeBERT",
        "single-stream",
        "early",
        "text code variables",
        early_concatenation(12),
        "which variable sees which code token is a mask over pairs of tokens",
    ),
    Published("SimVLM, GIT (text causal)", "single-stream", "early", "image text", early_concatenation(6)),
    Published(
        "BEiT-3",
        "single-stream",
        "throughout",
        "image text",
        (Joint(12, multiway=("attention", "mlp", "norm")),),
    ),
    Published("CLIP, ALIGN, SigLIP", "multi-stream", "late", "image text", (PerStream(12),), "they meet in the loss"),
    Published("FLAVA", "multi-stream", "late", "image text", multi_to_one(12, 6)),
    Published(
        "UniVL",
        "multi-stream",
        "late",
        "text video",
        (PerStream({"text": 12, "video": 6}), Joint(2)),
        "its decoder is a third stack",
    ),
    Published("CBT", "multi-stream", "late", "text video", (PerStream({"text": 12, "video": 1}), Joint(1))),
    Published("AI Choreographer (FACT)", "multi-stream", "late", "audio pose", multi_to_one(2, 12)),
    Published("METER, merged attention", "multi-stream", "late", "image text", multi_to_one(12, 6)),
    Published(
        "METER, co-attention",
        "multi-stream",
        "late",
        "image text",
        (PerStream(12), Cross(6, sublayers="self cross mlp")),
    ),
    Published(
        "BridgeTower",
        "multi-stream",
        "late",
        "image text",
        (
            PerStream(12, taken=dict.fromkeys(("image", "text"), tuple(range(7, 13)))),
            Bridge(6, sublayers="self cross mlp"),
        ),
    ),
    Published(
        "HERO",
        "hybrid-stream",
        "early",
        "frame text video",
        (Joint(6, streams=("frame", "text")), Scatter("frame", "video"), PerStream({"video": 3})),
        "a row of `frame` and `text` for each clip, one of `video` for all frames",
    ),
    Published("InterBERT", "hybrid-stream", "early", "image text", one_to_multi(6, 6)),
    Published(
        "ViLBERT, ActBERT",
        "multi-stream",
        "middle",
        "text image",
        (PerStream({"text": 6}), Cross(6, sublayers="cross mlp self mlp")),
        "ViLBERT's image is 1024 wide, its text 768: `block` takes one for each stream",
    ),
    Published(
        "LXMERT",
        "multi-stream",
        "middle",
        "text image",
        (PerStream({"text": 9, "image": 5}), Cross(5, sublayers="cross self mlp", share=("cross",))),
    ),
    Published("Pano-AVQA", "multi-stream", "throughout", "video audio text", cross_attention(5)),
    Published("TriBERT", "multi-stream", "throughout", "image pose audio", cross_attention(6)),
    Published(
        "ALBEF",
        "hybrid-stream",
        "middle",
        "image text",
        (PerStream({"image": 12, "text": 6}), Cross(6, sublayers="self cross mlp", edges={"text": ("image",)}, steps=("text",))),
    ),
    Published(
        "BLIP",
        "hybrid-stream",
        "throughout",
        "image text",
        (PerStream({"image": 12}), Cross(12, sublayers="self cross mlp", edges={"text": ("image",)}, steps=("text",))),
    ),
    Published(
        "CoCa (text causal)",
        "hybrid-stream",
        "middle",
        "image text",
        (
            PerStream({"image": 12, "text": 12}),
            Cross(12, sublayers="self cross mlp", edges={"text": ("image",)}, steps=("text",)),
        ),
    ),
    Published(
        "Flamingo",
        "hybrid-stream",
        "throughout",
        "image text",
        (PerStream({"image": 24}), Cross(32, sublayers="cross mlp self mlp", edges={"text": ("image",)}, steps=("text",))),
        "its cross sublayers begin behind a closed gate",
    ),
    Published(
        "MulT",
        "multi-stream",
        "throughout",
        "text audio video",
        (
            Cross(
                5,
                sublayers="cross mlp",
                edges={"text": ("audio", "video"), "audio": ("text", "video"), "video": ("text", "audio")},
                original=True,
                past=True,
                apart=True,
            ),
            PerStream(5, causal=("text", "audio", "video")),
        ),
        "the layers behind are as wide as two streams",
    ),
    Published("Product1M (CAPTURE)", "hybrid-stream", "middle", "image text", (PerStream(4), *cross_to_concatenation(4, 4))),
    Published("HKT", "hybrid-stream", "late", "text audio video", (PerStream(12), *cross_to_concatenation(1, 1))),
    Published("MBT", "multi-stream", "middle", "video audio", (PerStream(8), Bottleneck(4))),
    Published("Perceiver IO", "single-stream", "throughout", "image text", (Latent(26, 256),)),
)


def list() -> str:
    """The table as Markdown: structure, timing, models, stages, and where these are not yet the model."""
    lines = ["| structure | they meet | models | streams | stages | differs |", "|---|---|---|---|---|---|"]
    for row in sorted(PUBLISHED, key=lambda row: (STRUCTURES.index(row.structure), TIMINGS.index(row.timing))):
        cells = (row.structure, row.timing, row.models, row.streams, f"`{describe(row.stages)}`", row.differs)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(stages: tuple[Stage, ...]) -> str:
    """Stages as they are written: `PerStream(12), Joint(6)`; fields that have their default are left out."""

    def one(stage: Stage) -> str:
        fields = [f for f in dataclasses.fields(stage) if f.name not in ("parent", "name", "depth")]
        given = {f.name: getattr(stage, f.name) for f in fields if getattr(stage, f.name) != f.default}
        parts = [str(_plain(stage.depth))] if hasattr(stage, "depth") else []  # type: ignore[attr-defined]
        return f"{type(stage).__name__}({', '.join(parts + [f'{name}={_plain(value)!r}' for name, value in given.items()])})"

    return ", ".join(one(stage) for stage in stages)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
