"""The numbers of an evaluation are those of pycocotools on the document as it is written."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from coco_files import make_document
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_runs import make_config

from detection_toolkit.engine import Trainer, prepare_config

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Near(torch.nn.Module):
    """Answers with the objects, moved and stretched by a few pixels, and some that are none."""

    def __init__(self, document):
        super().__init__()
        self.classes = {c["id"]: k for k, c in enumerate(document["categories"])}
        self.document = document

    def forward(self, batch):
        answers = []
        for x in batch:
            generator = torch.Generator().manual_seed(x["image_id"])
            truth = [a for a in self.document["annotations"] if a["image_id"] == x["image_id"]]
            boxes = torch.tensor([a["bbox"] for a in truth], dtype=torch.float32)
            boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).repeat(3, 1)
            boxes += 6 * torch.rand(boxes.shape, generator=generator) - 3
            instances = Instances((x["height"], x["width"]))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.rand(len(boxes), generator=generator)
            classes = [self.classes[a["category_id"]] for a in truth]
            instances.pred_classes = torch.tensor(classes * 3)
            answers.append({"instances": instances})
        return answers


def metrics_of(document, folder):
    """By pycocotools, of the detections that the evaluation has left."""
    path = folder / "as_written.json"
    path.write_text(json.dumps(document))
    (results,) = folder.glob("output/inference/*/coco_instances_results.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(json.loads(results.read_text())), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, 100 * evaluation.stats[:6]))


def crowds(document):
    for annotation in document["annotations"][::3]:
        annotation["iscrowd"] = 1


def mask_areas(document):
    for annotation in document["annotations"]:
        annotation["area"] *= 0.6  # as of a mask, which decides what is small


def reaching_out(document):
    for annotation in document["annotations"][::2]:
        annotation["bbox"][0] = 75.0  # of 96 pixels, and 30 wide


def areas_below_zero(document):
    reaching_out(document)
    for annotation in document["annotations"]:
        annotation["area"] *= -1


def evaluate(document, folder, *, by_name, encoding="utf-8"):
    """COCO's metrics of the answers of :class:`Near`, by one of the two ways to name a data set."""
    cfg = make_config(folder, document=document)
    dataset = cfg.dataloader.test.dataset
    Path(dataset.json_file).write_text(json.dumps(document), encoding=encoding)
    if by_name:
        register_coco_instances("by_name", {}, dataset.json_file, dataset.image_root)
        dataset.update(names="by_name", json_file=None, image_root=None)
    prepare_config(cfg, training=False)
    return Trainer.test(cfg, Near(document))["bbox"]


@pytest.mark.parametrize(
    "change, by_name",
    [
        (None, False),
        (None, True),
        (crowds, False),
        (mask_areas, False),
        (crowds, True),
        (reaching_out, True),
        (areas_below_zero, True),
    ],
)
def test_they_are_those_of_the_document(tmp_path, change, by_name):
    document = make_document(6)
    if change is not None:
        change(document)
    found = evaluate(document, tmp_path, by_name=by_name)
    for annotation in document["annotations"]:  # the one thing that has no other meaning
        annotation["area"] = abs(annotation["area"])
    expected = metrics_of(document, tmp_path)
    assert 10 < expected["AP"] < 90
    for name, value in expected.items():
        assert found[name] == pytest.approx(value if value >= 0 else float("nan"), nan_ok=True)


def ids_from_zero(document):
    for annotation in document["annotations"]:
        annotation["id"] -= 1


def whole_floats(document):
    for annotation in document["annotations"]:
        annotation["id"] = float(annotation["id"])


def texts(document):
    for annotation in document["annotations"]:
        annotation["id"] = f"object {annotation['id']}"


def no_areas(document):
    for annotation in document["annotations"]:
        del annotation["area"]


def negative_areas(document):
    for annotation in document["annotations"]:
        annotation["area"] *= -1


def no_crowds(document):
    for annotation in document["annotations"]:
        del annotation["iscrowd"]


def no_info(document):
    del document["info"]


def nothing(document):
    pass


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "change, encoding",
    [
        *((f, "utf-8") for f in (ids_from_zero, whole_floats, texts, no_areas, negative_areas)),
        *((f, "utf-8") for f in (no_crowds, no_info)),
        *((nothing, e) for e in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32")),
    ],
)
def test_what_other_programs_write_has_the_numbers_of_the_sound_document(
    tmp_path, change, encoding, by_name
):
    document = make_document(6)
    expected = evaluate(document, tmp_path / "sound", by_name=False)
    assert 10 < expected["AP"] < 90
    change(document)
    found = evaluate(document, tmp_path / "other", by_name=by_name, encoding=encoding)
    assert found == pytest.approx(expected, nan_ok=True)
