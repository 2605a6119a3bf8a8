"""Training batches: drawn and augmented on the device that holds the images, and resumable at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shoal.data.augment import augment_batch
from shoal.data.dataset import Dataset
from shoal.training.settings import Settings

FAR = 1_000_003
"""A prime that separates the epoch seeds of runs with neighbouring seeds."""

AHEAD = 32
"""Batches that are augmented together on a GPU, where launching operations is the cost. A CPU augments one at a
time."""
AHEAD_BYTES = 1 << 31
"""Most bytes of normalised images that are made together, so that large images leave room for the network."""


def as_input(data: Dataset, images: Tensor, settings: Settings) -> Tensor:
    """Images [N, C, H, W] (uint8) as a network takes them: on the device, normalised, in its memory format."""
    x = data.normalise(images.to(settings.device))
    return x.to(memory_format=torch.channels_last) if settings.channels_last else x


class Batches:
    """The full batches of an epoch for one process, with `world` = (rank, number of processes).

    Images that do not fill a batch are left out of the epoch. Order and augmentation depend only on the seed and the
    epoch. `state` and `load` serve checkpoints within an epoch. After a resume on another kind of device, whose
    generators differ, the rest of that epoch is drawn from a separate seed.
    """

    def __init__(self, data: Dataset, settings: Settings, size: int, world: tuple[int, int]) -> None:
        self.data, self.settings, self.size, self.world = data, settings, size, world
        self.steps = max(1, len(data.train) // size)
        self.generator = torch.Generator(data.train.images.device)
        batch = 4 * size * data.train.images.shape[1:].numel()
        few = min(AHEAD, max(1, AHEAD_BYTES // batch))
        self.ahead = 1 if data.train.images.device.type == "cpu" else few
        self.next, self.seed, self.before = 0, settings.seed * FAR, self.generator.get_state()

    def begin(self, epoch: int) -> None:
        """Seed everything that an epoch draws at random: its batches, and dropout."""
        self.seed = self.settings.seed * FAR + epoch
        torch.manual_seed(self.seed)
        self.generator.manual_seed(self.seed * self.world[1] + self.world[0])

    def draw(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from step `first` on: input images [N, C, H, W] and labels [N] (int64)."""
        split, (rank, count) = self.data.train, self.world
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.seed))
        if isinstance(split.images, Tensor):  # a file is read by the CPU, which would wait for indices on the GPU
            order = order.to(split.images.device)
        self.next = first
        for start in range(first - first % self.ahead, self.steps, self.ahead):
            self.before = self.generator.get_state()
            stop = min(start + self.ahead, self.steps)
            mine = [part[rank::count] for part in order[start * self.size : stop * self.size].split(self.size)]
            for step, batch in enumerate(zip(*self._made(torch.cat(mine), len(mine[0])), strict=True), start):
                if step >= first:  # earlier steps were done before the stop
                    self.next = step + 1
                    yield batch

    def _made(self, mine: Tensor, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images and labels at the indices `mine`, split into batches of `size`."""
        split, policy = self.data.train, self.settings.augment or self.data.augment
        x = as_input(self.data, augment_batch(split.images[mine], policy, self.generator), self.settings)
        return x.split(size), split.labels[mine].to(self.settings.device).split(size)

    def end(self) -> None:
        """Mark the end of the epoch's steps: the next epoch is seeded anew, so no state is needed."""
        self.next = 0

    def state(self) -> dict[str, Tensor]:
        """The states of all random generators, or nothing between epochs.

        The state for the batches is that from which the next batch is made.
        """
        if not self.next:
            return {}
        batches = self.before if self.next % self.ahead else self.generator.get_state()
        found = {"batches": batches, "cpu": torch.get_rng_state()}
        return found | ({"cuda": torch.cuda.get_rng_state()} if self._on_cuda else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`, if the generators are of the same kind."""
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
