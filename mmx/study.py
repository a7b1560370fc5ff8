"""`mmx study`: the same data, seeds and budget through several topologies, and one table."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmx.errors import InputError, unknown
from mmx.topologies import BEYOND, TOPOLOGIES
from mmx.train import Experiment, run
from mmx.train.experiment import differences, load_config, to_json
from mmx.train.log import step_of

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
    for name in study.topologies:
        if name not in TOPOLOGIES | BEYOND:
            raise InputError(unknown("topology", name, TOPOLOGIES | BEYOND))
    base = load_config(Path(study.config)) if study.config else Experiment()
    if base.stages:
        raise InputError(f"{study.config} has stages of its own; a study compares the named topologies")
    base = dataclasses.replace(base, steps=study.steps or base.steps)
    results: dict[str, list[dict[str, float]]] = {}
    for name in study.topologies:
        for seed in study.seeds:
            folder = Path(study.folder) / f"{name}-{seed}"
            experiment = dataclasses.replace(base, topology=name, seed=seed, run=str(folder), resume="auto")
            if not _is_finished(folder, experiment):
                run(experiment)
            results.setdefault(name, []).append(_last_records(folder / "metrics.jsonl", experiment.steps))
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


def _is_finished(folder: Path, experiment: Experiment) -> bool:
    """Whether a run of this very configuration has been evaluated at its last step."""
    if not (folder / "config.json").exists() or not (folder / "metrics.jsonl").exists():
        return False
    old = json.loads((folder / "config.json").read_text())
    if differences(old, json.loads(json.dumps(to_json(experiment)))):
        return False  # the run itself says what differs
    last = _last_records(folder / "metrics.jsonl", experiment.steps)
    return all(any(key.startswith(f"{name}/") for key in last) for name in experiment.evaluators)


def _last_records(metrics: Path, steps: int) -> dict[str, float]:
    """What a run recorded at its last step, and the seconds its steps took."""
    records = [json.loads(line) for line in metrics.read_text().splitlines() if step_of(line) < math.inf]
    last = {name: value for record in records if record["step"] == steps for name, value in record.items()}
    timed = [record["time/step_ms"] for record in records if "time/step_ms" in record]
    return last | {"training_seconds": float(np.mean(timed)) * steps / 1e3 if timed else math.nan}
