"""The error for what somebody gave us, and one wording for "unknown name"."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be used as it is. The message names the field, what was expected, what came, what to do.

    The command line prints the message alone; any other exception is a bug and shows where it came from.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns `unknown topology 'x'; did you mean 'y'? Known: ...`."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
