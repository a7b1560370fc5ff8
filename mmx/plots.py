"""Plots of several runs, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Curve = Mapping[str, Sequence[tuple[int, float]]]  # metric -> (step, value)


def plot_curves(runs: Mapping[str, Sequence[Curve]], metric: str, path: Path) -> None:
    """A metric over steps: for each name the mean of its runs, in a band from the lowest to the highest of them."""
    figure, axes = _figure()
    for name, curves in runs.items():
        found = [np.asarray(curve[metric], float) for curve in curves if metric in curve]
        if not found:
            continue
        shortest = min(map(len, found))
        values = np.stack([curve[:shortest, 1] for curve in found])  # (runs, points)
        steps = found[0][:shortest, 0]
        axes.plot(steps, values.mean(0), label=name)
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
    _finish(figure, axes, "step", metric, path)


def plot_points(points: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, path: Path) -> None:
    """For each name its runs as points."""
    figure, axes = _figure()
    for name, found in points.items():
        if found:
            axes.scatter(*np.asarray(found, float).T, label=name, alpha=0.7)
    _finish(figure, axes, x, y, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, x: str, y: str, path: Path) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)  # below, where it hides no point
    figure.savefig(path, bbox_inches="tight")
