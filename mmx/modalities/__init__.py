"""From raw arrays to tokens: one module for each kind of token. `mmx.modalities.list()` shows what each is for."""

from mmx.modalities.catalogue import list as list
from mmx.modalities.embedder import Embedder
from mmx.modalities.features import Features
from mmx.modalities.graph import Graph
from mmx.modalities.ids import Ids
from mmx.modalities.patches import PackedPatches, Patches
from mmx.modalities.points import Points
from mmx.modalities.spectrogram import Spectrogram
from mmx.modalities.strokes import Strokes
from mmx.modalities.waveform import Waveform

__all__ = [
    "Embedder",
    "Features",
    "Graph",
    "Ids",
    "PackedPatches",
    "Patches",
    "Points",
    "Spectrogram",
    "Strokes",
    "Waveform",
]
