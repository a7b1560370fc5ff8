"""BLIP (arXiv 2201.12086): the text as an encoder (contrastive), as an encoder that reads the image (matching), and as a decoder.

python train.py configs/recipes/blip.py
"""

import mmx
from mmx.objectives import Captioning, Contrastive, Matching
from mmx.topologies import Cross, PerStream
from mmx.train import OptimizerConfig

OBJECTIVES = {
    "contrastive": Contrastive(teacher=0.4, queue=1024),
    "matching": Matching(negatives="hard"),
    "captioning": Captioning(label_smoothing=0.1),
}


def config() -> mmx.Experiment:
    """One text stack for all three, whose layers read the image where it is given."""
    reads = {"text": ("image",)}
    return mmx.Experiment(
        stages=(PerStream({"image": 2}), Cross(2, sublayers="self cross mlp", edges=reads, steps=("text",))),
        objectives=OBJECTIVES,
        optimizer=OptimizerConfig(ema=0.995),
    )
