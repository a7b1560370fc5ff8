"""`mmx study`: the same data, seeds and budget through several topologies, and one report."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mmx.errors import InputError, at_least, unknown
from mmx.evaluate import Missing
from mmx.model import abstract_params, count_parameters, example_batch
from mmx.objectives import Captioning
from mmx.topologies import BEYOND, TOPOLOGIES
from mmx.train import Experiment, Task, run
from mmx.train.experiment import differences, load_config, to_json
from mmx.train.log import step_of

COLUMNS = {  # of the table: a title, the metric, decimals
    "image to text R@1": ("composition/image_to_text_R@1", 3),
    "text to image R@1": ("composition/text_to_image_R@1", 3),
    "image to text R@5": ("composition/image_to_text_R@5", 3),
    "captions exact": ("captions/exact", 3),
    "caption loss": ("missing/loss_complete", 3),
    "without image": ("missing/loss_without_image", 3),
    "parameters": ("parameters", 0),
    "steps": ("steps", 0),
    "TFLOP in all": ("tflops", 1),
}
QUALITY = "composition/image_to_text_R@1"


@dataclasses.dataclass(frozen=True)
class Study:
    """Trains every topology with every seed, one after the other, and writes a report: table, curves, cost, absence.

    A study goes on where it was interrupted: runs that are done are read, not trained again.
    """

    topologies: tuple[str, ...] = tuple(TOPOLOGIES)
    """Which topologies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Which seeds."""
    match: Literal["nothing", "parameters", "flops"] = "nothing"
    """What the topologies have in common, beside data, width and depth: nothing; the number of parameters, that of the
    largest of them, by the hidden size of the MLPs; the FLOPs of the whole training, those of the configuration's own
    topology, by the number of steps."""
    config: str = ""
    """A configuration file; empty: the default experiment."""
    steps: int = 0
    """Steps of every run; 0: the configuration's."""
    folder: str = "runs/study"
    """Where the runs and the report lie."""

    def __post_init__(self) -> None:
        at_least(self, steps=0)
        if not self.topologies or not self.seeds:
            raise InputError("study: name at least one topology and one seed")


def run_study(study: Study) -> Path:
    """Runs the study and returns the path of its report, `study.md`; `study.json` holds the numbers.

    Raises:
        InputError: an unknown topology.
    """
    for name in study.topologies:
        if name not in TOPOLOGIES | BEYOND:
            raise InputError(unknown("topology", name, TOPOLOGIES | BEYOND))
    base = load_config(Path(study.config)) if study.config else Experiment()
    if base.stages or base.published:
        raise InputError(f"{study.config} has stages of its own; a study compares the named topologies")
    base = dataclasses.replace(base, steps=study.steps or base.steps)
    writes = any(isinstance(o, Captioning) for o in base.active_objectives.values())
    if "missing" not in base.evaluators and writes and {"image", "text"} <= set(base.data.fields):
        base = dataclasses.replace(base, evaluators={**base.evaluators, "missing": Missing()})
    matched = match(base, study.topologies, study.match)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, experiment in matched.items():
        parameters, flops = cost(experiment)
        for seed in study.seeds:
            folder = Path(study.folder) / f"{name}-{seed}"
            one = dataclasses.replace(experiment, seed=seed, run=str(folder), resume="auto")
            if not _is_finished(folder, one):
                run(one)
            found = read_run(folder / "metrics.jsonl", one.steps)
            found |= {"parameters": parameters, "tflops": flops * one.steps / 1e12, "steps": one.steps}
            results.setdefault(name, []).append(found)
    path = Path(study.folder)
    (path / "study.json").write_text(json.dumps({"study": to_json(study), "results": results}, indent=1))
    report = make_report(study, base, results, path)
    (path / "study.md").write_text(report)
    print(f"\n{make_table(results)}\n{path / 'study.md'}")
    return path / "study.md"


def cost(experiment: Experiment) -> tuple[int, int]:
    """Parameters, and FLOPs of a training step by the rule of `mmx.flops`; nothing is computed."""
    task = Task(experiment.build_model(), experiment.active_objectives)
    batch = jax.eval_shape(lambda: example_batch(task.model, experiment.batch_size))
    params = abstract_params(task.model)
    return count_parameters(params), task.flops(params, batch)


def match(base: Experiment, topologies: Sequence[str], what: str) -> dict[str, Experiment]:
    """The experiment with each of the topologies, at equal parameters, equal training FLOPs, or as it is.

    Parameters are those of the largest of them: the MLPs of the others grow, and nobody's shrink.
    """
    matched = {name: dataclasses.replace(base, topology=name) for name in topologies}
    if what == "flops":
        budget = base.steps * cost(base)[1]
        return {name: dataclasses.replace(e, steps=max(round(budget / cost(e)[1]), 1)) for name, e in matched.items()}
    if what == "parameters":
        most = max(cost(e)[0] for e in matched.values())
        return {name: _with_parameters(e, most) for name, e in matched.items()}
    return matched


def _with_parameters(experiment: Experiment, count: int) -> Experiment:
    def with_mlp(hidden: int) -> Experiment:
        return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, mlp=hidden))

    few, many = (cost(with_mlp(hidden))[0] for hidden in (8, 16))
    return with_mlp(8 + round((count - few) / (many - few)) * 8)  # parameters are linear in the hidden size


def make_report(study: Study, base: Experiment, results: Mapping[str, Any], folder: Path) -> str:
    """The report as Markdown, with its plots beside it."""
    from mmx.plots import plot_curves, plot_points

    own = f"those of `{base.topology}`"
    matching = {
        "nothing": "parameters and FLOPs are not matched",
        "parameters": "parameters are matched to those of the largest by the hidden size of the MLPs",
        "flops": f"the FLOPs of the whole training are matched to {own} by the number of steps",
    }[study.match]
    curves = {name: [r["curves"] for r in runs] for name, runs in results.items()}
    lines = [
        "# Study",
        "",
        f"{len(study.topologies)} topologies, seeds {', '.join(map(str, study.seeds))}, batches of {base.batch_size} examples "
        f"of {base.data.name}; {matching}. Mean and standard "
        f"deviation over the seeds. FLOPs are those of matrix products, counted in the program.",
        "",
        make_table(results),
    ]
    for metric, file in ((QUALITY, "quality.png"), ("loss", "loss.png")):
        if any(metric in curve for runs in curves.values() for curve in runs):
            plot_curves(curves, metric, folder / file)
            lines += [f"![{metric} by step]({file})", ""]
    if any(QUALITY in r for runs in results.values() for r in runs):
        points = {n: [(r["tflops"], r[QUALITY]) for r in runs if QUALITY in r] for n, runs in results.items()}
        plot_points(points, "TFLOP in all", QUALITY, folder / "cost.png")
        lines += ["![quality by cost](cost.png)", ""]
    return "\n".join(lines)


def make_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: for each topology the mean of its runs and, behind it, the standard deviation."""
    shown = {t: column for t, column in COLUMNS.items() if any(column[0] in r for runs in results.values() for r in runs)}
    lines = ["| topology | " + " | ".join([*shown, "training, s"]) + " |", "|---" * (len(shown) + 2) + "|"]
    for name, runs in results.items():
        cells = [_cell([r[key] for r in runs if key in r], decimals) for key, decimals in shown.values()]
        seconds = np.mean([r["training_seconds"] for r in runs])
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], decimals: int) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 and np.ptp(values) > 0 else ""
    return f"{np.mean(values):,.{decimals}f}{spread}"


def _is_finished(folder: Path, experiment: Experiment) -> bool:
    """Whether a run of this very configuration has been evaluated at its last step."""
    if not (folder / "config.json").exists() or not (folder / "metrics.jsonl").exists():
        return False
    old = json.loads((folder / "config.json").read_text())
    if differences(old, json.loads(json.dumps(to_json(experiment)))):
        return False  # the run itself says what differs
    last = read_run(folder / "metrics.jsonl", experiment.steps)
    return all(any(key.startswith(f"{name}/") for key in last) for name in experiment.evaluators)


def read_run(metrics: Path, steps: int) -> dict[str, Any]:
    """What a run recorded at its last step, the seconds its steps took, and every metric as a curve over steps."""
    records = [json.loads(line) for line in metrics.read_text().splitlines() if step_of(line) < math.inf]
    last = {name: value for record in records if record["step"] == steps for name, value in record.items()}
    timed = [record["time/step_ms"] for record in records if "time/step_ms" in record]
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if not name.startswith("time/") and name != "step" and not isinstance(value, str):
                curves.setdefault(name, []).append((record["step"], value))
    return last | {"training_seconds": float(np.mean(timed)) * steps / 1e3 if timed else math.nan, "curves": curves}
