"""Self-distillation: weights that follow the epoch, the recipe and its command. Its loss: test_self_distill_loss.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import ShoalError, StoppedError
from shoal.exits.attention import add_adapters, feature_taps
from shoal.exits.classifiers import count_exits, keep_exit
from shoal.exits.figures import Ensembles, exit_figures
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.outputs import forward
from shoal.recipes.self_distill import Options, Preset, check_options, distill, objective_terms
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy, switched
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs
from tests.recipes.test_self_distill_loss import LABELS, LOGITS, aligned
from tests.support.tables import fast_first

SHAPE, DATA = (1, 8, 8), blobs(64)
SPEC = Spec("given", 4, SHAPE)
PLAN = Preset(Schedule(3, 0.05, batch_size=32), release=1)


def test_a_weight_follows_the_epoch_in_fit() -> None:
    weights: list[float] = []

    def told(weight: float) -> float:
        weights.append(weight)
        return weight

    switch = switched(1.0, 0.25, 2)
    assert callable(switch)
    term = replace(cross_entropy(), weight=lambda epoch: told(switch(epoch)))
    fit(Residual(), DATA, Objective((term,)), Schedule(4, 0.01, batch_size=64))
    assert weights == [1.0, 1.0, 0.25, 0.25]


def test_ensembles_by_hand() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.tensor(rows) for rows in LOGITS)

    *own, logits, softmax = Ensembles(Fixed())(torch.zeros(3, 1))
    assert len(own) == 3
    stacked = torch.tensor(LOGITS)
    assert torch.allclose(logits, stacked.mean(0), atol=1e-6)
    assert torch.allclose(softmax.exp(), stacked.softmax(2).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "kind", fast_first(["attention", "aligned", "plain", "attention-se", "attention-cbam", "attention-bam"])
)
@pytest.mark.parametrize("path", fast_first(["deepest", "ensemble"]))
def test_the_recipe_trains_every_classifier(kind: str, path: str) -> None:
    plan = replace(PLAN, schedule=Schedule(5, 0.05, batch_size=16), release=0)
    options = Options(after=("relu", "act_2"), kind=kind, path=path, feature_weight=0.0 if kind == "plain" else None)
    result = distill(SPEC, options, plan, Stages(blobs(128), Settings()), base=Residual())
    assert count_exits(result.model) == 3
    assert list(result.histories) == ["baseline", "self-distillation"]
    rows = result.histories["self-distillation"].rows
    for name in ("exit0_cross_entropy", "exit1_cross_entropy", "cross_entropy"):
        assert rows[-1][name] < rows[0][name]
    figures = exit_figures(result.model, DATA, DATA.test, Settings())
    assert [row["accuracy"] for row in figures["exits"]] == evaluate(result.model, DATA, DATA.test)
    assert set(figures["ensemble"]) == {"logits", "softmax"}
    macs = [row["macs"] for row in figures["exits"]]
    assert [row["cascaded_macs"] >= own for row, own in zip(figures["exits"], macs, strict=True)] == [True] * 3


def test_adapters_train_and_are_cut_away() -> None:
    plan = replace(PLAN, adapters=True, distance="batch-norm", mean=False, squared=False, skipped=(1,), release=0)
    result = distill(
        SPEC, Options(after=("relu", "act_2"), baseline=False), plan, Stages(DATA, Settings()), base=Residual()
    )
    assert result.baseline is None
    assert result.model.state_dict().keys() == assemble(result.spec, Residual()).state_dict().keys()
    model = aligned()
    adapted, (name,) = add_adapters(model, feature_taps(model)[:1])
    terms = objective_terms(adapted, plan, {0: name})
    Objective(terms)(forward(adapted, torch.randn(3, *SHAPE), terms[-1].own), None, LABELS)[0].backward()
    weight = adapted.get_parameter(f"{name}.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    plan = replace(PLAN, adapters=True, skipped=(1,), release=1)
    options = Options(after=("relu", "act_2"), baseline=False)

    def trained(folder: str, settings: Settings) -> dict[str, Tensor]:
        run = Run(tmp_path / folder)
        torch.manual_seed(7)
        return dict(distill(SPEC, options, plan, Stages(DATA, settings, run), base=Residual()).model.state_dict())

    whole, asked = trained("whole", Settings()), iter([False, False, True])
    with pytest.raises(StoppedError):
        trained("parts", Settings(stop=lambda: next(asked)))
    parts = trained("parts", Settings(resume=True))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_each_classifier_alone_is_what_it_was_among_all() -> None:
    spec = replace(SPEC, exits=("relu", "relu_2"), exit_kind="attention")
    torch.manual_seed(0)
    model = assemble(spec, Residual()).eval()
    x = torch.randn(2, *SHAPE)
    for index in range(3):
        alone = keep_exit(model, index)
        again = assemble(replace(spec, kept_exit=index), Residual()).eval()
        again.load_state_dict(alone.state_dict())
        assert torch.equal(again(x), model(x)[index])


BAD: list[tuple[Options, Preset, str]] = [
    (Options(path="best"), PLAN, "found path 'best'; need one of deepest"),
    (Options(kind="round"), PLAN, "found exits of kind 'round'"),
    (Options(alpha=1.5), PLAN, "found alpha 1.5 and a feature weight of 0.04"),
    (Options(feature_weight=-1.0), PLAN, "a feature weight of -1"),
    (Options(kind="plain"), PLAN, "found plain exits, which have no aligned features"),
    (Options(augment="mixup"), PLAN, "found augmentation 'mixup'"),
    (Options("nowhere"), PLAN, "found scheme 'nowhere'"),
    (Options(after=("layer9",)), PLAN, "found no site \\['layer9'\\] for an exit"),
    (Options(), replace(PLAN, release=3), "found 3 epochs, the last 3 of them without distillation"),
    (Options(), replace(PLAN, distance="cosine"), "found distance 'cosine'"),
    (Options("shallow", 1), replace(PLAN, skipped=(1,)), "found no student of features among 2 classifiers"),
]


@pytest.mark.parametrize(("options", "preset", "message"), BAD)
def test_what_cannot_be_trained_is_refused_before_training(options: Options, preset: Preset, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        check_options(options, options.applied(preset), SPEC, Residual())


def test_a_reduced_network_is_refused() -> None:
    with pytest.raises(ShoalError, match="reduced already"):
        check_options(Options(), PLAN, replace(SPEC, masked=("relu",)), Residual())


def table(*words: object) -> Any:
    """The JSON that a command prints."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def call(*words: object) -> dict[str, Any]:
    return dict(table(*words))


@pytest.mark.slow
def test_the_command_makes_a_run_of_each_classifier(tmp_path: Path) -> None:
    small = ("--data", "digits", "--limit", 200, "--epochs", 2, "--json")
    call("train", "resnet9", *small, "--width", 0.05, "--out", tmp_path / "teacher")
    words = ("self-distill", tmp_path / "teacher", "--kind", "aligned", "--epochs", 2, "--out", tmp_path / "own")
    body = call(*words, "--json")
    again = call(*words, "--resume", "--json")
    assert body["exits"] == again["exits"]
    assert set(body["ensemble"]) == {"logits", "softmax"}
    assert len(body["exits"]) == 4
    for index in (1, 4):
        row, alone = body["exits"][index - 1], call("evaluate", tmp_path / "own" / "exits" / str(index), "--json")
        assert alone["accuracy"] == pytest.approx(row["accuracy"])
        assert (alone["params"], alone["macs"] + alone["linear_macs"]) == (row["params"], row["macs"])
    assert table("report", tmp_path / "own", "--json")[0]["reduced.accuracy"] == body["exits"][-1]["accuracy"]
    spec, model = load_network(Run(tmp_path / "own"))
    assert spec.exit_kind == "aligned"
    assert count_exits(model) == 4


REFUSED = [
    (("resnet9",), "found no data for 'resnet9'"),
    (("resnet9", "--data", "digits", "--preset", "best"), "found preset 'best'"),
    (("resnet9", "--data", "digits", "--epochs", "0"), "found 0 epochs"),
    (("resnet9", "--data", "digits", "--alpha", "2"), "found alpha 2"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_wrong_commands_write_nothing(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=message):
        CliRunner().invoke(app, ["self-distill", *words, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()
