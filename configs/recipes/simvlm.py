"""SimVLM (arXiv 2108.10904): nothing but a prefix language model. The image and the beginning of the text are read both ways.

python train.py configs/recipes/simvlm.py
"""

import mmx
from mmx.evaluate import Captions, Scores
from mmx.objectives import Captioning
from mmx.train import CheckpointConfig

OBJECTIVES = {"prefix": Captioning(prefix=0.5)}


def config() -> mmx.Experiment:
    """One stack over the image and the text."""
    return mmx.Experiment(
        topology="early_concatenation",
        objectives=OBJECTIVES,
        evaluators={"captions": Captions(), "held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
