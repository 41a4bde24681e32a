"""Everything about a run that is not model, data or optimiser.

Keys, defaults and what they mean: RunSettings, in detection_toolkit/engine/settings.py.
"""

from detection_toolkit.engine.settings import RunSettings

train = RunSettings().as_dict()
