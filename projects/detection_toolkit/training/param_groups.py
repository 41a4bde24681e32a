"""Parameter groups of the optimizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from detectron2.solver.build import reduce_param_groups
from torch import nn

from ..errors import UserError

__all__ = ["params_with_decay_exceptions"]


def params_with_decay_exceptions(
    model: nn.Module, *, no_weight_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters, those with certain names free of weight decay.

    Detectron2's ``get_default_optimizer_params`` chooses by kind of module or by the last part of
    a name; the released Swin recipe spares some norms but not others, so the whole name decides.

    Args:
        model: the model; as in Detectron2's configs the trainer fills it in.
        no_weight_decay: regular expressions; a parameter whose full name one of them matches
            anywhere is not decayed.

    Returns:
        at most two groups for a ``torch.optim`` optimizer.

    Raises:
        ValueError: an expression matches no parameter at all, so it is misspelt.
    """
    patterns = {pattern: re.compile(pattern) for pattern in no_weight_decay}
    names = [name for name, _ in model.named_parameters()]
    unused = [p for p, regex in patterns.items() if not any(map(regex.search, names))]
    if unused:
        raise UserError(
            f"no parameter of the model has a name that matches {unused}: correct "
            "optimizer.params.no_weight_decay"
        )
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = any(regex.search(name) for regex in patterns.values())
            groups.append({"params": [parameter], **({"weight_decay": 0.0} if spared else {})})
    return reduce_param_groups(groups)
