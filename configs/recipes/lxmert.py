"""LXMERT (arXiv 1908.07490): words, regions by their features, matching, and answers to questions about the image.

Patches stand for regions. What a detector calls those that are hidden, by its 1600 objects and 400 attributes, no label tells
here. Each is a further objective of the same pass: the masks of "masked", with answer="nothing" for the text and for the image
answer="classes", target=..., classes=... and confidence=...

python train.py configs/recipes/lxmert.py
"""

import mmx
from mmx.data import DataConfig, Label
from mmx.data.builders.emoji import ask, read_entries
from mmx.evaluate import Scores
from mmx.modalities import Ids, Patches
from mmx.objectives import Classification, Mask, MaskedModelling, Matching
from mmx.topologies import Cross, PerStream
from mmx.train import CheckpointConfig

ANSWERS = tuple(sorted({ask(entry)[1] for entry in read_entries()}))
OBJECTIVES = {
    "masked": MaskedModelling(masks={"text": Mask(0.15, spare=(0, 2, 3)), "image": Mask(0.15, answer="huber")}, given=()),
    "matching": Matching(),
    "answers": Classification(("image", "text/question"), "answer", len(ANSWERS)),
}


def config() -> mmx.Experiment:
    """Encoders of their own, then layers of cross- and self-attention."""
    return mmx.Experiment(
        stages=(PerStream({"text": 2, "image": 1}), Cross(1, sublayers="cross self mlp", share=("cross",))),
        modalities={"image": Patches((32, 32), (8, 8), mask_token=True), "text": Ids(1024, 21, mask_token=True)},
        objectives=OBJECTIVES,
        data=DataConfig(
            fields={"image": "image", "text": "name", "text/question": "question"},
            labels={"answer": Label("answer", ANSWERS)},
        ),
        evaluators={"held_out": Scores(OBJECTIVES)},
        checkpoint=CheckpointConfig(best=""),
    )
