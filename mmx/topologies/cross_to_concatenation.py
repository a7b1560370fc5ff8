"""Cross-attention to concatenation: exchange first, then one joint encoder.

    Z_m <- Tf_m(Q = Z_m, KV = the other streams)       all m in parallel, from the same inputs
    Z   <- Tf(C(Z_1, ..., Z_M))

Cost: sum over m of N_m * N_others, then (sum of N_m)^2. Models: MulT, Product1M, HKT. Survey 3.3.2 (f).
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Cross, Joint


def cross_to_concatenation(cross_depth: int, joint_depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stages of streams that query each other, followed by a joint encoder."""
    return Cross(cross_depth, block), Joint(joint_depth, block)
