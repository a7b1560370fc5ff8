"""From raw arrays to tokens: one module for each kind of token."""

from mmx.modalities.ids import Ids
from mmx.modalities.patches import Patches

__all__ = ["Ids", "Patches"]
