"""The stage that leaves a few tokens of a stream where there were many."""

from typing import ClassVar

import flax.linen as nn

from mmx.layers import AttentionPool, make_norm
from mmx.layers.stack import sow_states
from mmx.topologies.stage import Stage
from mmx.types import Streams, Tokens


class Pool(Stage):
    """Learned tokens read a stream and take its place: `Z_stream <- Norm(AttentionPool(Z_stream))` (CoCa, arXiv 2205.01917).

    Args:
        stream: which one.
        heads: attention heads.
        tokens: how many learned tokens.
        width: their size; None: that of the stream.
        eps: of the norms before the attention and behind it.
    """

    NAMING: ClassVar[tuple[str, ...]] = ("stream",)

    stream: str
    heads: int
    tokens: int
    width: int | None = None
    eps: float = 1e-6

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        if self.stream not in streams:
            return streams
        entered = streams[self.stream]
        dtype = entered.values.dtype
        pool = AttentionPool(self.heads, self.tokens, self.width, norm=True, eps=self.eps, dtype=dtype, name="pool")
        x = make_norm("layer", self.eps, dtype, "norm")(pool(entered.values, entered.mask))
        mask = None if entered.mask is None else entered.present[:, None].repeat(self.tokens, 1)
        new = {**streams, self.stream: Tokens(x, mask, causal=entered.causal)}
        sow_states(self, {name: tokens.values for name, tokens in new.items()})
        return new
