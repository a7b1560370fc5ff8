"""Data: sources (TFDS, ArrayRecord), transforms by kind of modality, and the pipeline (Grain). Never TensorFlow."""

from mmx.data.config import DataConfig, DataSet, Label
from mmx.data.pipeline import Pipeline, PrefetchToDevice
from mmx.data.sources import DataError, open_source
from mmx.data.text import Tokenizer, train_tokenizer

__all__ = [
    "DataConfig",
    "DataError",
    "DataSet",
    "Label",
    "Pipeline",
    "PrefetchToDevice",
    "Tokenizer",
    "open_source",
    "train_tokenizer",
]
