"""Files of each format, changed at random: used, or refused as a user's mistake."""

import json
import random
import shutil

import pytest
from coco_files import make_document
from format_files import make_splits, write_coco, write_images

from detection_toolkit.data.findings import raise_harm
from detection_toolkit.data.formats import FORMATS, WRITERS, convert, open_source, read_split
from detection_toolkit.data.judgement import judge
from detection_toolkit.errors import UserError

TIMES = 40
PIECES = [
    *(b"0", b"-1", b"1e999", b"nan", b"", b" ", b"\n", b"\t", b"\0", b"\xff", b"\xe2\x98\x83"),
    *(b"<", b">", b"&", b'"', b"'", b"[", b"]", b"{", b"}", b",", b":", b";", b"null", b"true"),
    *(b"../", b"/", b"\\", b"*a", b"&a ", b"!!python/name:os.system ", b"<box/>", b"[[[[["),
]


def write_label_studio(folder):
    document = make_document()
    write_images(folder, document["images"])
    value = {"x": 25, "y": 50, "width": 25, "height": 25, "rectanglelabels": ["cat"]}
    polygon = {"points": [[1, 2], [3, 4], [5, 9]], "polygonlabels": ["dog"]}
    results = [
        {"original_width": 96, "original_height": 64, "value": v, "type": "x", "rotation": 0}
        for v in (value, polygon)
    ]
    tasks = [
        {"id": i, "data": {"image": f"/data/{i}.png"}, "annotations": [{"result": results}]}
        for i in range(1, 5)
    ]
    (folder / "export.json").write_text(json.dumps(tasks))


def change(data, chance):
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(at + chance.choice((0, 0, 1, 3, 20)), len(data))
        data = data[:at] + chance.choice(PIECES) + data[end:]
    return data


@pytest.mark.parametrize("name", FORMATS)
def test_changed_files_are_used_or_refused(tmp_path, name):
    folder = tmp_path / "data"
    if name in WRITERS:
        write_coco(tmp_path / "coco", make_splits())
        convert(open_source(tmp_path / "coco"), folder, to=name)
    else:
        folder.mkdir()
        write_label_studio(folder)
    endings = (".json", ".txt", ".yaml", ".xml", ".csv")
    files = sorted(p for p in folder.rglob("*") if p.suffix in endings)
    assert files
    outcomes = {"used": 0, "refused": 0}
    chance = random.Random(name)
    for _ in range(TIMES):
        path = chance.choice(files)
        before = path.read_bytes()
        path.write_bytes(change(before, chance))
        try:
            source = open_source(folder, format=name)
            part = read_split(source, chance.choice([None, "train", "val"]))
            findings = judge(part.document, str(part.image_root), found=part.found).findings
            raise_harm(findings, name)
            outcomes["used"] += 1
        except (UserError, FileNotFoundError) as error:
            assert str(error)
            outcomes["refused"] += 1
        path.write_bytes(before)
    assert min(outcomes.values()) > 0, outcomes
    shutil.rmtree(folder)
