"""Your own module and tensors, from training to a private inference, in about ten lines of shoal."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import shoal
from shoal.private.compiler.deployment import deploy
from shoal.recipes.shallow.presets import quick


class MyCNN(nn.Module):
    """Any torch.fx-traceable network will do; this one has a residual add and a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.c = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(self.a(x)))
        return self.fc(torch.relu(self.d(self.c(x))).mean((2, 3)))


def main(out: Path | None = None, epochs: int = 8) -> dict[str, float]:
    """Train, reduce to 600 ReLUs, compile; returns the figures. `out` takes the artifact's client/ and server/."""
    data = shoal.load("digits")  # or shoal.Dataset(...) around your own uint8 images and labels
    spec = shoal.Spec("given", classes=data.classes, shape=data.shape)
    plan = quick(teacher=epochs, sensitivity=1, mask=max(1, epochs // 2), finetune=epochs)
    stages = shoal.Stages(data, shoal.Settings())  # what every training stage shares
    teacher, _ = shoal.train_teacher(spec, plan.teacher, stages, base=MyCNN())
    result = shoal.reduce(spec, teacher, shoal.Options(budget=600, exit=False), plan, stages)
    before, after = (shoal.cost(shoal.fold(shoal.trace(m, data.shape))) for m in (teacher, result.model))
    _, program, weights = deploy(result.model, data)
    if out is not None:
        from shoal.private.program.artifact import save_artifact

        save_artifact(out, program, weights)
    return {
        "baseline_accuracy": shoal.evaluate(teacher, data, data.test)[-1],
        "accuracy": shoal.evaluate(result.model, data, data.test)[-1],
        "baseline_relus": before.relus,
        "relus": after.relus,
        "error_bound": program.error_bound,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    for name, value in main(parser.parse_args().out).items():
        print(f"{name:>18}: {value:,.4g}")
