"""The batches of training: drawn and augmented on the device where the images lie, and resumable at any one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shoal.augment import augment_batch
from shoal.data import Dataset
from shoal.settings import Settings

FAR = 1_000_003
"""A prime between seeds of neighbouring runs, for seeds of epochs."""


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
        self.inside = False

    def begin(self, epoch: int) -> None:
        """Seed all that an epoch draws: its batches, and dropout."""
        seed = self.settings.seed * FAR + epoch
        torch.manual_seed(seed)
        self.generator.manual_seed(seed * self.world[1] + self.world[0])

    def draw(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images as the network takes them, labels int64 [N]) of the epoch begun, from step `first` on."""
        split, (rank, count) = self.data.train, self.world
        seed = self.settings.seed * FAR + epoch
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).to(split.images.device)
        policy = self.settings.augment or self.data.augment
        self.inside = True
        for step in range(first, self.steps):
            mine = order[step * self.size : (step + 1) * self.size][rank::count]
            x = augment_batch(split.images[mine], policy, self.generator)
            yield as_input(self.data, x, self.settings), split.labels[mine].to(self.settings.device)

    def end(self) -> None:
        """Note that the epoch's steps are done: the next one is seeded anew."""
        self.inside = False

    def state(self) -> dict[str, Tensor]:
        """Within an epoch, the states of all generators."""
        if not self.inside:
            return {}
        found = {"batches": self.generator.get_state(), "cpu": torch.get_rng_state()}
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
