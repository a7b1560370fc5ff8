"""MulT (arXiv 1906.00295), supervised: each stream reads the others as they came, then itself; a class is told from both.

The group of an emoji stands for the sentiment of an utterance (there `answer="regression"`); any number of modalities goes.

python train.py configs/recipes/mult.py
"""

import mmx
from mmx.data import DataConfig, Label
from mmx.evaluate import Scores
from mmx.objectives import Classification
from mmx.topologies import Cross, PerStream
from mmx.train import CheckpointConfig

GROUPS = (
    "activities",
    "animals-nature",
    "component",
    "flags",
    "food-drink",
    "objects",
    "people-body",
    "smileys-emotion",
    "symbols",
    "travel-places",
)
OBJECTIVES = {"group": Classification(label="group", classes=len(GROUPS))}


def config() -> mmx.Experiment:
    """Two layers of cross-attention, one of self-attention."""
    return mmx.Experiment(
        stages=(Cross(2, sublayers="cross mlp", original=True), PerStream(1)),
        objectives=OBJECTIVES,
        data=DataConfig(labels={"group": Label("group", GROUPS)}),
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
