"""What a detector contradicts: each kind by itself, and errors that were planted are found."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from planted_errors import KINDS, plant_errors, which_planted

from detection_toolkit.commands import main
from detection_toolkit.data.inspection import inspect_dataset
from detection_toolkit.data.shapes import SHAPES, generate_shapes
from detection_toolkit.engine.label_errors import find_label_errors
from detection_toolkit.engine.shipped import shipped_checkpoint, shipped_config
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.label_errors import Answer, find_suspects, rank_suspects

HERE, BESIDE, FAR = [10.0, 10, 50, 50], [18.0, 10, 58, 50], [100.0, 100, 140, 140]


def answer(*detections, stages=2, num_classes=3, first_box=None):
    """Of (class, score, box), the same after every stage but for the box of the first."""
    scores = torch.zeros(stages, len(detections), num_classes)
    boxes = torch.zeros(stages, len(detections), 4)
    for i, (label, score, box) in enumerate(detections):
        scores[:, i, label] = score
        boxes[:, i] = torch.tensor(box)
        if first_box is not None:
            boxes[0, i] = torch.tensor(first_box)
    queries = torch.arange(len(detections))
    classes = torch.tensor([d[0] for d in detections], dtype=torch.long)
    return Answer(scores[-1, queries, classes], classes, boxes[-1], queries, scores, boxes)


def suspects_of(given, *truth, crowd=None):
    boxes = torch.tensor([box for _, box in truth]).reshape(-1, 4)
    classes = torch.tensor([label for label, _ in truth], dtype=torch.long)
    crowd = None if crowd is None else torch.tensor(crowd)
    return find_suspects(given, boxes, classes, crowd=crowd)


def test_what_is_annotated_as_it_is_found_is_no_suspect():
    suspects, is_found = suspects_of(answer((1, 0.9, HERE)), (1, HERE))
    assert suspects == [] and is_found.tolist() == [True]


def test_each_kind():
    (missing,), _ = suspects_of(answer((1, 0.9, HERE)))
    assert (missing.kind, missing.annotation) == ("missing", None)
    assert missing.score == pytest.approx(0.9)
    (other,), is_found = suspects_of(answer((1, 0.9, HERE)), (2, HERE))
    assert (other.kind, other.annotation, other.class_found) == ("class", 0, 1)
    assert other.score == pytest.approx(0.9) and not is_found.any()
    (placed,), _ = suspects_of(answer((1, 0.9, HERE)), (1, BESIDE))
    assert placed.kind == "box" and placed.iou == pytest.approx(32 / 48)
    assert placed.score == pytest.approx(0.9 * (1 - 32 / 48))
    (nothing,), _ = suspects_of(answer((1, 0.9, HERE)), (1, HERE), (2, FAR))[0], None
    assert (nothing.kind, nothing.annotation, nothing.box_found) == ("nothing", 1, None)


def test_detections_below_the_threshold_contradict_nothing():
    assert suspects_of(answer((1, 0.4, HERE)))[0] == []
    # But an annotation that is found weakly, by any stage, is not one that nothing finds.
    assert suspects_of(answer((1, 0.4, HERE)), (1, HERE))[0] == []


def test_stages_that_disagree_make_a_suspect_less_sure():
    sure, unsure = (suspects_of(answer((1, 0.8, HERE), first_box=box))[0][0] for box in (HERE, FAR))
    assert (sure.agreement, unsure.agreement) == (1, 0)
    assert sure.score == pytest.approx(0.8) and unsure.score == pytest.approx(0.4)
    (other,), _ = suspects_of(
        answer((1, 0.8, HERE))._replace(stage_scores=torch.tensor([[[0.9, 0, 0]], [[0, 0.8, 0]]]))
    )
    assert other.agreement == 0  # another class before


def test_a_detector_without_stages_is_taken_at_its_word():
    scores, classes, boxes = torch.tensor([0.8]), torch.tensor([1]), torch.tensor([HERE])
    given = Answer.of_detections(scores, classes, boxes, 3)
    (missing,), _ = suspects_of(given)
    assert missing.score == pytest.approx(0.8) and missing.agreement == 1
    assert [s.kind for s in suspects_of(given, (1, HERE), (0, FAR))[0]] == ["nothing"]
    empty = Answer.of_detections(scores[:0], classes[:0], boxes[:0], 3)
    assert [s.kind for s in suspects_of(empty, (1, HERE))[0]] == ["nothing"]
    assert suspects_of(empty)[0] == []


def test_second_detections_of_an_object_are_not_missing_annotations():
    given = answer((1, 0.9, HERE), (1, 0.7, HERE), (2, 0.6, HERE))
    assert suspects_of(given, (1, HERE))[0] == []


def test_crowds_are_left_alone():
    given = answer((1, 0.9, HERE))
    assert suspects_of(given, (1, [0.0, 0, 90, 90]), crowd=[True])[0] == []
    assert suspects_of(given, (2, [0.0, 0, 90, 90]), crowd=[True])[0] == []  # of any class
    assert [s.kind for s in suspects_of(given, (2, FAR), crowd=[True])[0]] == ["missing"]


def test_what_is_often_missed_is_a_weaker_suspect():
    """Of two classes, one of which the detector always finds otherwise."""
    suspects, is_found = suspects_of(answer((1, 0.9, HERE)), (1, HERE), (1, FAR), (2, FAR))
    classes = torch.tensor([1, 1, 2])
    often = (suspects_of(answer((1, 0.9, HERE)), (1, HERE))[1], torch.tensor([1]))
    ranked = rank_suspects([(suspects, is_found, classes), *[([], *often)] * 8])
    assert [(place, s.annotation) for place, s in ranked] == [(0, 1), (0, 2)]
    assert ranked[0][1].score == pytest.approx(0.5 * 9 / 10) and ranked[1][1].score == 0


UPPER_HALF, LOWER_THIRD = [10.0, 10, 50, 30], [10.0, 37, 50, 50]


def test_a_class_is_doubted_less_where_the_annotated_one_is_seen_too():
    given = answer((1, 0.9, HERE), (2, 0.4, HERE), (2, 0.8, FAR))
    (other, missing), _ = suspects_of(given, (2, HERE))
    assert (other.kind, missing.kind) == ("class", "missing")
    assert other.detection_score == pytest.approx(0.9)
    assert other.score == pytest.approx(0.9 * (1 - 0.4))  # 0.8 is seen elsewhere
    (other,), _ = suspects_of(answer((1, 0.9, HERE), (2, 0.4, UPPER_HALF)), (2, HERE))
    assert other.score == pytest.approx(0.9 * (1 - 0.4))  # half of it is there
    (other,), _ = suspects_of(answer((1, 0.9, HERE), (2, 0.4, LOWER_THIRD)), (2, HERE))
    assert other.score == pytest.approx(0.9)


def test_one_detection_contradicts_one_annotation():
    suspects, _ = suspects_of(answer((1, 0.9, HERE)), (2, UPPER_HALF), (2, HERE))
    assert [(s.kind, s.annotation) for s in suspects] == [("class", 1), ("nothing", 0)]
    assert suspects[1].iou == pytest.approx(0.5)


def test_from_half_of_a_box_on_it_is_about_the_annotation():
    (other,), _ = suspects_of(answer((1, 0.5, UPPER_HALF)), (2, HERE))
    assert (other.kind, other.iou) == ("class", 0.5) and other.score == pytest.approx(0.5 / 2)
    missing, nothing = suspects_of(answer((1, 0.9, LOWER_THIRD)), (2, HERE))[0]
    assert (missing.kind, nothing.kind) == ("missing", "nothing")
    assert missing.iou == nothing.iou == pytest.approx(13 / 40)
    assert missing.score == pytest.approx(0.9 * (1 - 13 / 40))
    # Of the same class a box that is this far off is badly placed.
    (placed,), _ = suspects_of(answer((1, 0.9, LOWER_THIRD)), (1, HERE))
    assert placed.kind == "box"


def test_what_some_stage_finds_by_a_quarter_is_there():
    assert suspects_of(answer((1, 0.25, HERE)), (1, HERE))[0] == []
    (nothing,), _ = suspects_of(answer((1, 0.48, UPPER_HALF)), (1, HERE))
    assert nothing.kind == "nothing" and nothing.detection_score == pytest.approx(0.24)
    assert nothing.score == pytest.approx((1 - 0.24) / 2)


def test_a_detection_is_within_a_crowd_if_half_of_it_is():
    given = answer((1, 0.9, HERE))
    assert suspects_of(given, (2, UPPER_HALF), crowd=[True])[0] == []
    below_half = [10.0, 10, 50, 29]
    assert [s.kind for s in suspects_of(given, (2, below_half), crowd=[True])[0]] == ["missing"]


class Plain(torch.nn.Module):
    """A detector of another project: no stages, a class that the data set lacks."""

    def forward(self, batched_inputs):
        found = Instances((64, 96))
        found.pred_boxes = Boxes(torch.tensor([[4.0, 6, 34, 31], [60.0, 30, 80, 50], HERE]))
        found.scores = torch.tensor([0.9, 0.8, 0.7])
        found.pred_classes = torch.tensor([1, 2, 3])
        return [{"instances": found}]


def test_a_model_without_stages_is_asked_by_names_of_classes(tmp_path):
    document = make_document(num_images=1, boxes_per_image=1)  # one dog
    names = ["bird", "dog", "cat", "horse"]
    predictor = SimpleNamespace(
        model=Plain(),
        metadata=Metadata(thing_classes=names),
        preprocess=lambda image: {"image": torch.zeros(3, 64, 96), "height": 64, "width": 96},
    )
    report = inspect_dataset(*write_dataset(tmp_path, document))
    (error,) = find_label_errors(predictor, report)
    assert (error.suspect.kind, error.class_found, error.annotation) == ("missing", "cat", None)
    assert error.as_dict("1.png")["found"]["bbox"] == [60, 30, 20, 20]
    predictor.metadata = Metadata()
    with pytest.raises(UserError, match="does not know the names of its classes"):
        find_label_errors(predictor, report)


def check(document, root, output, *options):
    path = output / "planted.json"
    output.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    words = ["--model", shipped_checkpoint(), "--config-file", shipped_config()]
    main(["check", str(path), str(root), *words, "--output", str(output), *options])
    return json.loads((output / "label_errors.json").read_text())


def make_planted(folder, num_images):
    spec = replace(SHAPES["shapes_val"], num_images=num_images)
    generate_shapes(spec, folder / "shapes", title="shapes_val")
    document = json.loads((folder / "shapes" / "annotations.json").read_text())
    return *plant_errors(document), folder / "shapes" / "images"


def measure(findings, planted, first):
    """Precision and recall of the first findings."""
    hits = [which_planted(f, planted) for f in findings[:first]]
    right = {hit for hit in hits if hit is not None}
    return (
        sum(hit is not None for hit in hits) / len(hits),
        len(right) / sum(map(len, planted.values())),
    )


def test_planted_errors_come_first(tmp_path, capsys):
    document, planted, root = make_planted(tmp_path, 60)
    output = tmp_path / "checked"
    findings = check(document, root, output, "--num-suspects", "12")
    shown = capsys.readouterr().out
    count = sum(map(len, planted.values()))
    precision, recall = measure(findings, planted, count)
    assert count > 20 and precision > 0.6 and recall > 0.6
    assert measure(findings, planted, len(findings))[1] > 0.85
    first = findings[0]
    assert f"{first['score']:.2f}" in shown and first["file_name"] in shown
    assert f"{len(findings)} suspects (nothing is annotated here: " in shown
    page = (output / "label_errors.html").read_text()
    assert page.count("<figure>") == 12 and "http" not in page


@pytest.mark.slow
def test_how_many_planted_errors_are_among_the_first(tmp_path, capsys):
    """Prints the table of docs/own_data.md."""
    document, planted, root = make_planted(tmp_path, 300)
    findings = check(document, root, tmp_path / "checked", "--num-suspects", "0")
    count = sum(map(len, planted.values()))
    with capsys.disabled():
        print(f"\n{count} planted errors, {len(findings)} suspects")
        for first in (20, 50, 100, count, len(findings)):
            precision, recall = measure(findings, planted, first)
            print(f"first {first}: precision {precision:.2f}, recall {recall:.2f}")
        everything = {which_planted(f, planted) for f in findings} - {None}
        for kind in KINDS:
            found = sum(hit[0] == kind for hit in everything)
            print(f"{kind}: {found} of {len(planted[kind])}")
    precision, recall = measure(findings, planted, count)
    assert precision > 0.75 and recall > 0.75


def ended_by(*argv):
    with pytest.raises(SystemExit) as ended:
        main(["check", *map(str, argv)])
    text = str(ended.value.code)
    assert text.startswith("error: ") and "\n" not in text and text.isprintable()
    return text


def test_bad_input_is_one_line(tmp_path, capsys):
    json_file, root = write_dataset(tmp_path / "data")
    shapes = ["--model", shipped_checkpoint(), "--config-file", shipped_config()]
    given = (json_file, root, "--output", tmp_path / "out")
    assert "the model knows no class cat, which the data set has" in ended_by(*given, *shapes)
    assert "no.pth does not exist" in ended_by(*given, "--model", "no.pth")
    (tmp_path / "empty").mkdir()
    assert "there is no config.yaml" in ended_by(*given, "--model", tmp_path / "empty")
    text = ended_by(*given, *shapes, "--min-score", "7")
    assert "must lie between 0 and 1, got 7.0" in text
    with pytest.raises(SystemExit) as ended:
        main(["check", json_file, root, "--config-file", "x.py"])
    assert ended.value.code == 2 and "goes with --model" in capsys.readouterr().err


def test_boxes_and_files_that_are_none_are_left_out(tmp_path):
    document, planted, root = make_planted(tmp_path, 6)
    boxes = ([1, 2, 3], [0, 0, -5, 3], [float("nan"), 0, 5, 5], "x", [0, 0, 1e9, 4])
    for annotation, box in zip(document["annotations"], boxes):
        annotation["bbox"] = box
    (root / document["images"][2]["file_name"]).write_bytes(b"no image")
    findings = check(document, root, tmp_path / "checked")
    bad = {a["id"] for a in document["annotations"][: len(boxes)]}
    assert not bad & {f["annotation_id"] for f in findings}
    assert all(f["image_id"] != document["images"][2]["id"] for f in findings)
