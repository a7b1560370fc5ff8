"""Waveforms to what published models were trained with. The fields are those of a folder's preprocessor_config.json."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmx.data.audio import mel_filters, power_spectrum
from mmx.errors import InputError
from mmx.zoo.config import only


@dataclasses.dataclass(frozen=True)
class SoundSteps(abc.ABC):
    """What all share: waveforms `(S,)` of floating point, `sampling_rate` samples a second, on one channel.

    Args:
        sampling_rate: samples a second.
        padding_value: of what is not there.
        padding_side: where that is; only "right".
        return_attention_mask: whether the inputs tell what is there.
    """

    sampling_rate: int = 16_000
    padding_value: float = 0.0
    padding_side: str = "right"
    return_attention_mask: bool = False

    def __post_init__(self) -> None:
        only(self, padding_side="right")

    def __call__(self, audio: Sequence[Any]) -> dict[str, np.ndarray]:
        """The inputs of several waveforms."""
        waves = [np.asarray(wave) for wave in ([] if isinstance(audio, str | bytes) else audio)]
        if not waves:
            raise InputError(f"audio={audio!r}; expected a list of waveforms")
        for wave in waves:
            if wave.ndim != 1 or not len(wave) or not np.issubdtype(wave.dtype, np.floating):
                raise InputError(f"audio: expected waveforms (S,) of floating point from -1 to 1, got {wave.dtype} {wave.shape}")
        return self.many([wave.astype(np.float32) for wave in waves])

    @abc.abstractmethod
    def many(self, waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of waveforms that were checked."""

    def pad(self, waves: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Waveforms cut or padded to `length`, and what of it is there: `(B, length)` both."""
        rows = [np.pad(w[:length], (0, max(length - len(w), 0)), constant_values=self.padding_value) for w in waves]
        return np.stack(rows), np.arange(length) < np.asarray([[len(w)] for w in waves])


@dataclasses.dataclass(frozen=True)
class WaveSteps(SoundSteps):
    """wav2vec 2.0: `input_values (B, S)` of mean 0 and variance 1, padded to the longest.

    The padding counts as sound where the model is told of no mask, as it did in training: such models are given one length.
    """

    do_normalize: bool = True

    def many(self, waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and variance are those of one waveform."""
        values, mask = self.pad(waves, max(map(len, waves)))
        if self.do_normalize:
            counted = mask if self.return_attention_mask else np.ones_like(mask)
            mean = values.mean(1, keepdims=True, where=counted)
            variance = values.var(1, keepdims=True, where=counted)
            values = np.where(counted, (values - mean) / np.sqrt(variance + 1e-7), np.float32(self.padding_value))
        return {"input_values": values} | ({"attention_mask": mask.astype(np.int32)} if self.return_attention_mask else {})


@dataclasses.dataclass(frozen=True)
class LogMelSteps(SoundSteps):
    """Whisper: `input_features (B, mel, T)`, the decimal logarithm of Slaney's mel filters in `chunk_length` seconds."""

    feature_size: int = 80
    chunk_length: int = 30
    n_fft: int = 400
    hop_length: int = 160
    dither: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        only(self, dither=0.0)

    def many(self, waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Everything below a hundred-millionth of the loudest is that; what is left lies around 0."""
        values, mask = self.pad(waves, self.chunk_length * self.sampling_rate)
        filters = mel_filters(self.feature_size, self.n_fft, self.sampling_rate, highest=8000, scale="slaney", area=True)
        features = []
        for wave in values:
            power = power_spectrum(wave, self.n_fft, self.hop_length, self.n_fft, centred=True)[:-1] @ filters
            logarithm = np.log10(np.maximum(power, 1e-10))
            features.append((np.maximum(logarithm, logarithm.max() - 8) + 4) / 4)
        frames = mask[:, :: self.hop_length][:, : len(features[0])].astype(np.int32)
        found = np.stack(features).transpose(0, 2, 1)
        return {"input_features": found} | ({"attention_mask": frames} if self.return_attention_mask else {})


@dataclasses.dataclass(frozen=True)
class FilterBankSteps(SoundSteps):
    """AST: `input_values (B, T, mel)`, the logarithm of Kaldi's filter bank, cut or padded with zeros to `max_length` frames."""

    num_mel_bins: int = 128
    max_length: int = 1024
    do_normalize: bool = True
    mean: float = -4.2677393
    std: float = 4.5689974

    def many(self, waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Frames of 400 samples, 160 apart, whatever the rate. The padding is normalised like sound."""
        filters = mel_filters(self.num_mel_bins, 512, self.sampling_rate, lowest=20, over="mel")
        features = np.zeros((len(waves), self.max_length, self.num_mel_bins), np.float32)
        for row, wave in zip(features, waves, strict=True):
            power = power_spectrum(wave, 400, 160, 512, periodic=False, level=True, emphasis=0.97) @ filters
            found = np.log(np.maximum(power, np.finfo(np.float32).eps))[: self.max_length]
            row[: len(found)] = found
        return {"input_values": (features - self.mean) / (2 * self.std) if self.do_normalize else features}
