"""The default: image and text of the emoji set, contrastive, matching and captioning. About two minutes on two CPU cores.

python train.py configs/emoji.py
"""

import mmx


def config() -> mmx.Experiment:
    """What `python train.py` trains without arguments."""
    return mmx.Experiment()
