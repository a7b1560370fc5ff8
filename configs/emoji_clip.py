"""Two towers and a contrastive loss (CLIP, arXiv 2103.00020) on the emoji set: no fusion, the fastest way to retrieval.

python train.py configs/emoji_clip.py
"""

import mmx
from mmx.objectives import Contrastive
from mmx.topologies import PerStream


def config() -> mmx.Experiment:
    """Three layers for the image, two for the text, and nothing that joins them."""
    return mmx.Experiment(
        stages=(PerStream({"image": 3, "text": 2}),),
        steps=600,
        objectives={"contrastive": Contrastive()},
        evaluators={"composition": mmx.evaluate.Retrieval(every=100)},
    )
