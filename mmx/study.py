"""`mmx study`: the same data, seeds and budget through several topologies, and one table."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmx.errors import InputError, unknown
from mmx.topologies import TOPOLOGIES

COLUMNS = {
    "image to text R@1": "composition/image_to_text_R@1",
    "text to image R@1": "composition/text_to_image_R@1",
    "image to text R@5": "composition/image_to_text_R@5",
    "captions exact": "captions/exact",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Trains every topology with every seed, one after the other, and writes a table of means and spreads.

    A study goes on where it was interrupted: runs that are done are read, not trained again.
    """

    topologies: tuple[str, ...] = tuple(TOPOLOGIES)
    """Which topologies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Which seeds."""
    config: str = ""
    """A configuration file; empty: the default experiment."""
    steps: int = 0
    """Steps of every run; 0: the configuration's."""
    folder: str = "runs/study"
    """Where the runs and the table lie."""


def run_study(study: Study) -> Path:
    """Runs the study and returns the path of its table, `study.md`; `study.json` holds the numbers.

    Raises:
        InputError: an unknown topology.
    """
    from mmx.cli import load_config
    from mmx.train import Experiment, run

    for name in study.topologies:
        if name not in TOPOLOGIES:
            raise InputError(unknown("topology", name, TOPOLOGIES))
    base = load_config(Path(study.config)) if study.config else Experiment()
    base = dataclasses.replace(base, steps=study.steps or base.steps)
    results: dict[str, list[dict[str, float]]] = {}
    for name in study.topologies:
        for seed in study.seeds:
            folder = Path(study.folder) / f"{name}-{seed}"
            found = _finished(folder / "metrics.jsonl", base.steps)
            if found is None:
                run(dataclasses.replace(base, topology=name, seed=seed, run=str(folder), resume="auto"))
                found = _finished(folder / "metrics.jsonl", base.steps)
            results.setdefault(name, []).append(found or {})
    path = Path(study.folder)
    (path / "study.json").write_text(json.dumps({"seeds": study.seeds, "steps": base.steps, "results": results}, indent=1))
    table = make_table(results)
    (path / "study.md").write_text(table)
    print(f"\n{table}\n{path / 'study.md'}")
    return path / "study.md"


def make_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: for each topology the mean of its runs and, behind it, the standard deviation."""
    shown = {title: key for title, key in COLUMNS.items() if any(key in r for runs in results.values() for r in runs)}
    columns = [*shown, "training, s"]
    lines = ["| topology | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in results.items():
        cells = [_cell([r[key] for r in runs if key in r]) for key in shown.values()]
        seconds = np.mean([r["training_seconds"] for r in runs])
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _finished(metrics: Path, steps: int) -> dict[str, float] | None:
    """What a run that is done found at its last step, and the seconds its steps took; None if it is not done."""
    if not metrics.exists():
        return None
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    last: dict[str, float] = {}
    for record in records:
        if record["step"] == steps:
            last |= record
    timed = [record["time/step_ms"] for record in records if "time/step_ms" in record]
    evaluated = any("/" in name and not name.startswith(("time/", "loss/")) and name.endswith(("R@1", "exact")) for name in last)
    return last | {"training_seconds": float(np.mean(timed)) * steps / 1e3} if evaluated else None
