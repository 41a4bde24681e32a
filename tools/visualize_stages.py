#!/usr/bin/env python3
"""Draw what the stages of a detector do with pictures.

    python tools/visualize_stages.py --input picture.jpg --output output/stages

The code is in detection_toolkit/commands/view_stages.py.
"""

import sys

from detection_toolkit.commands.view_stages import main

if __name__ == "__main__":
    sys.exit(main())
