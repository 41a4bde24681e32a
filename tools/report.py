#!/usr/bin/env python3
"""Judge a trained detector on one HTML page.

    python tools/report.py output/mine

The code is in detection_toolkit/commands/report.py.
"""

import sys

from detection_toolkit.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
