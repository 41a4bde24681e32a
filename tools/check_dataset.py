#!/usr/bin/env python3
"""Look at a COCO-format data set before anything is trained on it.

    python tools/check_dataset.py my/train.json my/images --test my/val.json

The code is in detection_toolkit/commands/check.py.
"""

import sys

from detection_toolkit.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
