"""What a training step keeps in fp32, and parameters that begin to learn later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.networks.spec import Spec
from shoal.outputs import Outputs
from shoal.training.loop import fit
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.support.fits import DATA, OBJECTIVE, PLAN, SHAPE, network

SPEC = Spec("given", 4, SHAPE)
EPOCHS = Schedule(3, 0.05, (2,), batch_size=32)


def test_bf16_keeps_statistics_weights_and_losses_in_fp32() -> None:
    seen: dict[str, torch.dtype] = {}

    class Noting:
        def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Any:
            loss, parts = OBJECTIVE(student, teacher, labels)
            seen.update(logits=student.final.dtype, loss=loss.dtype, **{name: p.dtype for name, p in parts.items()})
            return loss, parts

    model = network()
    history = fit(model, DATA, Noting(), replace(PLAN, epochs=2), settings=Settings(precision="bf16"))
    assert seen == {"logits": torch.bfloat16, "loss": torch.float32, "cross_entropy": torch.float32}
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert history.best > 50


def test_parameters_may_begin_to_learn_later() -> None:
    class Late:
        taps: tuple[str, ...] = ()

        def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
            model.a1.weight.requires_grad_(epoch > 0)  # type: ignore[union-attr]

    model = network()
    before = model.a1.weight.detach().clone()  # type: ignore[union-attr, operator]
    fit(model, DATA, OBJECTIVE, replace(PLAN, epochs=2), hooks=(Late(),))
    assert not torch.equal(before, model.a1.weight)  # type: ignore[arg-type]
