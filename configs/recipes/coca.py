"""CoCa (arXiv 2205.01917): two towers in a shared space, and a decoder behind them; captions count twice as much.

python train.py configs/recipes/coca.py
"""

import mmx
from mmx.objectives import Captioning, Contrastive
from mmx.topologies import Cross, PerStream
from mmx.train import ModelConfig


def config() -> mmx.Experiment:
    """The shared space stands behind the towers; the text goes on and reads the image. Only where it is written is it causal."""
    reads = {"text": ("image",)}
    return mmx.Experiment(
        stages=(PerStream({"image": 2, "text": 1}), Cross(1, sublayers="self cross mlp", edges=reads, steps=("text",))),
        model=ModelConfig(pool_after=1),
        objectives={"contrastive": Contrastive(), "captioning": Captioning(weight=2.0)},
    )
