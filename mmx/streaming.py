"""Telling a listener what a compiled program writes while it runs."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import io_callback

from mmx.errors import InputError

Listener: TypeAlias = Callable[[np.ndarray], None]
_listeners: dict[int, Listener] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def listening(listener: Listener | None, inputs: Any) -> Iterator[np.int32 | None]:
    """The number by which a program that runs on these inputs finds a listener; None: there is none.

    The program is given the number and not the listener, so that it is not compiled again for every listener. The context ends
    when all has been told. What the listener raises is raised there, and it is told nothing more.
    """
    if listener is None:
        yield None
        return
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(inputs)):
        raise InputError("stream: it listens to one call as it runs, and cannot be part of a program; call outside jax.jit")
    raised: list[BaseException] = []

    def told(ids: np.ndarray) -> None:
        try:
            if not raised:
                listener(ids)
        except BaseException as error:  # noqa: BLE001  (raised below; raised here, it would break JAX's queue of effects)
            raised.append(error)

    number = next(_numbers)
    _listeners[number] = told
    try:
        yield np.int32(number)
        jax.effects_barrier()
    finally:
        del _listeners[number]
    if raised:
        raise raised[0]


def tell(number: Any, values: jax.Array) -> None:
    """Tells values, in their order, from inside a program."""
    io_callback(lambda number, values: _listeners[int(number)](np.asarray(values)), None, number, values, ordered=True)
