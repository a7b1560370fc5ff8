"""ALBEF (arXiv 2107.07651): align before fuse. A momentum teacher, its queue and its beliefs of masked words; hard negatives of
images and of texts.

python train.py configs/recipes/albef.py
"""

import mmx
from mmx.modalities import Ids, Patches
from mmx.objectives import Contrastive, Mask, MaskedModelling, Matching
from mmx.topologies import Cross, PerStream
from mmx.train import ModelConfig, OptimizerConfig

OBJECTIVES = {
    "contrastive": Contrastive(teacher=0.4, queue=1024),
    "hard_texts": Matching(negatives="hard", stream="text"),
    "hard_images": Matching(("text", "image"), negatives="hard", stream="text"),
    "words": MaskedModelling(masks={"text": Mask(0.15, spare=(0, 2, 3))}, given=("image",), teacher=0.4),
}


def config() -> mmx.Experiment:
    """The image has a tower; the text half of its layers alone, half with the image. The moving average is the teacher."""
    reads = {"text": ("image",)}
    return mmx.Experiment(
        stages=(PerStream({"image": 2, "text": 1}), Cross(1, sublayers="self cross mlp", edges=reads, steps=("text",))),
        modalities={"image": Patches((32, 32), (4, 4)), "text": Ids(1024, 21, mask_token=True)},
        model=ModelConfig(pool_after=1),
        objectives=OBJECTIVES,
        optimizer=OptimizerConfig(ema=0.995),
        evaluators={"composition": mmx.evaluate.Retrieval(), "held_out": mmx.evaluate.Scores(OBJECTIVES)},
    )
