"""UniVL (arXiv 2002.06353): two encoders, a stack over both, and a decoder that writes the text again; five tasks.

Patches stand for clips: which of the batch's a hidden one was, words, alignment, a shared space, in which an image belongs to one
at least of two texts; and a text that was hidden in part is written whole by a modality of its own, which borrows the embedding
of the text.

python train.py configs/recipes/univl.py
"""

import mmx
from mmx.modalities import Ids, Patches
from mmx.objectives import Captioning, Contrastive, Mask, MaskedModelling, Matching
from mmx.topologies import Joint, PerStream

OBJECTIVES = {
    "joint": Contrastive(("image", "text", "text/group"), kind="mil_nce"),
    "words": MaskedModelling(masks={"text": Mask(0.15, spare=(0, 2, 3))}, given=("image",)),
    "frames": MaskedModelling(masks={"image": Mask(0.15, answer="contrast", others="batch")}, given=("text",)),
    "alignment": Matching(),
    "reconstruction": Captioning(given=("image", "text"), masks={"text": Mask(0.5, spare=(0, 2, 3))}, writer="written"),
}


def config() -> mmx.Experiment:
    """The decoder's tokens stand in the joint stack as a causal stream, which sees the other two and which nobody sees."""
    return mmx.Experiment(
        stages=(PerStream({"image": 1, "text": 1, "written": 1}), Joint(1)),
        modalities={
            "image": Patches((32, 32), (8, 8), mask_token=True),
            "text": Ids(1024, 21, mask_token=True),
            "written": Ids(1024, 21, lender="text"),
        },
        objectives=OBJECTIVES,
        data=mmx.data.DataConfig(fields={"image": "image", "text": "name", "text/group": "group"}),
        evaluators={"composition": mmx.evaluate.Retrieval(), "held_out": mmx.evaluate.Scores(OBJECTIVES)},
    )
