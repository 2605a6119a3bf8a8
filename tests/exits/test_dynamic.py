"""Dynamic inference: stages that compute what the network computes, and images that leave one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.channels.slimmable import slimmable
from shoal.errors import ShoalError
from shoal.exits.cascades import cascade
from shoal.exits.classifiers import add_exits, keep_exit
from shoal.exits.evidence import Evidence
from shoal.exits.inference import confidence, infer
from shoal.exits.latency import compare, stage_seconds
from shoal.models import build
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count
from tests.conftest import Residual, randomise

CIFAR, SHAPE = (3, 32, 32), (1, 8, 8)
ZOO = ("resnet18", "wrn-16-4", "vgg16-avg", "mobilenetv1")


def multi_exit(name: str) -> nn.Module:
    """A narrow network of the zoo with exits at a quarter, half and three quarters of its ReLU layers."""
    model = randomise(build(name, 10, width=0.125))
    sites = [site.name for site in relu_sites(model, CIFAR)]
    after = [sites[len(sites) * k // 4] for k in (1, 2, 3)]
    return randomise(add_exits(model, after, 10, CIFAR))


def three_exits() -> nn.Module:
    """The user's network of `conftest` with two exits; logits are enlarged so that confidences spread."""
    model = randomise(Residual())
    made = add_exits(model, [site.name for site in relu_sites(model, SHAPE)][1:4:2], 4, SHAPE)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 8
    return randomise(made)


def middles(logits: tuple[Tensor, ...]) -> list[float]:
    """A threshold for each exit that about half of the images pass."""
    return [float(confidence(z).median()) for z in logits]


class Counted(nn.Module):
    """A stage that notes how many images it has seen."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage, self.images = stage, 0

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        self.images += len(carried[0])
        return self.stage(*carried)


@pytest.mark.parametrize("name", ZOO)
def test_stages_together_are_the_network(name: str) -> None:
    model, x = multi_exit(name), torch.randn(3, *CIFAR)
    made = cascade(model, CIFAR)
    assert len(made) == 4
    with torch.no_grad():
        for a, b in zip(made(x), model(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ZOO)
def test_macs_are_those_of_the_work_up_to_an_exit(name: str) -> None:
    model = multi_exit(name)
    made, whole = cascade(model, CIFAR), count(model, CIFAR)
    alone = [count(keep_exit(model, i), CIFAR) for i in range(4)]
    assert made.macs[0] == alone[0].macs + alone[0].linear_macs
    assert made.macs[3] == whole.macs + whole.linear_macs
    # Exits are branches: one costs what it does alone, and the layers of all earlier ones.
    branches = [sum(r.macs + r.linear_macs for r in c.rows if r.name.startswith("exits.")) for c in alone]
    own = [c.macs + c.linear_macs for c in alone]
    assert (list(made.alone), made.full_macs) == (own, own[3])
    assert list(made.macs) == [own[i] + sum(branches[:i]) for i in range(4)]
    assert min(branches[:3]) > 0


def test_macs_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, stride=2, padding=1)
            self.relu = nn.ReLU()
            self.weak, self.strong = nn.Linear(2, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.relu(self.a(x))
            y = self.b(x)
            return self.weak(x.mean((2, 3))), self.strong(y.mean((2, 3)))

    made = cascade(Two(), SHAPE)
    first, second = 64 * 2 * 9, 16 * 4 * 18
    assert made.macs == (first + 10, first + 10 + second + 20)
    assert made.full_macs == first + second + 20
    decided = infer(made, torch.randn(10, *SHAPE), [0.0])
    assert decided.average(made.macs) == first + 10


@pytest.mark.parametrize("ensemble", [False, True])
def test_thresholds_of_one_and_of_zero(ensemble: bool) -> None:
    model, x = three_exits(), torch.randn(16, *SHAPE)
    made = cascade(model, SHAPE)
    with torch.no_grad():
        truth = model(x)
    late = infer(made, x, [1.0] * (2 + ensemble), ensemble=ensemble)
    assert torch.equal(late.logits, torch.stack(truth).mean(0) if ensemble else truth[-1])
    assert late.exits.tolist() == [2] * 16
    early = infer(made, x, [0.0] * (2 + ensemble), ensemble=ensemble)
    assert torch.equal(early.logits, truth[0])
    assert early.exits.tolist() == [0] * 16


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_mixed_batch_gives_each_image_what_it_gets_alone(ensemble: bool) -> None:
    model, x = three_exits(), torch.randn(32, *SHAPE)
    made = cascade(model, SHAPE)
    with torch.no_grad():
        logits = model(x)
    thresholds = middles(logits)[: 2 + ensemble]
    decided = infer(made, x, thresholds, ensemble=ensemble)
    assert set(decided.exits.tolist()) == {0, 1, 2}
    for i in range(32):
        own = infer(made, x[i : i + 1], thresholds, ensemble=ensemble)
        assert own.exits.item() == decided.exits[i]
        assert (own.logits[0] - decided.logits[i]).abs().max() < 1e-5
    # And it is Algorithm 1 on the logits of all exits.
    evidence = Evidence.of(logits, torch.zeros(32, dtype=torch.int64))
    assert decided.exits.tolist() == evidence.leaves_at(thresholds).tolist()


def test_no_image_is_computed_after_it_left() -> None:
    model, x = three_exits(), torch.randn(32, *SHAPE)
    made = cascade(model, SHAPE)
    with torch.no_grad():
        thresholds = middles(model(x))[:2]
    made.stages = nn.ModuleList(Counted(stage) for stage in made.stages)
    exits = infer(made, x, thresholds).exits
    assert [stage.images for stage in made.stages] == [int((exits >= i).sum()) for i in range(3)]


def test_sizes_and_several_tensors_cross_a_cut() -> None:
    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.weak, self.strong = nn.Linear(2, 3), nn.Linear(128, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left, right = self.a(x).relu().chunk(2, 1)
            scale = self.scale * 3
            weak = self.weak((left * scale).mean((2, 3)))
            y = nn.functional.avg_pool2d(torch.cat((left, right, self.b(x)), 1), 2)
            return weak, self.strong((y * scale).view(x.size(0), -1)) + weak

    model, x = Branchy(), torch.randn(5, *SHAPE)
    made = cascade(model, SHAPE)
    with torch.no_grad():
        thresholds = middles(model(x))[:1]
        for a, b in zip(made(x), model(x), strict=True):
            assert (a - b).abs().max() < 1e-6
    decided = infer(made, x, thresholds)
    alone = [infer(made, image[None], thresholds).logits[0] for image in x]
    assert (torch.stack(alone) - decided.logits).abs().max() < 1e-5


def test_widths_of_a_slimmable_network_are_exits() -> None:
    slim, x = slimmable(randomise(Residual()), SHAPE, (0.5, 1.0)), torch.randn(6, *SHAPE)
    made = cascade(slim, SHAPE)
    with torch.no_grad():
        for a, b in zip(made(x), slim(x), strict=True):
            assert torch.equal(a, b)
    assert made.macs[1] == made.macs[0] + made.full_macs


@pytest.mark.slow  # torch.compile takes 10 s to load
def test_compiled_stages_agree() -> None:
    model, x = three_exits(), torch.randn(8, *SHAPE)
    made = cascade(model, SHAPE)
    with torch.no_grad():
        thresholds = middles(model(x))[:2]
    before = infer(made, x, thresholds)
    made.compile_stages(backend="eager")
    after = infer(made, x, thresholds)
    assert torch.equal(before.exits, after.exits)
    assert (before.logits - after.logits).abs().max() < 1e-5


def test_ways_take_turns_and_see_the_same_full_batches() -> None:
    seen: list[tuple[str, int]] = []
    ways = {name: (lambda x, name=name: seen.append((name, int(x.sum())))) for name in ("a", "b")}
    images = torch.arange(7.0).view(7, 1, 1, 1)
    taken = compare(ways, images, batch=3, rounds=2)
    assert seen == [("a", 3), ("a", 12), ("b", 3), ("b", 12)] * 3  # one round is not counted
    assert min(taken.values()) > 0


def test_seconds_up_to_an_exit_rise() -> None:
    made = cascade(three_exits(), SHAPE)
    made.stages = nn.ModuleList(Counted(stage) for stage in made.stages)
    taken = stage_seconds(made, torch.randn(9, *SHAPE), batch=4, rounds=2)
    assert len(taken) == 3
    assert 0 < taken[0] < taken[1] < taken[2]
    assert [stage.images for stage in made.stages] == [24] * 3  # two batches of four, three rounds


class Mixing(nn.Module):
    """Mixes every image with the others of its batch: into one row, or into a row each."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.fc, self.rows = nn.Linear(64, 3), rows

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        mean = flat.mean(0, keepdim=True)
        return self.fc(flat), self.fc(flat - mean if self.rows else mean)


class Whole(nn.Module):
    """Reads a tuple of tensors, whole, on both sides of an exit."""

    def __init__(self) -> None:
        super().__init__()
        self.weak, self.strong = nn.Linear(32, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = x.flatten(1).chunk(2, 1)
        return self.weak(halves[0]), self.strong(torch.cat(halves, 1))


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: cascade(Residual(), SHAPE), "one classifier; need two or more"),
        (lambda: cascade(Mixing(False), SHAPE), "mixes the images of a batch"),
        (lambda: cascade(Mixing(True), SHAPE), "mixes the images of a batch"),
        (lambda: cascade(Whole(), SHAPE), "found at chunk a value without one row per image"),
        (lambda: infer(cascade(three_exits(), SHAPE), torch.zeros(1, *SHAPE), [0.5]), "need 2 numbers"),
        (lambda: infer(cascade(three_exits(), SHAPE), torch.zeros(1, *SHAPE), [0.5, 1.5]), r"in \[0, 1\]"),
        (lambda: infer(cascade(three_exits(), SHAPE), torch.zeros(1, *SHAPE), [0.5] * 2, ensemble=True), "need 3"),
        (lambda: infer(cascade(three_exits(), SHAPE), torch.zeros(0, *SHAPE), [0.5] * 2), "no image"),
        (lambda: compare({}, torch.zeros(3, *SHAPE), 4, 1), "batches of 4, 1 rounds and 3 images"),
    ],
)
def test_what_cannot_leave_early_is_refused(make: Callable[[], object], pattern: str) -> None:
    with pytest.raises(ShoalError, match=pattern):
        make()


def test_evidence_by_hand() -> None:
    # Confidences .9 and .6 at the weak exit: the first image leaves there, right; the second goes on and is wrong.
    table = Evidence(
        np.array([[0.9, 0.8], [0.6, 0.5]]), np.array([[True, False], [True, False]]), np.array([True, True])
    )
    assert table.accuracies == (100.0, 0.0)
    found = table.outcome([0.7], (10, 30))
    assert (found.accuracy, found.price, found.shares) == (50.0, 20.0, (0.5, 0.5))
    with_ensemble = table.outcome([0.95, 0.7], (10, 30), ensemble=True)
    assert (with_ensemble.accuracy, with_ensemble.price, with_ensemble.shares) == (50.0, 30.0, (0.0, 1.0))
