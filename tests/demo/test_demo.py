"""demo/demo.py as a user runs it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import MetadataCatalog
from PIL import Image
from small_disks import small_disk
from tolerances import tolerance

from detection_toolkit.config import get_config
from detection_toolkit.data.videos import check_video
from detection_toolkit.engine import shipped_config
from detection_toolkit.engine.arguments import find_pictures, parse_arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def run(demo, weights, monkeypatch):
    """Runs the demo with the random detector; returns the exit code."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)

    def call(*arguments) -> int:
        overrides = ["--opts", f"train.init_checkpoint={weights}", "train.device=cpu"]
        try:
            return demo.main([*map(str, arguments), *overrides])
        except SystemExit as ended:
            if isinstance(ended.code, int):
                return ended.code
            print(ended.code, file=sys.stderr)  # as Python does
            return 1

    return call


def write(path, picture) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(path.suffix, picture)[1].tofile(path)
    return str(path)


def test_a_folder_with_a_broken_picture_and_difficult_names(run, tmp_path, picture, capfd, caplog):
    folder = tmp_path / "in put"
    write(folder / "plain.png", picture)
    write(folder / "two words ñ 図.jpg", picture)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    (folder / "notes.txt").write_text("not a picture")
    output = tmp_path / "new" / "out"
    assert run("--input", folder, "--output", output, "--confidence-threshold", 0.1) == 1
    assert sorted(p.name for p in output.iterdir()) == ["plain.png", "two words ñ 図.jpg"]
    shown = capfd.readouterr()
    assert "broken.jpg: cannot be decoded" in shown.err
    assert "1 of 3 pictures unreadable" in shown.out + shown.err + caplog.text
    drawn = cv2.imread(str(output / "plain.png"))
    assert drawn.shape == (360, 480, 3)  # enlarged, for the labels
    plain = cv2.resize(picture, (480, 360), interpolation=cv2.INTER_NEAREST)
    assert (np.abs(drawn.astype(int) - plain).max(axis=2) > 60).mean() > 0.005


def test_without_detections_the_picture_is_written_all_the_same(run, tmp_path, picture, capfd):
    file = write(tmp_path / "a.png", picture)
    output = tmp_path / "drawn.png"
    threshold = ["--confidence-threshold", 1.1, "--scale", 1]
    assert run("--input", file, "--output", output, *threshold) == 0
    shown = capfd.readouterr()
    (line,) = [x for x in (shown.out + shown.err).splitlines() if "0 detections" in x]
    assert re.search(r"\(the best score is 0\.\d\d: lower --confidence-threshold; a detec", line)
    assert np.array_equal(cv2.imread(str(output)), picture)


def test_advice_is_given_once(run, tmp_path, picture, capfd):
    for name in "abc":
        write(tmp_path / "in" / f"{name}.png", picture)
    threshold = ["--confidence-threshold", 1.1]
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", *threshold) == 0
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("0 detections") == 3
    assert (shown.out + shown.err).count("the best score is 0.") == 3
    assert (shown.out + shown.err).count("lower --confidence-threshold") == 1
    assert "picture/s" not in shown.err  # no bar where there is no terminal


def test_without_config_and_weights_the_shipped_detector_is_named(demo, caplog, monkeypatch):
    logger = logging.getLogger("demo")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    arguments = ["--input", "a.png", "train.device=cpu"]
    demo.build_predictor(parse_arguments(demo.get_parser(), arguments))
    assert "shipped detector, which knows drawn shapes alone (circle, squ" in caplog.text
    caplog.clear()
    arguments += ["--config-file", shipped_config()]
    demo.build_predictor(parse_arguments(demo.get_parser(), arguments))
    assert not caplog.text


def test_weights_of_a_run_bring_their_config(demo, weights, tmp_path, picture, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = get_config("stageinteractor/shapes_tiny.py")
    cfg.dataloader.test.mapper.image_format = "BGR"  # as no packaged config has it
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    shutil.copy(weights, folder / "model_best.pth")
    file = write(tmp_path / "a.png", picture)
    for given in (folder, folder / "model_best.pth"):
        arguments = ["--input", file, "--weights", str(given), "train.device=cpu"]
        args = parse_arguments(demo.get_parser(), arguments)
        assert demo.build_predictor(args).input_format == "BGR"
    # A config that is named counts.
    named = ["--config-file", "stageinteractor/shapes_tiny.py"]
    args = parse_arguments(demo.get_parser(), [*arguments[:2], "--weights", weights, *named])
    assert demo.build_predictor(args).input_format == "RGB"


def test_detections_as_json(run, tmp_path, picture, monkeypatch):
    file = write(tmp_path / "a.png", picture)
    monkeypatch.setenv("HOME", str(tmp_path))
    results = tmp_path / "deep" / "r.json"
    options = ["--confidence-threshold", 0.1, "--save-json", "~/deep/r.json"]
    assert run("--input", file, "--output", tmp_path / "out", *options) == 0
    records = json.loads(results.read_text())
    assert records and {r["image_id"] for r in records} == {file}
    assert min(r["score"] for r in records) >= 0.1
    names = MetadataCatalog.get("shapes_val").thing_classes
    assert all(r["category_name"] == names[r["category_id"]] for r in records)
    x, y, width, height = records[0]["bbox"]
    assert 0 <= x and x + width <= 120.01 and 0 <= y and y + height <= 90.01


def test_a_batch_gives_what_one_by_one_gives(run, tmp_path, picture, capfd):
    """Pictures of two sizes, one too thin to be resized and one broken among them."""
    folder = tmp_path / "in"
    for name, content in {
        "a": picture,
        "b": picture[:, ::-1],
        "c": picture[:60],
        "d": picture[::-1],
    }.items():
        write(folder / f"{name}.png", content)
    (folder / "bad.png").write_bytes(b"no picture")
    write(folder / "thin.png", np.zeros((1, 3000, 3), np.uint8))
    resizing = (
        "dataloader.test.mapper.augmentations=[{_target_: detectron2.data.transforms."
        "ResizeShortestEdge, short_edge_length: 90, max_size: 200}]"
    )
    found = {}
    for size in (1, 4):
        file = tmp_path / f"{size}.json"
        options = ["--save-json", file, "--confidence-threshold", 0.1, "--batch-size", size]
        output = tmp_path / str(size)
        assert run("--input", folder, "--output", output, *options, resizing) == 1
        shown = capfd.readouterr().err
        assert "bad.png: cannot be decoded" in shown and "skipped" in shown
        assert shown.count("skipped") == 2
        assert sorted(p.name for p in output.iterdir()) == ["a.png", "b.png", "c.png", "d.png"]
        found[size] = json.loads(file.read_text())
    assert len(found[1]) == len(found[4]) > 20
    limits = tolerance(torch.float32, 1.0, 1000)
    for name in "abcd":
        scores = [
            torch.tensor([r["score"] for r in found[n] if r["image_id"].endswith(f"{name}.png")])
            for n in (1, 4)
        ]
        torch.testing.assert_close(*scores, **limits)


def test_inputs_of_one_name_do_not_overwrite_each_other(demo, tmp_path, picture):
    files = [tmp_path / folder / "x.png" for folder in "abc"] + [tmp_path / "d" / "x_2.PNG"]
    for file in files:
        write(file, picture)
    found = find_pictures([str(tmp_path / "a"), str(tmp_path / "[bcd]" / "*")])
    assert found == files
    outputs = demo.choose_outputs(found, str(tmp_path / "out"))
    assert len({p.name.lower() for p in outputs}) == len(files)
    assert all(p.parent == tmp_path / "out" for p in outputs)


def test_a_picture_given_twice_is_taken_once(demo, tmp_path, picture):
    file = write(tmp_path / "x.png", picture)
    assert find_pictures([file, str(tmp_path), str(tmp_path / "*.png")]) == [tmp_path / "x.png"]


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file: ~\$x.jpg"):
        find_pictures(["~$x.jpg"])


def test_a_name_that_looks_like_a_glob_is_a_name_first(demo, tmp_path, picture):
    write(tmp_path / "a[1].png", picture)
    assert find_pictures([str(tmp_path / "a[1].png")]) == [tmp_path / "a[1].png"]


def test_formats_that_are_only_read_are_written_as_png(demo, tmp_path):
    files = [tmp_path / "a.ppm", tmp_path / "a.png"]
    outputs = demo.choose_outputs(files, str(tmp_path / "out"))
    assert [p.name for p in outputs] == ["a.png", "a_2.png"]


def test_an_input_is_never_overwritten(run, tmp_path, picture, capfd):
    file = write(tmp_path / "a.png", picture)
    for output in (tmp_path, file):
        assert run("--input", file, "--output", output) == 1
        assert "a.png is an input" in capfd.readouterr().err
    assert np.array_equal(cv2.imread(file), picture)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nowhere.png", "--output", "out"], "no such file: nowhere.png"),
        (["--input", "no*thing", "--output", "out"], "no such file: no*thing"),
        (["--video-input", "nowhere.mp4", "--output", "out"], "no such video: nowhere.mp4"),
        (["--input", "nowhere.png"], "--output"),
        (["--config-file", "no/such.py", "--input", "a.png", "--output", "out"], "no/such.py"),
        (["--input", "a.png", "--output", "out", "--batch-size", "0"], "--batch-size must be"),
        (["--input", "a.png", "--output", "out", "--tile", "big"], "--tile big: give pixels"),
        (["--input", "a.png", "--output", "out", "--tile", "640x8"], "a side must be 32"),
        (["--input", "a.png", "--output", "out", "--tile-overlap", "0.3"], "need --tile"),
        (["--input", "a.png", "--output", "out", "--tiles-only"], "need --tile"),
        (
            ["--input", "a.png", "--output", "out", "--tile", "64", "--tile-overlap", "1"],
            "1.0 is not between 0 and 0.9",
        ),
        (["--input", "a.png", "--output", "out", "--track"], "--track is for --video-input"),
        (["--input", "a.png", "b.MP4", "--output", "out"], "b.MP4 is a video: give it by itself"),
        (["--input", "b.mp4", "--output", "out"], "no such video: b.mp4"),
        (["--input", "b.ts", "--output", "out"], "no such video: b.ts"),
    ],
)
def test_mistakes_are_named(run, monkeypatch, tmp_path, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    error = capfd.readouterr().err
    assert error.count("error:") == 1 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_glob_of_videos_is_all_of_them_and_a_folder_is_none(run, tmp_path, picture, capfd):
    folder = tmp_path / "pictures.mp4"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), picture)
    out = tmp_path / "out"
    assert run("--input", str(folder), "--output", str(out)) == 0
    assert [path.name for path in out.iterdir()] == ["a.png"]
    make_video(tmp_path / "one.mp4", picture, frames=2)
    found = tmp_path / "found.json"
    glob = str(tmp_path / "*.mp4")  # the folder is no file that it stands for
    words = ["--input", glob, "--output", str(out), "--confidence-threshold", "0"]
    assert run(*words, "--save-json", str(found)) == 0
    assert {result["image_id"] for result in json.loads(found.read_text())} == {0, 1}
    make_video(tmp_path / "two.mp4", picture, frames=2)
    assert run(*words) == 1
    assert "one.mp4 is a video: give it by itself" in capfd.readouterr().err


def make_video(path, picture, frames: int) -> str:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, picture.shape[1::-1])
    for i in range(frames):
        writer.write(np.roll(picture, 4 * i, axis=1))
    writer.release()
    return str(path)


@pytest.mark.parametrize("option", ["--video-input", "--input"])
def test_a_video_becomes_an_mp4_of_the_same_length(run, tmp_path, picture, option):
    source = make_video(tmp_path / "clip.mp4", picture, frames=6)
    assert run(option, source, "--output", tmp_path / "out") == 0
    result = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert result.isOpened() and result.get(cv2.CAP_PROP_FPS) == pytest.approx(12.0)
    frames = 0
    while True:
        ok, frame = result.read()
        if not ok:
            break
        assert frame.shape == (90, 120, 3)
        frames += 1
    assert frames == 6


def write_animation(path, picture):
    frames = [Image.fromarray(np.roll(picture, 9 * shift, axis=1)) for shift in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return str(path)


def test_an_animated_gif_is_a_video_where_it_is_alone(run, tmp_path, picture, capfd, caplog):
    moving = write_animation(tmp_path / "moving.gif", picture)
    options = ["--confidence-threshold", 0.1, "--output"]
    assert run("--input", moving, *options, tmp_path / "out") == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["moving.mp4"]
    shown = capfd.readouterr()
    assert "moving.gif: 3 frames" in shown.out + shown.err + caplog.text
    # Among others, and where a picture is to be written, it is a picture.
    still = str(tmp_path / "still.gif")
    Image.fromarray(picture).save(still)
    other = write_animation(tmp_path / "other.webp", picture)
    assert run("--input", moving, still, other, *options, tmp_path / "all") == 0
    assert len(list((tmp_path / "all").iterdir())) == 3
    shown = capfd.readouterr()
    lines = (shown.out + shown.err).splitlines()
    said = {p: [line for line in lines if f"{p}: " in line] for p in (moving, still, other)}
    for path, told in ((moving, True), (other, True), (still, False)):
        assert ("in the first picture of an animation" in said[path][0]) == told
    assert run("--input", moving, *options, tmp_path / "first.png") == 0
    assert cv2.imread(str(tmp_path / "first.png")) is not None


def test_detections_of_a_video_as_json(run, tmp_path, picture):
    source = make_video(tmp_path / "clip.mp4", picture, frames=5)
    found = {}
    for size in (1, 3):
        file = tmp_path / f"{size}.json"
        options = ["--save-json", file, "--confidence-threshold", 0.1, "--batch-size", size]
        assert run("--video-input", source, "--output", tmp_path / f"{size}.mp4", *options) == 0
        found[size] = json.loads(file.read_text())
    assert {r["image_id"] for r in found[1]} == set(range(5))
    assert all(r["time"] == pytest.approx(r["image_id"] / 12, abs=1e-6) for r in found[1])
    assert len(found[1]) == len(found[3]) and "track_id" not in found[1][0]
    scores = [torch.tensor([r["score"] for r in found[n]]) for n in (1, 3)]
    torch.testing.assert_close(*scores, **tolerance(torch.float32, 1.0, 1000))


def test_a_tracked_video_has_numbers(run, tmp_path, picture):
    pytest.importorskip("trackers")
    source = make_video(tmp_path / "clip.mp4", picture, frames=4)
    plain, tracked = tmp_path / "plain.mp4", tmp_path / "tracked.mp4"
    options = ["--save-json", tmp_path / "r.json", "--confidence-threshold", 0.1]
    assert run("--video-input", source, "--output", plain, *options) == 0
    assert run("--video-input", source, "--output", tracked, *options, "--track") == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert {r["track_id"] for r in results if r["image_id"] == 0} == {None}
    numbers = [r["track_id"] for r in results if r["image_id"] == 3]
    seen = [n for n in numbers if n is not None]
    assert seen and len(set(seen)) == len(seen)
    assert not np.array_equal(*(last_frame(path) for path in (plain, tracked)))


def test_moving_shapes_keep_their_numbers(demo, tmp_path):
    """Three shapes on lines that pass each other, found by the shipped detector."""
    pytest.importorskip("trackers")
    colours = {"circle": (40, 40, 220), "square": (220, 60, 40), "triangle": (40, 200, 60)}
    lines = {"circle": (15, 30, 6), "square": (145, 66, -6), "triangle": (40, 105, 4)}
    size = (160, 128)
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, size)
    for t in range(18):
        frame = np.full((*size[::-1], 3), 120, np.uint8)
        for name, (x, y, speed) in lines.items():
            place = (x + speed * t, y)
            if name == "circle":
                cv2.circle(frame, place, 14, colours[name], -1, cv2.LINE_AA)
                continue
            corners = {"square": [(-13, -13), (13, -13), (13, 13), (-13, 13)]}
            triangle = [(0, -15), (14, 11), (-14, 11)]
            points = np.array(corners.get(name, triangle)) + place
            cv2.fillPoly(frame, [points], colours[name], cv2.LINE_AA)
        writer.write(frame)
    writer.release()
    file = tmp_path / "r.json"
    options = ["--track", "--batch-size", "6", "--confidence-threshold", "0.5"]
    options += ["--save-json", str(file), "train.device=cpu"]
    source = ["--video-input", str(tmp_path / "a.mp4"), "--output", str(tmp_path / "b.mp4")]
    written = []
    for _ in range(2):
        assert demo.main([*source, *options]) == 0
        written.append(file.read_bytes())
    assert written[0] == written[1]
    numbers = {name: set() for name in lines}
    for result in json.loads(written[0]):
        if result["track_id"] is not None and result["category_name"] in numbers:
            x, y, width, height = result["bbox"]
            (at_x, at_y, speed) = lines[result["category_name"]]
            assert abs(x + width / 2 - at_x - speed * result["image_id"]) < 12
            assert abs(y + height / 2 - at_y) < 12
            numbers[result["category_name"]].add(result["track_id"])
    assert all(len(of_shape) == 1 for of_shape in numbers.values())
    assert len(set.union(*numbers.values())) == 3


def last_frame(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames[-1]


def test_packages_that_tracking_lacks_are_named_before_the_work(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert run("--video-input", "clip.mp4", "--output", tmp_path / "out", "--track") == 1
    assert "pip install --no-deps trackers" in one_line_of(capfd.readouterr().err)


def test_tiles_of_a_picture(run, tmp_path, picture):
    """Tiles that share nothing give four times what one picture gives, all of it within."""
    file = write(tmp_path / "a.png", np.tile(picture, (2, 2, 1)))
    counts = []
    for tiles in ([], ["--tile", "120x90", "--tile-overlap", 0, "--tiles-only"], ["--tile", 300]):
        options = ["--save-json", tmp_path / "r.json", "--confidence-threshold", 0.1]
        assert run("--input", file, "--output", tmp_path / "b.png", *options, *tiles) == 0
        results = json.loads((tmp_path / "r.json").read_text())
        counts.append(len(results))
        for x, y, width, height in (r["bbox"] for r in results):
            assert 0 <= x and x + width <= 240.01 and 0 <= y and y + height <= 180.01
    assert 0 < counts[0] == counts[2] and counts[1] == 4 * counts[0]


def test_a_video_does_not_overwrite_itself(run, tmp_path, picture, capfd):
    source = make_video(tmp_path / "clip.mp4", picture, frames=2)
    assert run("--video-input", source, "--output", tmp_path) == 1
    assert "clip.mp4 is the input" in capfd.readouterr().err


def test_what_is_no_video_is_named(run, tmp_path, capfd):
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"no video at all")
    assert run("--video-input", file, "--output", tmp_path / "out") == 1
    assert "clip.mp4" in capfd.readouterr().err


def test_the_script_itself_runs_without_a_display(weights, tmp_path, picture):
    file = write(tmp_path / "a.png", picture)
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo" / "demo.py"), "--input", file, "--output", "out"]
        + ["--opts", f"train.init_checkpoint={weights}", "train.device=cpu"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in hidden},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.png").is_file()


OLD = '[{"image_id": "old"}]'


def one_line_of(text):
    """The error, which is one line and the last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in text
    assert ".partial" not in text
    return lines[-1]


def leftovers(folder):
    return [path for path in folder.rglob(".*") if path.is_file()]


def test_a_full_disk_is_one_line_and_leaves_the_old_results(run, tmp_path, picture, capfd):
    file = write(tmp_path / "a.png", picture)
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        (disk / "old.json").write_text(OLD)
        (disk / "filler").write_bytes(bytes(52 * 1024))
        options = ["--save-json", disk / "old.json", "--confidence-threshold", 0]
        assert run("--input", file, "--output", disk / "out", *options) == 1
        assert "No space left on device" in one_line_of(capfd.readouterr().err)
        with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert run("--input", file, "--output", tmp_path / "out", *options) == 1
        assert "No space left on device" in one_line_of(capfd.readouterr().err)
        assert (disk / "old.json").read_text() == OLD
        assert not leftovers(disk)


def test_a_video_on_a_full_disk_is_named(run, tmp_path, picture, capfd):
    large = cv2.resize(picture, (640, 480), interpolation=cv2.INTER_NEAREST)
    source = make_video(tmp_path / "clip.mp4", large, frames=12)
    disk = tmp_path / "disk"
    with small_disk(disk, 40):
        (disk / "clip.mp4").write_bytes(b"old")
        assert run("--video-input", source, "--output", disk / "clip.mp4") == 1
        assert "as a whole" in one_line_of(capfd.readouterr().err)
        assert (disk / "clip.mp4").read_bytes() == b"old"
        assert not leftovers(disk)


def test_a_folder_that_takes_nothing_is_one_line(run, tmp_path, picture, capfd):
    file = write(tmp_path / "a.png", picture)
    with small_disk(tmp_path / "disk", 64, read_only=True):
        for output in (tmp_path / "disk", tmp_path / "disk" / "out"):
            assert run("--input", file, "--output", output) == 1
            assert "Read-only file system" in one_line_of(capfd.readouterr().err)


def test_a_folder_in_the_way_is_one_line(run, tmp_path, picture, capfd):
    file = write(tmp_path / "a.png", picture)
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert run("--input", file, "--output", tmp_path / "out") == 1
    assert "a.png is a folder" in one_line_of(capfd.readouterr().err)
    (tmp_path / "file").write_text("")
    assert run("--input", file, "--output", tmp_path / "file" / "out") == 1
    assert "file" in one_line_of(capfd.readouterr().err)
    saved = ["--output", tmp_path / "b.png", "--save-json", tmp_path]
    assert run("--input", file, *saved) == 1
    assert "is a folder: name a file in it" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "b.png").exists()  # said before the work


def test_a_link_in_the_place_of_a_result_is_not_followed(run, tmp_path, picture):
    file = write(tmp_path / "a.png", picture)
    source = make_video(tmp_path / "clip.mp4", picture, frames=2)
    secret = tmp_path / "secret"
    secret.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.png", "a.json", "clip.mp4"):
        (out / name).symlink_to(secret)
    assert run("--input", file, "--output", out, "--save-json", out / "a.json") == 0
    assert run("--video-input", source, "--output", out) == 0
    assert secret.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir())


PLAYLISTS = {
    "playlist.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    "list.mp4": "ffconcat version 1.0\nfile '{}'\n",
    "dash.mp4": '<?xml version="1.0"?><MPD><BaseURL>{}</BaseURL></MPD>',
    "dash_behind_ogg.mp4": "OggS" + " " * 100_000 + "<MPD><BaseURL>{}</BaseURL></MPD>",
    "dash_behind_mov.mp4": "AAAAfree<mpd><BaseURL>{}</BaseURL></mpd>",
    "session_behind_flv.mp4": "FLV\x01\nv=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "session.avi": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_list_of_other_files_is_no_video(run, tmp_path, picture, capfd, name):
    secret = make_video(tmp_path / "secret.mp4", picture, frames=2)
    path = tmp_path / "given" / name
    path.parent.mkdir()
    path.write_text(PLAYLISTS[name].format(secret))
    assert run("--video-input", path, "--output", tmp_path / "out") == 1
    assert "is no video of a known format" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending, code", [(".avi", "MJPG"), (".mp4", "mp4v"), (".mkv", "mp4v")])
def test_containers_of_frames_are_videos(tmp_path, picture, ending, code):
    path = tmp_path / f"clip{ending}"
    fourcc = cv2.VideoWriter_fourcc(*code)
    writer = cv2.VideoWriter(str(path), fourcc, 12.0, picture.shape[1::-1])
    writer.write(picture)
    writer.release()
    check_video(path)


def test_a_name_that_is_a_command_is_a_name(run, tmp_path, picture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "clip.mp4", picture, frames=2)
    os.rename("clip.mp4", "concat:a|b.mp4")
    assert run("--video-input", "concat:a|b.mp4", "--output", "out.mp4") == 0
    assert (tmp_path / "out.mp4").is_file()


def test_names_give_the_terminal_no_orders(run, tmp_path, picture, capfd, caplog):
    names = ["a\x1b]0;owned\x07.png", "b\x9b2J.png", "c\u202e.png", "d\r.png"]
    for name in names:
        write(tmp_path / "in" / name, picture)
    source = make_video(tmp_path / "clip.mp4", picture, frames=2)
    os.rename(source, tmp_path / "v\x1b[2J.mp4")
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    assert run("--video-input", tmp_path / "v\x1b[2J.mp4", "--output", tmp_path / "out") == 0
    missing = tmp_path / "x\x1b[2J"
    assert run("--input", missing, "--output", tmp_path / "out") == 1
    assert run("--video-input", missing, "--output", tmp_path / "out") == 1
    shown = capfd.readouterr()
    # tqdm itself sends a new line and moves up one.
    text = re.sub(r"\x1b\[A|\r", "", shown.out + shown.err) + caplog.text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert len(list((tmp_path / "out").iterdir())) == 5
