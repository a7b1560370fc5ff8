"""Whole runs: what they write, how they go on, and what stops them."""

import collections
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import mmx
from mmx import evaluate
from mmx.data import DataError, Pipeline
from mmx.errors import InputError
from mmx.parallel import make_mesh
from mmx.train import CheckpointConfig, LogConfig, MeshConfig, Stopped, run
from mmx.train.checkpoint import open_checkpoints
from mmx.train.experiment import differences, to_json
from mmx.train.loop import MAX_SKIPPED

ROOT = Path(mmx.__file__).parent.parent


def records(run_folder):
    return [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]


def kept(run_folder):
    """The records without the measurements of time."""
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records(run_folder)]


def train(experiment):
    return run(experiment, devices=jax.devices()[:1])


@pytest.fixture
def cheap(tiny):
    """With one objective, for what has nothing to do with them: most of the time goes into compiling."""
    return dataclasses.replace(tiny, objectives={"contrastive": mmx.objectives.Contrastive()})


def poison(monkeypatch, steps):
    """Turns the images of some steps into NaN."""
    original = Pipeline.train

    def batches(self, first_step=0):
        for i, batch in enumerate(original(self, first_step), first_step + 1):
            image = batch["image"].astype(np.float32) / 255
            yield dict(batch, image=np.full_like(image, np.nan) if i in steps else image)

    monkeypatch.setattr(Pipeline, "train", batches)


def test_a_run_writes_what_it_says(tiny, capsys):
    experiment = dataclasses.replace(
        tiny,
        log=LogConfig(every=2, tensorboard=True),
        evaluators={
            "composition": evaluate.Retrieval(split="composition[:16]", every=3),
            "captions": evaluate.Captions(split="composition[:16]", count=8),
        },
    )
    found = train(experiment)
    folder, out = Path(tiny.run), capsys.readouterr().out
    assert {f"composition/image_to_text_R@{k}" for k in (1, 5, 10)} | {"captions/exact"} <= found.keys()
    trained = [r for r in records(folder) if "loss" in r]
    assert [r["step"] for r in trained] == [2, 4, 6]
    assert {"loss/contrastive", "loss/matching", "loss/captioning", "grad_norm", "learning_rate", "skipped"} <= trained[0].keys()
    assert {"time/examples_per_second", "time/share_of_peak", "time/waiting_for_data", "time/memory_gib"} <= trained[0].keys()
    assert [r["step"] for r in records(folder) if "composition/image_to_text_R@1" in r] == [3, 6]
    assert json.loads((folder / "config.json").read_text())["model"]["width"] == 32
    assert (folder / "composition_contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "tokenizer.json").exists() and list((folder / "tensorboard").glob("events*"))
    assert (folder / "checkpoints/6").is_dir()
    for part in ("step 6/6 100% eta 0:00", "examples/s", "tokens/s", "TFLOP/s", "of peak", "waiting for data", "GiB", "grad norm",
                 "matrix products of the forward passes x 3", "first step", "next: python train.py", str(folder), "chance"):  # fmt: skip
        assert part in out


@pytest.mark.slow
def test_a_run_is_loaded_like_published_weights(tiny, tmp_path, batch):
    """A run folder, one of its checkpoints, and the safetensors that were made of it answer alike, as the trained model does."""
    train(dataclasses.replace(tiny, steps=4))
    run, image = mmx.load_pretrained(tiny.run), np.asarray(batch["image"])
    words = run.preprocess(text=["red apple"] * len(image))
    fields = run(image=image, **words)
    expected = run.model.apply({"params": run.params}, {"image": image, **words})
    np.testing.assert_allclose(fields["text_embeds"], expected.embeddings["text"], atol=1e-6)
    assert fields["text_embeds"].shape == (8, 32) and {"image_embeds", "matching", "captioning"} < set(fields)
    mmx.save_pretrained(tmp_path / "saved", run)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    for again in (
        mmx.load_pretrained(f"{tiny.run}/checkpoints/4"),
        mmx.load_pretrained(tmp_path / "saved"),
        mmx.load_pretrained(tmp_path / "saved", mesh=mesh),
    ):
        same = again(image=image, **again.preprocess(text=["red apple"] * len(image)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, fields)
    with pytest.raises(InputError, match="unknown modality 'texd'"):
        run(texd=image)
    config = json.loads((Path(tiny.run) / "config.json").read_text())
    config["modalities"]["text"]["class"] = "Idz"
    (Path(tiny.run) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="unknown class 'Idz'; did you mean 'Ids'"):
        mmx.load_pretrained(tiny.run)


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tiny, tmp_path):
    """What takes long to compile comes from the cache folder, in another run folder and with nothing left in memory."""
    counted = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counted.update([event.removeprefix("/jax/compilation_cache/")]))
    train(tiny)
    jax.clear_caches()
    counted.clear()
    train(dataclasses.replace(tiny, run=str(tmp_path / "second")))
    assert counted["cache_hits"] > 0 and counted["cache_misses"] == 0


def test_training_learns(tiny):
    """A hundred steps on 64 examples bring every loss well below its start."""
    experiment = dataclasses.replace(
        tiny,
        steps=120,
        batch_size=32,
        evaluators={"train": evaluate.Retrieval(split="train[:64]")},
        checkpoint=CheckpointConfig(best=""),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=5e-3, ema=0.0),
    )
    found = train(experiment)
    first, last = (next(r for r in rs if "loss" in r) for rs in (records(tiny.run), records(tiny.run)[::-1]))
    assert last["loss/contrastive"] < 0.5 * first["loss/contrastive"]
    assert last["loss/captioning"] < 0.7 * first["loss/captioning"]
    assert found["train/image_to_text_R@1"] > 0.2


@pytest.mark.slow
def test_options_work_together(tiny):
    """bfloat16, dropout, everything computed again, accumulation, Muon: finite, and another curve than without."""
    model = dataclasses.replace(tiny.model, dtype="bfloat16", dropout=0.1, drop_path=0.1, remat="full", unroll=1)
    train(dataclasses.replace(tiny, model=model, microbatches=2, optimizer=dataclasses.replace(tiny.optimizer, name="muon")))
    losses = [r["loss"] for r in records(tiny.run) if "loss" in r]
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert len(set(losses)) == 6 and records(tiny.run)[-1]["step"] == 6


@pytest.mark.slow
def test_resuming_equals_never_stopping(tiny, tmp_path):
    """Saved at step 4, gone on to 6: metrics, parameters, moments, average and counters of an uninterrupted run."""
    whole = dataclasses.replace(tiny, run=str(tmp_path / "whole"))
    train(whole)
    train(tiny)
    folder = Path(tiny.run)
    import shutil

    shutil.rmtree(folder / "checkpoints/6")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99}\n{"step": 6, "lo')  # what a crash leaves
    train(dataclasses.replace(tiny, resume="must"))
    assert kept(tiny.run) == kept(whole.run)
    assert_same_state(tiny, whole)


def assert_same_state(a, b):
    states = []
    for experiment in (a, b):
        from mmx.parallel import make_mesh
        from mmx.train import make_optimizer, make_state

        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        target, _ = make_state(experiment.build_model(), make_optimizer(experiment.optimizer, experiment.steps), True, 7, mesh)
        checkpoints = open_checkpoints(Path(experiment.run) / "checkpoints")
        states.append(checkpoints.restore(target)[0])
        checkpoints.close()
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_finished_run_only_evaluates_again(cheap):
    train(cheap)
    before = kept(cheap.run)
    assert train(cheap)
    assert kept(cheap.run)[: len(before)] == before


def test_a_failed_start_leaves_the_folder_free(tiny):
    wrong = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, split="trian"))
    with pytest.raises(InputError, match="did you mean 'train'"):
        train(wrong)
    assert not (Path(tiny.run) / "config.json").exists()


def test_evaluators_are_checked_before_training(tiny):
    for evaluator, message in [
        (evaluate.Retrieval(split="compositoin"), "evaluators.composition: .*did you mean 'composition'"),
        (evaluate.Captions(given=("imag",)), "evaluators.composition: .*did you mean 'image'"),
    ]:
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(tiny, evaluators={"composition": evaluator}))
    assert not (Path(tiny.run) / "metrics.jsonl").exists()


def test_a_failing_evaluation_loses_nothing(cheap, monkeypatch):
    def fail(self, _):
        raise RuntimeError("out of order")

    monkeypatch.setattr(evaluate.Retrieval, "__call__", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        train(dataclasses.replace(cheap, checkpoint=CheckpointConfig(every_minutes=0)))
    assert (Path(cheap.run) / "checkpoints/6").is_dir()


@pytest.mark.slow
def test_a_new_run_keeps_the_words_of_the_state_it_starts_from(tiny, tmp_path):
    train(tiny)
    other_texts = dataclasses.replace(tiny.data, split="train[1000:1064]")
    new = dataclasses.replace(tiny, steps=8, resume=tiny.run, run=str(tmp_path / "new"), data=other_texts)
    train(new)
    old, kept_ = ((Path(folder) / "tokenizer.json").read_text() for folder in (tiny.run, new.run))
    assert old == kept_
    with pytest.raises(InputError, match="its state is at step 6; set --steps to more than that"):
        train(dataclasses.replace(new, steps=6, run=str(tmp_path / "none")))


@pytest.mark.slow
def test_another_mesh_may_go_on(tiny):
    train(dataclasses.replace(tiny, steps=6))
    import shutil

    expected = kept(tiny.run)
    shutil.rmtree(Path(tiny.run) / "checkpoints/6")
    run(dataclasses.replace(tiny, mesh=MeshConfig(2, 2, 2)))
    for a, b in zip(kept(tiny.run), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_new_run_may_start_from_another_ones_state(tiny, tmp_path):
    train(tiny)
    longer = dataclasses.replace(tiny, steps=8, resume=tiny.run, run=str(tmp_path / "longer"))
    train(longer)
    assert [r["step"] for r in kept(longer.run) if "loss" in r] == [7, 8]


def test_a_run_that_is_another_one_is_refused(cheap):
    train(dataclasses.replace(cheap, steps=4))
    for change, message in (
        ({"seed": 1, "batch_size": 16}, r"another configuration:\n  batch_size: 8 -> 16\n  seed: 0 -> 1\n"),
        ({"resume": "never"}, "holds checkpoints; choose another --run"),
        ({"resume": "nowhere"}, "holds no checkpoint; name a run folder"),
    ):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(cheap, steps=4, **change))


def test_must_wants_a_checkpoint(tiny):
    with pytest.raises(InputError, match="--resume must: .* holds no checkpoint"):
        train(dataclasses.replace(tiny, resume="must"))


def test_differences_name_nested_fields(tiny):
    other = dataclasses.replace(
        tiny, mesh=MeshConfig(data=8), modalities=tiny.modalities | {"audio": mmx.modalities.Ids(300, 12)}
    )
    lines = differences(to_json(tiny), to_json(other))
    assert len(lines) == 1 and lines[0].startswith("modalities.audio: null -> {")


@pytest.mark.slow
def test_a_step_with_nan_is_skipped_counted_and_shown(cheap, monkeypatch, capsys):
    poison(monkeypatch, {3, 4})
    train(cheap)
    trained = [r for r in records(cheap.run) if "loss" in r]
    assert [r["skipped"] for r in trained] == [0, 0, 1, 2, 2, 2]
    assert [isinstance(r["loss"], str) for r in trained] == [False, False, True, True, False, False]
    assert "2 steps skipped" in capsys.readouterr().out
    assert trained[3]["learning_rate"] == trained[2]["learning_rate"]


def test_a_skipped_step_moves_nothing(cheap, batch):
    import functools

    from mmx.parallel import make_mesh
    from mmx.train import Task, make_optimizer, make_schedule, make_state, train_step

    task, optimizer = Task(cheap.build_model(), cheap.active_objectives), make_optimizer(cheap.optimizer, 6)
    state, _ = make_state(task.model, optimizer, True, 0, make_mesh(MeshConfig(), jax.devices()[:1]))
    step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=make_schedule(cheap.optimizer, 6), ema=0.9)
    good, bad = dict(batch, image=batch["image"] / 255.0), dict(batch, image=np.full(batch["image"].shape, np.nan))
    step = jax.jit(step)
    state, _ = step(state, good)
    after, metrics = step(state, bad)
    jax.tree.map(
        np.testing.assert_array_equal, (after.params, after.opt_state, after.ema), (state.params, state.opt_state, state.ema)
    )
    assert (int(after.step), int(after.skipped), int(metrics["skipped_in_row"])) == (2, 1, 1)


def test_ten_steps_with_nan_in_a_row_stop_the_run_with_its_state(cheap, monkeypatch):
    poison(monkeypatch, set(range(3, 99)))
    long = dataclasses.replace(cheap, steps=40, checkpoint=CheckpointConfig(every_minutes=0))
    with pytest.raises(Stopped, match="not finite in 10 steps in a row, up to step 12") as stopped:
        train(long)
    assert stopped.value.code == 1
    (saved,) = [int(p.name) for p in (Path(long.run) / "checkpoints").iterdir() if p.name.isdigit()]
    assert MAX_SKIPPED + 2 <= saved <= MAX_SKIPPED + 6


def test_a_batch_that_does_not_divide_is_refused(tiny):
    with pytest.raises(InputError, match=r"batch_size=12 is not divisible by 8.*data=8 x fsdp=1; choose a multiple of 8"):
        run(dataclasses.replace(tiny, batch_size=12))
    with pytest.raises(InputError, match=r"microbatches=3, but each part .*data=8 x fsdp=1\) has 2 examples of a batch of 16"):
        run(dataclasses.replace(tiny, batch_size=16, microbatches=3))
    with pytest.raises(InputError, match="microbatches=9; there cannot be more than batch_size=8"):
        dataclasses.replace(tiny, microbatches=9)


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run folder .* cannot be written: .*choose another one with --run"):
        train(dataclasses.replace(tiny, run=str(tmp_path / "file" / "run")))


def test_a_full_disk_is_named(cheap):
    """metrics.jsonl leads to /dev/full, where every write fails as on a full disk."""
    Path(cheap.run).mkdir()
    (Path(cheap.run) / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl: No space left on device; make room"):
        train(cheap)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_named(cheap, tmp_path):
    """No file may grow beyond 64 KiB: the parameters do not fit, as on a full disk."""
    import resource

    wide = dataclasses.replace(
        cheap, model=dataclasses.replace(cheap.model, width=64), checkpoint=CheckpointConfig(every_minutes=0)
    )
    train(dataclasses.replace(wide, run=str(tmp_path / "whole")))  # else the cache of compiled programs is what is cut off
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
    try:
        with pytest.raises(InputError, match=r"cannot save step .* in .*checkpoints: .*; make room or correct the rights"):
            train(wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_corrupt_example_stops_the_run(cheap, monkeypatch):
    from mmx.data.sources import Source

    original = Source.__getitem__

    def broken(self, index):
        if index == 40:
            raise self.broken("record 40 cannot be read")
        return original(self, index)

    tokenizer_is_cached = Pipeline(cheap.data, cheap.modalities, cheap.batch_size)
    assert tokenizer_is_cached.tokenizer is not None
    monkeypatch.setattr(Source, "__getitem__", broken)
    with pytest.raises(DataError, match="record 40 cannot be read"):
        train(dataclasses.replace(cheap, steps=40))


def test_wrong_experiments_are_refused(tiny):
    for change, message in [
        ({"topology": "multi_to_on"}, "did you mean 'multi_to_one'"),
        ({"steps": 0}, "steps=0; it has to be at least 1"),
        ({"objectives": {"contrastive": mmx.objectives.Contrastive(weight=0)}}, "nothing to train"),
        ({"steps": 2}, "do not fit into steps=2"),
        ({"seed": -1}, "seed=-1; it has to be at least 0"),
        ({"objectives": {"contrastive": mmx.objectives.Contrastive(modalities=("image", "txt"))}}, "did you mean 'text'"),
        ({"checkpoint": CheckpointConfig(best="compsition/R@1")}, "did you mean 'composition'"),
    ]:
        with pytest.raises(InputError, match=message):
            dataclasses.replace(tiny, **change)


# Whole processes: signals, crashes, the command line.

FAST = [
    "--batch-size",
    "16",
    "--model.width",
    "32",
    "--model.mlp",
    "64",
    "--model.depth",
    "2",
    "--modalities.image.patch",
    "16",
    "16",
    "--modalities.text.vocab",
    "300",
    "--data.split",
    "train[:64]",
    "--optimizer.warmup",
    "2",
    "--optimizer.ema",
    "0.9",
    "--evaluators.composition.split",
    "composition[:16]",
    "--evaluators.captions.count",
    "8",
    "--evaluators.captions.split",
    "composition[:16]",
    "--log.every",
    "1",
    "--log.tensorboard",
    "False",
]


def start(run_folder, *arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "train.py", *FAST, "--run", str(run_folder), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_mid_run_and_resumed_equals_uninterrupted(tmp_path):
    """kill -9 while training and saving: afterwards everything is, bit for bit, as if nothing had happened."""
    arguments = ("--steps", "150", "--checkpoint.every-steps", "5", "--checkpoint.keep", "3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = finish(start(whole, *arguments))
    assert code == 0, err
    for at in (20, 70):
        process = start(killed, *arguments)
        wait_for(lambda at=at: (killed / "metrics.jsonl").exists() and len(kept_safely(killed)) >= at, process)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
        assert 0 < len(kept_safely(killed)) < 150
    code, out, err = finish(start(killed, *arguments, "--resume", "must"))
    assert code == 0 and "going on after step" in out, err
    assert kept(killed) == kept(whole)
    from mmx.cli import parse_experiment

    a, b = (parse_experiment([*FAST, *arguments, "--run", str(folder)]) for folder in (whole, killed))
    assert_same_state(a, b)


def kept_safely(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if line.endswith("}")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, "--steps", "5000")
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(kept_safely(folder)) >= 5, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number
    step = int(err.split("saved step ")[1].split(";")[0])
    assert [r["step"] for r in records(folder) if "loss" in r] == list(range(1, step + 1))
    assert (folder / f"checkpoints/{step}").is_dir()
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:2] == ["python", "train.py"] and command[-2:] == ["--run", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    again = subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    wait_for(lambda: len(kept_safely(folder)) >= step + 2, again)
    again.send_signal(signal.SIGTERM)
    assert f"going on after step {step}" in finish(again)[1]


@pytest.mark.slow
def test_errors_are_one_line_without_a_trace(tmp_path):
    code, _, err = finish(start(tmp_path / "run", "--topology", "multi_to_on"))
    message = " ".join(err.replace("│", " ").split())
    assert code == 2 and "unknown topology 'multi_to_on'; did you mean 'multi_to_one'?" in message
    assert "Traceback" not in err
    code, _, err = finish(start(tmp_path / "run", "--mesh.data", "3"))
    assert code == 2 and err.startswith("error: mesh: data x fsdp x tensor = 3x1x1 does not use exactly the 1 device(s) found.")


def test_wrong_settings_are_refused():
    from mmx.train import ModelConfig, OptimizerConfig

    for make, message in [
        (lambda: LogConfig(every=0), "every=0; it has to be at least 1"),
        (lambda: CheckpointConfig(keep=0), "keep=0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate=nan"),
        (lambda: OptimizerConfig(ema=1.0), "ema=1.0; it has to be less than 1"),
        (lambda: ModelConfig(heads=0), "heads=0"),
        (lambda: ModelConfig(dropout=1.5), "rates are less than 1"),
        (lambda: ModelConfig(dtype="float23"), "unknown dtype 'float23'"),
        (lambda: mmx.data.DataConfig(shift=-1), "shift=-1"),
        (lambda: evaluate.Captions(show=0), "show=0"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
