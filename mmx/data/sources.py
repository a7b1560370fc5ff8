"""Where examples come from: random access to prepared TFDS data sets in ArrayRecord files, without TensorFlow."""

import contextlib
import fcntl
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmx.cache import cache_folder
from mmx.errors import InputError, unknown

BUILT_IN = {
    "emoji": "mmx.data.builders.emoji:Emoji",
    "emoji_scenes": "mmx.data.builders.emoji_scenes:EmojiScenes",
}


class DataError(InputError):
    """The data cannot be used as it is; the message says which record, and what to do."""


class Source:
    """A split of a prepared data set: `len(source)`, `source[i]` -> `{field: value}`, text as str.

    Args:
        data: the random-access source of TFDS.
        label: what messages call it.
        folder: where its files lie.
    """

    def __init__(self, data: Any, label: str, folder: Path):
        self._data, self.label, self.folder = data, label, folder

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"Source({self.label}, {len(self)} examples)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {name: _text(value) for name, value in self._data[int(index)].items()}
        except Exception as error:
            raise self.broken(f"record {index} cannot be read: {type(error).__name__}: {error}") from error

    def broken(self, why: str) -> DataError:
        """The error for files that do not hold what they should."""
        return DataError(
            f"{self.label}: {why}. The files in {self.folder} are damaged or incomplete: delete this folder; a built-in "
            f"data set is then prepared again by the next run, any other has to be prepared or copied again"
        )


def open_source(name: str, split: str) -> Source:
    """Opens a split of a data set.

    Args:
        name: a built-in data set, which is prepared into the cache folder on first use, or the folder of any data set
            that TFDS prepared in ArrayRecord format (the one with `dataset_info.json`).
        split: such as `train`, or TFDS's slices of it, `train[:80%]`.

    Raises:
        DataError: no such data set or split, or files that are damaged or incomplete.
    """
    import tensorflow_datasets as tfds

    if name in BUILT_IN:
        builder = _prepare(name)
    elif (Path(name) / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(name)
    else:
        raise DataError(unknown("data set", name, BUILT_IN) + "; or the folder of a prepared one, with its dataset_info.json")
    base = split.split("[")[0]
    for part in base.split("+"):
        if part not in builder.info.splits:
            raise DataError(unknown(f"split of {name}", part, builder.info.splits))
    folder = Path(builder.data_dir)
    label = f"data set {name}, split {split}"
    source = Source([], label, folder)
    _check_files(builder, source)
    try:
        data: Any = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        length = len(data)
    except Exception as error:
        if "[" in split:
            open_source(name, base)  # its files are as they should be
            raise DataError(
                f"{label}: the slice cannot be understood: {error}; write it like train[:80%] or train[100:200]"
            ) from error
        raise source.broken(f"cannot be opened: {type(error).__name__}: {error}") from error
    if length == 0:
        raise DataError(f"{label} is empty")
    return Source(data, label, folder)


def _check_files(builder: Any, source: Source) -> None:
    """Every file the data set says it has is there, and none was cut off at its beginning; reading finds the rest."""
    for split in builder.info.splits.values():
        paths = [Path(path) for path in split.filepaths]
        if missing := [path.name for path in paths if not path.exists()]:
            raise source.broken(f"missing {', '.join(missing)}")
        if sum(path.stat().st_size for path in paths) < split.num_bytes // 100:
            raise source.broken(f"split {split.name} is cut off")


def _prepare(name: str) -> Any:
    """Prepares a built-in data set on first use; of several processes that start together, one does and the others wait."""
    import tensorflow_datasets as tfds

    module, builder_name = BUILT_IN[name].split(":")
    builder_type = getattr(importlib.import_module(module), builder_name)
    folder = cache_folder("data")
    with _locked(folder / f".{name}.lock"):
        builder = builder_type(data_dir=os.fspath(folder), file_format="array_record")
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _text(value: Any) -> Any:
    """Bytes as str, and a list or an array of them as a list."""
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.kind in "OS"):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
