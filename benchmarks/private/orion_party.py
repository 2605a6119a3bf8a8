"""Orion's part of `benchmarks.private.small_cnn`, which starts it: one network under fully homomorphic encryption.

    PYTHON benchmarks/private/orion_party.py FOLDER

PYTHON has orion-fhe 1.0.2 and no shoal. FOLDER holds `weights.safetensors` and `data.safetensors` (calibration images
`calibration` [N, 1, 16, 16] and images `images` [N, 1, 16, 16] to classify). Prints one line of JSON.

Orion imports torchvision for its own data sets alone, so an empty module replaces it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

sys.modules["torchvision"] = ModuleType("torchvision")
sys.modules["torchvision"].__dict__.update(datasets=None, transforms=None)
import orion  # noqa: E402
import orion.nn as on  # noqa: E402

PARAMETERS = {
    "ckks_params": {
        "LogN": 13,
        "LogQ": [29, 26, 26, 26, 26, 26],
        "LogP": [29, 29],
        "LogScale": 26,
        "H": 8192,
        "RingType": "ConjugateInvariant",
    },
    "orion": {
        "margin": 2,
        "embedding_method": "hybrid",
        "backend": "lattigo",
        "fuse_modules": True,
        "debug": False,
        "io_mode": "none",
        "diags_path": "",
        "keys_path": "",
    },
}
"""215 bits of modulus at degree 2^13, which is 128-bit secure."""


class SquareCNN(on.Module):  # type: ignore[misc]
    """Orion's example `LoLA` for images of 16x16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = on.Conv2d(1, 5, kernel_size=2, stride=2, padding=0)
        self.first, self.second = on.Quad(), on.Quad()
        self.flatten = on.Flatten()
        self.hidden = on.Linear(320, 100)
        self.last = on.Linear(100, 10)

    def forward(self, x: Any) -> Any:
        x = self.flatten(self.first(self.conv(x)))
        return self.last(self.second(self.hidden(x)))


def main() -> None:
    folder = Path(sys.argv[1])
    data, network = load_file(folder / "data.safetensors"), SquareCNN()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    network.eval()
    begun = time.perf_counter()
    orion.init_scheme(PARAMETERS)
    calibration = TensorDataset(data["calibration"], torch.zeros(len(data["calibration"])))
    orion.fit(network, DataLoader(calibration, batch_size=1))
    level = orion.compile(network)
    setup = time.perf_counter() - begun
    network.he()
    seconds, logits = [], []
    for image in data["images"]:
        begun = time.perf_counter()
        encrypted = orion.encrypt(orion.encode(image[None], level))
        found = network(encrypted).decrypt().decode().flatten()[:10]
        seconds.append(time.perf_counter() - begun)
        logits.append(found.tolist())
    print(json.dumps({"setup_s": setup, "seconds": seconds, "logits": logits}))


if __name__ == "__main__":
    main()
