"""A run that Weights & Biases shows, through the TensorBoard files that the run writes anyway.

    pip install wandb
    python examples/weights_and_biases.py train.output_dir=output/wandb

``WANDB_MODE=offline`` in front of it needs no account and no network.
"""

import sys

import wandb
from detectron2.utils import comm
from omegaconf import OmegaConf

from detection_toolkit.config import apply_overrides, config_text, get_config
from detection_toolkit.engine import Trainer, prepare_config

if __name__ == "__main__":
    overrides = sys.argv[1:]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), overrides)
    prepare_config(cfg, overrides)
    if comm.is_main_process():
        # Before the trainer, which opens the TensorBoard file.
        wandb.init(
            project="stageinteractor",
            sync_tensorboard=True,
            dir=cfg.train.output_dir,
            config={"train": OmegaConf.to_container(cfg.train), "yaml": config_text(cfg)},
        )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    if comm.is_main_process():
        wandb.finish()
