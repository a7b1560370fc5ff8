"""InterBERT (arXiv 2003.13198): one joint stack, then one for each stream; masked segments, masked regions, hard negatives.

Blocks of patches stand for regions that overlap, spans for segments of words. The paper finds hard negatives by TF-IDF; here they
are near in a shared space that is learned beside.

python train.py configs/recipes/interbert.py
"""

import mmx
from mmx.modalities import Ids, Patches
from mmx.objectives import Contrastive, Mask, MaskedModelling, Matching

OBJECTIVES = {
    "groups": MaskedModelling(masks={"text": Mask(0.15, "span", spare=(0, 2, 3)), "image": Mask(0.15, "block")}, given=()),
    "matching": Matching(negatives="hard"),
    "nearness": Contrastive(weight=0.2),
}


def config() -> mmx.Experiment:
    """Interaction first, independence after it."""
    return mmx.Experiment(
        topology="one_to_multi",
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        evaluators={"composition": mmx.evaluate.Retrieval(), "held_out": mmx.evaluate.Scores(OBJECTIVES)},
    )
