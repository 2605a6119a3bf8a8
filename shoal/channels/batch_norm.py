"""Recompute batch-norm statistics after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError


def calibrate_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the statistics of every batch norm of `model` from `batches`, normalised images [N, C, H, W].

    Statistics are plain means over the batches (post-statistics of US-Nets, Yu and Huang, ICCV'19, section 3.3). Batch
    norms run in train mode and everything else in eval mode; a `Slimmable` runs at all its widths. Raises ShoalError
    when there is no batch, or no batch norm that tracks statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    rest = iter(batches)
    first = next(rest, None)
    if not norms or first is None:
        found = "no batch" if norms else "no batch norm that keeps statistics"
        raise ShoalError(f"found {found} to calibrate with; need both; pass images of the training set")
    modes, momenta = {m: m.training for m in model.modules()}, [norm.momentum for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # None: the mean of all batches
            norm.train()
        with torch.no_grad():
            for x in chain((first,), rest):
                model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


class Calibration:
    """Hook: calibrates before each epoch is evaluated, so that the statistics of every width fit the weights."""

    taps: tuple[str, ...] = ()
    recordable = True

    def __init__(self, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.batches = batches

    def on_epoch_trained(self, model: nn.Module, epoch: int) -> None:
        """Recompute the statistics from `batches()`."""
        calibrate_bn(model, self.batches())
