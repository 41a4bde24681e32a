"""A hook of Detectron2 that logs how far the weights have moved since the run began.

    python examples/hook.py train.max_iter=100 train.output_dir=output/hook

The scalar ``weight_change`` is then in metrics.json and in TensorBoard.
"""

import sys

import torch
from detectron2.engine import HookBase

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer, prepare_config


class WeightChange(HookBase):
    """Logs the L2 distance between the weights now and before the first step."""

    def before_train(self):
        self.start = [p.detach().clone() for p in self.trainer.model.parameters()]

    def after_step(self):
        pairs = zip(self.trainer.model.parameters(), self.start)
        squares = sum((now.detach() - start).square().sum() for now, start in pairs)
        self.trainer.storage.put_scalar("weight_change", torch.sqrt(squares).item())


class MyTrainer(Trainer):
    def build_hooks(self):
        hooks = super().build_hooks()
        hooks.insert(0, WeightChange())  # before the hook that writes, which is the last
        return hooks


if __name__ == "__main__":
    overrides = sys.argv[1:]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), overrides)
    trainer = MyTrainer(prepare_config(cfg, overrides))
    trainer.resume_or_load(resume=False)
    trainer.train()
