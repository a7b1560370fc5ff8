"""Hierarchical attention, multi-stream to one-stream: own encoders first, then one over all.

    Z <- Tf(C(Tf_1(Z_1), ..., Tf_M(Z_M)))

Cost: sum over m of N_m^2, then (sum of N_m)^2. Models: FLAVA, UniVL, CBT, AI Choreographer. Survey 3.3.2 (c).
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Joint, PerStream


def multi_to_one(stream_depth: int, joint_depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stages of one encoder for each stream, followed by a joint encoder."""
    return PerStream(stream_depth, block), Joint(joint_depth, block)
