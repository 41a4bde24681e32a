"""Whatever a file holds, it is used or refused in words. ``make soak`` tries many more."""

import io

import numpy as np
import pytest
from coco_files import make_document, write_dataset
from fuzzing import (
    DIALECTS,
    IMAGES,
    checkpoint,
    damaged,
    damaged_documents,
    tool_documents,
    try_checkpoint,
    try_document,
    try_image,
)
from hypothesis import HealthCheck, given, settings
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzing")
    write_dataset(folder, num_images=3)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Repaired copies of documents are cached in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def test_a_good_document_is_taken(folder):
    assert try_document(make_document(num_images=3), folder)


@settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
@given(document=damaged_documents())
def test_damaged_documents(folder, document):
    try_document(document, folder)


@settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
@given(document=tool_documents())
def test_documents_of_other_tools(folder, document):
    try_document(document, folder)


@pytest.mark.parametrize("index", [None, 0])
@pytest.mark.parametrize("change", DIALECTS)
def test_each_dialect_by_itself(folder, change, index):
    document = make_document(num_images=3)
    change(document, index)
    try_document(document, folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "1e999999", '"\\ud800"', "\ufeff{}", "NaN"]
)
def test_texts_that_are_json_nearly_or_hardly(folder, text):
    assert not try_document(text, folder)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path, name):
    assert Image.open(io.BytesIO(IMAGES[name])).size == (32, 24)
    assert try_image(IMAGES[name], tmp_path / "image")
    generator = np.random.default_rng(1)
    for _ in range(60):
        try_image(damaged(IMAGES[name], generator), tmp_path / "image")


def test_checkpoints(tmp_path):
    good = checkpoint()
    assert try_checkpoint(good, tmp_path / "a.pth")
    generator = np.random.default_rng(1)
    outcomes = [try_checkpoint(damaged(good, generator), tmp_path / "a.pth") for _ in range(200)]
    assert not all(outcomes)
