"""The commands of networks with several exits. `app` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import DataDir, Json, grid, pairs, show
from shoal.exits.records import Chosen, Single, Worth
from shoal.jobs import exits as job
from shoal.report.layout import Grid

RunFolder = Annotated[Path, typer.Argument(help="A run folder whose network has several exits.")]


@expanded
def exits(run: RunFolder, wanted: job.Wanted, request: job.Request, json: Json = False) -> None:
    """Search confidence thresholds at which images leave early, and measure what that saves.

    Thresholds are searched on validation images. Accuracy, mean MACs, shares and seconds are those of test images, in
    batches of 64 and of 1, beside the full network. RUN/thresholds.json keeps the thresholds for shoal export;
    RUN/exits.png shows accuracy against MACs, and every exit alone.
    """
    body = job.exits(run, wanted, request)
    show(body, json, lambda: exits_table(str(run), body))


def exits_table(title: str, body: Chosen) -> Grid:
    """Every exit, the full network and dynamic inference, with thresholds and shares."""
    thresholds = [f"{t:.4f}" for t in body["thresholds"]]
    rows = []
    for i, (row, share) in enumerate(zip(body["exits"], body["test"]["shares"], strict=True)):
        threshold = thresholds[i] if i < len(thresholds) else "none"
        rows.append([f"exit {i + 1} alone", *_worth(row), threshold, units.share(share).removesuffix(" %")])
    rows.append(["all exits, by thresholds", *_worth(body["test"]), "", ""])
    head = ["", "test accuracy, %", "MACs an image, millions", "threshold", "images that leave here, %"]
    table = grid(title, head, rows)
    times = [_timing(batch, row) for batch, row in body["seconds"].items()]
    kinds = dict.fromkeys(name.partition(" (")[2].partition(" of ")[0].rstrip(")") for name in body["uncounted"])
    missing = [f"not counted in MACs: {', '.join(kinds)}"] if kinds else []
    table.caption = "\n".join([*_verdict(body), *times, *missing])
    return table


def _verdict(body: Chosen) -> list[str]:
    """A sentence that early exits lost against the full network; none where they did not."""
    if not body["lost"]:
        return []
    own, full = units.percent(body["test"]["accuracy"]), units.percent(body["full"]["accuracy"])
    return [f"Early exits lost: {own} % test accuracy, against {full} % of the full network."]


def _worth(row: Worth | Single) -> list[str]:
    return [units.percent(row["accuracy"]), units.millions(row["macs"])]


def _timing(batch: str, row: dict[str, float]) -> str:
    dynamic, full = units.milliseconds(row["dynamic"]), units.milliseconds(row["full"])
    faster = f"{units.ratio(row['full'], row['dynamic'])} time"
    return f"batches of {batch}: {dynamic} ms an image; the full network {full} ms ({faster})"


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write a run with several exits as ONNX, one file a stage, with thresholds and order in cascade.json.

    Stages take any number of images, so confident images can leave between two stages. Needs RUN/thresholds.json (from
    shoal exits) and shoal[export]. The stages' logits are compared with those of the network.
    """
    body = job.export(run, out, data_dir)
    show(body, json, lambda: pairs(str(run), body))
