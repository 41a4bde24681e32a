#!/usr/bin/env python3
"""Is one run better than another? A page that answers.

    python tools/compare.py output/first output/second

The code is in detection_toolkit/commands/compare.py.
"""

import sys

from detection_toolkit.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
