"""The command of the project, where it is not installed: ``python -m detection_toolkit``."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
