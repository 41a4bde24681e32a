"""Everything about a run that is not model, data or optimiser."""

import torch

train = dict(
    output_dir="./output",
    init_checkpoint="",  # "" is random initialisation
    init_prefix="",  # of the tensors to take from it in training, e.g. "backbone."; "": all
    max_iter=87960,
    device="cuda" if torch.cuda.is_available() else "cpu",
    seed=-1,  # negative: another one in every run
    cudnn_benchmark=False,
    # Bit for bit the same on a CPU, with the same number of threads; slower.
    deterministic=False,
    # enabled: in training; evaluation: when evaluating; precision: or "bfloat16", also on the CPU.
    amp=dict(enabled=False, evaluation=False, precision="float16"),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    clip_grad=dict(enabled=True, max_norm=1.0, norm_type=2.0),
    max_skipped_steps=20,  # in a row, whose losses or gradients are not finite
    allow_pickle=False,  # open init_checkpoint even where that runs code
    accumulation_steps=1,  # forward passes for one step of the optimiser
    ema=dict(enabled=False, decay=0.9999),
    # Number of processes that batch, learning rate and schedule are meant for; when the run has
    # another, they are scaled. 0: never.
    reference_world_size=0,
    checkpointer=dict(period=5000, max_to_keep=5),
    best_checkpointer=dict(enabled=True, metric="bbox/AP", mode="max"),
    eval_period=5000,
    # Also evaluate every stage (AP, fading and growing scores, duplicates, changing labels), after
    # the last iteration and with --eval-only.
    stage_evaluation=False,
    log_period=20,
)
