"""Hierarchical attention, one-stream to multi-stream: one encoder over all first, then an own one for each stream.

    C(Z_1, ..., Z_M) <- Tf(C(Z_1, ..., Z_M))
    Z_m <- Tf_m(Z_m)                                   for every m

Cost: (sum of N_m)^2, then sum over m of N_m^2. Models: InterBERT. Survey 3.3.2 (d).
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Joint, PerStream


def one_to_multi(joint_depth: int, stream_depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stages of a joint encoder, followed by one encoder for each stream."""
    return Joint(joint_depth, block), PerStream(stream_depth, block)
