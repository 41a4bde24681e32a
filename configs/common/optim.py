"""AdamW as released: weight decay on everything, norms and biases too."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is set to the model when the optimiser is built.
        # None: the same decay as everything else, unlike Detectron2's stock AdamW.
        weight_decay_norm=None,
        weight_decay_bias=None,
    ),
    lr=2.5e-5,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    # One pass over the weights instead of several; on the CPU since PyTorch 2.4.
    fused=torch.cuda.is_available() or torch.__version__ >= (2, 4),
)
