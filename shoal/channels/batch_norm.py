"""Statistics of batch norms, taken again after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError


def calibrate_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give every batch norm of `model` the statistics of `batches`, images [N, C, H, W] as the network takes them.

    Each is the plain mean over the batches (post-statistics of US-Nets, Yu and Huang, ICCV'19, section 3.3). The batch
    norms run as in training, all else as in inference, and a `Slimmable` runs at all of its widths. Raises ShoalError
    when there is no batch, or no batch norm that keeps statistics.
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
            norm.momentum = None  # a plain mean
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
    """Hook: calibrates after each epoch's last step, so that what is judged and kept has statistics at every width."""

    taps: tuple[str, ...] = ()
    recordable = True

    def __init__(self, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.batches = batches

    def on_epoch_trained(self, model: nn.Module, epoch: int) -> None:
        """Take the statistics of `batches()`."""
        calibrate_bn(model, self.batches())
