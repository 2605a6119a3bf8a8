"""DeepReDuce's grid from the command line, resumed; designs by name; their specs; and the Pareto front's laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.recipes import deepreduce
from shoal.recipes.deepreduce.designs import Design, design_spec, drops, grid, parse
from shoal.recipes.deepreduce.front import Point, choose, pareto
from shoal.recipes.deepreduce.merging import BLOCKS, UNMERGED, merged_cost
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.recipes.deepreduce.training import inherit
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs

CIFAR = (3, 32, 32)
SMALL = Spec("resnet10", 10, (1, 8, 8), 0.125)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    words = ("--data", "digits", "--width", "0.125", "--limit", "200", "--epochs", "1")
    call("train", "resnet10", *words, "--preset", "deepreduce-paper-cifar10", "--out", folder / "teacher", "--json")
    return folder


def words(runs: Path, name: str, *more: str) -> tuple[str, ...]:
    start = ("reduce", str(runs / "teacher"), "--recipe", "deepreduce", "--epochs", "1,1", "--out", str(runs / name))
    return (*start, "--json", *more)


@pytest.mark.usefixtures("epochwise")
@pytest.mark.slow
def test_a_grid_resumes_to_the_same_front_and_chooses_anew(runs: Path) -> None:
    whole = json.loads(call(*words(runs, "whole", "--designs", "2,S3+S4-a0.5")))
    run = Run(runs / "whole")
    rows = run.read_json("criticality.json")
    assert [row["stage"] for row in rows] == [1, 2, 3, 4]
    assert min(row["criticality"] for row in rows) == 0
    order = sorted(rows, key=lambda row: row["criticality"])
    thinned = Design((order[0]["stage"],), (1, 2, 3, 4)).name((1, 2, 3, 4))
    assert {row["name"] for row in whole["designs"]} == {thinned, "S3+S4-a0.5"}
    assert (runs / "whole" / "front.png").read_bytes()[:4] == b"\x89PNG"
    halting = words(runs, "parts", "--designs", "2,S3+S4-a0.5")
    for more in ((), ("--resume",)):
        with pytest.raises(ShoalError, match="time is up"):
            call(*halting, "--max-seconds", "0", *more)
    assert len(Run(runs / "parts").metrics()) == 2
    parts = json.loads(call(*halting, "--resume"))
    assert [without_times(p) for p in (parts, whole)] == [without_times(whole)] * 2
    # A smaller budget chooses among what is there, and the run's own network is the chosen design.
    least = min(row["relus"] for row in whole["designs"])
    again = json.loads(call(*words(runs, "whole", "--designs", "S3+S4-a0.5", "--resume", "--budget", str(least))))
    assert again["design"] == next(row["name"] for row in whole["designs"] if row["relus"] == least)
    body = json.loads(call("evaluate", str(runs / "whole"), "--json"))
    assert (body["relus"], body["accuracy"]) == (least, again["reduced"]["accuracy"])
    reported = json.loads(call("report", str(runs / "whole" / "designs" / thinned), "--json"))
    assert reported[0]["baseline.relus"] > reported[0]["reduced.relus"]
    with pytest.raises(ShoalError, match=f"need {least:,} or more, the least"):
        call(*words(runs, "whole", "--designs", "S3+S4-a0.5", "--resume", "--budget", "1"))


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "environment"}


def test_the_table_names_every_design(runs: Path) -> None:
    text = call(*(w for w in words(runs, "table", "--designs", "S4RT-r0.5") if w != "--json"))
    assert "S4RT-r0.5" in text
    assert not Run(runs / "table").has("criticality.json")  # a design by name needs no order of the stages


REFUSED = [
    (("--designs", "S9"), r"design 'S9'; need some of the stages \[1, 2, 3, 4\]"),
    (("--designs", "S2+S2"), "each once"),
    (("--designs", "thin"), "such as S2RT"),
    (("--designs", "S2-a2"), "scale '2'"),
    (("--designs", "S2-a0..5"), "scale '0..5'"),
    (("--designs", "S2-r0.3"), "need 1, 0.5 or 0.25"),
    (("--designs", "16"), "need places from 1 to 15"),
    (("--designs", "0-3"), "need places from 1 to 15"),
    (("--designs", "S2RT+S3-one"), "no second residual block"),
    (("--designs", "Conv1+S2"), "or Conv1 or NoReLUs; correct the name"),
    (("--designs", "Conv1-one"), "no second residual block"),
    (("--plan", "plan.json"), "found plan"),
    (("--designs", "1", "--budget", "1"), "need .* or more, the least of these designs"),
    (("--budget", "1"), "need .* or more, the least of these designs"),
    (("--designs", "S4", "--budget", "1"), "need .* or more, the least of these designs"),
    (("--preset", "reference-code"), "preset 'reference-code'"),
    (("--epochs", "1,1,1"), "need 2 numbers: criticality,design"),
    (("--masks", "random"), "masks 'random' with recipe deepreduce"),
    (("--no-gates",), "gates False with recipe deepreduce"),
]


@pytest.mark.parametrize(("more", "pattern"), REFUSED, ids=str)
def test_bad_input_is_refused_before_anything_is_written(runs: Path, more: tuple[str, ...], pattern: str) -> None:
    with pytest.raises(ShoalError, match=pattern):
        call(*words(runs, "refused", *more))
    assert not (runs / "refused").exists()


def test_a_design_is_no_teacher_and_shallow_takes_no_designs(runs: Path, tmp_path: Path) -> None:
    spec, model = load_network(Run(runs / "teacher"))
    design = design_spec(spec, Design((1,)), model)
    run = Run.create(tmp_path / "design", Run(runs / "teacher").config())
    save_network(run, design, assemble(design))
    with pytest.raises(ShoalError, match="reduced already"):
        call("reduce", str(run.folder), "--recipe", "deepreduce", "--out", str(tmp_path / "out"))
    with pytest.raises(ShoalError, match="designs for recipe shallow"):
        call("reduce", str(runs / "teacher"), "--budget", "9", "--designs", "1", "--out", str(tmp_path / "out"))


@pytest.mark.slow
def test_count_takes_a_design() -> None:
    body = json.loads(call("count", "resnet18", "--classes", "100", "--design", "S2RT+S3RT-a0.5", "--json"))
    assert (body["relus"], body["merging"]["unmerged"]["convs"], body["merging"]["paper"]["convs"]) == (49_152, 17, 7)
    # S4 is culled: its four convolutions and the layers behind them are one linear layer of 128 x 8 x 8 values.
    assert (body["merging"]["folded"]["convs"], body["merging"]["folded"]["linear_macs"]) == (13, 128 * 64 * 100)


@given(
    st.permutations([1, 2, 3, 4, 5]).flatmap(lambda order: st.tuples(st.just(order), st.integers(0, 4))),
    st.sets(st.integers(1, 5)),
    st.sampled_from([1.0, 0.5, 0.25]),
    st.sampled_from([1.0, 0.5]),
    st.booleans(),
)
@settings(max_examples=100)
def test_a_name_is_read_back(
    order: tuple[list[int], int], thin: set[int], width: float, resolution: float, one_block: bool
) -> None:
    culled = tuple(sorted(order[0][: order[1]]))
    kept = tuple(sorted(thin - set(culled)))
    design = Design(culled, kept, width, resolution, one_block)
    assert parse(design.name((0, 1, 2, 3, 4, 5)), (0, 1, 2, 3, 4, 5)) == design


NAMES = ["resnet9", "resnet10", "resnet18", "resnet34", "resnet20", "vgg16-avg", "mobilenetv1"]


def images(count: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *CIFAR), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(count) % 4)
    return Dataset("noise", split, split, split, 4, (0.5,) * 3, (0.3,) * 3, "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_goes_all_the_way(name: str, tmp_path: Path) -> None:
    """Built, trained for a step, stored, loaded, folded to the same function, and counted both ways."""
    spec = Spec(name, 4, CIFAR, 0.0625)
    torch.manual_seed(0)
    teacher = assemble(spec).eval()
    stages = DesignSpace(spec, teacher).stages
    design = Design((stages[0], stages[-1]), tuple(stages[1:-1])).name(stages)
    step = Schedule(1, 0.01, batch_size=4)
    plan, run = deepreduce.Preset(step, step, step, student_from_teacher=True), Run(tmp_path)
    options = deepreduce.Options(designs=(design,))
    result = deepreduce.reduce(spec, teacher, options, plan, Stages(images(), Settings(), run))
    own, model = load_network(Run(tmp_path / "designs" / design))
    assert result.chosen.relus == sum(s.relus for s in relu_sites(model, CIFAR)) < result.baseline.relus
    graph, x = trace(model, CIFAR), torch.randn(2, *CIFAR)
    with torch.no_grad():
        assert torch.allclose(fold(graph)(x)[-1], model(x), rtol=1e-4, atol=1e-4)
    plain, paper = (merged_cost(teacher, CIFAR, own.dropped, merging) for merging in (UNMERGED, BLOCKS))
    # Depthwise and pointwise convolutions cost more as one, so that MobileNet's stay.
    assert (paper.convs < plain.convs) == (paper.macs < plain.macs) == (name != "mobilenetv1")


@pytest.mark.slow
def test_designs_keep_their_names_at_any_size() -> None:
    """VGG16's stages are told by map size, and half the resolution leaves out a pool: names come from the full one."""
    full = build("vgg16-avg", 10, width=0.125)
    space = DesignSpace(Spec("vgg16-avg", 10, CIFAR, 0.125), full)
    last = space.plan(Design((1, 2, 3, 4), (5,), 0.5, 0.5))
    assert last.spec.dropped == drops(Design((1, 2, 3, 4), (5,)), full, CIFAR)[1]
    # Three convolutions of 32 channels on 2x2 maps, of which the second keeps its ReLU.
    assert last.relus == 32 * 2 * 2


@pytest.mark.slow
def test_the_grid_falls_in_relus_step_by_step() -> None:
    space = DesignSpace(SMALL, assemble(SMALL))
    planned = [space.plan(design).relus for design in grid({1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0})]
    for first in range(0, 15, 5):
        plain, thin, narrow, low, both = planned[first : first + 5]
        assert (plain, thin, both) == (2 * thin, 2 * narrow, low // 2)


def test_a_network_in_memory_has_one_size() -> None:
    torch.manual_seed(0)
    spec = Spec("given", 4, (1, 8, 8))
    teacher = assemble(spec, Residual())
    space = DesignSpace(spec, teacher)
    assert space.plan(Design((1,))).relus == 8 * 4 * 4 * 2
    with pytest.raises(ShoalError, match="reshaped design of a network made in memory"):
        space.plan(Design((1,), width=0.5))


def test_inherit_is_all_or_nothing() -> None:
    torch.manual_seed(0)
    teacher, narrow = assemble(SMALL), build("resnet10", 10, channels=1, width=0.0625)
    before = {k: v.clone() for k, v in narrow.state_dict().items()}
    assert not inherit(narrow, teacher)
    assert all(torch.equal(v, before[k]) for k, v in narrow.state_dict().items())
    small = build("resnet10", 10, channels=1, width=0.125, resolution=0.5)
    assert inherit(small, teacher)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in small.state_dict().items())


points = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points, st.integers(0, 10))
@settings(max_examples=200)
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]], budget: int) -> None:
    found = [Point(f"p{i}", relus, float(accuracy), 0.0) for i, (relus, accuracy) in enumerate(pairs)]
    best = pareto(found)
    for point in found:
        beaten = any(
            (o.relus <= point.relus and o.validation > point.validation)
            or (o.relus < point.relus and o.validation >= point.validation)
            for o in found
        )
        equal = any((o.relus, o.validation) == (point.relus, point.validation) for o in best)
        assert equal != beaten
    assert len({(p.relus, p.validation) for p in best}) == len(best)
    inside = [p.validation for p in found if p.relus <= budget]
    if not inside:
        with pytest.raises(ShoalError, match=f"need {min(r for r, _ in pairs)} or more"):
            choose(found, budget)
    else:
        assert choose(found, budget).validation == max(inside)
    assert choose(found, None).validation == max(p.validation for p in found)


def specs() -> list[tuple[Spec, str]]:
    base = Spec("resnet18", 10, (1, 16, 16), 0.0625)
    dropped = Spec(**{**vars(base), "dropped": ("layer2.0.relu1",)})
    return [
        (Spec(**{**vars(base), "dropped": ("conv1",)}), "no ReLU 'conv1'"),
        (Spec(**{**vars(base), "dropped": ("nope",)}), "no ReLU 'nope'"),
        (Spec(**{**vars(base), "dropped_blocks": ("layer2.0.relu1",)}), "keeps its shape"),
        (Spec(**{**vars(base), "dropped_blocks": ("relu",)}), "no residual block 'relu'"),
        (
            Spec(**{**vars(base), "dropped_blocks": ("layer1.1.relu1",), "dropped": ("layer1.1.relu2",)}),
            r"no ReLU 'layer1\.1\.relu2'",
        ),
        (Spec(**{**vars(dropped), "masked": ("layer2.0.relu1",)}), "no site 'layer2.0.relu1'"),
        (Spec(**{**vars(dropped), "branches": ("layer2.0.relu1",)}), "no site 'layer2.0.relu1'"),
    ]


@pytest.mark.parametrize(("spec", "pattern"), specs(), ids=[pattern for _, pattern in specs()])
def test_what_a_spec_cannot_drop_is_named(spec: Spec, pattern: str) -> None:
    with pytest.raises(ShoalError, match=pattern):
        assemble(spec)


def test_a_spec_with_drops_is_stored_and_an_old_one_still_loads(tmp_path: Path) -> None:
    teacher = build("resnet18", 10, channels=1, width=0.0625)
    spec = design_spec(Spec("resnet18", 10, (1, 16, 16), 0.0625), Design((1,), (2,), one_block=True), teacher)
    run, model = Run(tmp_path), assemble(spec).eval()
    save_network(run, spec, model)
    again, loaded = load_network(run)
    x = torch.randn(2, 1, 16, 16)
    assert again == spec
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    body = json.loads((tmp_path / "model.json").read_text())
    old = {k: v for k, v in body.items() if k not in ("dropped", "dropped_blocks")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Spec.load(tmp_path / "old.json") == Spec("resnet18", 10, (1, 16, 16), 0.0625)
    for wrong in ("relu", [1], None, {"relu": 1}):
        (tmp_path / "wrong.json").write_text(json.dumps(body | {"dropped": wrong}))
        with pytest.raises(ShoalError, match="no list of names at 'dropped'"):
            Spec.load(tmp_path / "wrong.json")


def test_a_users_function_is_scaled_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scaled.py").write_text(
        "from shoal.models import build\n"
        "def net(classes, width=1.0, resolution=1.0):\n"
        "    return build('resnet10', classes, channels=1, width=0.125 * width, resolution=resolution)\n"
        "def fixed(classes):\n    return net(classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = Spec("scaled:net", 10, (1, 8, 8))
    half = DesignSpace(spec, assemble(spec)).plan(Design((1,), width=0.5))
    assert 2 * half.relus == DesignSpace(spec, assemble(spec)).plan(Design((1,))).relus
    with pytest.raises(ShoalError, match=r"found width 0\.5 for scaled:fixed"):
        assemble(Spec("scaled:fixed", 10, (1, 8, 8), 0.5))
    with pytest.raises(ShoalError, match=r"found resolution 0\.5 for scaled:fixed"):
        assemble(Spec("scaled:fixed", 10, (1, 8, 8), resolution=0.5))


@pytest.mark.slow
def test_a_run_in_memory_keeps_its_figures_honest(tmp_path: Path) -> None:
    """Figures that are no numbers are refused, and not taken for a trained design."""
    torch.manual_seed(0)
    spec = Spec("given", 4, (1, 8, 8))
    teacher: nn.Module = assemble(spec, Residual()).eval()
    step = Schedule(1, 0.05, batch_size=32)
    plan, options = deepreduce.Preset(step, step, step), deepreduce.Options(designs=("S2",))
    result = deepreduce.reduce(spec, teacher, options, plan, Stages(blobs(64), Settings(), Run(tmp_path)))
    assert [point.name for point in result.points] == ["S2"]
    (tmp_path / "designs" / "S2" / "figures.json").write_text("{}")
    with pytest.raises(ShoalError, match="found no figures of S2"):
        deepreduce.trained_points(Run(tmp_path))
