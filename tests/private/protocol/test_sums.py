"""Sums in which one convolution's result occurs more than once: its wraps count as often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.private.program.clear import run_clear
from tests.private.protocol.test_phases import infer
from tests.support.parties import SHAPE, case, seeded


class Sums(nn.Module):
    """A convolution, a sum, a ReLU and a classifier."""

    def __init__(self, total: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.total = total
        self.a, self.b = nn.Conv2d(SHAPE[0], 3, 3, padding=1), nn.Conv2d(SHAPE[0], 3, 1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.total(self.a(x), self.b(x))).mean((2, 3)))


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "twice": lambda a, b: a + a,
    "three times": lambda a, b: sum([a, a, a]),  # type: ignore[arg-type, return-value]
    "diamond": lambda a, b: (a + b) + a,
    "four times": lambda a, b: (a + b) + (a + b) + (a + a),
}


@pytest.mark.parametrize("name", SUMS)
def test_prepared_sums_are_the_clear_ones_bit_for_bit(name: str, tmp_path: Path) -> None:
    summed = case(seeded(lambda: Sums(SUMS[name])), tmp_path, {})  # type: ignore[arg-type]
    for image in summed.images[:3].numpy():
        words, shares = np.rint(image / summed.unit).astype(np.int64), dict[str, np.ndarray]()
        (logits,), _ = infer(summed, summed.program, words, shares)
        (clear,) = run_clear(summed.program, summed.weights, words[None], shares=shares)
        assert (logits * summed.unit == clear).all()
        truth = summed.graph(torch.from_numpy(image[None]))[0].detach().numpy()
        assert np.abs(clear - truth).max() <= summed.program.error_bound
