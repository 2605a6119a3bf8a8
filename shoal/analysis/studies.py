"""The studies of a network; each gives rows for a CSV file and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.analysis import plots
from shoal.analysis.attention import attention_maps
from shoal.analysis.attribution import integrated_gradients, logit
from shoal.analysis.computation import parts_of
from shoal.analysis.confidence import threshold_curve
from shoal.analysis.features import collect_features, principal_components, separability
from shoal.analysis.gradients import gradient_magnitudes
from shoal.analysis.noise import noise_curve
from shoal.data.dataset import Dataset, Split
from shoal.exits.evidence import collect
from shoal.outputs import forward
from shoal.storage.files import replacing, write_text
from shoal.surgery.tracing import trace
from shoal.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
SHOWN = 6
"""Number of images in figures that show images."""


@dataclass(frozen=True)
class Subject:
    """A network in eval mode with its data, and the number of images, the noise levels and the seed for the studies."""

    model: nn.Module
    data: Dataset
    images: int = 1000
    levels: tuple[float, ...] = (0.0, 0.01, 0.02, 0.04)
    seed: int = 0
    settings: Settings = field(default_factory=Settings)

    def of(self, split: Split, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images float32 [N, C, H, W] and labels int64 [N], evenly spaced over `split`.

        N is `most`, by default `images`, or the size of the split if that is smaller.
        """
        count = min(most or self.images, len(split))
        some = split.take(torch.linspace(0, len(split) - 1, count).long())
        return self.data.normalise(some.images[:]).to(self.settings.device), some.labels.to(self.settings.device)


@dataclass(frozen=True)
class Result:
    """A study's rows, all with the same keys, and its figure."""

    rows: Rows
    figure: Figure


def flat_minimum(subject: Subject) -> Result:
    """Accuracy and loss on training images with noise on the parameters (section 5.1, Fig. 12)."""
    images, labels = subject.of(subject.data.train)
    rows = noise_curve(subject.model, images, labels, subject.levels, seed=subject.seed)
    return Result(rows, plots.lines(rows, "noise", ("accuracy", "loss"), "standard deviation of the noise"))


def gradients(subject: Subject) -> Result:
    """Mean absolute gradients on training images, by convolution and exit (section 5.5, Fig. 15)."""
    rows = gradient_magnitudes(subject.model, *subject.of(subject.data.train), seed=subject.seed)
    return Result(rows, plots.by_layer(rows))


def separation(subject: Subject) -> Result:
    """SSE, SSB and their ratio for each exit's features of test images (Table 11)."""
    images, labels = subject.of(subject.data.test)
    rows = []
    for exit, features in enumerate(collect_features(subject.model, images)):
        found = separability(features, labels)
        rows.append({"exit": exit, "sse": found.sse, "ssb": found.ssb, "ratio": found.ratio})
    return Result(rows, plots.bars(rows, "exit", "ratio", "SSE / SSB"))


def components(subject: Subject) -> Result:
    """The first two principal components of each exit's features of test images (Fig. 16)."""
    images, labels = subject.of(subject.data.test)
    rows, panels = [], []
    for exit, features in enumerate(collect_features(subject.model, images)):
        places, shares = principal_components(features)
        panels.append((f"exit {exit + 1}: {float(shares.sum()):.0%} of variance", places.numpy()))
        for label, (first, second) in zip(labels.tolist(), places.tolist(), strict=True):
            rows.append({"exit": exit, "label": label, "first": first, "second": second})
    return Result(rows, plots.scatter(panels, labels.cpu().numpy()))


def attention(subject: Subject) -> Result | None:
    """Attention masks of test images, averaged over channels (Fig. 14); None if the network has no such masks."""
    images, _ = subject.of(subject.data.test, SHOWN)
    maps = attention_maps(subject.model, images)
    if not maps:
        return None
    rows = [
        {"mask": name, "image": i, "least": float(m.min()), "mean": float(m.mean()), "most": float(m.max())}
        for name, masks in maps.items()
        for i, m in enumerate(masks)
    ]
    return Result(rows, plots.pictures(_pixels(subject), {k: v.cpu().numpy() for k, v in maps.items()}))


def attribution(subject: Subject) -> Result:
    """Integrated gradients of each exit's own prediction on test images, with a black baseline (Fig. 17)."""
    images, labels = subject.of(subject.data.test, SHOWN)
    black = subject.data.normalise(torch.zeros(1, *subject.data.shape, dtype=torch.uint8))[0].to(images.device)
    rows, maps = [], {}
    with torch.no_grad():
        predicted = [z.argmax(1) for z in forward(subject.model, images).logits]
    for exit, classes in enumerate(predicted):
        found = integrated_gradients(subject.model, images, black, classes, exit)
        with torch.no_grad():
            gained = logit(subject.model, images, classes, exit)
            gained = gained - logit(subject.model, black.expand_as(images), classes, exit)
        maps[f"exit {exit + 1}"] = found.abs().sum(1).cpu().numpy()
        columns = (labels.tolist(), classes.tolist(), found.sum((1, 2, 3)).tolist(), gained.tolist())
        for i, (label, chosen, total, difference) in enumerate(zip(*columns, strict=True)):
            row = {"exit": exit, "image": i, "label": label, "class": chosen, "sum": total, "logit_gained": difference}
            rows.append(row)
    return Result(rows, plots.pictures(_pixels(subject), maps))


def thresholds(subject: Subject) -> Result:
    """Number of test images above each confidence threshold, and each exit's accuracy on them (Fig. 8)."""
    evidence = collect(subject.model, subject.data, subject.data.test, subject.settings)
    rows = threshold_curve(evidence, np.linspace(0, 0.99, 100).tolist())
    return Result(rows, plots.lines(rows, "threshold", ("accuracy", "images"), "threshold of confidence"))


def computation(subject: Subject) -> Result:
    """MACs of the backbone, the attention modules and the shallow classifiers in training (section 5.6, Fig. 13)."""
    rows: Rows = [{**row} for row in parts_of(trace(subject.model, subject.data.shape))]
    return Result(rows, plots.stacked(rows, "part", "share", "% of the MACs of a training step"))


def _pixels(subject: Subject) -> np.ndarray:
    """The test images that `Subject.of` selects for figures, uint8 [N, H, W, C]."""
    split = subject.data.test
    some = split.take(torch.linspace(0, len(split) - 1, min(SHOWN, len(split))).long())
    return some.images[:].permute(0, 2, 3, 1).cpu().numpy()


STUDIES: dict[str, Callable[[Subject], Result | None]] = {
    "flat-minimum": flat_minimum,
    "gradients": gradients,
    "separability": separation,
    "pca": components,
    "attention": attention,
    "attribution": attribution,
    "thresholds": thresholds,
    "computation": computation,
}
"""Studies by name. A study returns None when it does not apply to the network."""


def write(name: str, result: Result, folder: Path) -> None:
    """Write `<name>.csv` and `<name>.png` into `folder`, atomically. Raises ShoalError when they cannot be written."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(result.rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(result.rows)
    write_text(folder / f"{name}.csv", text.getvalue())
    with replacing(folder / f"{name}.png") as scratch:
        result.figure.savefig(scratch, dpi=150, format="png")
