"""Parameter groups of the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.solver.build import reduce_param_groups
from torch import nn

from ..errors import UserError

__all__ = ["params_with_decay_exceptions"]


def params_with_decay_exceptions(
    model: nn.Module,
    *,
    no_weight_decay: Sequence[str] = (),
    base_lr: float | None = None,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters, those with certain names free of weight decay or slower.

    Detectron2's ``get_default_optimizer_params`` chooses by kind of module or by the last part of
    a name; the released Swin recipe spares some norms but not others, so the whole name decides.

    Args:
        model: the model; as in Detectron2's configs the trainer fills it in.
        no_weight_decay: regular expressions; a parameter whose full name one of them matches
            anywhere is not decayed.
        base_lr: the optimizer's learning rate, for ``lr_factors``.
        lr_factors: regular expression, likewise -> share of ``base_lr`` that a parameter has; the
            first that matches counts.

    Returns:
        few groups for a ``torch.optim`` optimizer.

    Raises:
        UserError: an expression matches no parameter at all, so it is misspelt; factors without
            ``base_lr``.
    """
    names = [name for name, _ in model.named_parameters()]
    spare = _compiled(names, no_weight_decay, "optimizer.params.no_weight_decay")
    slow = _compiled(names, lr_factors or {}, "optimizer.params.lr_factors")
    if lr_factors and base_lr is None:
        raise UserError("optimizer.params.lr_factors needs optimizer.params.base_lr")
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group: dict[str, Any] = {"params": [parameter]}
            if any(regex.search(name) for regex in spare.values()):
                group["weight_decay"] = 0.0
            for pattern, regex in slow.items():
                if lr_factors and base_lr is not None and regex.search(name):
                    group["lr"] = base_lr * lr_factors[pattern]
                    break
            groups.append(group)
    return reduce_param_groups(groups)


def _compiled(
    names: Sequence[str], patterns: Iterable[str], key: str
) -> dict[str, re.Pattern[str]]:
    compiled = {pattern: re.compile(pattern) for pattern in patterns}
    unused = [p for p, regex in compiled.items() if not any(map(regex.search, names))]
    if unused:
        raise UserError(
            f"no parameter of the model has a name that matches {unused}: correct {key}"
        )
    return compiled
