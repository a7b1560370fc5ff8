"""The folder where mmx keeps what it can make again: prepared data sets, tokenizers, compiled programs."""

import os
from pathlib import Path

from mmx.errors import InputError


def cache_folder(*parts: str) -> Path:
    """Returns (and makes) a folder below `$MMX_CACHE`, or below `$XDG_CACHE_HOME/mmx`, or `~/.cache/mmx`."""
    base = os.environ.get("MMX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmx"
    folder = Path(base).joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache folder {folder}: {error}; set MMX_CACHE to a folder you can write") from error
    return folder
