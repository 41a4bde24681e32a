#!/usr/bin/env python3
"""Detect objects in pictures, folders, a video or the webcam, and draw them.

    python demo/demo.py --input a.jpg folder/ "more/*.png" --output out/

The code is in detection_toolkit/commands/predict.py.
"""

import sys

from detection_toolkit.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
