"""What each command but those that train does, as functions that return JSON-ready data."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from shoal.checkpoint import write_text
from shoal.cost import cost
from shoal.errors import ShoalError
from shoal.report import collect, plot_curves, write_csv
from shoal.run import Run, own_network
from shoal.sites import relu_sites
from shoal.spec import Spec
from shoal.surgery import trace
from shoal.train import Settings
from shoal.training import counts, figures, load_data


def dump(body: Any) -> str:
    """JSON for `--json`."""
    return json.dumps(body, indent=1, default=str)


def parse_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W) of text like 3x32x32. Raises ShoalError otherwise."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --input {text!r}; need channels x height x width, such as 3x32x32")
    c, h, w = (int(p) for p in parts)
    return c, h, w


def count(model: str, size: str, classes: int, width: float, resolution: float) -> dict[str, Any]:
    """Counts of a zoo or a user's network."""
    shape = parse_shape(size)
    network = own_network(Spec(model, classes, shape, width, resolution))
    total = cost(trace(network, shape))
    sites = [
        {"name": s.name, "shape": s.shape, "relus": s.relus, "stage": s.stage, "block": s.block}
        for s in relu_sites(network, shape)
    ]
    return counts(total) | {"unknown": total.unknown, "sites": sites}


def evaluate(folder: Path, data_dir: Path | None, fixed: bool) -> dict[str, Any]:
    """Test accuracy and counts of a run's network, in float and if asked in fixed point."""
    run = Run(folder)
    spec, network = run.load_model()
    data = load_data(run.config(), data_dir)
    body = figures(network, data, spec, Settings())
    if fixed:
        from shoal.private.deploy import clear_agreement, deploy

        graph, program, weights = deploy(network, data)
        images = data.normalise(data.test.images)
        agreement, accuracy = clear_agreement(graph, program, weights, images, data.test.labels)
        body |= {"fixed_accuracy": accuracy, "error_bound": program.error_bound} | asdict(agreement)
    return body


def report(folders: list[Path], csv: Path | None) -> list[dict[str, Any]]:
    """Flat rows of every run with a summary; draws each run's curves."""
    rows = collect(folders)
    for folder in folders:
        if Run(folder).has("metrics.jsonl"):
            plot_curves(Run(folder), folder / "curves.png")
    if csv is not None:
        write_csv(rows, csv)
    return rows


def report_table(rows: list[dict[str, Any]]) -> Table:
    """Runs down, figures across."""
    table = Table(header_style="bold")
    shown: tuple[str, ...] = (
        "run",
        "data",
        "baseline.accuracy",
        "reduced.accuracy",
        "reduced.relus",
        "reduced.macs",
        "reduced.depth",
    )
    shown += ("baseline.private.online_s", "reduced.private.online_s")
    for name in shown:
        table.add_column(name, justify="left" if name in ("run", "data") else "right")
    for row in rows:
        table.add_row(*(f"{v:,.6g}" if isinstance(v := row.get(k), (int, float)) else str(v or "") for k in shown))
    return table


def compile_run(
    folder: Path, out: Path, data_dir: Path | None, fraction_bits: int | None, teacher: bool, ot_kind: str
) -> dict[str, Any]:
    """Write the artifact of a run's network."""
    from shoal.private.artifact import save_artifact
    from shoal.private.deploy import deploy

    run = Run(folder)
    _, network = run.load_model("teacher" if teacher else "model")
    data = load_data(run.config(), data_dir)
    graph, program, weights = deploy(network, data, fraction_bits=fraction_bits)
    save_artifact(out, program, weights, ot_kind=ot_kind)
    facts = {"digest": program.digest(), "fraction_bits": program.fraction_bits, "error_bound": program.error_bound}
    return {"client": str(out / "client"), "server": str(out / "server")} | facts | counts(cost(graph))


def certs(folder: Path, names: list[str], overwrite: bool) -> dict[str, Any]:
    """Make test certificates."""
    from shoal.private.certs import make_certificates

    make_certificates(folder, tuple(names), overwrite=overwrite)
    return {"ca": str(folder / "ca.pem"), "names": ", ".join(names), "folder": str(folder)}


def tls(cert: Path | None, key: Path | None, ca: Path | None) -> Any:
    """The TLS files of a party, or None when none is given. Raises ShoalError for some of them."""
    from shoal.private.party import TLS

    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise ShoalError("found only some of --cert, --key and --ca; need all three for mutual TLS (see shoal certs)")
    return TLS(cert, key, ca)


def serve(
    artifact: Path, listen: str, tls: Any, insecure: bool, sessions: int | None, timeout: float, ready: Path | None
) -> None:
    """Serve sessions until stopped."""
    from shoal.private.party import Server

    with Server(artifact, listen, tls, timeout_s=timeout, insecure=insecure) as server:
        if ready is not None:
            write_text(ready, server.address + "\n")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.info("serving %s at %s", artifact, server.address)
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
            server.serve(sessions)


def query(artifact: Path, images: list[Path], connect: str, tls: Any, insecure: bool, timeout: float) -> dict[str, Any]:
    """Classify image files privately."""
    from shoal.private.party import Client
    from shoal.private.program import Program

    program = Program.load(artifact)
    x = np.stack([read_image(path, program.input_shape) for path in images])
    mean, std = (np.asarray(program.preprocessing[k], np.float32)[:, None, None] for k in ("mean", "std"))
    with Client(artifact, connect, tls, timeout_s=timeout, insecure=insecure) as client:
        result = client.query(((x / np.float32(255)) - mean) / std)
        facts = {"setup_s": client.setup_s, "online_s": result.seconds, "bytes": result.bytes}
    names = program.preprocessing.get("class_names")
    rows = []
    for path, logits in zip(images, np.asarray(result.logits), strict=True):
        best = int(logits.argmax())
        rows.append({"image": str(path), "class": names[best] if names else best, "logits": logits.tolist()})
    return {"mode": result.mode, "messages": result.messages, "results": rows} | facts


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels [C, H, W] in 0..255 as float32. Raises ShoalError unless the file is an image of `shape`."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"), np.float32)
    except (OSError, ValueError) as error:
        raise ShoalError(f"found no readable image at {path} ({error}); need a PNG or JPEG file") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != tuple(shape):
        raise ShoalError(f"found an image of shape {pixels.shape} at {path}; need {tuple(shape)}; resize it first")
    return pixels


def query_table(body: dict[str, Any]) -> Table:
    """Images down, their classes, and what the query cost."""
    cost_ = f"{body['online_s']:.2f} s, {body['bytes']:,} bytes, {body['messages']:,} messages"
    table = Table(title=f"{body['mode']}: set-up {body['setup_s']:.1f} s, query {cost_}", header_style="bold")
    table.add_column("image")
    table.add_column("class", justify="right")
    table.add_column("logit", justify="right")
    for row in body["results"]:
        table.add_row(row["image"], str(row["class"]), f"{max(row['logits']):.4f}")
    return table
