"""Where metrics go: JSON lines always, TensorBoard events on request. What was written survives a crash."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from mmx.errors import writing
from mmx.train.folder import RunFolder


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard.

    A run that goes on from `first_step` takes back the records after it: they are computed again, and are the same.
    Fields under `time/` are measurements; all others depend on nothing but the configuration.
    """

    def __init__(self, folder: RunFolder, first_step: int, tensorboard: bool):
        self._path = folder.metrics
        kept = []
        if self._path.is_file():
            kept = [line for line in self._path.read_text().splitlines() if step_of(line) <= first_step]
        temporary = self._path.with_suffix(".tmp")
        with writing(self._path):
            if not self._path.is_symlink():
                temporary.write_text("".join(f"{line}\n" for line in kept) if first_step else "")
                temporary.replace(self._path)
            self._file = self._path.open("ab", buffering=0)  # a line is written when it is made, or not at all
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = first_step + 1 if first_step else None
            self._events = SummaryWriter(os.fspath(folder.tensorboard), purge_step=purge, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record.

        Raises:
            InputError: it cannot be written; the disk is full, say.
        """
        record = {"step": step} | {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
        with writing(self._path):
            self._file.write(f"{json.dumps(finite)}\n".encode())
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def step_of(line: str) -> float:
    """The step of a record; a line that was cut off by a crash comes after everything."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
