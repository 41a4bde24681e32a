#!/usr/bin/env python3
"""Train or evaluate a detector that a LazyConfig describes.

    python train_net.py --config-file stageinteractor/stageinteractor_r50_100q_1x.py \\
        --num-gpus 8 train.output_dir=output/r50

The code is in detection_toolkit/commands/train.py.
"""

import sys

from detection_toolkit.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
