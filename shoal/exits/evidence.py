"""What every exit says of every image of a split: all that thresholds need to be chosen and judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.exits.cascades import Cascade
from shoal.exits.inference import check_thresholds, confidence, infer
from shoal.outputs import forward
from shoal.training.settings import Settings

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """Accuracy in percent, the mean price of an image, and the share of images that leave at each exit."""

    accuracy: float
    price: float
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """For N images and K exits, weak to strong: `confidence` [N, K], `right` [N, K] and `ensemble_right` [N].

    The ensemble is the mean of all exits' logits.
    """

    confidence: Floats
    right: Bools
    ensemble_right: Bools

    @classmethod
    def of(cls, logits: Sequence[Tensor], labels: Tensor) -> Evidence:
        """From the logits [N, classes] of K exits and labels [N] of one image or more."""
        mean = torch.stack([z.float() for z in logits]).mean(0)
        right = torch.stack([z.argmax(1) == labels for z in logits], 1)
        sure = torch.stack([confidence(z) for z in logits], 1)
        return cls(sure.double().cpu().numpy(), right.cpu().numpy(), (mean.argmax(1) == labels).cpu().numpy())

    @property
    def exits(self) -> int:
        """K."""
        return self.right.shape[1]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy in percent of each exit alone."""
        return tuple(100 * float(a) for a in self.right.mean(0))

    def last_right(self, ensemble: bool) -> Bools:
        """Whether the answer [N] for an image that no exit is sure of is right."""
        return self.ensemble_right if ensemble else self.right[:, -1]

    def outcome(self, thresholds: Sequence[float], prices: Sequence[float], ensemble: bool = False) -> Outcome:
        """What `infer` with these thresholds comes to; leaving at exit i costs ``prices[i]``."""
        check_thresholds(thresholds, self.exits, ensemble)
        accuracy, price = self.outcomes(np.array([thresholds], dtype=np.float64), prices, ensemble)
        return Outcome(float(accuracy[0]), float(price[0]), self.shares(thresholds))

    def shares(self, thresholds: Sequence[float] | Floats) -> tuple[float, ...]:
        """The part of the images that leaves at each of the K exits, by thresholds [T] for the first T of them."""
        left = np.bincount(self.leaves_at(thresholds), minlength=self.exits)
        return tuple(float(share) for share in left / len(self.right))

    def leaves_at(self, thresholds: Sequence[float] | Floats) -> NDArray[np.int64]:
        """The exit [N] at which each image leaves."""
        sure = self.confidence[:, : len(thresholds)] > np.asarray(thresholds)
        first = np.where(sure.any(1), sure.argmax(1), self.exits - 1)
        return first.astype(np.int64)

    def outcomes(self, thresholds: Floats, prices: Sequence[float], ensemble: bool = False) -> tuple[Floats, Floats]:
        """Accuracies [P] in percent and mean prices [P] of P rows of thresholds [P, T]."""
        count = len(self.right)
        here = np.ones((len(thresholds), count), dtype=bool)
        hits, paid = np.zeros(len(thresholds)), np.zeros(len(thresholds))
        for i in range(thresholds.shape[1]):
            left = here & (self.confidence[:, i] > thresholds[:, i, None])
            here &= ~left
            hits += np.count_nonzero(left & self.right[:, i], axis=1)
            paid += prices[i] * np.count_nonzero(left, axis=1)
        hits += np.count_nonzero(here & self.last_right(ensemble), axis=1)
        paid += prices[-1] * np.count_nonzero(here, axis=1)
        return 100 * hits / count, paid / count


def collect(network: nn.Module, data: Dataset, split: Split, settings: Settings, batch: int = 500) -> Evidence:
    """The evidence of every exit of `network` on `split`."""
    return Evidence.of(stored_logits(network, data, split, settings, batch), split.labels.cpu())


@torch.inference_mode()
def stored_logits(
    network: nn.Module, data: Dataset, split: Split, settings: Settings, batch: int = 500
) -> list[Tensor]:
    """Float32 logits [N, classes] on the CPU of every exit of `network`, in eval mode, for the images of `split`.

    They are in order and not augmented. Raises ShoalError for an empty split.
    """
    if not len(split):
        raise ShoalError("found an empty split; need images to judge by; hold some out (val=)")
    was_training = network.training
    network.to(settings.device).eval()
    parts: list[tuple[Tensor, ...]] = []
    try:
        for i in range(0, len(split), batch):
            images = data.normalise(split.images[i : i + batch].to(settings.device))
            with settings.autocast():
                parts.append(tuple(z.float().cpu() for z in forward(network, images).logits))
    finally:
        network.train(was_training)
    return [torch.cat(z) for z in zip(*parts, strict=True)]


def dynamic_outcome(
    network: Cascade, data: Dataset, split: Split, thresholds: Sequence[float], ensemble: bool, batch: int = 500
) -> Outcome:
    """Accuracy, mean multiply-adds and shares of images by exit, by running dynamic inference on `split`."""
    hits, left = 0, torch.zeros(len(network), dtype=torch.int64)
    for i in range(0, len(split), batch):
        decided = infer(network, data.normalise(split.images[i : i + batch]), thresholds, ensemble=ensemble)
        hits += int((decided.logits.argmax(1) == split.labels[i : i + batch]).sum())
        left += torch.bincount(decided.exits, minlength=len(network)).cpu()
    shares = left.double() / len(split)
    price = float((shares * torch.tensor(network.macs, dtype=torch.float64)).sum())
    return Outcome(100 * hits / len(split), price, tuple(shares.tolist()))
