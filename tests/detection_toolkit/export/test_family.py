"""The other detectors of the family, through the same tool."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from sqr_models import SMALL

from detection_toolkit.commands import export
from detection_toolkit.config import apply_overrides, get_config

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# With few stages: translating each takes seconds.
CASES = {
    "adamixer/adamixer_shapes_tiny.py": ("onnx", SMALL["adamixer"]),
    "sqr/stageinteractor_sqr_shapes_tiny.py": ("torch_export", SMALL["stageinteractor"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES)
def test_the_tool_exports_it_and_finds_no_difference(tmp_path, capsys, config):
    kind, overrides = CASES[config]
    overrides = [*overrides, "model.decoder.num_stages=2"]
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(config), overrides).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        for stage in model.decoder.stages:
            stage.class_tower.out.bias.zero_()
    weights, output = tmp_path / "weights.pth", tmp_path / "model"
    torch.save({"model": model.state_dict()}, weights)
    overrides += [f"train.init_checkpoint='{weights}'", "train.ema.enabled=false"]
    export.main(["--config-file", config, "--format", kind, "--output", str(output), *overrides])
    assert "detections agree within" in capsys.readouterr().out
    assert output.is_file()
