"""Cross-attention: every stream queries the others.

    Z_m <- Tf_m(Q = Z_m, KV = the other streams)       all m in parallel, from the same inputs

Cost: sum over m of N_m * N_others (and N_m^2 for the self-attention of the default block).
Models: ViLBERT, LXMERT, ActBERT. Survey 3.3.2 (e), "co-attention".
"""

from mmx.layers import BlockConfig
from mmx.topologies.stage import Stage
from mmx.topologies.stages import Cross


def cross_attention(cross_depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the one stage of streams that query each other."""
    return (Cross(cross_depth, block),)
