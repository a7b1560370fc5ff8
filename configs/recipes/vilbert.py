"""ViLBERT (arXiv 1908.02265): two streams that query each other; words and regions hidden in one pass, and matching.

Patches stand for regions. Where a label of the data tells a detector's distributions of classes, regions are
`Mask(0.15, "region", "distribution", target=..., classes=1601)`.

python train.py configs/recipes/vilbert.py
"""

import mmx
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Mask, MaskedModelling, Matching
from mmx.topologies import Cross, PerStream
from mmx.train import CheckpointConfig

OBJECTIVES = {
    "masked": MaskedModelling(masks={"text": Mask(0.15, spare=(0, 2, 3)), "image": Mask(0.15, replaced=(0.9, 0.0))}, given=()),
    "matching": Matching(),
}


def config() -> mmx.Experiment:
    """Words have a layer of their own before the layers of co-attention, each of which is followed by self-attention."""
    return mmx.Experiment(
        stages=(PerStream({"text": 1}), Cross(2, sublayers="cross mlp self mlp")),
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
