"""What looks inside a detector must not show one that was never trained."""

import pytest

from detection_toolkit.engine.inspection import build_inspected_detector


@pytest.mark.parametrize("overrides", [[], ["model.num_classes=3"]])
def test_the_backbone_weights_that_training_starts_with_are_not_enough(overrides):
    config = "stageinteractor/stageinteractor_r50_100q_1x.py"
    with pytest.raises(ValueError, match=f"no trained weights for {config}: name a checkpoint"):
        build_inspected_detector(config, overrides)
