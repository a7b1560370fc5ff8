"""Latent fusion: a few learned tokens read everything, and every stream reads them.

    X <- Tf(Q = X, KV = C(Z_1, ..., Z_M))      X <- Tf(X)      Z_m <- Tf(Q = Z_m, KV = X)

Cost: linear in the sum of N_m. Models: Perceiver IO (arXiv 2107.14795). Beside the survey's six.
"""

from mmx.layers import BlockConfig
from mmx.topologies.latents import Latent
from mmx.topologies.stage import Stage


def latent(depth: int, block: BlockConfig | None = None) -> tuple[Stage, ...]:
    """Returns the stage of 64 latent tokens with `depth` layers of their own."""
    return (Latent(depth, block=block),)
