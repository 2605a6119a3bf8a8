"""Laws over all learners of masks, and each method's own numbers by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError, StoppedError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.recipes import shallow
from shoal.recipes.shallow.presets import Preset
from shoal.recipes.stages import Stages
from shoal.reduction.budget import allocate
from shoal.reduction.learners import LEARNERS, SUMMARIES
from shoal.reduction.learners.coordinate_descent import CoordinateDescent
from shoal.reduction.learners.depthshrinker import DepthShrinker
from shoal.reduction.learners.relupruner import ScoredReLU
from shoal.reduction.learners.search import Problem, Search
from shoal.reduction.learners.snl import LayerFolding, fill
from shoal.reduction.learners.soft import Pressure, sloped
from shoal.reduction.masks import MaskedReLU, global_top_k, masked_sites
from shoal.reduction.quadratic import QuadraticReLU
from shoal.storage.run import Run
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs
from tests.support.tables import fast_where

SHAPE = (1, 8, 8)
DATA = blobs(128)
TOTAL = 150
PLAN = Schedule(3, 0.02, (1,), batch_size=32)
PRESET = Preset(PLAN, replace(PLAN, epochs=1), PLAN, replace(PLAN, epochs=1), beta=1.0, rewirings=2)
SPEC = Spec("given", 4, SHAPE)
BEGIN_WHOLE = ("snl", "relupruner", "autorep", "autorep-linear", "layer-folding", "depthshrinker")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(3)
    model = normalise(Residual())
    fit(model, DATA, Objective((cross_entropy(),)), Schedule(3, 0.1, batch_size=16))
    return model.eval()


def options(masks: str, **more: Any) -> shallow.Options:
    return shallow.Options(**({"budget": TOTAL, "gates": False, "exit": False, "masks": masks} | more))


def reduce(teacher: nn.Module, masks: str, folder: Path | None = None, **more: Any) -> shallow.Result:
    """One reduction; with a folder it stops after every epoch and is resumed."""
    seed = more.pop("seed", 0)
    if folder is None:
        return shallow.reduce(SPEC, teacher, options(masks, **more), PRESET, Stages(DATA, Settings(seed)))
    folder.mkdir()
    pieces = Settings(seed, max_seconds=0.0, resume=True)
    while True:
        try:
            return shallow.reduce(SPEC, teacher, options(masks), PRESET, Stages(DATA, pieces, Run(folder)))
        except StoppedError:
            continue


def problem(teacher: nn.Module, total: int = TOTAL, **more: Any) -> Problem:
    sites = relu_sites(teacher, SHAPE)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        parts = DATA.train.images.split(32), DATA.train.labels.split(32)
        return ((DATA.normalise(x), y) for x, y in zip(*parts, strict=True))

    share = partial(allocate, sites, {site.name: 1.0 for site in sites})
    return Problem(teacher, teacher, sites, SHAPE, total, PLAN, 4, 0, batches, share, **more)


def trained(search: Search) -> Search:
    """The search after its `fit`, with a loss of cross-entropy and its own terms."""
    objective = Objective((cross_entropy(), *search.terms))
    settings = Settings(select_from=search.select_from)
    fit(search.model, DATA, objective, PLAN, teacher=search.problem.teacher, hooks=search.hooks, settings=settings)
    return search


@pytest.mark.parametrize("masks", fast_where(lambda masks: masks == "senet", LEARNERS))
def test_exact_budget_plain_modules_and_the_same_again_from_checkpoints(
    masks: str, teacher: nn.Module, tmp_path: Path
) -> None:
    result = reduce(teacher, masks)
    sites = {site.name: site for site in result.sites}
    assert result.budget.total == TOTAL
    found = masked_sites(result.model)
    assert {n: m.mask.shape for n, m in found.items()} == {n: torch.Size(s.shape) for n, s in sites.items()}
    assert {n: int(m.mask.sum()) for n, m in found.items()} == result.budget.counts
    plain = QuadraticReLU if masks == "autorep" else MaskedReLU
    assert all(type(module) is plain for module in found.values())
    total = cost(fold(trace(result.model, SHAPE)))
    assert (total.relus, total.unknown) == (TOTAL, ())
    assert total.quadratics == (sum(s.relus for s in result.sites) - TOTAL if masks == "autorep" else 0)
    again = reduce(teacher, masks, tmp_path / "run").model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in result.model.state_dict().items())
    other = masked_sites(reduce(teacher, masks, seed=1).model)
    assert masks in ("magnitude", "layer-folding", "depthshrinker") or any(
        bool((other[n].mask != m.mask).any()) for n, m in found.items()
    )


@pytest.mark.parametrize("masks", [name for name, kind in LEARNERS.items() if "channel" in kind.granularities])
def test_channels_are_taken_whole_where_that_is_asked(masks: str, teacher: nn.Module) -> None:
    found = masked_sites(reduce(teacher, masks, granularity="channel").model)
    part = [int(channel.sum()) for m in found.values() for channel in m.mask if 0 < channel.sum() < channel.numel()]
    per_site = LEARNERS[masks].per_site or masks == "depthshrinker"
    assert sum(int(m.mask.sum()) for m in found.values()) == TOTAL
    assert len(part) <= (len(found) if per_site else 1)


@pytest.mark.parametrize("masks", BEGIN_WHOLE)
def test_before_training_all_relus_are_kept(masks: str, teacher: nn.Module) -> None:
    search, x = LEARNERS[masks](problem(teacher)), torch.randn(5, *SHAPE)
    assert torch.allclose(search.model.eval()(x), teacher(x), atol=1e-6)


@pytest.mark.parametrize("masks", LEARNERS)
@pytest.mark.parametrize("total", [0, 10_000])
def test_an_impossible_budget_is_refused_before_training(masks: str, total: int, teacher: nn.Module) -> None:
    def listen(*moment: Any) -> None:
        raise AssertionError("training has begun")

    with pytest.raises(ShoalError, match=f"found a budget of {total:,} ReLUs"):
        shallow.reduce(SPEC, teacher, options(masks, budget=total), PRESET, Stages(DATA, Settings(), listen=listen))


def test_unknown_learners_are_refused_by_name(teacher: nn.Module) -> None:
    with pytest.raises(ShoalError, match=r"found masks 'snap'; need one of senet, random"):
        shallow.check_options(options("snap"), PRESET, teacher, SHAPE)
    assert SUMMARIES.keys() == LEARNERS.keys()


def test_sensitivities_are_measured_only_for_budgets_by_site(teacher: nn.Module) -> None:
    assert "sensitivity" not in reduce(teacher, "snl").histories
    assert "sensitivity" in reduce(teacher, "magnitude").histories


def test_a_network_with_quadratics_comes_back_from_its_folder(teacher: nn.Module, tmp_path: Path) -> None:
    result, x = reduce(teacher, "autorep"), torch.randn(3, *SHAPE)
    run = Run(tmp_path)
    save_network(run, result.spec, result.model)
    assert json.loads((tmp_path / "model.json").read_text())["rest"] == "quadratic"
    assert torch.allclose(load_network(run, base=Residual())[1](x), result.model(x), atol=1e-6)


def test_global_top_k_by_hand() -> None:
    scores = {"a": torch.tensor([[[5.0, 1.0]], [[4.0, 4.0]]]), "b": torch.tensor([4.0, -torch.inf])}
    table = {
        ("pixel", 1): ([[[1, 0]], [[0, 0]]], [0, 0]),
        ("pixel", 3): ([[[1, 0]], [[1, 1]]], [0, 0]),
        ("pixel", 4): ([[[1, 0]], [[1, 1]]], [1, 0]),
        ("channel", 2): ([[[0, 0]], [[1, 1]]], [0, 0]),
        ("channel", 3): ([[[0, 0]], [[1, 1]]], [1, 0]),
        ("channel", 4): ([[[1, 0]], [[1, 1]]], [1, 0]),
        ("channel", 6): ([[[1, 1]], [[1, 1]]], [1, 1]),
    }
    for (granularity, total), expected in table.items():
        found = global_top_k(scores, total, granularity)
        assert tuple(m.int().tolist() for m in found.values()) == expected, (granularity, total)
    partly = {"a": torch.tensor([[[9.0, -torch.inf]], [[4.0, 5.0]]])}
    assert global_top_k(partly, 3, "channel")["a"].int().tolist() == [[[1, 0]], [[1, 1]]]
    with pytest.raises(ShoalError, match="granularity 'row'"):
        global_top_k(scores, 1, "row")


def test_magnitude_masks_are_those_of_the_largest_clamped_means(teacher: nn.Module) -> None:
    search = LEARNERS["magnitude"](problem(teacher))
    clamped: dict[str, Tensor] = {}
    for site in search.problem.sites:
        teacher.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: clamped.update({name: F.relu(-args[0]).sum(0)})
        )
    teacher(DATA.normalise(DATA.train.images))
    for name, mask in search.masks().items():
        kept, gone = clamped[name][mask], clamped[name][~mask]
        assert int(mask.sum()) == search.problem.budget(TOTAL).counts[name]
        assert not len(kept) or not len(gone) or kept.min() >= gone.max() - 1e-4


def test_taylor_scores_are_gradient_and_fisher_by_slope() -> None:
    """Against one pass an image: minus the mean gradient plus half the mean square, times the layer's ratio."""
    torch.manual_seed(0)
    scored, head = ScoredReLU((3,)), nn.Linear(3, 2)
    x, y = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 0, 1, 0, 1])
    F.cross_entropy(head(scored.train()(x)), y).backward()
    each = []
    for image, label in zip(x.detach(), y, strict=True):
        slope = torch.ones(3, requires_grad=True)
        loss = F.cross_entropy(head(sloped(image[None], slope)), label[None])
        each.append(torch.autograd.grad(loss, slope)[0])
    gradients = torch.stack(each).double()
    own = -gradients.mean(0) + 0.5 * gradients.square().mean(0)
    whole = -gradients.sum(1).mean() + 0.5 * gradients.sum(1).square().mean()
    ratio = (whole / own.sum()).clamp(0.1, 10) if own.sum() > 0 and whole > 0 else 1.0
    assert torch.allclose(scored.scores(), own * ratio, atol=1e-6)
    scored.prune(torch.tensor([True, False, True]))
    assert scored.scores().tolist() == [0.0, -torch.inf, 0.0]


def test_pruned_and_dropped_positions_never_come_back(teacher: nn.Module) -> None:
    for masks in ("relupruner", "coordinate-descent"):
        search = LEARNERS[masks](problem(teacher))
        seen: list[dict[str, Tensor]] = []
        search.on_step(search.model, 0.0)  # type: ignore[attr-defined]
        for step in range(1, search.problem.all_steps):
            if masks == "relupruner":
                loss = F.cross_entropy(search.model.train()(DATA.normalise(DATA.train.images)), DATA.train.labels)
                loss.backward()
            search.on_step(search.model, step / search.problem.steps)  # type: ignore[attr-defined]
            seen.append({n: m.mask.clone() for n, m in masked_sites(search.model).items()})
        for before, after in itertools.pairwise(seen):
            assert not any(bool((after[n] & ~before[n]).any()) for n in before)
        assert sum(int(m.sum()) for m in seen[-1].values()) == TOTAL


def test_coordinate_descent_takes_the_candidate_that_hurts_least(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = CoordinateDescent(problem(teacher))
    tried: list[tuple[float, dict[str, Tensor]]] = []
    judge = CoordinateDescent._loss

    def noted(self: CoordinateDescent, model: nn.Module, masks: dict[str, Tensor]) -> float:
        tried.append((judge(self, model, masks), {n: m.clone() for n, m in masks.items()}))
        return tried[-1][0]

    monkeypatch.setattr(CoordinateDescent, "_loss", noted)
    search.on_step(search.model, search.problem.last_step / search.problem.steps)
    least = min(tried, key=lambda pair: pair[0])[1]
    assert len(tried) == 8
    assert len({loss for loss, _ in tried}) > 1
    assert all(torch.equal(m.mask, least[n]) for n, m in masked_sites(search.model).items())


def test_layer_folding_drops_whole_layers_but_one(teacher: nn.Module) -> None:
    search = trained(LayerFolding(problem(teacher)))
    part = [n for n, m in search.masks().items() if 0 < int(m.sum()) < m.numel()]
    assert len(part) <= 1
    assert fill(["b", "a", "c"], {"a": 3, "b": 4, "c": 5}, 6) == {"b": 4, "a": 2, "c": 0}


def test_depthshrinker_keeps_whole_blocks_of_the_highest_scores(teacher: nn.Module) -> None:
    search = DepthShrinker(problem(teacher, 600))
    with torch.no_grad():
        for i, name in enumerate(search.inner):
            search.sites[name].score.fill_(float(i))
    counts = search._counts(600)
    inside = round(600 * sum(search.sizes[n] for n in search.inner) / search.problem.everything)
    last, first = search.inner[-1], search.inner[0]
    assert sum(counts.values()) == 600
    assert (counts[last], counts[first]) == (min(inside, search.sizes[last]), inside - min(inside, search.sizes[last]))
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ShoalError, match="found no block"):
        shallow.check_options(options("depthshrinker", budget=9), PRESET, flat, SHAPE)


def test_pressure_acts_above_the_line_and_grows_where_nothing_falls(teacher: nn.Module) -> None:
    p = problem(teacher)
    pressure = Pressure(p, 2.0)
    first, half = pressure.weight, p.last_step // 2
    assert p.line(0) == p.everything
    assert p.line(p.last_step) == TOTAL
    pressure.look(p.everything, half)
    assert (pressure.acts, pressure.weight) == (True, first)
    pressure.look(p.everything, half)
    assert pressure.weight == pytest.approx(1.1 * first)
    pressure.look(TOTAL, half)
    assert (pressure.strength, pressure.weight) == (0.0, pytest.approx(1.1 * first))
    again = Pressure(p, 1.0)
    again.load(pressure.state())
    assert (again.weight, again.lowest, again.acts) == (pressure.weight, TOTAL, False)
