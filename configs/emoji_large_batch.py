"""The default model with a contrastive batch of 512 in four parts: the gradient is that of the whole batch.

python train.py configs/emoji_large_batch.py
"""

import dataclasses

import mmx


def config() -> mmx.Experiment:
    """The parts hold activations one after the other; every image still sees 511 wrong texts."""
    default = mmx.Experiment()
    optimizer = dataclasses.replace(default.optimizer, learning_rate=3e-3, ema=0.99)
    return dataclasses.replace(default, batch_size=512, microbatches=4, steps=200, optimizer=optimizer)
