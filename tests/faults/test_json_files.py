"""JSON files in a folder from somebody else: each reader says what is wrong, or goes on without."""

import pytest
import torch

from detection_toolkit.checkpoint.official_files import read_checkpoint
from detection_toolkit.engine.evaluation import _weights_of_results
from detection_toolkit.engine.folder_lock import LOCK_NAME, locked_folder
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.results import read_json, read_max_dets
from detection_toolkit.export.description import Description, find_description
from detection_toolkit.studies.run import read_record
from detection_toolkit.texts import parse_json
from detection_toolkit.visualization.curves import read_metrics

BAD = [b"[" * 100_000, b"\xff\xfe\x00", b"{", b'{"a": ' * 50_000]
# JSON, but not what is meant.
ODD = [b"5", b"[]", b"null", b'"text"', b'{"iteration": "x"}', b'{"iteration": Infinity}']


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


@pytest.mark.parametrize("content", BAD + ODD, ids=range(len(BAD + ODD)))
def test_files_of_results(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content + b"\n" + b'{"iteration": 3, "total_loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.json: line 1 is not JSON of metrics"):
        read_metrics(path)
    path.write_bytes(content)
    assert read_metrics(path) == {}  # as if a crash had cut the last line short
    assert _weights_of_results(tmp_path) is None
    assert read_max_dets(tmp_path) == 100
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        read_record(path)
    if content in BAD:
        with pytest.raises(UserError, match=r"metrics\.json is damaged.*evaluate again"):
            read_json(path)


@pytest.mark.parametrize("content", [*BAD, *ODD, b'{"host": "a", "process": Infinity, "since": 1}'])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    with locked_folder(tmp_path):
        assert b'"host"' in (tmp_path / LOCK_NAME).read_bytes()


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_a_description_beside_weights_and_in_a_model(tmp_path, content):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path / "pytorch_model.bin")
    text = content.decode("utf-8", "replace")
    assert find_description({"note": text}) is None
    with pytest.raises(UserError, match="cannot be read"):
        Description.from_json(text)
