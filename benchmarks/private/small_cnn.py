"""A small CNN on digits: in shoal with ReLUs, and in Orion with squares under fully homomorphic encryption.

    python -m venv ORION && ORION/bin/pip install torch 'scipy<=1.14.1' 'numpy<2' PyYAML h5py tqdm matplotlib certifi
    ORION/bin/pip install safetensors && ORION/bin/pip install --no-deps orion-fhe==1.0.2
    python -m benchmarks.private.small_cnn --orion ORION/bin/python --out benchmarks/results/private_small_cnn.json

The network is Orion's example `LoLA` for images of 16x16: a convolution of 5 channels and two linear layers, with 420
activations. Orion has no exact ReLU, so its network has squares; shoal's has ReLUs. Both are trained alike. The work is
divided differently, too: Orion's server computes alone on ciphertexts, while shoal's two parties prepare items in
advance and exchange messages. All run on this machine: Orion in one process, shoal in two over mutual TLS on loopback.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.private.queries import agreement, measure
from shoal.data.loading import load
from shoal.graph.folding import fold
from shoal.private.compiler.compilation import compile
from shoal.storage.environment import environment
from shoal.surgery.tracing import trace

SHAPE = (1, 16, 16)
BATCH = 20
"""Items that are made together."""


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class SmallCNN(nn.Module):
    """Orion's example `LoLA` for images of 16x16, with any activation."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 2, 2)
        self.first, self.second = activation(), activation()
        self.hidden, self.last = nn.Linear(320, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.first(self.conv(x)), 1)
        x = self.last(self.second(self.hidden(x)))
        return x


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Adam with a cosine schedule on batches of 100."""
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimiser.step()
        schedule.step()
    return network.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of `labels` that have the largest logit."""
    return 100.0 * float((logits.argmax(1) == labels).float().mean())


def orion(python: Path, network: nn.Module, calibration: Tensor, images: Tensor, folder: Path) -> dict[str, Any]:
    """Orion's agreement and seconds for `images`."""
    save_file(network.state_dict(), folder / "weights.safetensors")
    save_file({"calibration": calibration, "images": images}, folder / "data.safetensors")
    party = Path(__file__).with_name("orion_party.py")
    ended = subprocess.run([python, party, folder], capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    row = {"setup_s": found["setup_s"], "online_s": statistics.median(found["seconds"])}
    with torch.no_grad():
        return row | agreement(network(images).numpy(), np.array(found["logits"]))


def shoal(network: nn.Module, calibration: Tensor, images: Tensor, folder: Path) -> dict[str, Any]:
    """Shoal's agreement, seconds and bytes for `images`."""
    program, weights = compile(fold(trace(network, SHAPE)), calibration)
    logits, figures = measure(program, weights, images, BATCH, folder)
    with torch.no_grad():
        return figures | agreement(network(images).numpy(), logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orion", type=Path, required=True, help="a Python with orion-fhe 1.0.2")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    data, rows = load("digits"), {}
    parts = {
        name: (data.normalise(part.images[:]), part.labels)
        for name, part in (("train", data.train), ("test", data.test))
    }
    chosen = parts["test"][0][: a.images]
    for name, activation in (("orion", Square), ("shoal", nn.ReLU)):
        torch.manual_seed(0)
        network = train(SmallCNN(activation), *parts["train"], a.epochs)
        with torch.no_grad():
            right = accuracy(network(parts["test"][0]), parts["test"][1])
        with tempfile.TemporaryDirectory() as scratch:
            calibration = parts["train"][0][:500]
            begun = time.perf_counter()
            found = (
                orion(a.orion, network, calibration, chosen, Path(scratch))
                if name == "orion"
                else shoal(network, calibration, chosen, Path(scratch))
            )
            rows[name] = {"accuracy": right, "all_s": time.perf_counter() - begun} | found
        print(name, json.dumps(rows[name]), flush=True)
    settings = {"images": a.images, "epochs": a.epochs, "seed": 0, "orion": "1.0.2"}
    if a.out:
        text = json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1)
        a.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
