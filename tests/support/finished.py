"""Run folders as a reduction leaves them, with figures of our choice; networks are there only where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.reduction.masks import add_masks, masked_sites
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites

SIZES = {"relu": 4096, "layer1.0.relu1": 4096, "layer2.0.relu1": 2048, "layer3.0.relu2": 1024}
BASE = {"accuracy": 92.0, "relus": 11_264, "macs": 4_000_000, "depth": 9, "params": 300_000}
SMALL = Spec("resnet10", 10, (1, 8, 8), 0.125)


def finished(folder: Path, relus: int, accuracy: float, seed: int = 0, data: str = "digits", **config: Any) -> Path:
    """A finished run of `relus` kept of 11,264 ReLUs; its second block is replaced."""
    run = Run.create(folder, {"command": "reduce", "data": data, "seed": seed, "teacher": f"t{seed}", **config})
    share = relus / sum(SIZES.values())
    counts = {name: int(size * share) for name, size in SIZES.items()}
    counts["relu"] += relus - sum(counts.values())
    run.write_json("budget.json", {"counts": counts, "sizes": SIZES})
    reduced = BASE | {"accuracy": accuracy, "relus": relus, "macs": 3_000_000, "replaced_blocks": ["layer1.0.relu1"]}
    summary = {"data": data, "model": "resnet10", "seed": seed, "baseline": BASE, "reduced": reduced}
    run.write_json("summary.json", summary)
    for stage, epochs in (("sensitivity", 2), ("mask", 3), ("finetune", 5)):
        for epoch in range(epochs):
            run.log(stage, {"epoch": epoch, "accuracy": accuracy - 8 / (epoch + 1)})
    return folder


def with_networks(folder: Path) -> Path:
    """Stores an untrained network and a masked one in the run, so that its costs can be forecast."""
    run = Run(folder)
    torch.manual_seed(0)
    model = assemble(SMALL)
    save_network(run, SMALL, model, "teacher")
    sites = relu_sites(model, SMALL.shape)
    masked = add_masks(model, {site.name: torch.ones(site.shape, dtype=torch.bool) for site in sites})
    for site in masked_sites(masked).values():
        site.set_mask(torch.rand(site.mask.shape) < 0.1)
    spec = Spec(**{**vars(SMALL), "masked": tuple(site.name for site in sites)})
    save_network(run, spec, masked)
    return folder


def measured(folder: Path, seconds: float = 0.02) -> Path:
    """Adds seconds that the run has measured between two processes."""
    run = Run(folder)
    summary = run.read_json("summary.json")
    for side, factor in (("baseline", 2), ("reduced", 1)):
        summary[side]["prepared"] = {"online_s": factor * seconds, "offline_s": 1.0, "bytes": 1000, "messages": 40}
    run.write_json("summary.json", summary)
    return folder
