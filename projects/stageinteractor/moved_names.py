"""Where config.yaml of older runs says that things are, and where they are now.

Before ``detection_toolkit`` was a package of its own, all of it stood here.
"""

from __future__ import annotations

from detection_toolkit.config import register_moved_names

__all__ = ["MOVED_NAMES"]

# What configs can name is in these.
_PACKAGES = ("data", "engine", "evaluation", "modeling", "structures", "training")
# Modules of the old stageinteractor.modeling that are the method's.
_MODULES = ("attention", "factored_mixing", "filter_bank", "mixing", "queries", "stage")
_CLASSES = (
    "CascadeDynamicMixing",
    "DecoderStage",
    "DynamicFilters",
    "FactoredDynamicMixing",
    "FilterBank",
    "InitialQueries",
    "IoFBiasedSelfAttention",
    "StageInteractor",
    "StageInteractorDecoder",
    "SubBoxSampling",
)

MOVED_NAMES = {
    **{f"stageinteractor.{name}": f"detection_toolkit.{name}" for name in _PACKAGES},
    **{
        f"stageinteractor.modeling.{name}": f"stageinteractor.{name}"
        for name in (*_CLASSES, *_MODULES)
    },
    "stageinteractor.modeling.decoder.StageInteractorDecoder": (
        "stageinteractor.StageInteractorDecoder"
    ),
    "stageinteractor.modeling.detector.StageInteractor": "stageinteractor.StageInteractor",
    "stageinteractor.modeling.sampling.SubBoxSampling": "stageinteractor.SubBoxSampling",
    "stageinteractor.training.CrossStageMatcher": "stageinteractor.CrossStageMatcher",
    "stageinteractor.training.cross_stage_matcher.CrossStageMatcher": (
        "stageinteractor.CrossStageMatcher"
    ),
    "stageinteractor.training.cross_stage_matcher.StagewiseMatcher": (
        "detection_toolkit.training.StagewiseMatcher"
    ),
}
"""Dotted names; that of a package stands for all in it that has no entry of its own."""

register_moved_names(MOVED_NAMES)
