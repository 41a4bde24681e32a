import pytest
from coco_files import write_image, xyxy
from detectron2.data import MetadataCatalog

from detection_toolkit.data import dataset_names, get_detection_dataset
from detection_toolkit.data.formats import open_source, read_split
from detection_toolkit.data.judgement import judge


class Reader:
    """Of data sets in a folder, as training reads them."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def image(self, name, height=64, width=96):
        write_image(self.folder / name, height, width)

    def __call__(self, name=".", split=None, **options):
        """{name of an image: [(class, x0, y0, x1, y1)]}"""
        node = {"path": str(self.folder / name), "split": split, **options}
        dicts = get_detection_dataset(**node, filter_empty=False)
        classes = MetadataCatalog.get(dataset_names(node)[0]).thing_classes
        return {
            str(d["file_name"]).removeprefix(f"{self.folder}/"): [
                (classes[a["category_id"]], *xyxy(a)) for a in d["annotations"]
            ]
            for d in dicts
        }

    def findings(self, name=".", split=None):
        """{kind: the first example}"""
        part = read_split(open_source(self.folder / name), split)
        found = judge(part.document, str(part.image_root), found=part.found).findings
        return {f.kind: f.examples[0] for f in found}


@pytest.fixture
def read(tmp_path):
    return Reader(tmp_path)
