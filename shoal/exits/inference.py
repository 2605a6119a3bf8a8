"""Dynamic inference: each image leaves at the first exit that is confident of it (*Self-Distillation*, Algorithm 1).

Images leave one by one, and the remaining images continue as a smaller batch. The cost of a batch is therefore the sum
of the costs of its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.exits.cascades import Cascade


@dataclass(frozen=True)
class Decisions:
    """The result for a batch of N images: `logits` [N, classes] and the exit [N] (int64) at which each image left.

    An image of which no exit was confident has the index of the last exit, whether that exit or the ensemble answers.
    """

    logits: Tensor
    exits: Tensor

    def average(self, prices: Sequence[float]) -> float:
        """The mean price per image, where leaving at exit i costs ``prices[i]`` (multiply-adds or seconds)."""
        return float(torch.tensor(prices, dtype=torch.float64)[self.exits.cpu()].mean())


def confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability [N] (float32) of logits [N, classes]."""
    return F.softmax(logits.float(), 1).amax(1)


def check_thresholds(thresholds: Sequence[float], exits: int, ensemble: bool) -> None:
    """Raise ShoalError unless there is one number in [0, 1] for each exit that needs a threshold.

    The last exit needs none, because it answers in any case; with `ensemble` it needs one, too.
    """
    need = exits if ensemble else exits - 1
    if len(thresholds) != need or not all(0 <= t <= 1 for t in thresholds):
        raise ShoalError(
            f"found thresholds {list(thresholds)}; need {need} numbers in [0, 1] for {exits} exits"
            f"{' and their ensemble' if ensemble else ''}; search them with shoal exits"
        )


@torch.inference_mode()
def infer(network: Cascade, images: Tensor, thresholds: Sequence[float], *, ensemble: bool = False) -> Decisions:
    """Classify images [N, C, H, W]: each leaves at the first exit whose confidence is above its threshold.

    `thresholds` has one entry for each exit except the last [K - 1]. With `ensemble`, it has one for every exit [K],
    and the mean of all exits' logits answers where no exit is confident. Stages do not compute images that have left.
    Raises ShoalError for thresholds that do not fit the exits and for an empty batch.
    """
    check_thresholds(thresholds, len(network), ensemble)
    if not len(images):
        raise ShoalError("found no image to classify; need one or more; leave empty batches out")
    batch = _Batch(images)
    for i, stage in enumerate(network.stages):
        z, *batch.carried = stage(*batch.carried)
        batch.seen += [z] if ensemble else []
        sure = confidence(z) > thresholds[i] if i < len(thresholds) else torch.ones_like(batch.place, dtype=torch.bool)
        batch.release(sure, z, i)
        if not len(batch.place):
            return batch.decisions()
    everyone = torch.ones_like(batch.place, dtype=torch.bool)
    batch.release(everyone, torch.stack(batch.seen).mean(0), len(network) - 1)
    return batch.decisions()


class _Batch:
    """The images that have not left: their positions in the whole batch, and the tensors that the next stage reads."""

    def __init__(self, images: Tensor) -> None:
        self.place = torch.arange(len(images), device=images.device)
        self.exits = torch.zeros_like(self.place)
        self.carried, self.seen = [images], list[Tensor]()
        self.logits: Tensor | None = None

    def release(self, sure: Tensor, z: Tensor, exit: int) -> None:
        """Record exit and logits of the images that leave, and drop them.

        `sure` [M] (bool) marks them among the M images left; `z` [M, classes] are the logits at `exit`.
        """
        leaving = int(sure.sum())
        if leaving == len(self.exits):  # the whole batch at once, as a batch of one always does
            self.logits, self.exits, self.place = z, torch.full_like(self.exits, exit), self.place[:0]
        elif leaving:
            left, kept = torch.nonzero(sure).flatten(), torch.nonzero(~sure).flatten()
            if self.logits is None:
                self.logits = z.new_empty(len(self.exits), z.shape[1])
            self.logits[self.place[left]] = z[left]
            self.exits[self.place[left]] = exit
            self.place = self.place[kept]
            self.carried, self.seen = [t[kept] for t in self.carried], [t[kept] for t in self.seen]

    def decisions(self) -> Decisions:
        """The results of all images, once all have left."""
        assert self.logits is not None
        return Decisions(self.logits, self.exits)
