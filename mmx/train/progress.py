"""The live line: how far, how fast, how well."""

import resource
import sys
import time
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

QUIET_SECONDS = 5.0  # between two lines where the output is no terminal


class Progress:
    """Measures the speed of a run and shows one live line.

    Args:
        steps: of the whole run.
        first_step: where this process begins.
        examples: per step.
        tokens: positions of all streams of a batch, per step.
        flops: of a step, by the rule of `mmx.flops`.
        peak: FLOP/s all devices could reach.
    """

    def __init__(self, steps: int, first_step: int, examples: int, tokens: int, flops: int, peak: float):
        self.steps, self.examples, self.tokens, self.flops, self.peak = steps, examples, tokens, flops, peak
        self.console = Console(file=sys.stdout, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a terminal wraps words, a file keeps lines whole
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self._printed = 0.0
        self._step, self._time, self._waited = first_step, time.perf_counter(), 0.0
        self._paused = 0.0

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def restart(self, step: int, waited: float) -> None:
        """Starts the clock after `step`, so that compiling and the wait for the first batch do not count as training."""
        self._step, self._time, self._waited = step, time.perf_counter(), waited

    def pause(self, seconds: float) -> None:
        """Takes time that was no training (evaluating, saving) out of the speed."""
        self._paused += seconds

    def measure(self, step: int, waited: float) -> dict[str, float]:
        """What happened since the last call, as `time/...` metrics; `waited` is the total time spent waiting for data."""
        now = time.perf_counter()
        seconds = max(now - self._time - self._paused, 1e-9)
        count = step - self._step
        measured = {
            "time/step_ms": 1e3 * seconds / max(count, 1),
            "time/examples_per_second": count * self.examples / seconds,
            "time/tokens_per_second": count * self.tokens / seconds,
            "time/tflops_per_second": count * self.flops / seconds / 1e12,
            "time/share_of_peak": count * self.flops / seconds / self.peak,
            "time/waiting_for_data": (waited - self._waited) / seconds,
            "time/memory_gib": memory_gib(),
        }
        self._step, self._time, self._waited, self._paused = step, now, waited, 0.0
        return measured

    def show(self, step: int, metrics: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Shows the line; where the output is no terminal, at most one every few seconds."""
        line = self._line(step, metrics, measured)
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif step == self.steps or time.perf_counter() - self._printed > QUIET_SECONDS:
            self._printed = time.perf_counter()
            self.console.print(line)

    def say(self, text: str) -> None:
        """Prints lines that stay."""
        self.console.print(Text(text))

    def _line(self, step: int, metrics: Mapping[str, float], measured: Mapping[str, float]) -> str:
        parts = [f"{name.removeprefix('loss/')} {value:.3f}" for name, value in metrics.items() if name.startswith("loss/")]
        left = (self.steps - step) * measured["time/step_ms"] / 1e3
        skipped = f" | {metrics['skipped']:.0f} steps skipped" if metrics["skipped"] else ""
        return (
            f"step {step}/{self.steps} {step / self.steps:.0%} eta {clock(left)} | "
            f"{measured['time/examples_per_second']:,.0f} examples/s {measured['time/tokens_per_second']:,.0f} tokens/s "
            f"{measured['time/tflops_per_second']:.3g} TFLOP/s (3 x forward) {measured['time/share_of_peak']:.0%} of peak | "
            f"waiting for data {measured['time/waiting_for_data']:.1%} | {measured['time/memory_gib']:.2f} GiB | "
            f"loss {metrics['loss']:.3f}: {', '.join(parts)} | grad norm {metrics['grad_norm']:.2f} "
            f"lr {metrics['learning_rate']:.1e}{skipped}"
        )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_gib() -> float:
    """Highest memory use so far in GiB: of the fullest device, or of this process where devices do not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
