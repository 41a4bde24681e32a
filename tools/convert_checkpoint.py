#!/usr/bin/env python3
"""Convert checkpoints of the authors' code for this implementation, and back.

    python tools/convert_checkpoint.py official.pth --config-file CONFIG --output ours.pth

The code is in detection_toolkit/commands/convert_checkpoint.py.
"""

import sys

from detection_toolkit.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
