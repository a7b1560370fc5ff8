"""The blocks every model is made of. No model copies attention or MLP code."""

from mmx.layers.attention import Attention, Sight, attend
from mmx.layers.block import Block, BlockConfig
from mmx.layers.masks import visibility
from mmx.layers.mlp import ACTIVATIONS, MLP
from mmx.layers.norms import make_norm
from mmx.layers.stack import Stack

__all__ = ["ACTIVATIONS", "MLP", "Attention", "Block", "BlockConfig", "Sight", "Stack", "attend", "make_norm", "visibility"]
