"""UNITER (arXiv 1909.11740): one stack; of several tasks each step takes one, and one modality at a time is hidden.

Patches stand for regions: masked words, region feature regression, matching with the alignment of words and regions by optimal
transport. Classes of regions are another objective, `Mask(answer="distribution", target=..., classes=1601)`, or "likeliest".

python train.py configs/recipes/uniter.py
"""

import mmx
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Mask, MaskedModelling, Matching
from mmx.train import CheckpointConfig

OBJECTIVES = {
    "words": MaskedModelling(masks={"text": Mask(0.15, spare=(0, 2, 3))}, given=("image",)),
    "regions": MaskedModelling(masks={"image": Mask(0.15)}, given=("text",)),
    "matching": Matching(alignment=0.1),
}


def config() -> mmx.Experiment:
    """Ratios as in the published in-domain configuration, in which classes of regions, by their KL, are one more."""
    return mmx.Experiment(
        topology="early_concatenation",
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        sampling={"words": 2.0, "regions": 1.0, "matching": 2.0},
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
