"""From waveforms to spectra: arrays of samples `(S,)` in, frames `(T, bins)` out, float32, on the host."""

from typing import Literal

import numpy as np

from mmx.errors import InputError


def power_spectrum(
    samples: np.ndarray,
    window: int = 400,
    hop: int = 160,
    size: int | None = None,
    *,
    centred: bool = False,
    periodic: bool = True,
    level: bool = False,
    emphasis: float = 0.0,
) -> np.ndarray:
    """The power of each frequency in each frame: `(S,) -> (T, size // 2 + 1)`, with a Hann window.

    Args:
        samples: the waveform.
        window: samples of a frame; 400 are 25 ms at 16 kHz.
        hop: samples from one frame to the next; 160 are 10 ms at 16 kHz.
        size: of the Fourier transform; None: the next power of two that holds a frame.
        centred: whether frame t lies around sample `t hop`, the waveform mirrored at its ends; T is then `1 + S // hop`.
        periodic: whether the window begins anew one sample behind its end; False: it ends in 0, as it begins.
        level: whether the mean of each frame is taken off it.
        emphasis: how much of the sample before is taken off each, in its frame (Kaldi: 0.97).

    T is `1 + (S - window) // hop`: frames lie inside the waveform, which is not padded unless they are `centred`.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or len(samples) < window:
        raise InputError(f"audio: expected a waveform (S,) of at least {window} samples (one window), got {samples.shape}")
    size = size or 1 << (window - 1).bit_length()
    if size < window:
        raise InputError(f"audio: a Fourier transform of size={size} does not hold a window of {window} samples")
    if centred:
        samples = np.pad(samples, window // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]  # (T, window)
    if level:
        frames = frames - frames.mean(1, keepdims=True, dtype=np.float64)
    if emphasis:
        frames = frames - emphasis * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window if periodic else window - 1))
    return np.square(np.abs(np.fft.rfft(frames * hann, size))).astype(np.float32)


def mel_filters(
    bins: int,
    size: int,
    rate: int,
    lowest: float = 0.0,
    highest: float | None = None,
    *,
    scale: Literal["htk", "slaney"] = "htk",
    over: Literal["hertz", "mel"] = "hertz",
    area: bool = False,
) -> np.ndarray:
    """Triangles that are equally wide in mel: `(size // 2 + 1, bins)`.

    Args:
        bins: number of triangles.
        size: of the Fourier transform.
        rate: samples per second.
        lowest: frequency in Hz where the first triangle begins.
        highest: frequency in Hz where the last one ends; None: half the rate.
        scale: what a mel is: 2595 log10(1 + f / 700), HTK's and Kaldi's; or Slaney's, a line up to 1000 Hz and a logarithm
            behind it.
        over: what the sides of a triangle are straight over; Kaldi's are over mel.
        area: whether a triangle's height is 2 / its width in Hz, so that all have the same area; False: 1.
    """
    to_mel, to_hertz = _SCALES[scale]
    mel = np.linspace(to_mel(np.asarray(lowest)), to_mel(np.asarray(highest or rate / 2)), bins + 2)
    hertz, frequencies = to_hertz(mel), np.linspace(0, rate / 2, size // 2 + 1)
    corners, x = (hertz, frequencies[:, None]) if over == "hertz" else (mel, to_mel(frequencies)[:, None])
    rising = (x - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - x) / (corners[2:] - corners[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return (filters * 2 / (hertz[2:] - hertz[:-2]) if area else filters).astype(np.float32)


def log_mel(
    samples: np.ndarray, rate: int = 16_000, bins: int = 80, window: float = 0.025, hop: float = 0.010, floor: float = 1e-10
) -> np.ndarray:
    """The logarithm of the power in each mel filter: `(S,) -> (T, bins)`; `window` and `hop` in seconds."""
    frame, step = round(window * rate), round(hop * rate)
    size = 1 << (frame - 1).bit_length()
    power = power_spectrum(samples, frame, step, size) @ mel_filters(bins, size, rate)
    return np.log(np.maximum(power, floor)).astype(np.float32)


def log_power(samples: np.ndarray, window: int = 400, hop: int = 160, size: int = 512, floor: float = 1e-10) -> np.ndarray:
    """The logarithm of the power spectrum: `(S,) -> (T, size // 2 + 1)`."""
    return np.log(np.maximum(power_spectrum(samples, window, hop, size), floor))


def stack_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """Joins every `count` frames into one: `(T, bins) -> (T // count, count bins)` (AV-HuBERT joins four)."""
    whole = len(frames) // count * count
    return frames[:whole].reshape(-1, count * frames.shape[1])


def _slaney_mel(hertz: np.ndarray) -> np.ndarray:
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def _slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


_SCALES = {  # to mel, and back
    "htk": (lambda hertz: 2595 * np.log10(1 + hertz / 700), lambda mel: 700 * (10 ** (mel / 2595) - 1)),
    "slaney": (_slaney_mel, _slaney_hertz),
}
