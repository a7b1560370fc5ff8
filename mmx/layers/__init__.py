"""The blocks every model is made of. No model copies attention or MLP code."""

from mmx.layers.attention import PROJECTIONS, Attention, Line, Sight, attend
from mmx.layers.block import MULTIWAY, Block, BlockConfig, sublayer_names
from mmx.layers.masks import visibility
from mmx.layers.mlp import ACTIVATIONS, MLP
from mmx.layers.norms import make_norm
from mmx.layers.pooling import AttentionPool
from mmx.layers.relative import Axes, Buckets, Grid
from mmx.layers.stack import Stack

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "MULTIWAY",
    "PROJECTIONS",
    "Attention",
    "AttentionPool",
    "Axes",
    "Block",
    "BlockConfig",
    "Buckets",
    "Grid",
    "Line",
    "Sight",
    "Stack",
    "attend",
    "make_norm",
    "sublayer_names",
    "visibility",
]
