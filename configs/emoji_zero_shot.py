"""Two towers of `emoji_clip.py` as a classifier: what it never saw, by texts about the classes. About two minutes on two cores.

python train.py configs/emoji_zero_shot.py

Skin tones are those of the split `composition`. Everybody in it is of the group people-body, so that the groups are also asked of
a tenth of the training split that is kept out here. A group is told in the names of all emoji of it that are trained on.
"""

import dataclasses

import mmx
from mmx.data import DataConfig
from mmx.evaluate import Retrieval, ZeroShot
from mmx.objectives import Contrastive
from mmx.topologies import PerStream

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def config() -> mmx.Experiment:
    """One in ten of the training split is kept out."""
    tones = ZeroShot(
        label="tones",
        classes={str(number): f"{tone} skin tone" for number, tone in enumerate(TONES, 1)},
        templates=("person: {}", "man: {}", "woman: {}", "hand: {}"),
    )
    groups = ZeroShot(label="group", names="name")
    return mmx.Experiment(
        stages=(PerStream({"image": 3, "text": 2}),),
        steps=600,
        objectives={"contrastive": Contrastive()},
        data=DataConfig(split="train[:90%]"),
        evaluators={
            "composition": Retrieval(every=100),
            "tones": tones,
            "groups_of_composition": groups,
            "groups": dataclasses.replace(groups, split="train[90%:]"),
        },
    )
