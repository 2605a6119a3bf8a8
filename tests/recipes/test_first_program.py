"""A first program's usual mistakes end in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import shoal
from shoal.errors import ShoalError
from tests.conftest import Residual, blobs

SPEC = shoal.Spec("given", 4, (1, 8, 8))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: shoal.Stages("digits", shoal.Settings()), r"found a str as data; need.*shoal\.load\(NAME\)"),
        (lambda: shoal.Stages(loader(), shoal.Settings()), r"found a DataLoader as data.*Dataset\.from_loader"),
        (lambda: shoal.Stages(blobs(), {"seed": 0}), r"found a dict as settings; need shoal\.Settings"),
        (lambda: shoal.cost(Residual()), r"found a Residual to count; need a shoal\.Graph; use shoal\.count"),
        (lambda: shoal.count(Residual, (1, 8, 8)), r"found the class Residual; need a network; call it: Residual\(\)"),
        (lambda: shoal.adopt(Residual, blobs()), r"found the class Residual; need a network"),
        (lambda: shoal.count("resnet18", (1, 8, 8)), r"found a str; need a torch\.nn\.Module"),
        (lambda: teacher(Residual(10)), r"found a result of shape \(10,\) for an image from 'given'; need 4 logits"),
        (lambda: reduced("sennet"), "found masks 'sennet'; need one of"),
        (lambda: shoal.load("digitz"), "did you mean digits"),
    ],
)
def test_it_is_named_with_what_to_write_instead(call: Any, text: str) -> None:
    with pytest.raises(ShoalError, match=text):
        call()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4)))


def teacher(base: Any) -> Any:
    plan = shoal.quick(teacher=1)
    return shoal.train_teacher(SPEC, plan.teacher, shoal.Stages(blobs(), shoal.Settings()), base=base)


def reduced(masks: str) -> Any:
    stages, options = shoal.Stages(blobs(), shoal.Settings()), shoal.Options(100, masks=masks)
    return shoal.reduce(SPEC, Residual(), options, shoal.quick(), stages)


def test_reprs_are_short() -> None:
    assert repr(SPEC) == "Spec(base='given', classes=4, shape=(1, 8, 8))"
    assert repr(shoal.Run("runs/a")) == "Run('runs/a')"
    assert repr(blobs()) == "Dataset('blobs': 1x8x8, 4 classes; 96 train, 32 validation, 32 test)"
