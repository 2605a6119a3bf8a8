"""Laws over networks as people write them: all commands accept the same ones, and compute what PyTorch does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.jobs import inspect
from shoal.jobs.options import Named
from shoal.networks.adoption import adopt, check_logits
from shoal.networks.assembly import assemble
from shoal.networks.spec import GIVEN, Spec
from shoal.private.compiler import deployment
from shoal.private.compiler.compilation import compile
from shoal.private.compiler.deployment import deploy
from shoal.private.compiler.refusal import INSTEAD, refusals
from shoal.private.program.clear import run_clear
from shoal.surgery import tracing
from shoal.surgery.normal_form import normalise
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import check_trace, count, trace
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from tests.surgery.networks import CLASSES, FORMS, SHAPE, layered, net
from tests.surgery.refused import PRIVATE, RAISED


@pytest.fixture(autouse=True)
def _old_names_of_torch() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def truth(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    inner = getattr(model, "_orig_mod", model)
    kind = next(model.parameters()).dtype
    with torch.no_grad():
        return inner(x.to(kind)).float()


@pytest.mark.parametrize("form", FORMS)
def test_a_network_counts_checks_and_compiles_as_it_computes(form: str) -> None:
    torch.manual_seed(3)
    model, x = FORMS[form](), torch.randn(4, *SHAPE)
    wanted, loose = truth(model, x), 1e-2 if form == "half" else 1e-5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = check_trace(model, SHAPE)
    assert (graph(x)[0] - wanted).abs().max() < loose
    assert not cost(graph).unknown
    assert count(model, SHAPE).macs == cost(graph).macs
    body = inspect.examine(model, SHAPE)
    assert body["private"], body["refused"]
    folded = fold(graph)
    assert (folded(x)[0] - wanted).abs().max() < 10 * loose
    program, weights = compile(folded, x)
    assert np.abs(run_clear(program, weights, x)[0] - wanted.numpy()).max() <= program.error_bound + loose
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def data() -> Dataset:
    images, labels = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % CLASSES
    parts = [Split(images[i : i + 20], labels[i : i + 20]) for i in (0, 20)]
    return Dataset("noise", parts[0], parts[1], parts[1], CLASSES, (0.5,) * 4, (0.25,) * 4, "none")


@pytest.mark.parametrize("form", FORMS)
def test_a_network_trains_from_what_it_computes(form: str) -> None:
    torch.manual_seed(3)
    model, x = FORMS[form](), torch.randn(4, *SHAPE)
    spec, network = adopt(model, data())
    assert (network(x) - truth(model, x)).abs().max() < (1e-2 if form == "half" else 1e-5)
    history = fit(network, data(), Objective((cross_entropy(),)), Schedule(1, 0.01, batch_size=10))
    assert len(history.rows) == 1
    graph, _, _ = deploy(network, data())
    assert (graph(x)[0] - network.eval()(x)).abs().max() < 1e-3
    assert normalise(network).state_dict().keys() == assemble(spec, model).state_dict().keys()


def said(act: Callable[[], Any]) -> str:
    """What `act` raises as ShoalError, or nothing; any other exception fails the test."""
    try:
        act()
    except ShoalError as error:
        return str(error)
    return ""


def commands(model: nn.Module, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `shoal count`, `check` and `train` (before training) say of a network."""
    spec = Spec(GIVEN, CLASSES, SHAPE)
    patch.setattr(inspect, "own_network", lambda spec: model)
    named_model = Named("given:model", "x".join(map(str, SHAPE)), CLASSES)
    return {
        "count": said(lambda: inspect.count(named_model)),
        "check": said(lambda: inspect.check(named_model)),
        "train": said(lambda: check_logits(model, spec)),
    }


@pytest.mark.parametrize("form", FORMS)
def test_all_commands_accept_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    assert commands(FORMS[form](), monkeypatch) == {"count": "", "check": "", "train": ""}


@pytest.mark.parametrize("form", RAISED)
def test_no_command_accepts_it_and_all_say_why(
    form: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    make, message = RAISED[form]
    model = make()
    found = commands(model, monkeypatch)
    assert len(set(found.values())) == 1, found
    assert re.search(message, found["check"], re.DOTALL), found["check"]
    assert re.match(r"found .*; need .*; .", found["check"], re.DOTALL)
    assert not re.search(r"\b(Proxy|ValueAttribute|GraphModule)\b", found["check"])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("form", PRIVATE)
def test_check_and_compile_refuse_the_same_for_the_same_reason(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    make, what = PRIVATE[form]
    model, x = make(), torch.randn(2, *SHAPE)
    assert set(commands(model, monkeypatch).values()) == {""}
    body, graph = inspect.examine(model, SHAPE), fold(trace(model, SHAPE))
    assert not body["private"]
    first = body["refused"][0]
    assert [r["found"] for r in body["refused"] if r["found"].startswith(what)], body["refused"]
    assert f" {first['found']}" not in f" {first['need']}"
    assert ";" in first["need"]
    place = f"{first['node']} ({first['line']})" if first["line"] else first["node"]
    assert said(lambda: compile(graph, x)) == f"found {first['found']} at {place}; need {first['need']}"
    assert refusals(graph)


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_of_all_modules_are_refused_by_all_commands(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    handle = getattr(torch.nn.modules.module, f"register_module_forward_{kind}")(lambda *given: None)
    try:
        found = commands(model, monkeypatch)
    finally:
        handle.remove()
    assert len(set(found.values())) == 1
    words = rf"found a forward {kind.replace('_', '-')} of all modules \(.*lambda.*register_module_forward_{kind}\) at "
    assert re.match(words + "every layer; need layers .*; remove it", found["check"])


def test_advice_says_what_to_do() -> None:
    for name, need in INSTEAD.items():
        assert ";" in need, name
        assert not re.search(r"conv2d, linear, relu", need), name


def test_what_a_forward_prints_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    model = FORMS["values logged"]()
    capfd.readouterr()
    check_trace(model, SHAPE)
    found = capfd.readouterr()
    assert "the size is" in found.err
    assert found.out == ""


def test_batch_norm_is_accepted_once_it_has_statistics() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = layered(norm)
    (refused,) = inspect.examine(model, SHAPE)["refused"]
    assert "give it running statistics" in refused["need"]
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5
    assert inspect.examine(model, SHAPE)["private"]


@pytest.mark.parametrize("form", ["weight_norm", "double", "pruned", "DataParallel", "plain"])
def test_a_traced_network_is_never_out_of_date(form: str) -> None:
    model = FORMS[form]()
    traced = Traced(model, SHAPE)
    assert traced.graph.nodes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    after = trace(model, SHAPE).weights
    assert all(torch.equal(traced.graph.weights[key], value) for key, value in after.items())


def test_sizes_of_the_images_need_the_shape() -> None:
    model = FORMS["decisions by size"]()
    with pytest.raises(
        ShoalError, match=r"found a decision .* by a size at .*; need the image's shape .*pass the shape"
    ):
        normalise(model)
    assert normalise(model, SHAPE)(torch.randn(2, *SHAPE)).shape == (2, CLASSES)


def test_a_graph_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step, from the traced module to the graph, is compared too."""
    model = net()
    lower = tracing.lower

    def doubled(traced: Any, node: Any) -> Any:
        chain = lower(traced, node)
        return tuple((op, attrs, {key: 1.1 * tensor for key, tensor in held.items()}) for op, attrs, held in chain)

    monkeypatch.setattr(tracing, "lower", doubled)
    for act in (
        lambda: check_trace(model, SHAPE),
        lambda: inspect.examine(model, SHAPE),
        lambda: deploy(model, data()),
    ):
        with pytest.raises(ShoalError, match="found that Net computes something else once traced"):
            act()


def test_what_is_deployed_is_compared_with_the_module_on_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folding that changes the function is refused, although the traced graph is right."""
    model = FORMS[next(iter(FORMS))]()

    def halved(graph: Graph) -> Graph:
        folded = fold(graph)
        return replace(folded, weights={key: tensor / 2 for key, tensor in folded.weights.items()})

    deploy(model, data())
    monkeypatch.setattr(deployment, "fold", halved)
    with pytest.raises(
        ShoalError, match=r"found that the deployed graph of .* gives other logits than the module on 20"
    ):
        deploy(model, data())


@pytest.mark.parametrize("act", [check_trace, inspect.examine, lambda model, _: deploy(model, data())])
@pytest.mark.parametrize(("change", "found"), [("hook", "a forward hook on 0"), ("forward", "forward of 0 replaced")])
def test_hooks_and_replaced_forwards_are_refused_by_all_commands(
    change: str, found: str, act: Callable[..., Any]
) -> None:
    model = nn.Sequential(
        nn.Conv2d(SHAPE[0], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    if change == "hook":
        model[0].register_forward_hook(lambda layer, given, out: out * 2 + 1)
    else:
        model[0].forward = lambda x: nn.functional.conv2d(x, model[0].weight).sigmoid() * x.mean()
    with pytest.raises(ShoalError, match=found):
        act(model, SHAPE)
