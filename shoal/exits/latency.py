"""Measured seconds per image: several ways to classify the same images, in turn, and the stages of a cascade."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ShoalError
from shoal.exits.cascades import Cascade

Classify = Callable[[Tensor], object]


def compare(ways: Mapping[str, Classify], images: Tensor, batch: int, rounds: int) -> dict[str, float]:
    """Seconds per image of each way to classify `images` [N, C, H, W] in batches: medians over `rounds`.

    The ways take turns in every round, so that other load on the machine affects all of them alike. One more round at
    the start is not counted. Images that do not fill a batch are left out. Raises ShoalError for fewer images than a
    batch, or fewer than one round.
    """
    batches = _batches(images, batch, rounds)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, classify in ways.items():
                taken[name].append(_seconds(images.device, _classify_all, classify, batches))
    return {name: statistics.median(seconds[1:]) / (len(batches) * batch) for name, seconds in taken.items()}


def stage_seconds(network: Cascade, images: Tensor, batch: int, rounds: int) -> tuple[float, ...]:
    """Seconds per image up to each exit when no image leaves: medians over `rounds`, measured as in `compare`."""
    batches = _batches(images, batch, rounds)
    taken: list[list[float]] = [[] for _ in network.stages]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for i, seconds in enumerate(_one_round(network, batches)):
                taken[i].append(seconds)
    return tuple(accumulate(statistics.median(s[1:]) / (len(batches) * batch) for s in taken))


def _one_round(network: Cascade, batches: list[Tensor]) -> list[float]:
    spent = [0.0] * len(network)
    for x in batches:
        carried: list[Tensor] = [x]
        for i, stage in enumerate(network.stages):
            results: list[Tensor] = []
            spent[i] += _seconds(x.device, _run_stage, stage, carried, results)
            carried = results[1:]
    return spent


def _classify_all(classify: Classify, batches: list[Tensor]) -> None:
    for x in batches:
        classify(x)


def _run_stage(stage: Callable[..., Iterable[Tensor]], carried: list[Tensor], results: list[Tensor]) -> None:
    results += stage(*carried)


def _batches(images: Tensor, batch: int, rounds: int) -> list[Tensor]:
    if batch < 1 or rounds < 1 or len(images) < batch:
        raise ShoalError(
            f"found batches of {batch}, {rounds} rounds and {len(images)} images; need 1 or more rounds and at least "
            "one full batch; choose a smaller batch"
        )
    return [x for x in images.split(batch) if len(x) == batch]


def _seconds(device: torch.device, work: Callable[..., None], *arguments: Any) -> float:
    _wait(device)
    begun = time.perf_counter()
    work(*arguments)
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued. A CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
