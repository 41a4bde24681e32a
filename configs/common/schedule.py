"""Learning rate schedules for 16 images per step.

COCO has 117,266 training images with objects, so an epoch has 7,330 iterations.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

ITERATIONS_PER_EPOCH = 7330
ITERATIONS_PER_FULL_EPOCH = 7393


def multistep_schedule(epochs: int, drops: tuple, warmup_iters: int = 500):
    """Ten times less at each of the epochs ``drops``, after a linear warm-up from 0.001."""
    max_iter = epochs * ITERATIONS_PER_EPOCH
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[0.1**i for i in range(len(drops) + 1)],
            milestones=[epoch * ITERATIONS_PER_EPOCH for epoch in drops],
            num_updates=max_iter,
        ),
        warmup_length=warmup_iters / max_iter,
        warmup_factor=0.001,
        warmup_method="linear",
    )


def one_drop_schedule(epochs: int, drop: int):
    """Ten times less at epoch ``drop``, no warm-up, as DETRs have it.

    Theirs are epochs of all 118,287 images, those without objects among them.
    """
    return L(MultiStepParamScheduler)(
        values=[1.0, 0.1],
        milestones=[drop * ITERATIONS_PER_FULL_EPOCH],
        num_updates=epochs * ITERATIONS_PER_FULL_EPOCH,
    )


def schedule_by_iterations(max_iter: int, drops: tuple, *, warmup_iters: int = 0):
    """Ten times less at each of the iterations ``drops``; a linear warm-up is from 0.0001."""
    schedule = L(MultiStepParamScheduler)(
        values=[0.1**i for i in range(len(drops) + 1)],
        milestones=list(drops),
        num_updates=max_iter,
    )
    if not warmup_iters:
        return schedule
    return L(WarmupParamScheduler)(
        scheduler=schedule,
        warmup_length=warmup_iters / max_iter,
        warmup_factor=0.0001,
        warmup_method="linear",
    )


def cosine_schedule(warmup_share: float = 0.1, end_value: float = 0.001):
    """One cycle: linear warm-up over a share of the run, then a half cosine down."""
    return L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=end_value),
        warmup_length=warmup_share,
        warmup_factor=0.04,
        warmup_method="linear",
    )


schedule_1x = multistep_schedule(12, (8, 11))
schedule_3x = multistep_schedule(36, (27, 33))
schedule_crop_1x = multistep_schedule(12, (8, 11))
schedule_crop_2x = multistep_schedule(24, (16, 22))
schedule_crop_3x = multistep_schedule(36, (24, 33))
