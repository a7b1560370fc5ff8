"""Eight emulated CPU devices, a cache folder of the test session, and a small experiment that everything can train."""

import ctypes
import dataclasses
import gc
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles fast
os.environ["PJRT_NPROC"] = "64"  # as mmx.make_mesh sets it, but tests ask for devices before
os.environ.setdefault("MMX_CACHE", os.path.join(tempfile.gettempdir(), f"mmx-test-cache-{os.getuid()}"))

import jax

jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["MMX_CACHE"], "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

import numpy as np
import pytest

import mmx
from mmx import evaluate
from mmx.data import DataConfig, Pipeline
from mmx.train import CheckpointConfig, Experiment, LogConfig, ModelConfig, OptimizerConfig
from mmx.types import Masked


def pytest_collection_modifyitems(items):
    """Whole processes first: they would keep one worker busy at the end, while the others have nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_teardown(item, nextitem):
    """Forgets what was compiled once it is large. The programs of all tests would be several gigabytes in each worker, in more
    pieces than Linux gives a process (vm.max_map_count): the compiler then dies, and the worker with it."""
    memory = Path("/proc/self/statm")
    if memory.exists() and int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2e9:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or the C library keeps what was freed


@pytest.fixture
def tiny(tmp_path: Path) -> Experiment:
    """Seconds on one device: two layers of width 32, eight examples a step."""
    return Experiment(
        steps=6,
        batch_size=8,
        run=str(tmp_path / "run"),
        model=ModelConfig(width=32, mlp=64, depth=2, embed=32),
        modalities={"image": mmx.modalities.Patches((32, 32), (16, 16)), "text": mmx.modalities.Ids(300, 12)},
        data=dataclasses.replace(DataConfig(), split="train[:64]"),
        optimizer=OptimizerConfig(warmup=2, ema=0.9),
        evaluators={"composition": evaluate.Retrieval(split="composition[:16]")},
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every=1, tensorboard=False),
    )


@pytest.fixture
def batch(tiny: Experiment) -> dict:
    """Eight examples of the emoji set as the tiny experiment reads them."""
    return next(Pipeline(tiny.data, tiny.modalities, tiny.batch_size).train())


@pytest.fixture
def one_device() -> list:
    return jax.devices()[:1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def labelled(batch):
    ids, here = batch["text"].array, batch["text"].mask
    return {
        "image": batch["image"],
        "text": Masked(ids, here & (np.arange(12) < 9)),
        "text/other": Masked(ids[::-1], here[::-1] & (np.arange(8) != 3)[:, None]),
        "label/group": np.arange(8, dtype=np.int32) % 3,
        "label/patch": np.arange(-1, 15, 2, dtype=np.int32),
        "label/patches": np.repeat(np.eye(8, dtype=np.float32), 2, 1) * (np.arange(8) != 4)[:, None],
        "label/word": np.array([0, 1, 0, 2, -1, 1, 0, 1], np.int32),
        "label/size": np.linspace(-1, 1, 8, dtype=np.float32),
    }
