"""Both backends of COCO's metrics: equal to the last digit, whatever they are given."""

import importlib
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from hpr_models import make_model
from omegaconf import OmegaConf
from pycocotools import mask as mask_api
from small_runs import make_config

from detection_toolkit.config import apply_overrides, config_text, get_config
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.evaluators import build_evaluators, coco_backend
from detection_toolkit.errors import MissingPackageError, UnknownNameError, UserError
from detection_toolkit.evaluation import CocoEvaluator, evaluate_stages

pytest.importorskip("hotcoco", minversion="1.2")

HEIGHT, WIDTH = 120, 160
CATEGORIES = (20, 3, 7, 90)  # of the last there are neither objects nor detections


def mask_of(box):
    x0, y0, x1, y1 = np.asarray(box).round().astype(int)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[max(y0, 0) : max(y1, y0 + 1), max(x0, 0) : max(x1, x0 + 1)] = True
    mask[max(y0, 0) : (y0 + y1) // 2, max(x0, 0) : (x0 + x1) // 2] = False
    return mask


def rle_of(mask):
    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def make_objects(rng, num_images):
    """A document with crowds, images without objects, other areas than those of the boxes, and ids
    in no order."""
    ids = (rng.permutation(num_images) * 7 + 3).tolist()
    annotations = []
    for image_id in ids:
        for _ in range(rng.integers(0, 6)):
            x, y = rng.uniform(0, WIDTH - 20), rng.uniform(0, HEIGHT - 20)
            w, h = np.exp(rng.uniform(1.5, 4.8, size=2))
            crowd = rng.random() < 0.2
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORIES[:3])),
                    "bbox": [x, y, w, h],
                    "area": w * h * rng.uniform(0.4, 1),
                    "iscrowd": int(crowd),
                    "ignore": int(rng.random() < 0.2),  # which says nothing
                    "segmentation": rle_of(mask_of((x, y, x + w, y + h))) if crowd else [polygon],
                }
            )
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in ids
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORIES],
    }


def make_answers(rng, document, *, masks, most=12):
    """Detections near the objects and elsewhere, with scores of which many are equal; some images
    have none."""
    order = sorted(CATEGORIES)
    for image in document["images"]:
        boxes, classes = [], []
        objects = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        for annotation in objects:
            x, y, w, h = annotation["bbox"]
            for _ in range(rng.integers(0, most)):
                moved = np.array([x, y, x + w, y + h]) + rng.normal(0, rng.choice([0.4, 3, 25]), 4)
                boxes.append([*moved[:2], *np.maximum(moved[2:], moved[:2] + 1)])
                known = rng.random() < 0.8
                category = annotation["category_id"] if known else rng.choice(CATEGORIES[:3])
                classes.append(order.index(category))
        if not objects and rng.random() < 0.5:
            boxes, classes = [[5.0, 5.0, 40.0, 50.0]], [0]
        scores = rng.random(len(boxes))
        scores = np.where(rng.random(len(boxes)) < 0.5, scores.round(1), scores)
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.scores = torch.tensor(scores, dtype=torch.float32)
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        if masks:
            drawn = np.array([mask_of(b) for b in boxes]).reshape(-1, HEIGHT, WIDTH)
            instances.pred_masks = torch.from_numpy(drawn)
        yield {"image_id": image["id"]}, {"instances": instances}


def register(folder, document):
    path = folder / "truth.json"
    path.write_text(json.dumps(document))
    name, order = folder.name, sorted(CATEGORIES)
    register_coco_instances(name, {}, str(path), str(folder))
    # Without Detectron2's loader, which refuses "ignore".
    MetadataCatalog.get(name).set(
        thing_classes=[f"class {c}" for c in order],
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(order)},
    )
    return name


def results_of(name, pairs, backend, folder, **options):
    evaluator = CocoEvaluator(name, output_dir=str(folder), backend=backend, **options)
    evaluator.reset()
    for x, answer in pairs:
        evaluator.process([x], [answer])
    return evaluator.evaluate()


def assert_equal_results(name, pairs, folder, **options):
    expected, found = (
        results_of(name, pairs, backend, folder / backend, **options)
        for backend in ("pycocotools", "hotcoco")
    )
    assert repr(found) == repr(expected)  # to the last digit, and NaN where there is no object
    file = "coco_instances_results.json"
    texts = [(folder / backend / file).read_text() for backend in ("pycocotools", "hotcoco")]
    assert texts[0] == texts[1]
    return found


@pytest.mark.parametrize("max_dets", [None, 5, 30])
@pytest.mark.parametrize("seed", range(4))
def test_random_detections(tmp_path, seed, max_dets):
    rng = np.random.default_rng(seed)
    document = make_objects(rng, 40)
    pairs = list(make_answers(rng, document, masks=False))
    name = register(tmp_path, document)
    found = assert_equal_results(name, pairs, tmp_path, max_dets_per_image=max_dets)
    assert 5 < found["bbox"]["AP"] < 95 and found["bbox"]["AP-class 7"] > 0


def test_more_detections_than_count(tmp_path):
    rng = np.random.default_rng(9)
    document = make_objects(rng, 3)
    pairs = list(make_answers(rng, document, masks=False, most=300))
    assert max(len(answer["instances"]) for _, answer in pairs) > 200
    name = register(tmp_path, document)
    few, many = (
        assert_equal_results(name, pairs, tmp_path / str(limit), max_dets_per_image=limit)
        for limit in (None, 300)
    )
    assert few["bbox"]["AP"] != many["bbox"]["AP"]


@pytest.mark.parametrize("seed", range(2))
def test_masks(tmp_path, seed):
    rng = np.random.default_rng(seed)
    document = make_objects(rng, 15)
    pairs = list(make_answers(rng, document, masks=True))
    found = assert_equal_results(register(tmp_path, document), pairs, tmp_path)
    assert 5 < found["segm"]["AP"] < 95 and found["segm"]["AP"] != found["bbox"]["AP"]


@pytest.mark.parametrize("case", ["nothing found", "no object", "some images"])
def test_little(tmp_path, case):
    rng = np.random.default_rng(1)
    document = make_objects(rng, 6)
    pairs = list(make_answers(rng, document, masks=False))
    if case == "nothing found":
        pairs = [(x, {"instances": answer["instances"][:0]}) for x, answer in pairs]
    elif case == "no object":
        document["annotations"] = []
    name = register(tmp_path, document)
    if case != "some images":
        assert_equal_results(name, pairs, tmp_path)
        return
    found = []
    for backend in ("pycocotools", "hotcoco"):
        evaluator = CocoEvaluator(name, ("bbox",), output_dir=str(tmp_path), backend=backend)
        evaluator.reset()
        for x, answer in pairs:
            evaluator.process([x], [answer])
        found.append(evaluator.evaluate(img_ids=[x["image_id"] for x, _ in pairs[:3]]))
    assert repr(found[0]) == repr(found[1]) and found[0]["bbox"]["AP"] > 0


def run_by_stage(folder, backend):
    """Of a model that was not trained."""
    cfg = make_config(
        folder, "train.stage_evaluation=true", f"dataloader.evaluator.backend={backend}"
    )
    prepare_config(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    results = Trainer.test(cfg, model)
    (file,) = folder.glob("output/inference/*/stage_metrics.json")
    return results, json.loads(file.read_text())


def test_evaluation_by_stage_uses_it_too(tmp_path, monkeypatch):
    results, metrics = run_by_stage(tmp_path / "a", "pycocotools")
    module = importlib.import_module("detection_toolkit.evaluation.coco")
    calls, evaluate = [], module.evaluate_by_hotcoco
    monkeypatch.setattr(
        module, "evaluate_by_hotcoco", lambda *a, **k: calls.append(a) or evaluate(*a, **k)
    )
    by_hotcoco = run_by_stage(tmp_path / "b", "hotcoco")
    assert len(calls) == 5  # itself, three stages, and the last one after NMS
    for part in (metrics, by_hotcoco[1]):
        del part["dataset"]
    assert repr(by_hotcoco) == repr((results, metrics))


def test_refiners_have_the_same_numbers(tmp_path):
    """HPR's further heads, whose AP evaluation by stage has as well."""
    document = make_objects(np.random.default_rng(2), 8)
    for annotation in document["annotations"]:
        annotation["bbox"], annotation["area"] = [2.0, 2.0, 150.0, 110.0], 16500.0
        del annotation["ignore"]
    name = register(tmp_path, document)
    detector = make_model("model.num_classes=4").eval()
    loader = [
        [
            {
                "image": torch.randint(
                    256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(x["id"])
                ),
                "image_id": x["id"],
                "height": HEIGHT,
                "width": WIDTH,
            }
        ]
        for x in document["images"]
    ]
    expected, found = (
        evaluate_stages(detector, loader, dataset_name=name, backend=backend)[1]
        for backend in ("pycocotools", "hotcoco")
    )
    assert found["stages"][-1]["AP"] is not None
    assert set(found["auxiliary"]) == {"dynamic", "regional"}
    assert repr(found) == repr(expected)


@pytest.mark.slow
def test_detections_of_the_shipped_model(tmp_path):
    metrics = []
    for backend in ("pycocotools", "hotcoco"):
        cfg = get_config("stageinteractor/shapes_tiny.py")
        changes = [
            "train.stage_evaluation=true",
            "train.device=cpu",
            f"train.output_dir='{tmp_path / backend}'",
            f"dataloader.evaluator.backend={backend}",
            "dataloader.test.num_workers=0",
            "train.init_checkpoint=checkpoints/shapes_tiny.pth",
        ]
        cfg = prepare_config(apply_overrides(cfg, changes), training=False)
        model = Trainer.build_model(cfg)
        state = torch.load("checkpoints/shapes_tiny.pth", weights_only=True)
        model.load_state_dict(state["model"])
        results = Trainer.test(cfg, model)
        (file,) = (tmp_path / backend).glob("inference/*/stage_metrics.json")
        metrics.append((results, json.loads(file.read_text())))
    assert repr(metrics[0]) == repr(metrics[1])
    assert [round(x["AP"], 1) for x in metrics[0][1]["stages"]] == [9.8, 68.9, 79.8, 83.1]


def node(**options):
    evaluator = {"_target_": "detection_toolkit.evaluation.CocoEvaluator", **options}
    return OmegaConf.create({"dataloader": {"evaluator": evaluator}})


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="backend='hotcocoa' is not one of pycocotools, hot"):
        build_evaluators(node(backend="hotcocoa"), "any", str(tmp_path))


def test_without_the_package_a_run_says_what_to_install(tmp_path, monkeypatch):
    import_module = importlib.import_module

    def missing(name, *args):
        if name == "hotcoco":
            raise ModuleNotFoundError(name)
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    cfg = make_config(tmp_path, "dataloader.evaluator.backend=hotcoco")
    with pytest.raises(MissingPackageError, match="hotcoco is not installed: pip install"):
        Trainer(prepare_config(cfg))
    MetadataCatalog.get("any").json_file = str(tmp_path / "data" / "annotations.json")
    build_evaluators(node(), "any", str(tmp_path))  # the default does without
    MetadataCatalog.remove("any")


def test_the_config_of_a_run_needs_no_trust_for_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_text(make_config(tmp_path)))
    evaluator = get_config(str(path)).dataloader.evaluator
    assert evaluator._target_ == "detection_toolkit.evaluation.CocoEvaluator"
    for name in ("evaluate_by_hotcoco", "_Numbers", "check_backend"):
        path.write_text(f"a: {{_target_: detection_toolkit.evaluation.coco.{name}}}")
        with pytest.raises(UserError, match="is no part of a detector"):
            get_config(str(path))


def test_a_class_that_the_data_set_lacks_is_named(tmp_path):
    rng = np.random.default_rng(0)
    document = make_objects(rng, 4)
    pairs = list(make_answers(rng, document, masks=False))
    for _, answer in pairs:
        answer["instances"].pred_classes += 4
    with pytest.raises(UserError, match="has class .*, but .* has 4 classes: set model.num_classe"):
        results_of(register(tmp_path, document), pairs, "hotcoco", tmp_path)


def test_keypoints_are_for_pycocotools(tmp_path):
    rng = np.random.default_rng(0)
    document = make_objects(rng, 2)
    evaluator = CocoEvaluator(register(tmp_path, document), ("keypoints",), backend="hotcoco")
    evaluator.reset()
    for x, answer in make_answers(rng, document, masks=False):
        evaluator.process([x], [answer])
    with pytest.raises(UserError, match="keypoints need dataloader.evaluator.backend=pycocotools"):
        evaluator.evaluate()


def test_the_backend_is_found_among_several_evaluators():
    nodes = [{"_target_": "x"}, {"_target_": "y", "backend": "hotcoco"}]
    cfg = OmegaConf.create({"dataloader": {"evaluator": nodes}})
    assert coco_backend(cfg) == "hotcoco"
    assert coco_backend(OmegaConf.create({"dataloader": {"evaluator": nodes[:1]}})) == "pycocotools"
