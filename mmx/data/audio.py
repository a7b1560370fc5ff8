"""From waveforms to spectra: arrays of samples `(S,)` in, frames `(T, bins)` out, float32, on the host."""

import numpy as np

from mmx.errors import InputError


def power_spectrum(samples: np.ndarray, window: int = 400, hop: int = 160, size: int | None = None) -> np.ndarray:
    """The power of each frequency in each frame: `(S,) -> (T, size // 2 + 1)`, with a Hann window.

    Args:
        samples: the waveform.
        window: samples of a frame; 400 are 25 ms at 16 kHz.
        hop: samples from one frame to the next; 160 are 10 ms at 16 kHz.
        size: of the Fourier transform; None: the next power of two that holds a frame.

    T is `1 + (S - window) // hop`: frames lie inside the waveform, which is not padded.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or len(samples) < window:
        raise InputError(f"audio: expected a waveform (S,) of at least {window} samples (one window), got {samples.shape}")
    size = size or 1 << (window - 1).bit_length()
    if size < window:
        raise InputError(f"audio: a Fourier transform of size={size} does not hold a window of {window} samples")
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]  # (T, window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return np.square(np.abs(np.fft.rfft(frames * hann, size))).astype(np.float32)


def mel_filters(bins: int, size: int, rate: int, lowest: float = 0.0, highest: float | None = None) -> np.ndarray:
    """Triangles that are equally wide in mel (2595 log10(1 + f / 700)): `(size // 2 + 1, bins)`.

    Args:
        bins: number of triangles.
        size: of the Fourier transform.
        rate: samples per second.
        lowest: frequency in Hz where the first triangle begins.
        highest: frequency in Hz where the last one ends; None: half the rate.
    """
    highest = highest or rate / 2
    mel = np.linspace(_mel(lowest), _mel(highest), bins + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)  # Hz
    frequencies = np.linspace(0, rate / 2, size // 2 + 1)[:, None]
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


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


def _mel(frequency: float) -> float:
    return 2595 * float(np.log10(1 + frequency / 700))
