"""Magnitude pruning of a trained network by `torch.nn.utils.prune`: single weights, or whole filters.

*Self-Distillation*, section 4.6 and Fig. 6, combines pruning with its networks but does not name the method. Pruned
weights are zeros: layers and names stay the same. To remove channels from the network, see `cut`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from shoal.errors import ShoalError

METHODS = ("weights", "filters")
"""``weights``: the smallest weights of all convolutions and linear layers together. ``filters``: in each convolution,
the filters with the smallest sum of absolute values (L1 norm)."""


def pruned(model: nn.Module, amount: float, method: str) -> nn.Module:
    """A copy of `model` with masks that hold a fraction `amount` of its weights or filters at zero while it trains.

    Each convolution keeps at least one filter. Raises ShoalError for an unknown method and an amount outside (0, 1).
    """
    if method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    if not 0 < amount < 1:
        raise ShoalError(f"found an amount of {amount:g}; need a fraction between 0 and 1, such as 0.5")
    sparse = copy.deepcopy(model)
    if method == "weights":
        everything = [(layer, "weight") for layer in _layers(sparse)]
        prune.global_unstructured(everything, pruning_method=prune.L1Unstructured, amount=amount)
        return sparse
    for layer in (module for module in sparse.modules() if isinstance(module, nn.Conv2d)):
        filters = layer.out_channels
        prune.ln_structured(layer, "weight", min(round(amount * filters), filters - 1), n=1, dim=0)
    return sparse


def settle(model: nn.Module) -> None:
    """Write the zeros into the weights and remove the masks, in place."""
    for module in model.modules():
        if prune.is_pruned(module) and "weight_orig" in dict(module.named_parameters(recurse=False)):
            prune.remove(module, "weight")


def weights_left(model: nn.Module) -> tuple[int, int]:
    """The number of nonzero weights in convolutions and linear layers, and the number of all their weights."""
    weights = [layer.weight for layer in _layers(model)]
    return sum(int(torch.count_nonzero(w)) for w in weights), sum(w.numel() for w in weights)


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
