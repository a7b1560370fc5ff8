"""Trains a multimodal Transformer: `python train.py [CONFIG.py] [--field value ...]`, the same as `mmx train`.

Without arguments: the default model on the embedded emoji set, in about two minutes on two CPU cores.
"""

import sys
import time

if __name__ == "__main__":
    started = time.time()
    from mmx import cli

    sys.exit(cli.train(sys.argv[1:], started))
