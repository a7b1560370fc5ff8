"""UNITER (arXiv 1909.11740): one stack; of four tasks each step takes one, and one modality at a time is hidden.

Patches stand for regions: masked words, region feature regression, matching with the alignment of words and regions by optimal
transport. Classes of regions are a further mask: `Mask(answer="classes", ...)`, or "distribution" for its KL form.

python train.py configs/recipes/uniter.py
"""

import mmx
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Mask, MaskedModelling, Matching
from mmx.train import CheckpointConfig

OBJECTIVES = {
    "words": MaskedModelling(masks={"text": Mask(0.15)}, given=("image",)),
    "regions": MaskedModelling(masks={"image": Mask(0.15)}, given=("text",)),
    "matching": Matching(alignment=0.1),
}


def config() -> mmx.Experiment:
    """Ratios of the tasks as in the published configuration, where region tasks are two of five."""
    return mmx.Experiment(
        topology="early_concatenation",
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        sampling={"words": 2.0, "regions": 2.0, "matching": 1.0},
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
