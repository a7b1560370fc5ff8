"""The training loop, to be read from top to bottom.

The host never waits for a step: batches are put on the devices ahead, the metrics of a step are read when the step
after the next has been sent off, and checkpoints are written beside the training.
"""

import collections
import contextlib
import functools
import os
import shlex
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
from mmx.errors import InputError
from mmx.evaluate.report import Evaluation, due
from mmx.model import count_parameters
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
    _check_batch(experiment, mesh)
    folder = open_folder(experiment)
    tokenizer = Tokenizer.load(folder.tokenizer) if folder.tokenizer.exists() else None
    data = Pipeline(experiment.data, experiment.modalities, experiment.batch_size, experiment.seed, tokenizer)
    if data.tokenizer is not None and tokenizer is None:
        data.tokenizer.save(folder.tokenizer)

    task = Task(experiment.build_model(), experiment.active_objectives)
    config = experiment.optimizer
    optimizer, schedule = make_optimizer(config, experiment.steps), make_schedule(config, experiment.steps)
    state, layout = make_state(task.model, optimizer, bool(config.ema), experiment.seed, mesh)
    checkpoints = Checkpoints(folder.checkpoints, experiment.checkpoint, to_json(experiment))
    state, first_step = _restore(experiment, folder, checkpoints, state)

    put = functools.partial(put_batch, sharding=batch_sharding(mesh))
    batches = PrefetchToDevice(data.train(first_step), put)
    writer = MetricsWriter(folder, first_step, experiment.log.tensorboard)
    evaluate = functools.partial(_evaluate, experiment, task, data, mesh, folder, writer)
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        stack.callback(checkpoints.close)
        stack.callback(batches.close)
        stack.enter_context(jax.set_mesh(mesh))
        stopping = stack.enter_context(_signals())

        batch = next(batches)
        step_fn = functools.partial(
            train_step, task=task, optimizer=optimizer, schedule=schedule, ema=config.ema, parts=experiment.microbatches
        )
        work = 3 * flops_.count_flops(lambda s, b: task.forward(s.params, task.corrupt(b, s.key), None), state, batch)
        start = time.perf_counter()
        step_fn = compile_step(step_fn, mesh, layout).lower(state, batch).compile()
        peak, peak_source = flops_.peak_flops()
        tokens = experiment.batch_size * _tokens_per_example(task, batch)
        progress = Progress(experiment.steps, first_step, experiment.batch_size, tokens, work, peak)
        progress.say(_headline(experiment, task, state, mesh, folder, first_step))
        progress.say(
            f"{work / 1e12:.4f} TFLOP per step ({flops_.RULE}); peak {peak / 1e12:.3g} TFLOP/s ({peak_source}); "
            f"compiled in {time.perf_counter() - start:.1f} s"
        )
        stack.enter_context(progress)

        sent: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        begun = time.perf_counter()
        for step in range(first_step + 1, experiment.steps + 1):
            state, metrics = step_fn(state, batch)
            sent.append((step, metrics))
            last = step == experiment.steps
            if not last:
                batch = next(batches)
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                progress.say(f"first step {time.time() - started:.1f} s after the command")
                progress.restart()
            evaluating = any(due(e, step, experiment.steps) for e in experiment.evaluators.values())
            while sent and (len(sent) > LAG or last or evaluating):
                _read_metrics(*sent.popleft(), experiment, writer, progress, batches.waited, checkpoints, state, step)

            paused = time.perf_counter()
            if evaluating:
                found = evaluate(state, step, progress)
            if last or (evaluating and experiment.checkpoint.best in found) or checkpoints.due(step):
                checkpoints.save(step, state, found if evaluating else None)
            progress.pause(time.perf_counter() - paused)
            if stopping and not last:
                checkpoints.save(step, state)
                checkpoints.wait()
                name = signal.Signals(stopping[0]).name
                raise Stopped(f"{name}: saved step {step}; go on with\n  {resume_command(folder)}", 128 + stopping[0])
        if first_step >= experiment.steps:
            found = evaluate(state, experiment.steps, progress)
        checkpoints.wait()
        progress.say(_farewell(experiment, folder, time.perf_counter() - begun, time.time() - started))
    return found


def resume_command(folder: RunFolder) -> str:
    """The command that goes on with a run: this one, with the run's folder."""
    arguments = [*sys.argv]
    for i, argument in enumerate(arguments):
        if argument == "--run":
            del arguments[i : i + 2]
            break
        if argument.startswith("--run="):
            del arguments[i]
            break
    program = ["mmx"] if Path(arguments[0]).name == "mmx" else ["python", arguments[0]]
    return shlex.join([*program, *arguments[1:], "--run", os.fspath(folder.path)])


def _read_metrics(
    step: int,
    metrics: dict[str, jax.Array],
    experiment: Experiment,
    writer: MetricsWriter,
    progress: Progress,
    waited: float,
    checkpoints: Checkpoints,
    state: TrainState,
    sent: int,
) -> None:
    """Reads the metrics of a step that is done: records them now and then, and stops a run that has lost its way."""
    if int(metrics["skipped_in_row"]) >= MAX_SKIPPED:
        checkpoints.save(sent, state)
        checkpoints.wait()
        raise Stopped(
            f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up to step {step}: nothing moved in "
            f"them, and the state is saved at step {sent}. Look for NaN or infinity in the data, or lower "
            f"--optimizer.learning-rate",
            1,
        )
    if step % experiment.log.every == 0 or step == experiment.steps:
        values = {name: float(value) for name, value in metrics.items() if name != "skipped_in_row"}
        measured = progress.measure(step, waited)
        writer.write(step, values | measured)
        progress.show(step, values, measured)


def _evaluate(
    experiment: Experiment,
    task: Task,
    data: Pipeline,
    mesh: Mesh,
    folder: RunFolder,
    writer: MetricsWriter,
    state: TrainState,
    step: int,
    progress: Progress,
) -> dict[str, float]:
    """Runs the evaluators that are due; records, prints and draws what they find."""
    final = step == experiment.steps
    evaluation = Evaluation(task.model, state.evaluated_params, data, mesh, experiment.batch_size, final)
    found: dict[str, float] = {}
    for name, evaluator in experiment.evaluators.items():
        if not due(evaluator, step, experiment.steps):
            continue
        report = evaluator(evaluation)
        found |= {f"{name}/{metric}": value for metric, value in report.metrics.items()}
        if report.text:
            progress.say(f"\n{name}\n{report.text}")
        for file, picture in report.pictures.items():
            Image.fromarray(picture).save(folder.path / file)
    writer.write(step, found)
    if not final:
        progress.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items() if k.endswith(("R@1", "exact"))))
    return found


def _restore(experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, int]:
    """The state to begin with: the run's own last one, that of another run, or the new one."""
    if checkpoints.latest is not None:
        return checkpoints.restore(state)
    if experiment.resume in ("auto", "never", "must"):
        return state, 0
    source, step = find_checkpoint(Path(experiment.resume))
    other = open_checkpoints(source)
    try:
        return other.restore(state, step)
    finally:
        other.close()


def _check_batch(experiment: Experiment, mesh: Mesh) -> None:
    parts = batch_parts(mesh) * experiment.microbatches
    if experiment.batch_size % parts:
        raise InputError(
            f"batch_size={experiment.batch_size} is not divisible by {parts}, the number of parts it is split into: mesh "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}, microbatches={experiment.microbatches}; "
            f"choose a multiple of {parts}"
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
    names = {name: batch[name] for name in model.modalities if name in batch}
    streams = jax.eval_shape(
        lambda b: {n: t.values for n, t in model.init_with_output(jax.random.key(0), b)[0].streams.items()}, names
    )
    return sum(values.shape[1] for values in streams.values())


def _headline(experiment: Experiment, task: Task, state: TrainState, mesh: Mesh, folder: RunFolder, first_step: int) -> str:
    device = jax.devices()[0]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    names = ", ".join(f"{o} (weight {v.weight:g})" for o, v in task.objectives.items())
    lines = [
        f"{experiment.topology if not experiment.stages else 'own stages'}, {' + '.join(task.model.modalities)}: "
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
