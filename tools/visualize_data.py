#!/usr/bin/env python3
"""Draw what training sees: the images of its stream, augmented, and padded as in their batch.

    python tools/visualize_data.py --config-file stageinteractor/shapes_tiny.py --number 8

The code is in detection_toolkit/commands/view_data.py.
"""

import sys

from detection_toolkit.commands.view_data import main

if __name__ == "__main__":
    sys.exit(main())
