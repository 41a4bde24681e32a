import logging

import pytest
from coco_files import make_document
from fault_runs import run_forked, run_overrides
from small_runs import data_overrides, write_dataset


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Command lines that a test calls write their log to what pytest closes afterwards."""
    loggers = [logging.getLogger(n) for n in ("detectron2", "fvcore", "detection_toolkit", "demo")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Overrides for a data set of seven images, three of which are upright."""
    document = make_document(num_images=7)
    for image in document["images"][::2]:
        image["height"], image["width"] = 96, 64
    folder = tmp_path_factory.mktemp("data")
    return data_overrides(*write_dataset(folder, document))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, small_data):
    """The folder of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("undisturbed")
    code = run_forked(run_overrides(output, small_data), log=output / "console.txt")
    assert code == 0, (output / "console.txt").read_text()
    return output
