"""Bottleneck fusion: streams exchange through a few shared tokens only.

    [Z_m, F_m] <- Tf_m(C(Z_m, F))        F <- mean over m of F_m

Cost: sum over m of (N_m + F)^2. Models: MBT (arXiv 2107.00135), which has layers without the shared tokens before these:
`(PerStream(8),) + bottleneck(4)`. What one layer writes, the next one reads: it takes two. Beside the survey's six.
"""

from mmx.layers import BlockConfig
from mmx.topologies.latents import Bottleneck
from mmx.topologies.stage import Stage


def bottleneck(depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stage of `depth` layers with 4 shared tokens."""
    return (Bottleneck(depth, block=block),)
