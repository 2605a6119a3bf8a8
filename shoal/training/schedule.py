"""Number of epochs and learning rates of one stage of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Schedule:
    """Epochs and learning rates of one stage.

    `kind` ``step`` multiplies the rate by `gamma` at each of `milestones` (epochs); ``cosine`` anneals to 0 over all
    epochs, batch by batch. In the first `warmup` epochs, the rate rises linearly from 0.
    """

    epochs: int
    lr: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    kind: str = "step"
    warmup: float = 0.0
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def rate(self, epoch: float) -> float:
        """Learning rate at `epoch`, which may be fractional, counted from 0."""
        rise = min(1.0, epoch / self.warmup) if self.warmup else 1.0
        if self.kind == "cosine":
            return self.lr * rise * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr * rise * self.gamma ** sum(epoch >= m for m in self.milestones)

    @property
    def first_drop(self) -> int:
        """The epoch at which the rate first drops, where the ramp of the gates ends.

        Without milestones it is half of all epochs.
        """
        return min(self.milestones) if self.milestones else max(1, self.epochs // 2)


def ramp(epoch: float, until: float, kind: str = "linear") -> float:
    """The gate at `epoch`: it rises from 0 to 1 at `until`, then stays 1 (shallow section 4).

    `kind` is ``linear`` or ``cosine``. Raises ShoalError for another kind.
    """
    if kind not in ("linear", "cosine"):
        raise ShoalError(f"found ramp {kind!r}; need 'linear' or 'cosine'")
    part = min(1.0, epoch / until) if until > 0 else 1.0
    return part if kind == "linear" else 0.5 * (1 - math.cos(math.pi * part))
