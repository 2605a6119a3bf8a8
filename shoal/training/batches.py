"""The batches of training: drawn and augmented on the device where the images lie, and resumable at any one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shoal.data.augment import augment_batch
from shoal.data.dataset import Dataset
from shoal.training.settings import Settings

FAR = 1_000_003
"""A prime between seeds of neighbouring runs, for seeds of epochs."""

AHEAD = 32
"""Batches that are augmented at once on a GPU, where an operation costs its launch; on a CPU it is each alone."""


def as_input(data: Dataset, images: Tensor, settings: Settings) -> Tensor:
    """Images uint8 [N, C, H, W] as a network takes them: on the device, normalised, in its order of memory."""
    x = data.normalise(images.to(settings.device))
    return x.to(memory_format=torch.channels_last) if settings.channels_last else x


class Batches:
    """An epoch's full batches for one of `world` = (rank, processes); what is left over waits for another epoch.

    Order and augmentation follow from the seed and the epoch. `state` and `load` are for checkpoints within an epoch;
    on another kind of device, whose generators are others, the rest of that epoch is drawn from a seed of its own.
    """

    def __init__(self, data: Dataset, settings: Settings, size: int, world: tuple[int, int]) -> None:
        self.data, self.settings, self.size, self.world = data, settings, size, world
        self.steps = max(1, len(data.train) // size)
        self.generator = torch.Generator(data.train.images.device)
        self.ahead = 1 if data.train.images.device.type == "cpu" else AHEAD
        self.next, self.seed, self.before = 0, settings.seed * FAR, self.generator.get_state()

    def begin(self, epoch: int) -> None:
        """Seed all that an epoch draws: its batches, and dropout."""
        self.seed = self.settings.seed * FAR + epoch
        torch.manual_seed(self.seed)
        self.generator.manual_seed(self.seed * self.world[1] + self.world[0])

    def draw(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images as the network takes them, labels int64 [N]) of the epoch begun, from step `first` on."""
        split, (rank, count) = self.data.train, self.world
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.seed)).to(split.images.device)
        self.next = first
        for start in range(first - first % self.ahead, self.steps, self.ahead):
            self.before = self.generator.get_state()
            stop = min(start + self.ahead, self.steps)
            mine = [part[rank::count] for part in order[start * self.size : stop * self.size].split(self.size)]
            for step, batch in enumerate(zip(*self._made(torch.cat(mine), len(mine[0])), strict=True), start):
                if step >= first:  # what comes before was learned from before a stop
                    self.next = step + 1
                    yield batch

    def _made(self, mine: Tensor, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images and labels at `mine` in batches of `size`."""
        split, policy = self.data.train, self.settings.augment or self.data.augment
        x = as_input(self.data, augment_batch(split.images[mine], policy, self.generator), self.settings)
        return x.split(size), split.labels[mine].to(self.settings.device).split(size)

    def end(self) -> None:
        """Note that the epoch's steps are done: the next one is seeded anew."""
        self.next = 0

    def state(self) -> dict[str, Tensor]:
        """Within an epoch, the states of all generators; that of the batches is what the next one is made from."""
        if not self.next:
            return {}
        batches = self.before if self.next % self.ahead else self.generator.get_state()
        found = {"batches": batches, "cpu": torch.get_rng_state()}
        return found | ({"cuda": torch.cuda.get_rng_state()} if self._on_cuda else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave, where the generators are of the same kinds."""
        if not state:
            return
        if state["batches"].numel() != self.generator.get_state().numel() or self._on_cuda != ("cuda" in state):
            self.generator.manual_seed(self.generator.initial_seed() + FAR**2)
            return
        self.generator.set_state(state["batches"])
        torch.set_rng_state(state["cpu"])
        if self._on_cuda:
            torch.cuda.set_rng_state(state["cuda"])

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self.settings.device).type == "cuda"
