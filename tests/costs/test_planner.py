"""The planner: every candidate meets its target, none could have more ReLUs; `reduce --plan` trains what it says."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.costs import plan as plans
from shoal.costs.candidates import FINE, Candidate, Original, Structure, greatest, plan, points_lost, structures
from shoal.costs.machine import Machine
from shoal.costs.target import MODES, Forecast, Target
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.jobs import plan as planning
from shoal.models import build
from shoal.networks.spec import Spec
from shoal.reduction.budget import allocate
from shoal.reduction.masks import add_masks, random_masks
from shoal.reduction.sensitivity import magnitude_densities, pruning_sensitivity
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import trace
from tests.cli.test_commands import call
from tests.conftest import Residual, randomise
from tests.support.tables import fast_first

SHAPE = (3, 16, 16)
SPEC = Spec("resnet10", 10, SHAPE, 0.25)
BASE = randomise(build("resnet10", 10, width=0.25))


@functools.cache
def bodies() -> list[Structure]:
    return list(structures(SPEC, Traced(BASE, SPEC.shape), None))


@functools.cache
def everything() -> int:
    return sum(site.relus for site in relu_sites(BASE, SHAPE))


def test_targets_are_read_and_shown() -> None:
    table = {"0.5s": (0.5, "s"), " 120 ms": (0.12, "s"), "80MB": (8e7, "bytes"), "50krelus": (5e4, "relus")}
    for text, (limit, unit) in table.items():
        target = Target.parse(text)
        assert (target.limit, target.unit) == (pytest.approx(limit), unit)
    assert str(Target.parse("1.5GB", "offline", "wan")) == "1.5e+03 MB offline over wan"
    for bad in ("fast", "0s", "-1s", "1..5s", "5", "s", "nan s", "5 hours"):
        with pytest.raises(ShoalError, match="found target"):
            Target.parse(bad)
    with pytest.raises(ShoalError, match="found mode 'later'; need one of online"):
        Target.parse("1s", "later")
    with pytest.raises(ShoalError, match="found link 'moon'; need one of none"):
        Target.parse("1s", link="moon")


def test_a_written_target_keeps_the_key_of_earlier_plans() -> None:
    target = Target(2.0, "bytes", "offline", "wan")
    assert target.as_json() == {"limit": 2.0, "unit": "bytes", "mode": "offline", "network": "wan"}
    assert Target.from_json(target.as_json()) == target
    with pytest.raises(ValueError, match="Target with"):
        Target.from_json({"limit": 2.0, "unit": "bytes", "mode": "offline", "link": "wan"})
    with pytest.raises(ValueError, match="Target in mode 'direct'"):  # of plans by earlier versions
        Target.from_json(target.as_json() | {"mode": "direct"})


def test_structures_cut_blocks_and_exits_once_each() -> None:
    seen = {(body.gated, body.exit) for body in bodies()}
    assert len(seen) == len(bodies())
    assert ((), False) in seen
    assert ((), True) in seen
    assert max(len(gated) for gated, _ in seen) == 4
    for body in bodies():
        names = {node.name for node in body.graph.nodes}
        assert not names & set(body.gated)


def test_what_a_structure_costs_is_what_its_surgery_gives() -> None:
    """The graph with `total` ReLUs is that of the masked network, but for which positions are kept."""
    body = next(b for b in bodies() if not b.gated and not b.exit)
    total = everything() // 9
    budget = allocate(body.sites, body.sensitivity, total)
    masked = add_masks(BASE, random_masks(budget, body.sites, torch.Generator().manual_seed(0)))
    real, planned = cost(fold(trace(masked, SHAPE))), cost(body.at(total))
    assert planned.relus == real.relus == total
    assert (planned.macs, planned.depth, planned.relu_layers) == (real.macs, real.depth, real.relu_layers)


@settings(max_examples=30)
@example("offline", 0, 0.1171875)
@given(st.sampled_from(MODES), st.integers(0, 99), st.floats(0.0, 1.0))
@pytest.mark.slow
def test_the_greatest_budget_is_within_the_target_and_just_above_it_one_is_not(
    mode: str, which: int, part: float
) -> None:
    """Not every budget above is beyond: one ReLU more may take a word of 64 from another site, and cost less."""
    body, target = bodies()[which % len(bodies())], Target(1.0, "s", mode)
    least, most = (target.taken(target.forecast(body.at(total))) for total in (1, everything()))
    target = replace(target, limit=least + part * (most - least))
    found = greatest(body, target)
    assert not isinstance(found, float)
    budget, forecast = found
    assert target.taken(forecast) <= target.limit
    assert forecast == target.forecast(body.at(budget))
    above = range(budget + 1, min(everything(), budget + max(1, int(budget * FINE))) + 1)
    assert budget == everything() or any(target.taken(target.forecast(body.at(more))) > target.limit for more in above)


def test_below_the_least_there_is_nothing() -> None:
    found = greatest(bodies()[0], Target(1e-6, "s"))
    assert isinstance(found, float)
    assert found > 1e-6
    with pytest.raises(
        ShoalError, match=r"found no network cut from resnet10 within 1e-06 s online; need at least 0\.0"
    ):
        plan(Original(SPEC, BASE), Target(1e-6, "s"))


@pytest.mark.parametrize("text", fast_first(["300KB", "20ms", "2krelus"]))
def test_candidates_meet_the_target_and_none_beats_another(text: str) -> None:
    target = Target.parse(text)
    found = plan(Original(SPEC, BASE), target, reshapes=((0.5, 1.0),))
    assert found == sorted(found, key=lambda c: (c.lost, -c.forecast.relus))
    sizes = [(c.forecast.relus, c.forecast.macs, c.forecast.depth) for c in found]
    for c, size in zip(found, sizes, strict=True):
        assert target.taken(c.forecast) <= target.limit
        assert not any(o != size and all(a >= b for a, b in zip(o, size, strict=True)) for o in sizes)


@pytest.mark.slow
def test_a_slower_machine_or_link_affords_less() -> None:
    target = Target.parse("20ms")
    here = max(c.forecast.relus for c in plan(Original(SPEC, BASE), target))
    slow = max(c.forecast.relus for c in plan(Original(SPEC, BASE), target, machine=Machine(relu_s=4e-6)))
    assert slow < here
    with pytest.raises(ShoalError, match="over wan"):
        plan(Original(SPEC, BASE), replace(target, link="wan"))


def test_what_published_networks_lost_orders_candidates() -> None:
    assert points_lost(1.0, 0, False) == points_lost(0.18, 0, False) == 0
    assert points_lost(0.089, 2, False) == pytest.approx(2.77 + 0.7)
    losses = [points_lost(share, 0, False) for share in (1e-4, 0.01, 0.03, 0.06, 0.1, 0.5)]
    assert losses == sorted(losses, reverse=True)
    assert points_lost(0.5, 0, True) == pytest.approx(1.9)


def test_what_a_reshaped_network_lost_is_the_mean_of_deepreduces_pairs() -> None:
    """Tables 2 and 4: the thinned designs with S2 to S4 (74.72 %) and with S2 and S3 (71.95 %), and their halves."""
    width = ((74.72 - 72.68) + (71.95 - 69.50)) / 2
    resolution = ((74.72 - 68.68) + (71.95 - 68.41)) / 2
    assert points_lost(0.5, 0, False, width=0.5) == pytest.approx(width, abs=0.05)
    assert points_lost(0.5, 0, False, resolution=0.5) == pytest.approx(resolution, abs=0.05)
    assert points_lost(0.5, 0, False, width=0.5, resolution=0.25) == pytest.approx(width + 2 * resolution, abs=0.15)


def test_a_plan_says_what_its_fields_are_and_how_it_is_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.planner, "plan", lambda *args, **options: [candidate()])
    request = planning.Request("resnet10", "3x16x16", 10, 0.25, limit="2krelus", link="wan")
    body = planning.plan(request, lambda text: None)
    row: dict[str, object] = dict(body["candidates"][0])
    nested = {f"forecast.{name}" for name in dict(body["candidates"][0]["forecast"])}
    named = (row.keys() - {"forecast"}) | nested
    assert named == body["fields"].keys()
    note, (head, _) = planning.footnote(body), planning.table(body)
    assert {"MACs, millions", "time, s", "MB sent", "lost, points"} <= set(head)
    assert "online over wan" in note
    assert body["fields"]["lost"] in note
    assert body["order"] in note


def test_magnitudes_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 2), torch.nn.Conv2d(1, 1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[9.0, -8.0], [0.1, 0.2]]]]))
        model[1].weight.copy_(torch.arange(16.0).view(1, 1, 4, 4) / 4)
    assert magnitude_densities(model, 0.2) == {"0": 0.5, "1": 0.125}
    user = randomise(Residual())
    eta = pruning_sensitivity(magnitude_densities(user), relu_sites(user, (1, 8, 8)))
    assert all(0 <= value <= 1 for value in eta.values())


def candidate(**changes: object) -> Candidate:
    one = Candidate(900, ("layer1.0.relu1",), "final", 1.0, 1.0, Forecast(850, 1, 2, 3, 0.1, 5, 6.0), 1.0)
    return replace(one, **changes)  # type: ignore[arg-type]


def test_plans_survive_the_disk_and_strangers_do_not(tmp_path: Path) -> None:
    body = {"format": plans.FORMAT, "base": "resnet10", "shape": SHAPE, "width": 0.25, "resolution": 1.0}
    body |= {"target": {"limit": 0.1, "unit": "s", "mode": "online", "network": "none"}}
    body |= {"machine": asdict(Machine()), "chosen": 0}
    body |= {"candidates": [asdict(candidate()), asdict(candidate(budget=7))]}
    plans.write(body, 2, tmp_path / "plan.json")
    read = plans.read(tmp_path / "plan.json")
    assert (read.candidate, read.target, read.machine) == (candidate(budget=7), Target(0.1, "s"), Machine())
    with pytest.raises(ShoalError, match="found --pick 3; need 1 to 2"):
        plans.write(body, 3, tmp_path / "plan.json")
    for key, value in (("candidates", []), ("shape", None), ("target", {"limit": 1}), ("machine", {"and_s": 1})):
        (tmp_path / "bad.json").write_text(json.dumps(json.loads(json.dumps(body)) | {key: value}))
        with pytest.raises(ShoalError, match="found a damaged plan at"):
            plans.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ShoalError, match="found no plan at"):
        plans.read(tmp_path / "bad.json")


def test_a_plan_is_for_its_own_teacher() -> None:
    made = plans.Plan("resnet10", SHAPE, 0.25, 1.0, Target(0.1, "s"), None, candidate(width=0.5))
    made.check(replace(SPEC, width=0.125))
    with pytest.raises(ShoalError, match=r"shoal train resnet10 --width 0.125 --resolution 1"):
        made.check(SPEC)
    with pytest.raises(ShoalError, match="need a plan made for this teacher"):
        made.check(replace(SPEC, base="resnet18"))


@pytest.mark.slow
def test_reduce_trains_what_the_plan_says(tmp_path: Path) -> None:
    small = ("--data", "digits", "--width", "0.125", "--limit", "300")
    call("train", "resnet10", *small, "--epochs", "1", "--out", tmp_path / "teacher", "--json")
    words = ("plan", tmp_path / "teacher", "--target", "300relus", "--out", tmp_path / "plan.json", "--json")
    body = json.loads(call(*words))
    assert body["sensitivity_from"] == "magnitudes of the weights"
    first = body["candidates"][0]
    given = ("--plan", tmp_path / "plan.json", "--epochs", "1,1,2")
    summary = json.loads(call("reduce", tmp_path / "teacher", *given, "--out", tmp_path / "reduced", "--json"))
    outcome = summary["reduced"]["plan"]
    assert outcome["planned"] == first["forecast"]
    assert outcome["forecast"]["relus"] == summary["reduced"]["relus"]
    assert summary["reduced"]["replaced_blocks"] == first["gated"]
    assert outcome["forecast"]["macs"] == first["forecast"]["macs"]
    assert Run(tmp_path / "reduced").read_json("summary.json") == summary
    with pytest.raises(ShoalError, match="found --budget and --plan, or neither"):
        call("reduce", tmp_path / "teacher", "--out", tmp_path / "none")
