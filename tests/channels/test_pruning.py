"""Pruning: exact amounts, the smallest first, zeros that stay zero while training, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from shoal.channels.magnitude import pruned, settle, weights_left
from shoal.errors import ShoalError
from shoal.networks.stored import load_network
from shoal.storage.run import Run
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from tests.cli.test_commands import call
from tests.conftest import blobs
from tests.exits.test_dynamic import three_exits
from tests.jobs.test_exits import trained


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.93])
def test_the_smallest_weights_go(amount: float) -> None:
    model = three_exits()
    before = torch.cat([w.detach().abs().flatten() for w in weights(model)])
    sparse = pruned(model, amount, "weights")
    after = torch.cat([w.detach().flatten() for w in weights(sparse)])
    gone = after == 0
    assert int(gone.sum()) == round(amount * len(before))
    assert before[gone].max() <= before[~gone].min()
    assert torch.equal(after[~gone].abs(), before[~gone])
    assert weights_left(sparse) == (len(before) - int(gone.sum()), len(before))
    assert weights_left(model)[0] == len(before)


def test_filters_by_hand() -> None:
    conv = nn.Conv2d(1, 4, 1, bias=False)
    conv.weight.data = torch.tensor([3.0, -1.0, 2.0, -4.0]).view(4, 1, 1, 1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(4, 2))
    for amount, left in ((0.5, [3, 0, 0, -4]), (0.2, [3, 0, 2, -4]), (0.99, [0, 0, 0, -4])):
        sparse = pruned(model, amount, "filters")
        assert sparse[0].weight.flatten().tolist() == left
        assert torch.equal(sparse[2].weight, model[2].weight)


@pytest.mark.parametrize("method", ["weights", "filters"])
def test_zeros_stay_zero_and_settling_changes_nothing(method: str) -> None:
    model = three_exits()
    sparse = pruned(model, 0.6, method)
    zeros = [w == 0 for w in weights(sparse)]
    terms = tuple(cross_entropy(exit=i, name=f"exit{i}") for i in range(3))
    fit(sparse, blobs(32), Objective(terms), Schedule(2, 0.05, batch_size=16))
    sparse.eval()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = sparse(x)
    assert prune.is_pruned(sparse)
    settle(sparse)
    assert not prune.is_pruned(sparse)
    assert set(sparse.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for a, b in zip(sparse(x), before, strict=True):
            assert torch.equal(a, b)
    moved = False
    for w, zero, old in zip(weights(sparse), zeros, weights(model), strict=True):
        assert not w[zero].any()
        moved |= not torch.equal(w[~zero], old[~zero])
    assert moved


@pytest.mark.parametrize(("amount", "method"), [(0.0, "weights"), (1.0, "weights"), (0.5, "layers")])
def test_refused(amount: float, method: str) -> None:
    with pytest.raises(ShoalError, match="need"):
        pruned(three_exits(), amount, method)


@pytest.mark.slow
def test_the_command_and_its_resume(tmp_path: Path) -> None:
    run, out = trained(tmp_path / "run"), tmp_path / "pruned"
    words = ("prune", str(run), "--amount", "0.5,0.9", "--epochs", "1", "--json")
    with pytest.raises(ShoalError, match="time is up"):
        call(*words, "--out", str(out), "--max-seconds", "0")
    body = json.loads(call(*words, "--out", str(out), "--resume"))
    whole = json.loads(call(*words, "--out", str(tmp_path / "whole")))
    assert body["rows"] == whole["rows"]
    assert [row["amount"] for row in body["rows"]] == [0.0, 0.5, 0.9]
    for row in body["rows"][1:]:
        _, network = load_network(Run(out / f"amount-{row['amount']:g}"))
        assert weights_left(network) == (row["weights"], row["of"])
        # Weights of which training makes an exact zero are as good as none.
        assert row["weights"] == pytest.approx((1 - row["amount"]) * row["of"], abs=1)
        assert len(row["accuracy"]) == 3
    assert (out / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    for more, pattern in (
        (("--amount", "0.5,1.5"), "need different fractions"),
        (("--method", "layers"), "method 'layers'"),
        (("--epochs", "0"), "found 0 epochs"),
    ):
        with pytest.raises(ShoalError, match=pattern):
            call("prune", str(run), "--out", str(tmp_path / "new"), *more)
        assert not (tmp_path / "new").exists()
