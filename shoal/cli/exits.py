"""`shoal exits` and `shoal export`: networks with several exits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, pairs, show
from shoal.exits.records import Chosen, Single, Worth
from shoal.jobs import exits as job
from shoal.report.layout import Grid


@expanded
def exits(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder whose network has several exits, such as one of self-distill or inplace."),
    ],
    wanted: job.Wanted,
    request: job.Request,
    json: Json = False,
) -> None:
    """Search confidence thresholds at which images leave early, and measure what that saves.

    Exits are classifiers at several depths. An image leaves the network at the first exit whose confidence is above its
    threshold. Thresholds are searched on validation images for one goal: --budget, --loss or --beta. Accuracy, mean
    MACs and fractions of images are those of the test set; seconds are measured in batches of 64 and of 1, and compared
    with the full network, which is the last exit alone, and with the plain network, if RUN has one as its baseline or
    --baseline gives one. RUN/thresholds.json holds the thresholds for shoal export; RUN/exits.png shows accuracy
    against MACs, with each exit alone for comparison.
    """
    body = job.exits(run, wanted, request)
    show(body, json, lambda: exits_table(str(run), body))


def exits_table(title: str, body: Chosen) -> Grid:
    """A table of each exit alone and of early exits, with thresholds and fractions of images."""
    thresholds = [f"{t:.4f}" for t in body["thresholds"]]
    rows = []
    for i, (row, share) in enumerate(zip(body["exits"], body["test"]["shares"], strict=True)):
        threshold = thresholds[i] if i < len(thresholds) else "none"
        rows.append([f"exit {i + 1} alone", *_worth(row), threshold, units.share(share).removesuffix(" %")])
    rows.append(["all exits, by thresholds", *_worth(body["test"]), "", ""])
    if "baseline" in body:
        rows.append(["plain network (baseline)", *_worth(body["baseline"]), "", ""])
    head = ["", "test accuracy, %", "MACs per image, millions", "threshold", "images that leave here, %"]
    table = grid(title, head, rows)
    times = [_timing(batch, row) for batch, row in body["seconds"].items()]
    kinds = dict.fromkeys(name.partition(" (")[2].partition(" of ")[0].rstrip(")") for name in body["uncounted"])
    missing = [f"not counted in MACs: {', '.join(kinds)}"] if kinds else []
    table.caption = "\n".join([*_verdict(body), *times, *missing])
    return table


def _verdict(body: Chosen) -> list[str]:
    """What early exits gain over the plain network, if there is one, and a sentence if they are less accurate.

    They are less accurate than the plain network where the goal counts from it, and otherwise than the full network.
    """
    test, said = body["test"], []
    if "baseline" in body:
        points = units.points(test["accuracy"] - body["baseline"]["accuracy"])
        cost = units.ratio(body["baseline"]["macs"], test["macs"])
        said.append(f"Early exits against the plain network: test accuracy {points} points, MACs {cost}.")
    if body["lost"]:
        plain = "baseline" in body and body["goal"].get("against") == "baseline"
        other, name = (body["baseline"], "plain") if plain else (body["full"], "full")
        own, worth = units.percent(test["accuracy"]), units.percent(other["accuracy"])
        said.append(f"Early exits lost: {own} % test accuracy, against {worth} % of the {name} network.")
    return said


def _worth(row: Worth | Single) -> list[str]:
    return [units.percent(row["accuracy"]), units.millions(row["macs"])]


def _timing(batch: str, row: dict[str, float]) -> str:
    dynamic, full = units.milliseconds(row["dynamic"]), units.milliseconds(row["full"])
    faster = f"{units.ratio(row['full'], row['dynamic'])} time"
    return f"batches of {batch}: {dynamic} ms per image; the full network {full} ms ({faster})"


@expanded
def export(wanted: job.Export, json: Json = False) -> None:
    """Write a network with several exits as ONNX files, one per stage.

    OUT/cascade.json has the order of the stages and the thresholds. Stages take any number of images, so images can
    leave between two stages. The logits of the stages are compared with those of the network. Needs
    RUN/thresholds.json (from shoal exits) and shoal[export].
    """
    body = job.export(wanted)
    show(body, json, lambda: pairs(str(wanted.run), body))
