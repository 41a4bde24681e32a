"""Comparisons with other forms and other code; one command each."""

import detection_toolkit  # noqa: F401  (before PyTorch: how its threads wait)
