"""A detector's doubts about the annotations of a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import BoxMode
from torch import Tensor

from ..data import UnreadableImageError, read_image
from ..data.inspection import DatasetReport
from ..errors import UserError
from ..evaluation.label_errors import Answer, Suspect, find_suspects, rank_suspects
from ..evaluation.stages import AllStages
from ..modeling import QueryDetector
from ..texts import shown
from .predictor import Predictor

__all__ = ["LabelError", "find_label_errors"]

logger = logging.getLogger(__name__)


class LabelError(NamedTuple):
    """A :class:`.Suspect` with names and ids of the data set."""

    image_id: Any
    suspect: Suspect
    annotation: dict[str, Any] | None
    """Of the data set, with "id", "bbox" and the name of its "category"."""
    class_found: str | None

    @property
    def says(self) -> str:
        """What is annotated and what the detector says, for people."""
        annotated = "nothing" if self.annotation is None else self.annotation["category"]
        if self.class_found is None:
            return f"{annotated}, the model finds nothing"
        return f"{annotated}, the model says {self.class_found} {self.suspect.detection_score:.2f}"

    def as_dict(self, file_name: str) -> dict[str, Any]:
        """For a JSON file; boxes are x, y, width, height in pixels."""
        suspect, annotation = self.suspect, self.annotation or {}
        found = suspect.box_found
        box = None if found is None else _xywh(found)
        return {
            "kind": suspect.kind,
            "score": round(suspect.score, 4),
            "image_id": self.image_id,
            "file_name": file_name,
            "annotation_id": annotation.get("id"),
            "annotated": {k: annotation.get(k) for k in ("category", "bbox")},
            "found": {"category": self.class_found, "bbox": box},
            "iou": round(suspect.iou, 4),
            "detection_score": round(suspect.detection_score, 4),
            "agreement": None if suspect.agreement is None else round(suspect.agreement, 4),
        }


def _xywh(box: Sequence[float]) -> list[float]:
    values = BoxMode.convert(list(box), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return [round(x, 2) for x in values]


@torch.no_grad()
def find_label_errors(
    predictor: Predictor,
    report: DatasetReport,
    *,
    threshold: float = 0.5,
    max_pixels: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[LabelError]:
    """Annotations that a detector contradicts, the surest first.

    Args:
        predictor: of the detector, whose classes have the names of the data set's.
        report: of the data set. Images that cannot be read are left out, and boxes that are none.
        threshold: least score of a detection that counts.
        max_pixels: larger images are left out.
        progress: wraps an iterable, to show how far it is.

    Raises:
        UserError: the data set has a class that the detector does not know.
    """
    of_model = _classes_of(predictor, list(report.classes))
    names = {index: name for name, index in of_model.items()}
    is_known = torch.zeros(max(names, default=0) + 1, dtype=torch.bool)
    is_known[list(names)] = True
    ids, found = [], []
    for image_id in progress(list(report.images)):
        entry = report.images[image_id]
        if "path" not in entry:
            continue
        limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        try:
            answer = _answer(predictor, read_image(entry["path"], "BGR", **limits), is_known)
        except UnreadableImageError as error:
            logger.warning("left out: %s", error)
            continue
        boxes, classes, crowd = _objects(report.sound_annotations(image_id), of_model)
        suspects, is_found = find_suspects(answer, boxes, classes, crowd=crowd, threshold=threshold)
        ids.append(image_id)
        # A crowd is never found, and says nothing of recall.
        counted = torch.where(crowd, -1, classes)
        found.append((suspects, is_found, counted))
    errors = []
    for place, suspect in rank_suspects(found):
        annotations = report.sound_annotations(ids[place])
        annotation = None if suspect.annotation is None else annotations[suspect.annotation]
        name = None if suspect.class_found is None else names[suspect.class_found]
        errors.append(LabelError(ids[place], suspect, annotation, name))
    return errors


def _classes_of(predictor: Predictor, names: Sequence[str]) -> dict[str, int]:
    """Name of a class of the data set -> its index in the detector."""
    known = predictor.metadata.get("thing_classes")
    if known is None:
        raise UserError(
            "the model does not know the names of its classes: name the folder of a run, or a "
            "checkpoint that this project has trained"
        )
    missing = [name for name in names if name not in known]
    if missing:
        classes = ", ".join(map(shown, list(known)[:5])) + (", ..." if len(known) > 5 else "")
        raise UserError(
            f"the model knows no class {shown(missing[0])}, which the data set has; it knows "
            f"{classes}"
        )
    return {name: list(known).index(name) for name in names}


def _objects(
    annotations: Sequence[dict[str, Any]], of_model: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    boxes = [BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for a in annotations]
    return (
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([of_model[a["category"]] for a in annotations], dtype=torch.long),
        torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )


def _answer(predictor: Predictor, image: Any, is_known: Tensor) -> Answer:
    """Of what the data set has classes for."""
    given = predictor.preprocess(image)
    model = predictor.model
    if not isinstance(model, QueryDetector):
        instances = model([given])[0]["instances"].to("cpu")
        kept = _of_known_classes(instances, is_known)
        return Answer.of_detections(
            kept.scores, kept.pred_classes, kept.pred_boxes.tensor, len(is_known)
        )
    output = AllStages(model)([given])[0]
    kept = _of_known_classes(output["stages"][-1].to("cpu"), is_known)
    height, width = given["image"].shape[-2:]
    scale = torch.tensor([given["width"] / width, given["height"] / height]).repeat(2)
    return Answer(
        kept.scores,
        kept.pred_classes,
        kept.pred_boxes.tensor,
        kept.query_index,
        output["logits"].sigmoid(),
        output["boxes"] * scale,
    )


def _of_known_classes(instances: Any, is_known: Tensor) -> Any:
    classes = instances.pred_classes
    return instances[(classes < len(is_known)) & is_known[classes.clamp(max=len(is_known) - 1)]]
