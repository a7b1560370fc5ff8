"""The six topologies of the survey (section 3.3.2): short functions that return tuples of stages. Tuples add:

`cross_attention(4) + early_concatenation(2)` is a topology.
"""

import inspect
from collections.abc import Callable

from mmx.errors import InputError, unknown
from mmx.layers import BlockConfig
from mmx.topologies.cross_attention import cross_attention
from mmx.topologies.cross_to_concatenation import cross_to_concatenation
from mmx.topologies.early_concatenation import early_concatenation
from mmx.topologies.early_summation import early_summation
from mmx.topologies.multi_to_one import multi_to_one
from mmx.topologies.one_to_multi import one_to_multi
from mmx.topologies.stages import Cross, Joint, PerStream, Stage, Sum

TOPOLOGIES: dict[str, Callable[..., tuple[Stage, ...]]] = {
    f.__name__: f
    for f in (early_summation, early_concatenation, multi_to_one, one_to_multi, cross_attention, cross_to_concatenation)
}


def make_topology(name: str, depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the named topology with `depth` layers in all on the way of a token.

    A topology of two parts gives the first part the larger half: depth 5 is 3 + 2.
    """
    if name not in TOPOLOGIES:
        raise InputError(unknown("topology", name, TOPOLOGIES))
    topology = TOPOLOGIES[name]
    parts = len(inspect.signature(topology).parameters) - 1
    if depth < parts:
        raise InputError(f"topology {name!r} has {parts} parts and needs depth >= {parts}, got {depth}")
    depths = (depth,) if parts == 1 else (depth - depth // 2, depth // 2)
    return topology(*depths, block)


__all__ = [
    "TOPOLOGIES",
    "Cross",
    "Joint",
    "PerStream",
    "Stage",
    "Sum",
    "cross_attention",
    "cross_to_concatenation",
    "early_concatenation",
    "early_summation",
    "make_topology",
    "multi_to_one",
    "one_to_multi",
]
