"""FLAVA (arXiv 2112.04482): each modality alone, both together, matching, and a shared space, in one model.

Pixels stand for the codes of a visual codebook; where a label of the data, `codes`, tells them of each patch, images are
`Mask(0.4, "block", "classes", target="codes", classes=8192)`.

python train.py configs/recipes/flava.py
"""

import mmx
from mmx.modalities import Ids, Patches
from mmx.objectives import Contrastive, Mask, MaskedModelling, Matching

WORDS, PATCHES = Mask(0.15, spare=(0, 2, 3)), Mask(0.4, "block", "normalised")
OBJECTIVES = {
    "contrastive": Contrastive(),
    "matching": Matching(),
    "multimodal": MaskedModelling(masks={"image": PATCHES, "text": WORDS}, given=()),
    "image": MaskedModelling(masks={"image": PATCHES}, given=()),
    "text": MaskedModelling(masks={"text": WORDS}, given=()),
}


def config() -> mmx.Experiment:
    """A tower for each, and a stack over both; what is hidden in the image alone and in both is the same."""
    return mmx.Experiment(
        topology="multi_to_one",
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        evaluators={"composition": mmx.evaluate.Retrieval(), "held_out": mmx.evaluate.Scores(OBJECTIVES)},
    )
