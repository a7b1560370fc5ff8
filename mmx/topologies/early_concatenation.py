"""Early concatenation: one encoder over all tokens of all streams.

    Z <- Tf(C(Z_1, ..., Z_M))

Cost: (sum of N_m)^2. Models: VideoBERT, VisualBERT, UNITER, ViLT. Survey 3.3.2 (b), "all-attention".
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Joint


def early_concatenation(depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the one stage of a joint encoder."""
    return (Joint(depth, block),)
