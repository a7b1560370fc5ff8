"""The error for what somebody gave us, and one wording for "unknown name"."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

MANY = 40  # names that are still listed one by one


class InputError(ValueError):
    """What was given cannot be used as it is. The message names the field, what was expected, what came, what to do.

    The command line prints the message alone; any other exception is a bug and shows where it came from.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns `unknown topology 'x'; did you mean 'y'? Known: ...`; of a long list, those that are nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    if len(known) > MANY:
        known = [*difflib.get_close_matches(str(name), known, n=8, cutoff=0.3), f"and others, {len(known)} in all"]
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def at_least(config: object, **lowest: float) -> None:
    """Raises an InputError for a field of a configuration that is below its lowest value, or NaN."""
    for name, value in lowest.items():
        if not getattr(config, name) >= value:
            raise InputError(f"{name}={getattr(config, name)}; it has to be at least {value}")


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the field in front of an InputError's message."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turns an OSError into an InputError that names the file: a full disk, missing rights."""
    try:
        yield path
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; make room or correct the rights, then resume") from error
