"""The optimiser, and groups of parameters with their own rates and weight decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shoal.training.schedule import Schedule

FUSED = ("cpu", "cuda")
"""Kinds of device on which one kernel updates many parameters."""


def sgd(model: nn.Module, schedule: Schedule, device: str) -> torch.optim.SGD:
    """Stochastic gradient descent over `parameter_groups`. Rates are tensors on `device`, to be changed in place."""
    groups = parameter_groups(model, schedule.weight_decay)
    for group in groups:
        group["lr"] = torch.tensor(schedule.lr, device=device)
    fused = torch.device(device).type in FUSED
    rate, momentum = torch.tensor(schedule.lr, device=device), schedule.momentum
    optimiser = torch.optim.SGD(groups, rate, momentum, nesterov=schedule.nesterov, fused=fused)
    if momentum:
        # Created up front: a fused update fails for a parameter whose first gradient comes later than the others'.
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: one for most parameters, and one for each rate or decay that modules ask for.

    The parameters of a module with a `rate_multiplier` are trained at the schedule's rate times that number, without
    weight decay: they are slopes and scores, not weights, and their gradients have another scale. A module with an
    `own_weight_decay` applies it to all parameters inside it, at the schedule's rate.
    """
    special: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        rate, decay = (getattr(module, name, None) for name in ("rate_multiplier", "own_weight_decay"))
        if rate is not None:
            special.setdefault((float(rate), 0.0), []).extend(module.parameters(recurse=False))
        elif decay is not None:
            special.setdefault((1.0, float(decay)), []).extend(module.parameters())
    apart = {id(p) for group in special.values() for p in group}
    plain = [p for p in model.parameters() if id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": weight_decay, "multiplier": 1.0}]
    return groups + [{"params": p, "weight_decay": d, "multiplier": r} for (r, d), p in special.items() if p]
