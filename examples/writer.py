"""A writer of Detectron2 that writes the loss to a CSV file.

    python examples/writer.py train.max_iter=100 train.output_dir=output/writer

The file is losses.csv in train.output_dir.
"""

import csv
import sys
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer, prepare_config


class CsvWriter(EventWriter):
    """Writes iteration and ``total_loss`` every ``train.log_period`` iterations."""

    def __init__(self, path):
        self.file = Path(path).open("w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["iteration", "total_loss"])
        self.written = -1

    def write(self):
        loss, iteration = get_event_storage().latest()["total_loss"]
        if iteration > self.written:  # it is called once more after the last step
            self.rows.writerow([iteration, loss])
            self.file.flush()
            self.written = iteration

    def close(self):
        self.file.close()


class MyTrainer(Trainer):
    def build_writers(self):
        return [*super().build_writers(), CsvWriter(Path(self.settings.output_dir, "losses.csv"))]


if __name__ == "__main__":
    overrides = sys.argv[1:]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), overrides)
    trainer = MyTrainer(prepare_config(cfg, overrides))
    trainer.resume_or_load(resume=False)
    trainer.train()
