"""Parts of one's own, which examples/my_config.py puts into a detector."""

import numpy as np
import torch
from detectron2.data.transforms import Augmentation, NoOpTransform, Transform
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import Backbone
from detectron2.utils import comm
from torch import nn

from detection_toolkit.data import DetectionMapper
from detection_toolkit.structures import Assignment, box_iou


class NoisyMapper(DetectionMapper):
    """The usual mapper, and noise on the training images after it."""

    def __init__(self, is_train, *, augmentations, image_format="RGB", noise=4.0):
        super().__init__(is_train, augmentations=augmentations, image_format=image_format)
        self.noise = noise  # standard deviation, of 0..255

    def __call__(self, dataset_dict):
        sample = super().__call__(dataset_dict)
        if self.is_train:
            image = sample["image"].float()
            noisy = image + self.noise * torch.randn_like(image)
            sample["image"] = noisy.clamp(0, 255).to(torch.uint8)
        return sample


class GreyTransform(Transform):
    """An image (H, W, 3) without its colours; boxes stay."""

    def apply_image(self, img):
        return img.mean(2, keepdims=True).repeat(3, axis=2).astype(img.dtype)

    def apply_coords(self, coords):
        return coords


class RandomGrey(Augmentation):
    """Takes the colours out of some images."""

    def __init__(self, prob=0.2):
        super().__init__()
        self.prob = prob

    def get_transform(self, image):
        return GreyTransform() if np.random.rand() < self.prob else NoOpTransform()


class CountDetections(DatasetEvaluator):
    """The mean number of detections of an image that score at least ``threshold``."""

    def __init__(self, threshold=0.3):
        self.threshold = threshold

    def reset(self):
        self.counts = []

    def process(self, inputs, outputs):
        for output in outputs:
            self.counts.append(int((output["instances"].scores >= self.threshold).sum()))

    def evaluate(self):
        counts = [count for part in comm.gather(self.counts) for count in part]
        if not comm.is_main_process():
            return {}
        return {"detections": {"per_image": sum(counts) / max(len(counts), 1)}}


class PatchBackbone(Backbone):
    """Four maps of strides 4, 8, 16 and 32, each made of patches of the one before."""

    def __init__(self, channels=32):
        super().__init__()
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32)))
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self.patches = nn.ModuleList(
            nn.Conv2d(3 if level == 0 else channels, channels, size, stride=size)
            for level, size in enumerate((4, 2, 2, 2))
        )

    def forward(self, x):
        """(B, 3, H, W), sides that are multiples of 32 -> {"res2": (B, C, H / 4, W / 4), ...}."""
        features = {}
        for name, patches in zip(self._out_features, self.patches):
            x = patches(x).relu()
            features[name] = x
        return features


class OverlapMatcher(nn.Module):
    """Gives each query the object that its box overlaps most, if by IoU ``threshold`` or more.

    Unlike the Hungarian matcher, it may give an object to many queries, or to none.
    """

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, logits, boxes, truth):
        """Logits (S, B, N, K) and boxes (S, B, N, 4), ``xyxy`` in pixels -> the assignment."""
        iou = box_iou(boxes[:, :, :, None], truth.boxes[:, None])  # (S, B, N, M)
        counts = torch.tensor(truth.num_objects, device=iou.device)
        is_padding = torch.arange(iou.shape[-1], device=iou.device) >= counts[:, None]  # (B, M)
        iou = iou.masked_fill(is_padding[:, None], -1)
        best, index = iou.max(-1)
        return Assignment(index.masked_fill(best < self.threshold, -1))
