"""The survey's table of tokens and embeddings (arXiv 2206.06488, table 1), row by row, as embedders that run."""

import dataclasses
from collections.abc import Callable

import jax

from mmx.modalities.embedder import Embedder
from mmx.modalities.features import Features
from mmx.modalities.graph import Graph
from mmx.modalities.ids import Ids
from mmx.modalities.masking import unmask
from mmx.modalities.patches import PackedPatches, Patches
from mmx.modalities.points import Points
from mmx.modalities.spectrogram import Spectrogram
from mmx.modalities.strokes import Strokes
from mmx.modalities.waveform import WAV2VEC2, Waveform


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: what a modality's token is, how it is embedded, and the embedder that does it at its usual size."""

    modality: str
    token: str
    embedding: str
    models: str
    make: Callable[[], Embedder]


SURVEY = (
    Row("RGB", "RoI", "CNN embedding", "ViLBERT, LXMERT", lambda: Features(2048, 36, vectors={"box": 4})),
    Row("RGB", "patch", "linear projection", "ViT", lambda: Patches((224, 224), (16, 16), special=("class",))),
    Row(
        "video",
        "clip of sampled frames",
        "3D-CNN embedding",
        "VideoBERT, CBT, ActBERT",
        lambda: Features(1024, 20, position="learned"),
    ),
    Row("video", "sampled frame", "2D-CNN embedding", "audio-visual parsing", lambda: Features(2048, 32, position="learned")),
    Row("video", "voxel of sampled frames", "linear projection", "VATT", lambda: Patches((32, 224, 224), (4, 16, 16))),
    Row("video", "patch of sampled frame", "linear projection", "MBT", lambda: Patches((8, 224, 224), (1, 16, 16))),
    Row("360° video", "clip of sampled frames", "3D-CNN embedding", "AVSA", lambda: Features(512, 16, position="sincos")),
    Row("audio", "mel-spectrogram frame", "CNN embedding", "audio-visual parsing, AVSA", lambda: Spectrogram(400, 64, "cnn")),
    Row("audio", "waveform segment", "linear projection", "VATT", lambda: Waveform(48_000, ((128, 128),))),
    Row("audio", "spectrogram patch", "linear projection", "MBT, AST", lambda: Patches((128, 800), (16, 16), 1)),
    Row("speech", "waveform segment", "1D-CNN embedding", "FaceFormer, wav2vec 2.0", lambda: Waveform(32_000, WAV2VEC2, 512)),
    Row(
        "speech",
        "mel-spectrogram frame",
        "linear projection, gated CNN",
        "Meta-StyleSpeech",
        lambda: Spectrogram(400, 80, "gated"),
    ),
    Row("speech", "log-Mel filterbank frame", "linear projection", "AV-HuBERT", lambda: Spectrogram(400, 104)),
    Row("speech", "log power spectrum frame", "linear projection", "VSET", lambda: Spectrogram(400, 257)),
    Row("speech", "log-Mel filterbank frame", "2D-CNN embedding", "FAT-MLM", lambda: Spectrogram(400, 80, "cnn")),
    Row("music", "frame of 35 features", "linear projection", "AI Choreographer", lambda: Features(35, 240, position="learned")),
    Row("text", "word", "learned embedding", "Transformer, BERT", lambda: Ids(30_522, 512, tables={"segment": 2})),
    Row("text", "word", "GNN embedding", "MGNNS", lambda: Graph(128, vocab=30_522)),
    Row(
        "SQL schema",
        "table node, column node",
        "GNN embedding",
        "SpeechSQLNet",
        lambda: Graph(64, vocab=30_522, tables={"kind": 2}),
    ),
    Row("question graph", "word node", "GNN embedding", "SADGA", lambda: Graph(64, vocab=30_522)),
    Row("sketch", "stroke key point", "linear projection, learnable embedding", "Multi-Graph Transformer", lambda: Strokes(100)),
    Row("sketch", "picture patch", "linear projection", "RVT", lambda: Patches((224, 224), (16, 16), 1)),
    Row("table", "cell", "learned embedding", "TAPAS", lambda: Ids(30_522, 512, tables={"row": 256, "column": 256, "rank": 256})),
    Row("3D point cloud", "point", "non-linear projection", "Point Cloud Transformer", lambda: Points(1024)),
    Row("source code", "code token", "learned embedding", "GraphCodeBERT", lambda: Ids(50_265, 256)),
    Row("data flow of code", "variable", "learned embedding", "GraphCodeBERT", lambda: Ids(50_265, 64, position="none")),
    Row("pose", "key point", "GCN embedding", "TriBERT", lambda: Graph(18, channels=3, position="learned")),
    Row("health records", "ICD code", "GNN embedding", "G-BERT", lambda: Graph(64, vocab=2048)),
    Row("health records", "ICD code", "learned embedding", "Med-BERT", lambda: Ids(82_603, 512, tables={"visit": 128})),
    Row("whole-slide image", "patch", "CNN embedding", "MCAT", lambda: Features(1024, 4096)),
)
FURTHER = (
    Row("RGB", "cell of a CNN's grid", "linear projection", "Pixel-BERT", lambda: Features(2048, 49, position="learned")),
    Row("RGB", "patch, any size and aspect ratio", "linear projection", "NaViT, SigLIP 2", lambda: PackedPatches(256, (16, 16))),
    Row("RGB, video", "code of a codebook", "learned embedding", "VideoBERT, BEiT", lambda: Ids(8192, 196)),
    Row(
        "document",
        "word with layout box",
        "learned embedding",
        "LayoutLM",
        lambda: Ids(30_522, 512, tables=dict.fromkeys(("left", "top", "right", "bottom", "box_width", "box_height"), 1024)),
    ),
    Row("optical flow, depth", "patch", "linear projection", "Actor-Transformers", lambda: Patches((224, 224), (16, 16), 2)),
    Row("volume", "voxel", "linear projection", "VATT's kind", lambda: Patches((32, 32, 32), (8, 8, 8), 1)),
    Row("user behaviour", "item", "learned embedding", "recommenders", lambda: Ids(100_000, 200, tables={"action": 8})),
    Row("skeleton", "joint", "GCN embedding", "TriBERT's kind", lambda: Graph(25, channels=3, position="learned")),
)


def list() -> str:
    """The table: the survey's 30 rows, those beside it, and for each the embedder and the shape of an example."""
    lines = ["| modality | token | embedding | models | embedder | raw array |", "|---|---|---|---|---|---|"]
    for row in (*SURVEY, *FURTHER):
        module = row.make()
        cells = (row.modality, row.token, row.embedding, row.models, type(module).__name__, example_shape(module))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def example_shape(module: Embedder) -> str:
    """The raw arrays of an example, such as `ids (512), segment (512)`."""
    raw, _ = unmask(jax.eval_shape(lambda: module.example(1)))
    names = (*module.reads, *module.tables, *module.vectors)
    shapes = {name: raw[name].shape[1:] for name in names} if isinstance(raw, dict) else {names[0]: raw.shape[1:]}
    return ", ".join(f"{name} {tuple(shape)}".replace(",)", ")") for name, shape in shapes.items())
