import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from pycocotools.coco import COCO

from detection_toolkit.data import (
    SHAPES,
    ShapesSpec,
    dataset_names,
    dataset_num_classes,
    ensure_shapes,
    generate_shapes,
    get_detection_dataset,
    register_shapes,
)
from detection_toolkit.data.make_shapes import main
from detection_toolkit.data.shapes import OUTLINES, render_image

SMALL = ShapesSpec(num_images=4, seed=5)
DIGESTS_OF_VERSION_1 = {
    "shapes_train": "81b08beb",
    "shapes_val": "11196d62",
    "shapes_shifted_train": "1342fe90",
    "shapes_shifted_val": "f1b4a667",
    "shapes_hard_train": "bd0bf1a9",
    "shapes_hard_val": "5c2904b4",
}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", SHAPES)
def test_a_data_set_is_the_same_each_time(name, tmp_path):
    spec = replace(SHAPES[name], num_images=12)
    generate_shapes(spec, tmp_path / "a", workers=1)
    generate_shapes(spec, tmp_path / "b", workers=3)
    first = files(tmp_path / "a")
    assert len(first) == 13
    assert first == files(tmp_path / "b")


def test_the_built_in_boxes_are_those_of_this_version():
    # Who changes what is drawn raises VERSION, lest a cache of the former pictures be used.
    digests = {}
    for name, spec in SHAPES.items():
        boxes = [render_image(spec, index)[1] for index in range(20)]
        digests[name] = hashlib.sha1(json.dumps(boxes).encode()).hexdigest()[:8]
    assert digests == DIGESTS_OF_VERSION_1


def test_splits_differ():
    shapes, shifted = SHAPES["shapes_train"], SHAPES["shapes_shifted_train"]
    assert len({spec.seed for spec in SHAPES.values()}) == len(SHAPES)
    assert not set(shapes.backgrounds) & set(shifted.backgrounds)
    assert shifted.classes[:-1] == shapes.classes  # one more, behind the others
    assert shapes == replace(SHAPES["shapes_val"], num_images=6000, seed=shapes.seed)
    assert shifted == replace(SHAPES["shapes_shifted_val"], num_images=1500, seed=shifted.seed)
    hard = SHAPES["shapes_hard_train"]
    assert hard == replace(SHAPES["shapes_hard_val"], num_images=2000, seed=hard.seed)
    assert hard.classes == shapes.classes
    assert hard.mean_objects > shapes.mean_objects and hard.max_size < shapes.max_size


def test_files_are_valid_coco_with_jpeg_and_png(tmp_path):
    spec = replace(SHAPES["shapes_train"], num_images=25)
    generate_shapes(spec, tmp_path / "set")
    coco = COCO(str(tmp_path / "set" / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(spec.classes)
    assert coco.getImgIds() == list(range(1, 26))
    extensions = set()
    for index, image in enumerate(coco.dataset["images"]):
        path = tmp_path / "set" / "images" / image["file_name"]
        extensions.add(path.suffix)
        assert cv2.imread(str(path)).shape == (image["height"], image["width"], 3)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        boxes = [(a["category_id"] - 1, a["bbox"]) for a in annotations]
        assert boxes == render_image(spec, index)[1]
        for a in annotations:
            assert a["area"] == pytest.approx(a["bbox"][2] * a["bbox"][3], abs=0.01)
    assert extensions == {".jpg", ".png"}


@settings(max_examples=60)
@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 5000))
def test_boxes_lie_in_the_image_and_have_the_sizes_asked_for(name, index):
    spec = SHAPES[name]
    image, objects = render_image(spec, index)
    height, width = image.shape[:2]
    assert max(height, width) == spec.long_side
    assert min(height, width) >= int(spec.min_aspect * spec.long_side)
    assert len(objects) <= spec.max_objects
    for label, (x, y, w, h) in objects:
        assert 0 <= label < len(spec.classes)
        assert x >= 0 and y >= 0 and x + w <= width + 0.02 and y + h <= height + 0.02
        assert min(w, h) >= spec.min_size / 2 - 0.02
        assert max(w, h) <= spec.max_size + 0.02


@pytest.mark.parametrize("name", OUTLINES)
def test_a_box_is_tight_around_its_shape(name, monkeypatch):
    # One object on black: what is bright is the object.
    monkeypatch.setattr(
        "detection_toolkit.data.shapes._background",
        lambda spec, rng, height, width: np.zeros((height, width, 3), np.float32),
    )
    spec = ShapesSpec(
        num_images=30,
        seed=7,
        classes=(name,),
        mean_objects=1,
        max_objects=1,
        empty_share=0,
        blur=0,
        noise=0,
    )
    differences = []
    for index in range(spec.num_images):
        image, ((_, (x, y, w, h)),) = render_image(spec, index)
        bright = image.max(2)
        rows, columns = np.nonzero(bright > 0.5 * bright.max())
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        box = np.array([x, y, x + w, y + h])
        assert (found[:2] > box[:2] - 1.25).all() and (found[2:] < box[2:] + 1.25).all()
        if box.min() > 0 and box[2] < image.shape[1] and box[3] < image.shape[0]:
            differences.append(found - box)
    # OpenCV's antialiased outlines reach half a pixel further than their corners.
    assert len(differences) > 10
    assert np.abs(differences).max() < 1.25
    np.testing.assert_allclose(np.mean(differences, 0), [-0.5, -0.5, 0.5, 0.5], atol=0.3)


def test_some_images_are_empty_some_objects_overlap_and_all_classes_occur():
    spec = SHAPES["shapes_shifted_val"]
    counts, labels, overlapping = [], [], 0
    for index in range(spec.num_images):
        _, objects = render_image(spec, index)
        counts.append(len(objects))
        labels += [label for label, _ in objects]
        boxes = [b for _, b in objects]
        overlapping += any(
            a is not b
            and min(a[0] + a[2], b[0] + b[2]) > max(a[0], b[0]) + 3
            and min(a[1] + a[3], b[1] + b[3]) > max(a[1], b[1]) + 3
            for a in boxes
            for b in boxes
        )
    assert 0.01 < counts.count(0) / len(counts) < 0.12
    assert 2.3 < np.mean(counts) < 3.5
    assert overlapping > 0.2 * len(counts)
    shares = np.bincount(labels, minlength=7) / len(labels)
    assert shares.min() > 0.5 / 7


def test_what_is_hidden_too_much_is_left_out():
    crowded = replace(SMALL, mean_objects=30, max_objects=60, min_size=60, empty_share=0)
    counts = {}
    for share in (0.0, 0.4, 1.0):
        spec = replace(crowded, min_visible=share)
        counts[share] = sum(len(render_image(spec, index)[1]) for index in range(4))
    assert counts[0.0] > counts[0.4] > counts[1.0] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": ("circle", "blob")}, "classes=.*blob"),
        ({"classes": ("circle", "circle")}, "classes=.*do not repeat"),
        ({"classes": ()}, "classes="),
        ({"backgrounds": ("sea",)}, "backgrounds=.*'sea'.*clutter"),
        ({"palette": "neon"}, "palette='neon': must be one of"),
        ({"num_images": 0}, "num_images=0"),
        ({"long_side": 8}, "long_side=8"),
        ({"min_aspect": 0}, "min_aspect=0"),
        ({"min_size": 90}, "min_size=90"),
        ({"max_size": 200}, "max_size=200: must be at most long_side=160"),
        ({"mean_objects": 9}, "mean_objects=9: must be between 1 and max_objects=7"),
        ({"empty_share": 1.5}, "empty_share=1.5"),
        ({"min_visible": -0.1}, "min_visible=-0.1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(ValueError, match=f"ShapesSpec.{message}"):
        replace(SMALL, **change)


def test_an_interrupted_generation_leaves_no_data_set_and_is_taken_up_again(tmp_path, monkeypatch):
    def fail(spec, folder, index):
        if index == 2:
            raise OSError("disk full")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr("detection_toolkit.data.shapes._write_image", fail)
        with pytest.raises(OSError, match="disk full"):
            generate_shapes(SMALL, tmp_path / "set")
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    killed = tmp_path / ".set.abc.partial"  # of a process that could not tidy up
    (killed / "images").mkdir(parents=True)
    generate_shapes(SMALL, tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_simultaneous_calls_draw_once(tmp_path, monkeypatch):
    from detection_toolkit.data import shapes

    drawn = []
    monkeypatch.setattr(
        shapes,
        "_write_image",
        lambda spec, folder, index, write=shapes._write_image: (
            drawn.append(index),
            write(spec, folder, index),
        )[1],
    )
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: generate_shapes(SMALL, tmp_path / "set"), range(6)))
    assert sorted(drawn) == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    generate_shapes(SMALL, tmp_path / "set")
    before = files(tmp_path / "set")
    generate_shapes(SMALL, tmp_path / "set")
    with pytest.raises(FileExistsError, match="set holds a split of another kind"):
        generate_shapes(replace(SMALL, seed=6), tmp_path / "set")
    assert files(tmp_path / "set") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="mine exists and is no generated data set"):
        generate_shapes(SMALL, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


def test_the_built_in_sets_are_registered_before_they_are_drawn():
    for name, spec in SHAPES.items():
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(spec.classes)
        assert metadata.evaluator_type == "coco"
        assert dataset_num_classes([name]) == len(spec.classes)


@pytest.mark.parametrize("variable", [True, False])
def test_a_variant_is_registered_then_drawn_into_the_cache(tmp_path, monkeypatch, variable):
    if variable:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        cache = tmp_path / "detection_toolkit_shapes"
    else:
        monkeypatch.delenv("DETECTRON2_DATASETS")
        monkeypatch.setenv("HOME", str(tmp_path))
        cache = tmp_path / ".cache" / "detection_toolkit" / "shapes"
    register_shapes("few_shapes", SMALL)
    register_shapes("few_shapes", SMALL)  # again is no error
    assert not cache.exists()
    assert dataset_names({"names": "few_shapes"}) == ["few_shapes"]
    metadata = MetadataCatalog.get("few_shapes")
    assert os.path.isfile(metadata.json_file) and os.path.isdir(metadata.image_root)
    assert cache in ensure_shapes("few_shapes").parents
    records = get_detection_dataset("few_shapes", filter_empty=False)
    assert len(records) == 4
    for index, record in enumerate(records):
        _, objects = render_image(SMALL, index)
        assert [(a["category_id"], a["bbox"]) for a in record["annotations"]] == objects
        assert os.path.isfile(record["file_name"])


def test_another_spec_has_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_shapes("few_shapes", SMALL)
    register_shapes("other_shapes", replace(SMALL, seed=6))
    with pytest.raises(ValueError, match="'few_shapes' is taken already"):
        register_shapes("few_shapes", replace(SMALL, seed=6))
    one = ensure_shapes("few_shapes")
    DatasetCatalog.remove("few_shapes")
    MetadataCatalog.remove("few_shapes")
    register_shapes("few_shapes", replace(SMALL, seed=6))
    assert ensure_shapes("few_shapes") != one


@pytest.mark.parametrize("name", ["coco_2017_val", "nowhere"])
def test_what_is_not_generated_cannot_be_ensured(name):
    with pytest.raises(KeyError, match=f"'{name}'.*shapes_train"):
        ensure_shapes(name)


DRAW_WHEN_TOLD = """
import sys
from detection_toolkit.data.make_shapes import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


def test_the_command_line_in_two_processes_at_once(tmp_path):
    output = tmp_path / "output"
    command = [sys.executable, "-c", DRAW_WHEN_TOLD, "shapes_val", "--output", str(output)]
    with ExitStack() as stack:
        runs = []
        for _ in range(2):
            run = subprocess.Popen(
                [*command, "--num-images", "40"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(run)
            stack.callback(run.kill)  # before it is waited for
            runs.append(run)
        for run in runs:
            assert run.stdout.readline() == "ready\n"
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        for run in runs:
            printed, _ = run.communicate(timeout=PATIENCE)
            assert run.returncode == 0
            assert printed.splitlines()[-1] == str(output / "shapes_val")
    assert [p.name for p in output.iterdir()] == ["shapes_val"]
    document = json.loads((output / "shapes_val" / "annotations.json").read_text())
    assert len(document["images"]) == len(os.listdir(output / "shapes_val" / "images")) == 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shapes_vall"], "no split is called 'shapes_vall'"),
        (["--num-images", "3"], "--num-images needs --output"),
        (["shapes_val", "--output", "{tmp}", "--num-images", "0"], "num_images=0"),
    ],
)
def test_the_command_line_refuses_nonsense(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([a.replace("{tmp}", str(tmp_path)) for a in arguments])
    assert message in capsys.readouterr().err
