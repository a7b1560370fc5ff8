"""What the framework costs: the whole loop, data included, against bare code, side by side in one process.

    python benchmarks/loop.py

1. Two towers (a ViT and a text encoder, about 340,000 parameters, batch 128) trained by mmx.train.run, against a trainer
   of the same model written by hand: Flax's own attention, an in-memory array, no logging, no checkpoints.
2. The default model trained by mmx.train.run, against mmx's own jitted step on one batch that lies on the device.
3. The time from the command to the first step, with an empty cache and with a full one.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mmx
from mmx.data import Pipeline
from mmx.data.pipeline import put_batch
from mmx.modalities import Ids, Patches
from mmx.objectives import Contrastive
from mmx.parallel import MeshConfig, batch_sharding, make_mesh
from mmx.topologies import PerStream
from mmx.train import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    Task,
    compile_step,
    make_optimizer,
    make_schedule,
    make_state,
    train_step,
)
from mmx.train import run as run_loop

LENGTH, VOCAB, WIDTH, STEPS, ROUNDS, WINDOW = 14, 1024, 64, 60, 5, 5
TRAIN = Path(__file__).parent.parent / "train.py"


class BareBlock(nn.Module):
    """Pre-norm, 4 heads, MLP of three times the width."""

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4)(y, y, mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(3 * WIDTH)(nn.LayerNorm()(x))))


class BareTowers(nn.Module):
    """Three layers over 64 patches, two over 14 words."""

    @nn.compact
    def __call__(self, image, ids):
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(image.astype(jnp.float32) / 127.5 - 1).reshape(len(image), -1, WIDTH)
        x = x + self.param("image_position", nn.initializers.normal(0.02), (64, WIDTH))
        for _ in range(3):
            x = BareBlock()(x)
        there = ids > 0
        y = nn.Embed(VOCAB, WIDTH)(ids) + self.param("text_position", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        for _ in range(2):
            y = BareBlock()(y, there[:, None, None, :])
        x = nn.Dense(WIDTH, use_bias=False)(nn.LayerNorm()(x).mean(1))
        y = nn.Dense(WIDTH, use_bias=False)((nn.LayerNorm()(y) * there[..., None]).sum(1) / there.sum(1, keepdims=True))
        scale = jnp.exp(self.param("logit_scale", nn.initializers.constant(2.66), ()))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True), y / jnp.linalg.norm(y, axis=-1, keepdims=True), scale


def towers() -> mmx.Experiment:
    """The same two towers in mmx."""
    return mmx.Experiment(
        stages=(PerStream({"image": 3, "text": 2}),),
        model=ModelConfig(width=WIDTH, mlp=3 * WIDTH, heads=4, embed=WIDTH, unroll=3),
        modalities={"image": Patches((32, 32), (4, 4)), "text": Ids(VOCAB, LENGTH)},
        objectives={"contrastive": Contrastive()},
    )


class BareTrainer:
    """Everything in memory, one loop, nothing else."""

    def __init__(self, experiment: mmx.Experiment):
        data = Pipeline(experiment.data, experiment.modalities, experiment.batch_size)
        examples = data.examples("train")
        rows = [examples[i] for i in range(len(examples))]
        self.images = np.stack([row["image"] for row in rows])
        self.ids = np.stack([row["text"].array for row in rows])
        self.size, self.rng = experiment.batch_size, np.random.default_rng(0)
        model, optimizer = BareTowers(), make_optimizer(experiment.optimizer, experiment.steps)
        self.params = model.init(jax.random.key(0), self.images[:2], self.ids[:2])
        self.state = optimizer.init(self.params)
        self.parameters = mmx.count_parameters(self.params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, image, ids):
            def loss(params):
                image_, text, scale = model.apply(params, image, ids)
                return mmx.losses.clip_loss(image_, text, scale)

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self.step = step

    def run(self, steps: int) -> list[float]:
        """Seconds per step in each window."""
        return windows(self._step, steps)

    def _step(self):
        chosen = self.rng.choice(len(self.images), self.size, replace=False)
        image = np.roll(self.images[chosen], self.rng.integers(-1, 2, 2), (1, 2))
        self.params, self.state = self.step(self.params, self.state, image, self.ids[chosen])
        return self.params


def windows(step, steps: int) -> list[float]:
    """Seconds per step in each window of steps; `step()` returns what to wait for at its end."""
    found = []
    for _ in range(steps // WINDOW):
        start = time.perf_counter()
        for _ in range(WINDOW):
            out = step()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / WINDOW)
    return found


def loop_windows(experiment: mmx.Experiment, steps: int) -> list[float]:
    """The same of mmx.train.run after its first record: logging, TensorBoard, prefetching; no evaluation, no saving."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = dataclasses.replace(
            experiment,
            steps=steps,
            run=folder,
            evaluators={},
            checkpoint=CheckpointConfig(every_minutes=0, best=""),
            log=LogConfig(every=WINDOW),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run_loop(experiment)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record["time/step_ms"] / 1e3 for record in records if "time/step_ms" in record][1:]


class BareStep:
    """mmx's own train step on one batch that lies on the device."""

    def __init__(self, experiment: mmx.Experiment):
        mesh = make_mesh(MeshConfig())
        task = Task(experiment.build_model(), experiment.active_objectives)
        optimizer, schedule = make_optimizer(experiment.optimizer, 1000), make_schedule(experiment.optimizer, 1000)
        self.state, layout = make_state(task.model, optimizer, False, 0, mesh)
        data = Pipeline(experiment.data, experiment.modalities, experiment.batch_size)
        self.batch, self.size = put_batch(next(data.train()), batch_sharding(mesh)), experiment.batch_size
        step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule)
        with jax.set_mesh(mesh):
            self.step = compile_step(step, mesh, layout).lower(self.state, self.batch).compile()

    def run(self, steps: int) -> list[float]:
        """Seconds per step in each window."""
        return windows(self._step, steps)

    def _step(self):
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def first_step(cache: str) -> float:
    """Seconds from the command to the first step in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "--run", folder, "--steps", "51"]
        process = subprocess.Popen(command, env={**os.environ, "MMX_CACHE": cache}, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"first step ([\d.]+) s", line):
                process.kill()
                process.wait()
                return float(found[1])
    raise RuntimeError("the run ended before its first step")


def compare(title: str, size: int, ours, theirs) -> None:
    """Runs both sides in turn, each round longer than a hiccup; prints the ratio of the medians over all windows."""
    theirs(WINDOW)
    rounds = [(ours(STEPS), theirs(STEPS)) for _ in range(ROUNDS)]
    a, b = (float(np.median(np.concatenate(side))) for side in zip(*rounds, strict=True))
    each = ", ".join(f"{np.median(y) / np.median(x):.3f}" for x, y in rounds)
    print(f"{title}: {size / a:,.0f} against {size / b:,.0f} examples/s, ratio {b / a:.3f} (rounds: {each})", flush=True)


def main() -> None:
    print(f"jax {jax.__version__}, {os.cpu_count()} CPU cores, {jax.devices()[0].device_kind}; {ROUNDS} rounds of {STEPS} steps")
    bare = BareTrainer(towers())
    shapes = jax.eval_shape(lambda: towers().build_model().init(jax.random.key(0), mmx.example_batch(towers().build_model())))
    assert bare.parameters == mmx.count_parameters(shapes), "not the same model"
    compare("1. two towers, mmx's loop against a bare trainer", bare.size, lambda n: loop_windows(towers(), n), bare.run)
    default = mmx.Experiment()
    step = BareStep(default)
    compare("2. default model, mmx's loop against mmx's bare step", step.size, lambda n: loop_windows(default, n), step.run)
    with tempfile.TemporaryDirectory() as cache:
        print(f"3. first step {first_step(cache):.1f} s after the command with an empty cache,", end=" ")
        print(f"{first_step(cache):.1f} s with the data set prepared and the programs compiled")


if __name__ == "__main__":
    main()
