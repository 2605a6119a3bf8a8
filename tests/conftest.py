"""Small data and networks that tests make for themselves; one thread each, because two tests run side by side."""

from __future__ import annotations

import gc
import importlib.util
import sys

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.private.transport.certs import TLS, make_certificates
from shoal.training.clock import Clock
from tests.support.parties import Case, Small, case, seeded, small_mask

hypothesis.settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


def pytest_collection_finish() -> None:
    """What was imported stays to the end: looking through it again and again takes a tenth of the time.

    JAX may not be among it. It starts threads, and tests fork, so SPU's part runs in other processes.
    """
    assert "jax" not in sys.modules, "found JAX loaded by a test module; need it in other processes only"
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Residual(nn.Module):
    """A user's network: a functional ReLU, one ReLU module called twice, residual adds, a strided block."""

    def __init__(self, classes: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.a1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(4)
        self.a2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(4)
        self.c1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.short = nn.Conv2d(4, 8, 1, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn(self.stem(x)))
        y = self.b2(self.a2(self.act(self.b1(self.a1(x)))))
        x = self.act(x + y)
        y = self.c2(torch.relu(self.c1(x)))
        x = self.act(self.short(x) + y)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def epochwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any time limit lets one epoch through, and no more: tests of what lies beyond need not count steps."""
    monkeypatch.setattr(Clock, "has_time_for", lambda self, kind: self.limit is None or "judgement" not in self.laps)


@pytest.fixture
def residual() -> nn.Module:
    """The user's network above with batch-norm statistics that are not the trivial ones."""
    return randomise(Residual())


def randomise(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine values as if it had been trained."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


def blobs(count: int = 96, classes: int = 4, size: int = 8, seed: int = 0) -> Dataset:
    """Images of one bright quadrant a class, which a small network learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)

    def split(n: int) -> Split:
        labels = torch.arange(n) % classes
        images = torch.randint(0, 90, (n, 1, size, size), generator=generator, dtype=torch.uint8)
        half = size // 2
        for i, k in enumerate(labels.tolist()):
            r, c = divmod(k, 2)
            images[i, 0, r * half : (r + 1) * half, c * half : (c + 1) * half] += 120
        return Split(images, labels)

    return Dataset("blobs", split(count), split(32), split(32), classes, (0.3,), (0.3,), "none")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(seeded(Small), tmp_path_factory.mktemp("small"), {"relu": small_mask()})


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TLS]:
    pytest.importorskip("cryptography")
    return make_certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def spu() -> None:
    """Skips where SPU is absent; the module itself is never imported into the tests' process."""
    if importlib.util.find_spec("spu") is None:
        pytest.skip("needs the private extra")
