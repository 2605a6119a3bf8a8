"""`History`: what a training stage leaves beside the network."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.storage.summary import OnTest
from shoal.training.on_test import on_test


@dataclass
class History:
    """The result of `fit`: one row of metrics per epoch, the best score on validation, and whether time ran out.

    `best` is the value of `Settings.score` in percent, and `exit` its classifier (`Settings.exit`).
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = -1
    stopped: bool = False
    exit: int | None = -1

    def on_test(self, classifier: int | None = None) -> OnTest:
        """Largest and last test accuracy of `classifier` (default: `exit`) by `training.on_test`; empty if unknown."""
        own = self.exit if classifier is None else classifier
        return on_test(self.rows, self.exit, -1 if own is None else own)
