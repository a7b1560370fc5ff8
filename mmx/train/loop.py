"""The training loop, to be read from top to bottom.

The host never waits for a step: batches are put on the devices ahead, the metrics of a step are read when the step
after the next has been sent off, and checkpoints are written beside the training.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from mmx import flops as flops_
from mmx.cache import cache_folder
from mmx.data import Pipeline, PrefetchToDevice, Tokenizer
from mmx.data.pipeline import put_batch
from mmx.errors import InputError, naming, writing
from mmx.evaluate.report import Evaluation, due
from mmx.modalities.masking import WORDS, modality_of
from mmx.model import count_parameters
from mmx.objectives import check_reached, memories
from mmx.parallel import batch_sharding, make_mesh
from mmx.parallel.mesh import batch_parts
from mmx.train.checkpoint import Checkpoints, find_checkpoint, open_checkpoints
from mmx.train.experiment import Experiment, to_json
from mmx.train.folder import RunFolder, open_folder
from mmx.train.log import MetricsWriter
from mmx.train.optimizer import make_optimizer, make_schedule
from mmx.train.progress import Progress, clock
from mmx.train.state import TrainState, make_state
from mmx.train.step import Task, compile_step, train_step

MAX_SKIPPED = 10  # steps in a row whose gradient is not finite, after which a run stops
ALWAYS = ("loss", "grad_norm")  # metrics of every step, whatever it samples
LAG = 2  # steps on their way to the devices before the host reads the metrics of the first of them


class Stopped(Exception):  # noqa: N818  (it is no error)
    """The run stopped before its last step, with its state saved. `code` is the exit code of the process."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run(experiment: Experiment, started: float | None = None, devices: Sequence[Any] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the metrics of the last evaluation.

    Args:
        experiment: the whole configuration.
        started: `time.time()` when the command began, to report the time to the first step.
        devices: to run on; None: all.

    Raises:
        InputError: something that was given cannot be used.
        Stopped: a signal, or too many steps in a row without a finite gradient. The state is saved.
    """
    started = started or time.time()
    _use_compile_cache()
    mesh = make_mesh(experiment.mesh, devices)
    if not experiment.active_objectives:
        raise InputError("objectives: there are none, as `mmx convert` leaves it; give some in a configuration file")
    _check_batch(experiment, mesh)
    folder = open_folder(experiment)
    data = Pipeline(
        experiment.data, experiment.modalities, experiment.batch_size, experiment.seed, _tokenizer(experiment, folder)
    )
    for name, evaluator in experiment.evaluators.items():
        with naming(f"evaluators.{name}"):
            evaluator.check(data)

    task = Task(experiment.build_model(), experiment.active_objectives, experiment.modality_dropout, experiment.sampling)
    for name, objective in task.objectives.items():
        with naming(f"objectives.{name}"):
            objective.check_tokenizer(data.tokenizer)
    config = experiment.optimizer
    optimizer, schedule = make_optimizer(config, experiment.steps), make_schedule(config, experiment.steps)
    memory = memories(task.objectives, task.model)
    state, layout = make_state(task.model, optimizer, bool(config.ema), experiment.seed, mesh, memory=memory)
    checkpoints = Checkpoints(folder.checkpoints, experiment.checkpoint, to_json(experiment))
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        state, first_step = _restore(experiment, checkpoints, state)
        folder.keep(experiment, data.tokenizer)
        if (origin := _origin(experiment)) and origin.published.exists() and not folder.published.exists():
            shutil.copytree(origin.published, folder.published)
        batches = PrefetchToDevice(data.train(first_step), functools.partial(put_batch, sharding=batch_sharding(mesh)))
        stack.callback(batches.close)
        writer = MetricsWriter(folder, first_step, experiment.log.tensorboard)
        stack.callback(writer.close)
        stack.enter_context(jax.set_mesh(mesh))
        stopping = stack.enter_context(_signals())

        batch, begun = next(batches), time.perf_counter()
        check_reached(task.objectives, task.model, state.params, batch)
        step_fn = functools.partial(
            train_step, task=task, optimizer=optimizer, schedule=schedule, ema=config.ema, parts=experiment.microbatches
        )
        step_fn = compile_step(step_fn, mesh, layout).lower(state, batch).compile()
        compiling = time.perf_counter() - begun
        work = task.flops(state.params, batch)
        peak, peak_source = flops_.peak_flops(mesh.size)
        tokens = experiment.batch_size * _tokens_per_example(task, batch)
        progress = Progress(experiment.steps, first_step, experiment.batch_size, tokens, work, peak)
        progress.say(_headline(experiment, task, state, mesh, folder, first_step))
        progress.say(
            f"{work / 1e12:.4f} TFLOP per step ({flops_.RULE}); peak {peak / 1e12:.3g} TFLOP/s ({peak_source}); "
            f"compiled in {compiling:.1f} s"
        )
        stack.enter_context(progress)

        host = _Host(experiment, task, data, mesh, folder, writer, progress)
        sent: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        found, begun = {}, time.perf_counter()
        for step in range(first_step + 1, experiment.steps + 1):
            state, metrics = step_fn(state, batch)
            sent.append((step, metrics))
            last = step == experiment.steps
            if not last:
                batch = next(batches)
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                progress.say(f"first step {time.time() - started:.1f} s after the command")
                progress.restart(step, batches.waited)
            stop = bool(stopping) and not last
            evaluating = any(due(e, step, experiment.steps) for e in experiment.evaluators.values())
            saving = last or stop or checkpoints.due(step) or (evaluating and bool(experiment.checkpoint.best))
            while sent and (len(sent) > LAG or evaluating or saving):  # a saved state is never ahead of its metrics
                host.read(*sent.popleft(), batches.waited)

            paused = time.perf_counter()
            if host.lost:
                checkpoints.save(step, state)
                checkpoints.wait()
                raise Stopped(host.lost + f"; the state is saved at step {step}", 1)
            if evaluating:
                try:
                    found = host.evaluate(state, step)
                except BaseException:
                    checkpoints.save(step, state)  # nothing is lost with an evaluation
                    checkpoints.wait()
                    raise
            if saving:
                checkpoints.save(step, state, found if evaluating else None)
            progress.pause(time.perf_counter() - paused)
            if stop:
                checkpoints.wait()
                name = signal.Signals(stopping[0]).name
                raise Stopped(f"{name}: saved step {step}; go on with\n  {resume_command(folder)}", 128 + stopping[0])
        if first_step >= experiment.steps:
            found = host.evaluate(state, experiment.steps)
        checkpoints.wait()
        progress.say(_farewell(experiment, folder, time.perf_counter() - begun, time.time() - started))
    return found


def resume_command(folder: RunFolder) -> str:
    """The command that goes on with a run: this one, with the run's folder; a study finds its runs by itself."""
    program, *arguments = sys.argv
    name = ["mmx"] if Path(program).name == "mmx" else ["python", program]
    if arguments[:1] != ["study"]:
        for flag in ("--run", "--resume"):
            for i, argument in enumerate(arguments):
                if argument == flag or argument.startswith(f"{flag}="):
                    del arguments[i : i + (2 if argument == flag else 1)]
                    break
        arguments += ["--run", os.fspath(folder.path)]
    flags = f"XLA_FLAGS={shlex.quote(os.environ['XLA_FLAGS'])} " if os.environ.get("XLA_FLAGS") else ""
    return flags + shlex.join([*name, *arguments])


@dataclasses.dataclass
class _Host:
    """What the host does between steps: it reads metrics and evaluates. `lost` says why a run has to stop, if it has."""

    experiment: Experiment
    task: Task
    data: Pipeline
    mesh: Mesh
    folder: RunFolder
    writer: MetricsWriter
    progress: Progress
    lost: str = ""

    def read(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Reads the metrics of a step that is done, records them now and then, and notes when a run has lost its way."""
        if step % self.experiment.log.every == 0 or step == self.experiment.steps:
            values = {name: float(value) for name, value in metrics.items() if name != "skipped_in_row"}
            drawn = {name: value for name, value in values.items() if name in ALWAYS or not math.isnan(value)}
            values = drawn if self.task.sampling else values
            measured = self.progress.measure(step, waited)
            self.writer.write(step, values | measured)
            self.progress.show(step, values, measured)
        if int(metrics["skipped_in_row"]) >= MAX_SKIPPED and not self.lost:
            self.lost = (
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up to step {step}, and nothing "
                f"moved in them. Look for NaN or infinity in the data, or lower --optimizer.learning-rate"
            )

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Runs the evaluators that are due; records, prints and draws what they find."""
        steps, final = self.experiment.steps, step == self.experiment.steps
        evaluation = Evaluation(self.task.model, state.evaluated_params, self.data, self.mesh, self.experiment.batch_size, final)
        found: dict[str, float] = {}
        for name, evaluator in self.experiment.evaluators.items():
            if not due(evaluator, step, steps):
                continue
            report = evaluator(evaluation)
            found |= {f"{name}/{metric}": value for metric, value in report.metrics.items()}
            if report.text:
                self.progress.say(f"\n{name}\n{report.text}")
            for file, picture in report.pictures.items():
                with writing(self.folder.path / f"{name}_{file}") as path:
                    Image.fromarray(picture).save(path)
        self.writer.write(step, found)
        if not final:
            shown = [f"{name} {value:.3f}" for name, value in found.items() if name.endswith(("R@1", "exact"))]
            self.progress.say(f"step {step}: " + ", ".join(shown))
        return found


def _tokenizer(experiment: Experiment, folder: RunFolder) -> Tokenizer | None:
    """The tokenizer a run must keep to: its own, or that of the run whose state it starts from; None: a new one."""
    if folder.tokenizer.exists():
        return Tokenizer.load(folder.tokenizer)
    origin = _origin(experiment)
    return Tokenizer.load(origin.tokenizer) if origin is not None and origin.tokenizer.exists() else None


def _origin(experiment: Experiment) -> RunFolder | None:
    """The folder of the run whose state this one starts from; None: there is none."""
    if experiment.resume in ("auto", "never", "must"):
        return None
    return RunFolder(find_checkpoint(Path(experiment.resume))[0].parent)


def _restore(experiment: Experiment, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, int]:
    """The state to begin with: the run's own last one, that of another run, or the new one."""
    if checkpoints.latest is not None:
        return checkpoints.restore(state)
    if experiment.resume in ("auto", "never", "must"):
        return state, 0
    folder, step = find_checkpoint(Path(experiment.resume))
    other = open_checkpoints(folder)
    try:
        state, position = other.restore(state, step)
    finally:
        other.close()
    if position >= experiment.steps:
        raise InputError(f"--resume {experiment.resume}: its state is at step {position}; set --steps to more than that")
    return state, position


def _check_batch(experiment: Experiment, mesh: Mesh) -> None:
    if jax.process_count() > 1:
        raise InputError("training on several processes is not supported yet; start one process with all devices")
    parts, shape = batch_parts(mesh), f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
    if experiment.batch_size % parts:
        raise InputError(
            f"batch_size={experiment.batch_size} is not divisible by {parts}, the number of parts the mesh splits it into: "
            f"{shape}; choose a multiple of {parts}"
        )
    if experiment.microbatches > (most := experiment.batch_size // parts):
        raise InputError(
            f"microbatches={experiment.microbatches}, but each part of the mesh ({shape}) has {most} examples of a batch of "
            f"{experiment.batch_size}; set --microbatches to at most {most}"
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C in a list; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever owns it owns the signals
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _use_compile_cache() -> None:
    """Compiled programs are kept, so that the second start is fast; an own setting of JAX's cache is left alone."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache_folder("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _tokens_per_example(task: Task, batch: Any) -> int:
    """Positions of all streams of one example, padding included."""
    model = task.model
    entries = {entry: value for entry, value in batch.items() if modality_of(entry) in model.modalities}
    names = {modality_of(entry): value for entry, value in reversed(entries.items()) if not entry.endswith(f"/{WORDS}")}
    streams = jax.eval_shape(
        lambda b: {n: t.values for n, t in model.init_with_output(jax.random.key(0), b)[0].streams.items()}, names
    )
    return sum(values.shape[1] for values in streams.values())


def _headline(experiment: Experiment, task: Task, state: TrainState, mesh: Mesh, folder: RunFolder, first_step: int) -> str:
    device = jax.devices()[0]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    names = ", ".join(f"{o} (weight {v.weight:g})" for o, v in task.objectives.items())
    kind = experiment.published.family if experiment.published else "own stages" if experiment.stages else experiment.topology
    lines = [
        f"{kind}, {' + '.join(task.model.modalities)}: "
        f"{count_parameters(state.params):,} parameters, {experiment.model.dtype}; {names}",
        f"{len(jax.devices())} {device.platform} device(s) ({device.device_kind}), mesh {shape}; run folder {folder}",
    ]
    if first_step:
        lines.append(f"going on after step {first_step}")
    return "\n".join(lines)


def _farewell(experiment: Experiment, folder: RunFolder, training: float, total: float) -> str:
    pictures = sorted(folder.path.glob("*.png"))
    other = "cross_attention" if experiment.topology != "cross_attention" else "early_concatenation"
    lines = [
        f"\ntrained in {clock(training)}, {clock(total)} in all",
        f"  {folder.metrics}  metrics",
        f"  {folder.checkpoints}  checkpoints",
        *[f"  {picture}  pictures" for picture in pictures],
    ]
    if experiment.log.tensorboard:
        lines.append(f"  {folder.tensorboard}  TensorBoard events")
    return "\n".join([*lines, f"next: python train.py --topology {other}"])
