"""Who listens to training stages hears every step, and after each epoch its row of figures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from shoal.data.loading import load
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings


class Listening:
    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int, int]] = []
        self.rows: list[tuple[str, dict[str, float]]] = []

    def __call__(self, stage: str, epoch: int, step: int, steps: int) -> None:
        self.steps.append((stage, epoch, step, steps))

    def judged(self, stage: str, row: dict[str, float]) -> None:
        self.rows.append((stage, row))


def train(stages: Stages) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    stages.fit("one", model, Objective((cross_entropy(),)), Schedule(2, 0.1, batch_size=256))


def test_each_epoch_s_row_is_heard_and_logged(tmp_path: Path) -> None:
    data, heard = load("digits", seed=0), Listening()
    run = Run.create(tmp_path / "run", {"command": "train"})
    train(Stages(data, Settings(seed=0), run, heard))
    assert [(stage, row["epoch"]) for stage, row in heard.rows] == [("one", 0), ("one", 1)]
    assert all({"loss", "accuracy", "seconds"} <= set(row) for _, row in heard.rows)
    assert [row["accuracy"] for row in run.metrics()] == [row["accuracy"] for _, row in heard.rows]
    steps = heard.steps[0][3]
    assert heard.steps == [("one", epoch, step, steps) for epoch in range(2) for step in range(steps)]


def test_a_stage_elsewhere_is_heard_by_its_label(tmp_path: Path) -> None:
    data, heard = load("digits", seed=0), Listening()
    stages = Stages(data, Settings(seed=0), None, heard)
    train(stages.at(Run.create(tmp_path / "run", {"command": "train"}), "design 3"))
    assert {stage for stage, _ in heard.rows} == {stage for stage, *_ in heard.steps} == {"design 3"}


def test_a_plain_function_may_listen_too() -> None:
    steps: list[int] = []
    train(Stages(load("digits", seed=0), Settings(seed=0), None, lambda stage, epoch, step, n: steps.append(step)))
    assert steps
