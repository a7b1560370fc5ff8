"""VideoBERT (arXiv 1904.01766): one stack over words and a video; what was hidden, alone and together, and whether they match.

A frame stands for a second and a half, and its pixels for the visual word that the set does not have; with an `Ids` modality of
codes and `Mask(mask_id=...)` this is the paper's masking.

python train.py configs/recipes/videobert.py
"""

import mmx
from mmx.data import DataConfig
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Mask, MaskedModelling, Matching
from mmx.train import CheckpointConfig

WORDS, FRAMES = Mask(0.15, "word"), Mask(0.15)
OBJECTIVES = {
    "both": MaskedModelling(masks={"text": WORDS, "video": FRAMES}, given=()),
    "text": MaskedModelling(masks={"text": WORDS}, given=()),
    "video": MaskedModelling(masks={"video": FRAMES}, given=()),
    "alignment": Matching(("video", "text")),
}


def config() -> mmx.Experiment:
    """Each step takes one of the three kinds of input (section 4.2), and matches."""
    return mmx.Experiment(
        topology="early_concatenation",
        modalities={"video": Patches((8, 32, 32), (1, 32, 32), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        sampling={"both": 1.0, "text": 1.0, "video": 1.0},
        data=DataConfig(name="emoji_scenes", fields={"video": "film", "text": "subtitle"}, words=True),
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
