"""Detectron2's own loop on a config of this project, as its tools/lazyconfig_train_net.py has it.

    python examples/detectron2_loop.py train.max_iter=100 train.output_dir=output/detectron2_loop

Model, data, optimiser and schedule are the same as with train_net.py. What this loop lacks is
listed in docs/extending.md.
"""

import sys

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils.file_io import PathManager

from detection_toolkit.config import find_config_file


def evaluate(cfg, model):
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(cfg):
    PathManager.mkdirs(cfg.train.output_dir)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    trainer.train(0, cfg.train.max_iter)


if __name__ == "__main__":
    cfg = LazyConfig.load(find_config_file("stageinteractor/shapes_tiny.py"))
    cfg.dataloader.evaluator.dataset_name = cfg.dataloader.test.dataset.names
    train(LazyConfig.apply_overrides(cfg, sys.argv[1:]))
