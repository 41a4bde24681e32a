#!/usr/bin/env python3
"""Export a detector as one file.

    python tools/export.py --config-file CONFIG --weights model.pth --output model.onnx

The code is in detection_toolkit/commands/export.py.
"""

import sys

from detection_toolkit.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
