#!/usr/bin/env python3
"""Draw which labels the stages get on training images, and why.

    python tools/visualize_assignment.py --num-images 3 --output output/assignment

The code is in detection_toolkit/commands/view_labels.py.
"""

import sys

from detection_toolkit.commands.view_labels import main

if __name__ == "__main__":
    sys.exit(main())
