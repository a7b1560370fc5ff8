"""Early summation: streams are added token by token, and one encoder reads the sum.

    Z <- Tf(sum over m of a_m Z_m)

Cost: (longest N_m)^2; no interaction costs less, and none needs token-aligned streams more.
Models: Actor-Transformers; every sum of token, position and segment embeddings. Survey 3.3.2 (a).
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import FUSED, PerStream, Sum


def early_summation(depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stages of a sum of the streams, followed by one encoder."""
    return Sum(), PerStream({FUSED: depth}, block)
