"""The usual training on ImageNet: schedule and augmentation of the presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ShoalError
from shoal.jobs import train as job
from shoal.jobs.options import Shared
from shoal.recipes import self_distill
from shoal.training.settings import Settings
from tests.support.layouts import write_folder


def test_the_preset_has_the_usual_schedule() -> None:
    schedule = job.IMAGENET.teacher
    assert [schedule.rate(epoch) for epoch in (0, 29, 30, 60, 80, 89)] == pytest.approx(
        [0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-4]
    )
    assert (schedule.epochs, schedule.batch_size, schedule.momentum, schedule.weight_decay) == (90, 256, 0.9, 1e-4)


@pytest.mark.parametrize(("preset", "augment"), [("imagenet", "resized-crop-flip"), ("quick", None)])
def test_training_uses_the_presets_augmentation(
    preset: str, augment: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    seen: list[Settings] = []

    def stop(spec: Any, schedule: Any, stages: Any) -> None:
        seen.append(stages.settings)
        raise ShoalError("found enough")

    monkeypatch.setattr(job, "train_teacher", stop)
    request = job.Request(model="resnet10", data=str(tmp_path / "set"), width=0.05, preset=preset)
    with pytest.raises(ShoalError, match="found enough"):
        job.train(request, Shared(tmp_path / "run"))
    assert [settings.augment for settings in seen] == [augment]


def test_self_distillation_on_imagenet_has_the_papers_schedule() -> None:
    preset = self_distill.PRESETS["paper-imagenet"]()
    schedule = preset.schedule
    assert (schedule.epochs, schedule.milestones, schedule.batch_size, schedule.lr) == (100, (30, 60, 90), 256, 0.1)
    assert (preset.alpha, preset.feature_weight, preset.release) == (0.6, 0.04, 5)
    assert preset.augment == "resized-crop-flip"
