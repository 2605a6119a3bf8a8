"""How training runs: device, precision, seed, time limit and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.errors import ShoalError, first_line

PRECISIONS = ("fp32", "bf16")

STEPS = ("eager", "compiled", "graph", "compiled-graph")
"""Ways to run a training step: see `shoal.training.stepping`."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Settings:
    """How to run training, as opposed to what to learn."""

    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = True
    max_seconds: float | None = None
    resume: bool = False
    select: str = "val"
    select_from: int = 0
    """Epochs before this one are never the best: a network whose gates are half open must not be selected."""
    exit: int | None = -1
    """The classifier whose accuracy selects the best epoch; None for the mean of all classifiers."""
    test_every_epoch: bool = False
    """Whether to evaluate the test set, too, after each epoch (`training.on_test`). That selects nothing."""
    augment: str | None = None
    stop: Callable[[], bool] = _never
    """Called before each step; if it returns true, training saves a checkpoint and stops."""
    step: str = "eager"
    """One of `STEPS`. If the machine does not support it, a warning names the way that is used instead."""
    save_seconds: float = 0.0
    """Minimum seconds between checkpoints, so that short epochs on a GPU do not wait for the disk."""

    def __post_init__(self) -> None:
        """Raise ShoalError for invalid values."""
        if self.precision not in PRECISIONS:
            raise ShoalError(f"found precision {self.precision!r}; need one of {', '.join(PRECISIONS)}; choose one")
        if self.step not in STEPS:
            raise ShoalError(f"found step {self.step!r}; need one of {', '.join(STEPS)}; choose one")
        if not 0 <= self.seed < 2**32:
            raise ShoalError(f"found seed {self.seed}; need 0 to 2^32 - 1; choose one of them")
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise ShoalError(f"found a time limit of {self.max_seconds} s; need 0 or more; leave it out for none")
        if not self.save_seconds >= 0:
            raise ShoalError(
                f"found {self.save_seconds} s between checkpoints; need 0 or more; give 0 to save after each epoch"
            )

    def check(self) -> None:
        """Raise ShoalError, before any work, when this machine does not have the device."""
        try:
            torch.zeros(1, device=self.device).item()  # `item` fails on the device "meta", which stores no values
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ShoalError(
                f"found that device {self.device!r} cannot be used ({first_line(error)}); need cpu, or cuda where "
                "PyTorch finds a GPU; choose cpu"
            ) from error
        device = torch.device(self.device)
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            raise ShoalError(
                f"found device {self.device!r} where cuda:{torch.cuda.current_device()} is in use; need that one; give "
                f"cuda, and choose the GPU by CUDA_VISIBLE_DEVICES={device.index}"
            )

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Within the block, cuDNN uses deterministic algorithms, and fp32 is not computed as TF32."""
        cudnn = torch.backends.cudnn
        before = cudnn.deterministic, cudnn.allow_tf32
        cudnn.deterministic, cudnn.allow_tf32 = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.allow_tf32 = before

    def score(self, accuracy: Sequence[float]) -> float:
        """The score that selects the best epoch, from the accuracy of each classifier in percent."""
        return sum(accuracy) / len(accuracy) if self.exit is None else accuracy[self.exit]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the precision: bf16 autocast, or nothing for fp32.

        With autocast, batch norms take bf16 inputs but store their statistics in fp32. Losses are computed in fp32,
        outside.
        """
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)
