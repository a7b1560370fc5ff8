"""SigLIP (arXiv 2303.15343): two towers; each pair of the batch is a question of its own.

python train.py configs/recipes/siglip.py
"""

import mmx
from mmx.objectives import Contrastive
from mmx.topologies import PerStream
from mmx.train import ModelConfig


def config() -> mmx.Experiment:
    """The temperature and the bias begin as in the paper, 10 and -10. On several devices take form="ring"."""
    return mmx.Experiment(
        stages=(PerStream({"image": 3, "text": 2}),),
        model=ModelConfig(logit_scale=10.0, logit_bias=-10.0),
        objectives={"contrastive": Contrastive(kind="sigmoid")},
        evaluators={"composition": mmx.evaluate.Retrieval()},
    )
