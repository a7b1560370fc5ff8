"""VideoBERT (arXiv 1904.01766): one stack over words and visual words; what was hidden, alone and together, and matching.

Patches stand for frames, and their pixels for visual words, of which the emoji set has none; with an `Ids` modality of codes and
`Mask(mask_id=...)` for the image this is the paper's masking.

python train.py configs/recipes/videobert.py
"""

import mmx
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Mask, MaskedModelling, Matching
from mmx.train import CheckpointConfig

WORDS, FRAMES = Mask(0.15, "word"), Mask(0.15)
OBJECTIVES = {
    "both": MaskedModelling(masks={"text": WORDS, "image": FRAMES}, given=()),
    "text": MaskedModelling(masks={"text": WORDS}, given=()),
    "video": MaskedModelling(masks={"image": FRAMES}, given=()),
    "alignment": Matching(),
}


def config() -> mmx.Experiment:
    """Each step takes one of the three kinds of input (section 4.2), and matches."""
    return mmx.Experiment(
        topology="early_concatenation",
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        sampling={"both": 1.0, "text": 1.0, "video": 1.0},
        data=mmx.data.DataConfig(words=True),
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
