"""Importing mmx is fast and touches nothing."""

import subprocess
import sys


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_fast_and_loads_no_framework():
    code = """
import sys, time
start = time.perf_counter()
import mmx
seconds = time.perf_counter() - start
heavy = [m for m in ("jax", "flax", "orbax", "tensorflow_datasets", "tensorflow", "torch") if m in sys.modules]
print(seconds < 0.5, heavy)
"""
    assert python(code).strip() == "True []"


def test_every_public_name_exists_and_no_device_is_touched():
    code = """
import mmx
for name in mmx.__all__:
    getattr(mmx, name)
from jax._src import xla_bridge
import sys
print(sorted(set(dir(mmx)) ^ set(mmx.__all__)), xla_bridge._backends, [m for m in ("tensorflow", "torch") if m in sys.modules])
"""
    assert python(code).strip() == "[] {} []"


def test_unknown_name_lists_the_public_ones():
    code = """
import mmx
try:
    mmx.biuld_model
except AttributeError as error:
    print(error)
"""
    assert "build_model" in python(code)
