"""The six topologies of the survey (section 3.3.2), and two beside them: short functions that return tuples of stages.

Tuples add: `cross_attention(4) + early_concatenation(2)` is a topology.
"""

import inspect
from collections.abc import Callable

from mmx.errors import InputError, unknown
from mmx.layers import BlockConfig
from mmx.topologies.adapt import Adapt
from mmx.topologies.bottleneck import bottleneck
from mmx.topologies.bridge import Bridge
from mmx.topologies.catalogue import list as list
from mmx.topologies.cross_attention import cross_attention
from mmx.topologies.cross_to_concatenation import cross_to_concatenation
from mmx.topologies.early_concatenation import early_concatenation
from mmx.topologies.early_summation import early_summation
from mmx.topologies.gather import Gather
from mmx.topologies.insert import Insert, Scatter
from mmx.topologies.latent import latent
from mmx.topologies.latents import Bottleneck, Latent
from mmx.topologies.multi_to_one import multi_to_one
from mmx.topologies.one_to_multi import one_to_multi
from mmx.topologies.pool import Pool
from mmx.topologies.stage import Stage
from mmx.topologies.stages import FUSED, Cross, Joint, PerStream, Sum

TOPOLOGIES: dict[str, Callable[..., tuple[Stage, ...]]] = {
    f.__name__: f
    for f in (early_summation, early_concatenation, multi_to_one, one_to_multi, cross_attention, cross_to_concatenation)
}
BEYOND: dict[str, Callable[..., tuple[Stage, ...]]] = {f.__name__: f for f in (bottleneck, latent)}


def make_topology(name: str, depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the named topology with `depth` layers in all on the way of a token.

    A topology of two parts gives the first part the larger half: depth 5 is 3 + 2.
    """
    topology = (TOPOLOGIES | BEYOND).get(name)
    if topology is None:
        raise InputError(unknown("topology", name, TOPOLOGIES | BEYOND))
    parts = len(inspect.signature(topology).parameters) - 1
    if depth < parts:
        raise InputError(f"topology {name!r} has {parts} parts and needs depth >= {parts}, got {depth}")
    depths = (depth,) if parts == 1 else (depth - depth // 2, depth // 2)
    return topology(*depths, block)


__all__ = [
    "BEYOND",
    "FUSED",
    "TOPOLOGIES",
    "Adapt",
    "Bottleneck",
    "Bridge",
    "Cross",
    "Gather",
    "Insert",
    "Joint",
    "Latent",
    "PerStream",
    "Pool",
    "Scatter",
    "Stage",
    "Sum",
    "bottleneck",
    "cross_attention",
    "cross_to_concatenation",
    "early_concatenation",
    "early_summation",
    "latent",
    "make_topology",
    "multi_to_one",
    "one_to_multi",
]
