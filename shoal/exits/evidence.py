"""Confidence and correctness of every exit for every image of a split: enough to choose and evaluate thresholds."""

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
    """Accuracy in percent, mean price per image, and the fraction of images that leave at each exit."""

    accuracy: float
    price: float
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Results of K exits, weakest first, on N images: `confidence` [N, K], `right` [N, K], `ensemble_right` [N].

    `right` and `ensemble_right` say whether the predicted class is correct. The ensemble is the mean of all exits'
    logits.
    """

    confidence: Floats
    right: Bools
    ensemble_right: Bools

    @classmethod
    def of(cls, logits: Sequence[Tensor], labels: Tensor) -> Evidence:
        """Build the evidence from the logits [N, classes] of K exits and labels [N] (int64); N is at least 1."""
        mean = torch.stack([z.float() for z in logits]).mean(0)
        right = torch.stack([z.argmax(1) == labels for z in logits], 1)
        sure = torch.stack([confidence(z) for z in logits], 1)
        return cls(sure.double().cpu().numpy(), right.cpu().numpy(), (mean.argmax(1) == labels).cpu().numpy())

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return self.right.shape[1]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy in percent of each exit alone."""
        return tuple(100 * float(a) for a in self.right.mean(0))

    def last_right(self, ensemble: bool) -> Bools:
        """For each image, whether the answer is right if no exit is confident enough: [N], bool.

        The ensemble answers if `ensemble` is true, else the last exit.
        """
        return self.ensemble_right if ensemble else self.right[:, -1]

    def outcome(self, thresholds: Sequence[float], prices: Sequence[float], ensemble: bool = False) -> Outcome:
        """The outcome of `infer` with these thresholds, where an image that leaves at exit i costs ``prices[i]``.

        Raises ShoalError when the thresholds do not fit the exits.
        """
        check_thresholds(thresholds, self.exits, ensemble)
        accuracy, price = self.outcomes(np.array([thresholds], dtype=np.float64), prices, ensemble)
        return Outcome(float(accuracy[0]), float(price[0]), self.shares(thresholds))

    def shares(self, thresholds: Sequence[float] | Floats) -> tuple[float, ...]:
        """The fraction of images that leaves at each of the K exits, with `thresholds` [T] for the first T exits."""
        left = np.bincount(self.leaves_at(thresholds), minlength=self.exits)
        return tuple(float(share) for share in left / len(self.right))

    def leaves_at(self, thresholds: Sequence[float] | Floats) -> NDArray[np.int64]:
        """The index of the exit at which each image leaves: [N], int64."""
        sure = self.confidence[:, : len(thresholds)] > np.asarray(thresholds)
        first = np.where(sure.any(1), sure.argmax(1), self.exits - 1)
        return first.astype(np.int64)

    def outcomes(self, thresholds: Floats, prices: Sequence[float], ensemble: bool = False) -> tuple[Floats, Floats]:
        """Accuracies [P] in percent and mean prices [P] for P rows of thresholds [P, T]."""
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
    """Run `network` on `split` and return the evidence of all its exits. Raises ShoalError for an empty split."""
    return Evidence.of(stored_logits(network, data, split, settings, batch), split.labels.cpu())


@torch.inference_mode()
def stored_logits(
    network: nn.Module, data: Dataset, split: Split, settings: Settings, batch: int = 500
) -> list[Tensor]:
    """Float32 logits [N, classes] on the CPU of every exit of `network`, in eval mode, for the images of `split`.

    Images are in order and not augmented. Raises ShoalError for an empty split.
    """
    if not len(split):
        raise ShoalError("found an empty split; need at least one image; hold some out (val=)")
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
    """Run dynamic inference on `split` and return its accuracy, mean multiply-adds, and fractions of images by exit."""
    hits, left = 0, torch.zeros(len(network), dtype=torch.int64)
    for i in range(0, len(split), batch):
        decided = infer(network, data.normalise(split.images[i : i + batch]), thresholds, ensemble=ensemble)
        hits += int((decided.logits.argmax(1) == split.labels[i : i + batch]).sum())
        left += torch.bincount(decided.exits, minlength=len(network)).cpu()
    shares = left.double() / len(split)
    price = float((shares * torch.tensor(network.macs, dtype=torch.float64)).sum())
    return Outcome(100 * hits / len(split), price, tuple(shares.tolist()))
