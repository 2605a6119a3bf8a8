"""Studies of a network: laws and values by hand, and the command that writes their plots and tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.analysis import STUDIES, Subject
from shoal.analysis.attention import attention_maps
from shoal.analysis.attribution import integrated_gradients, logit
from shoal.analysis.computation import ATTENTION, BACKBONE, CLASSIFIER, parts_of
from shoal.analysis.confidence import threshold_curve
from shoal.analysis.features import collect_features, principal_components, separability
from shoal.analysis.gradients import ALL, gradient_magnitudes
from shoal.analysis.noise import noise_curve
from shoal.errors import ShoalError
from shoal.exits.attention import add_aligned_exits
from shoal.exits.evidence import Evidence
from shoal.exits.points import exit_points
from shoal.models import build
from shoal.networks.assembly import own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.outputs import forward
from shoal.storage.run import Run
from shoal.surgery.tracing import trace
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs, randomise
from tests.exits.test_dynamic import three_exits
from tests.jobs.test_exits import trained
from tests.support.tables import fast_first

SHAPE = (1, 8, 8)


def some(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *SHAPE), torch.arange(count) % 4


# ---- flat minima


def test_no_noise_changes_nothing_and_the_model_is_left_alone() -> None:
    model, (x, y) = three_exits(), some()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = noise_curve(model, x, y, (0.0, 0.5), draws=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        logits = forward(model, x).logits
    for i, z in enumerate(logits):
        own = next(r for r in rows if r["exit"] == i and r["noise"] == 0)
        assert own["accuracy"] == pytest.approx(100 * float((z.argmax(1) == y).float().mean()))
        assert own["loss"] == pytest.approx(float(nn.functional.cross_entropy(z, y)), rel=1e-5)
    assert [r["loss"] for r in rows if r["noise"] == 0.5] != [r["loss"] for r in rows if r["noise"] == 0]


def test_noise_has_the_size_that_it_is_said_to_have() -> None:
    # The loss of one logit pair (w x, 0) at label 0 is log(1 + exp(-w x)): noise on w is read off it.
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(20_000))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((self.w.square().mean().expand(len(x)), torch.zeros(len(x))), 1)

    (row,) = noise_curve(One(), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), (2.0,), draws=1)
    assert -np.log(np.exp(row["loss"]) - 1) == pytest.approx(4.0, rel=0.05)  # the mean of squares is 2^2


def test_the_seed_decides_the_noise() -> None:
    model, (x, y) = three_exits(), some()
    first, again, other = (noise_curve(model, x, y, (0.1,), draws=1, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


# ---- gradients


def test_gradients_reach_the_layers_that_an_exit_reads() -> None:
    model, (x, y) = three_exits(), some()
    rows = gradient_magnitudes(model, x, y, batch=12)
    sizes = {(r["layer"], r["exit"]): r["gradient"] for r in rows}
    assert sizes["stem", 0] > 0
    assert sizes["c2", 0] == 0
    assert sizes["c2", 2] > 0
    assert sizes["c2", ALL] == pytest.approx(sizes["c2", 2])  # the last exit alone reads it
    assert not any(p.grad is not None for p in model.parameters())


def test_gradients_have_a_seed_and_leave_single_images_out() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 4)
    )
    images, labels = some(9)
    state = torch.get_rng_state()
    first, again, other = (gradient_magnitudes(model, images, labels, 4, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == gradient_magnitudes(model, images[:8], labels[:8], 4)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ShoalError, match="found one image"):
        gradient_magnitudes(model, images[:1], labels[:1])


def test_gradients_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(1)

    model = Net()
    model.conv.weight.data = torch.tensor([[[[0.0]]], [[[0.0]]]])
    # Both classes have probability 1/2: dL/dw = (p - onehot) x = -+ x / 2; means over images of 3 and 1 are 2 / 2.
    (one, all_) = gradient_magnitudes(
        model, torch.tensor([3.0, 1.0]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    )
    assert one == {"layer": "conv", "exit": 0, "gradient": pytest.approx(1.0)}
    assert all_["gradient"] == pytest.approx(1.0)


# ---- features


def test_separability_by_hand() -> None:
    # Class 0 at 0 and 2, class 1 at 4 and 6: means 1 and 5, each point 1 from its own, each mean 2 from that of all.
    found = separability(torch.tensor([[0.0], [2.0], [4.0], [6.0]]).double(), torch.tensor([0, 0, 1, 1]))
    assert (found.sse, found.ssb, found.ratio) == (1.0, 4.0, 0.25)
    assert separability(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([0, 0])).ratio == float("inf")


def test_separability_adds_up_to_the_variance() -> None:
    features, labels = torch.randn(50, 7, dtype=torch.float64), torch.randint(0, 5, (50,))
    found = separability(features, labels * 3)  # labels need not be consecutive
    assert found.sse + found.ssb == pytest.approx(float(features.var(0, correction=0).sum()))


def test_features_are_what_the_linear_layers_read() -> None:
    model, (x, _) = three_exits(), some()
    features = collect_features(model, x, batch=5)
    with torch.no_grad():
        logits = forward(model, x).logits
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for f, z in zip(features, logits, strict=True):
        assert any((m(f.float()) - z).abs().max() < 1e-4 for m in linears if m.in_features == f.shape[1])


def test_features_need_a_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    with pytest.raises(ShoalError, match="need a linear layer's"):
        collect_features(model, torch.zeros(2, *SHAPE))


def test_principal_components_of_a_line_and_of_a_cloud() -> None:
    t = torch.linspace(-1, 1, 9, dtype=torch.float64)
    places, shares = principal_components(torch.stack((3 * t + 1, 4 * t - 2), 1))
    assert shares.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert places[:, 0].abs().tolist() == pytest.approx((5 * t).abs().tolist(), abs=1e-9)
    cloud = torch.randn(40, 6, dtype=torch.float64)
    places, shares = principal_components(cloud)
    variance = torch.linalg.eigvalsh(torch.cov(cloud.T)).flip(0)
    assert places.var(0).tolist() == pytest.approx(variance[:2].tolist())
    assert shares.tolist() == pytest.approx((variance / variance.sum())[:2].tolist())
    assert principal_components(torch.randn(5, 1).double())[0][:, 1].tolist() == [0.0] * 5


# ---- attention, attribution, thresholds


class Attentive(nn.Module):
    """One spatial mask, and one of a value a channel, which is no map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(1, 3, 3, padding=1), nn.Sigmoid()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * self.gate(2 * y)
        y = torch.sigmoid(y.mean((2, 3), keepdim=True)) * y
        return self.fc(y.mean((2, 3)))


def test_attention_maps_are_found_in_the_graph() -> None:
    model, (x, _) = Attentive(), some(3)
    maps = attention_maps(model, x)
    with torch.no_grad():
        truth = torch.sigmoid(2 * model.conv(x)).mean(1)
    assert list(maps) == ["gate"]
    assert torch.allclose(maps["gate"], truth)
    assert attention_maps(Residual(), x) == {}


def test_integrated_gradients_of_a_linear_network_are_its_products() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, baseline, classes = torch.randn(2, *SHAPE), torch.randn(*SHAPE), torch.tensor([3, 1])
    found = integrated_gradients(model, x, baseline, classes, 0, steps=1)
    truth = model[1].weight[classes].view(2, *SHAPE) * (x - baseline)
    assert torch.allclose(found, truth, atol=1e-6)


@pytest.mark.slow
def test_integrated_gradients_add_up_to_the_difference_of_logits() -> None:
    model, (x, y) = three_exits(), some(4)
    baseline = torch.full(SHAPE, -1.0)
    for exit in range(3):
        found = integrated_gradients(model, x, baseline, y, exit, steps=400)
        with torch.no_grad():
            gained = logit(model, x, y, exit) - logit(model, baseline.expand_as(x), y, exit)
        assert (found.sum((1, 2, 3)) - gained).abs().max() < 0.01 * gained.abs().max()
    with pytest.raises(ShoalError, match="found 0 steps"):
        integrated_gradients(model, x, baseline, y, 0, steps=0)


def test_threshold_curves_by_hand() -> None:
    table = Evidence(np.array([[0.9], [0.6], [0.4]]), np.array([[True], [False], [True]]), np.ones(3, dtype=bool))
    rows = threshold_curve(table, (0.0, 0.5, 0.7, 0.95))
    assert [(r["images"], r["accuracy"]) for r in rows] == [
        (3, pytest.approx(200 / 3)),
        (2, 50.0),
        (1, 100.0),
        (0, None),
    ]


# ---- computation

# Attention after C x H x H: two depthwise and two pointwise layers at half the resolution, (2C^2 + 18C) (H / 2)^2.
# The backbone, and all classifiers one after the other, are those of tests/exits/test_attention_exits.py.
SHARES = [
    ("resnet18", 555_468_800, (2_392_064, 2_244_608, 2_170_880), 582_115_328),
    ("resnet50", 1_298_014_208, (34_734_080, 34_144_256, 33_849_344), 1_706_590_208),
]


@pytest.mark.parametrize(("name", "backbone", "attention", "whole"), fast_first(SHARES))
def test_parts_of_the_computation_are_those_counted_by_hand(
    name: str, backbone: int, attention: tuple[int, ...], whole: int
) -> None:
    plain = build(name, 100)
    rows = parts_of(trace(add_aligned_exits(plain, exit_points(plain, (3, 32, 32)), 100, (3, 32, 32)), (3, 32, 32)))
    assert [row["macs"] for row in rows if row["part"] == BACKBONE] == [backbone]
    assert tuple(row["macs"] for row in rows if row["part"] == ATTENTION) == attention
    assert sum(row["macs"] for row in rows) == whole
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["params"] for row in rows) == sum(p.numel() for p in plain.parameters()) + sum(
        row["params"] for row in rows if row["part"] != BACKBONE
    )
    if name == "resnet50":  # section 5.6: the additional layers take a quarter
        assert rows[-1]["share"] == pytest.approx(0.76, abs=0.005)


def test_exits_without_attention_and_plain_networks_have_no_attention_part() -> None:
    assert [row["part"] for row in parts_of(trace(randomise(Residual()), SHAPE))] == [BACKBONE]
    parts = [(row["exit"], row["part"]) for row in parts_of(trace(three_exits(), SHAPE))]
    assert parts == [(0, CLASSIFIER), (1, CLASSIFIER), (2, BACKBONE)]


# ---- the command


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_takes_one_exit_or_several(name: str, exits: int) -> None:
    model = randomise(Residual()) if exits == 1 else three_exits()
    result = STUDIES[name](Subject(model, blobs(16), images=16, levels=(0.0, 0.1)))
    if name == "attention":
        assert result is None
        return
    assert result is not None
    assert {row["exit"] for row in result.rows} - {ALL} == set(range(exits))
    assert all(set(row) == set(result.rows[0]) for row in result.rows)


def test_attention_is_drawn_where_there_is_any() -> None:
    result = STUDIES["attention"](Subject(Attentive(), blobs(16), images=16))
    assert result is not None
    assert all(0 < row["least"] <= row["mean"] <= row["most"] < 1 for row in result.rows)


def test_studies_that_a_network_has_none_of_stop_only_who_asked(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"data": "digits", "seed": 0, "limit": 100, "data_dir": None})
    spec = Spec("tests.analysis.test_analysis:Pooled", 10, (1, 16, 16))
    save_network(run, spec, own_network(spec))
    body = json.loads(call("analyse", str(run.folder), "--images", "20", "--json"))
    assert "found logits from" in body["pca"]["note"]
    assert body["gradients"]["rows"] > 0
    with pytest.raises(ShoalError, match="found logits from"):
        call("analyse", str(run.folder), "--study", "pca")


class Pooled(nn.Module):
    """Without a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(x))).mean((2, 3))


@pytest.mark.slow
def test_the_command_writes_a_plot_and_a_table_each(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    words = ("analyse", str(run), "--images", "60", "--levels", "0,0.1", "--json")
    body = json.loads(call(*words))
    assert set(body) == set(STUDIES)
    assert body["attention"]["files"] == []
    for name, row in body.items():
        for file in row["files"]:
            data = Path(file).read_bytes()
            assert Path(file).name in (f"{name}.csv", f"{name}.png")
            assert data[:4] == b"\x89PNG" or len(list(csv.reader(data.decode().splitlines()))) == row["rows"] + 1
    other = json.loads(call(*words, "--study", "separability", "--out", str(tmp_path / "out")))
    assert list(other) == ["separability"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["separability.csv", "separability.png"]
    for more, pattern in (
        (("--study", "colour"), r"found studies \['colour'\]"),
        (("--images", "0"), "0 images"),
        (("--levels", "a"), "--levels 'a'"),
        (("--levels", "-1", "--study", "flat-minimum"), "need standard deviations of 0 or more"),
        (("--levels", "nan"), "need standard deviations of 0 or more"),
    ):
        with pytest.raises(ShoalError, match=pattern):
            call("analyse", str(run), *more)
