"""Peak memory of `fit` on 50,000 images of 3x32x32, ResNet18 at full width, beyond the data and the model.

    python -m benchmarks.training.fit_memory --out benchmarks/results/fit_memory.json

The peak is reached in the first steps and in the evaluation after them, so the run is cut off after a few batches of
each: an epoch at full width takes hours on two cores and allocates nothing more.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import torch

from shoal.data.dataset import Dataset, Split
from shoal.models import build
from shoal.storage.environment import environment
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule

IMAGES = 50_000


class EnoughError(Exception):
    """Raised to leave the epoch early."""


def stop_after(steps: int) -> None:
    raise EnoughError(steps)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 100, (IMAGES,), generator=g)
    train, held = Split(images, labels), Split(images[:1000], labels[:1000])
    data = Dataset("random", train, held, held, 100, (0.5,) * 3, (0.25,) * 3, "crop-flip")
    model = build("resnet18", 100)
    before = peak()
    try:
        fit(
            model,
            data,
            Objective((cross_entropy(),)),
            Schedule(1, 0.1, batch_size=a.batch),
            progress=lambda epoch, step, steps: stop_after(step) if step == 3 else None,
        )
    except EnoughError:
        evaluate(model, data, held)
    beyond = peak() - before
    held_bytes = images.numel() + 8 * len(labels) + sum(4 * p.numel() for p in model.parameters())
    body = {"batch": a.batch, "images": IMAGES, "before_bytes": before, "data_and_model_bytes": held_bytes}
    body |= {"beyond_bytes": beyond, "beyond_gib": beyond / 2**30, "environment": environment()}
    a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{body['beyond_gib']:.2f} GiB beyond the data and the model")


if __name__ == "__main__":
    main()
