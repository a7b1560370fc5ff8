"""Data: sources (TFDS, ArrayRecord), transforms by kind of modality, and the pipeline (Grain). Never TensorFlow."""

from mmx.data.pipeline import DataConfig, Pipeline, PrefetchToDevice
from mmx.data.sources import DataError, open_source
from mmx.data.text import Tokenizer, train_tokenizer

__all__ = ["DataConfig", "DataError", "Pipeline", "PrefetchToDevice", "Tokenizer", "open_source", "train_tokenizer"]
