"""What the commands of private inference do: artifacts, certificates, and both parties."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.jobs.inputs import load_data
from shoal.networks.figures import counts
from shoal.networks.stored import load_network
from shoal.progress import counter
from shoal.storage.run import Run


def compile_run(
    folder: Path,
    out: Path,
    data_dir: Path | None,
    teacher: bool,
    fraction_bits: int | None,
    max_failure: float,
    ot_kind: str,
) -> dict[str, Any]:
    """Write the artifact of a run's network."""
    from shoal.private.compiler.deployment import deploy
    from shoal.private.program.artifact import save_artifact

    run = Run(folder)
    _, network = load_network(run, "teacher" if teacher else "model")
    data = load_data(run.config(), data_dir)
    graph, program, weights = deploy(network, data, fraction_bits=fraction_bits, max_failure=max_failure)
    save_artifact(out, program, weights, ot_kind=ot_kind)
    facts = {"digest": program.digest(), "fraction_bits": program.fraction_bits, "error_bound": program.error_bound}
    facts |= {"failure_bound": program.failure_bound, "exact_truncations": len(program.exact)}
    return {"client": str(out / "client"), "server": str(out / "server")} | facts | counts(cost(graph))


def certs(folder: Path, names: list[str], overwrite: bool) -> dict[str, Any]:
    """Make test certificates."""
    from shoal.private.transport.certs import make_certificates

    make_certificates(folder, tuple(names), overwrite=overwrite)
    return {"ca": str(folder / "ca.pem"), "names": ", ".join(names), "folder": str(folder)}


def tls(cert: Path | None, key: Path | None, ca: Path | None) -> Any:
    """The TLS files of a party, or None when none is given. Raises ShoalError for some of them."""
    from shoal.private.transport.certs import TLS

    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise ShoalError("found only some of --cert, --key and --ca; need all three for mutual TLS (see shoal certs)")
    return TLS(cert, key, ca)


@dataclass(frozen=True)
class Connection:
    """How a client reaches its server: options that its commands share."""

    address: str
    tls: Any
    insecure: bool
    timeout_s: float
    client_address: str | None
    pool: Path | None

    def client(self, artifact: Path, mode: str = "prepared", **more: Any) -> Any:
        """A Client of `artifact`, not open yet. Its pool may be waited for as long as the peer."""
        from shoal.private.serving.client import Client

        choices: dict[str, Any] = {
            "insecure": self.insecure,
            "timeout_s": self.timeout_s,
            "client_address": self.client_address,
            "pool_wait_s": self.timeout_s,
        }
        return Client(artifact, self.address, self.tls, mode=mode, pool=self.pool, **(choices | more))


def prepare(artifact: Path, connection: Connection, count: int, batch: int) -> dict[str, Any]:
    """Make `count` items with the server."""
    if count < 1 or batch < 1:
        raise ShoalError(f"found {count} items in batches of {batch}; need 1 or more of each")
    client = connection.client(artifact)
    try:
        with counter("prepared items", count) as progress:
            made = client.prepare(count, batch=batch, progress=progress)
        facts = {f"{kind}_{what}": row[what] for kind, row in made.kinds.items() for what in ("seconds", "bytes")}
        return facts | {"made": count, "ready": len(client.pool.names()), "bytes": client.pool.bytes()}
    finally:
        client.close()


def query(
    artifact: Path, images: list[Path], connection: Connection, mode: str, top_up: bool, exit_above: float | None
) -> dict[str, Any]:
    """Classify image files privately; with `top_up` make the items that are missing first."""
    from shoal.private.program.program import Program

    program = Program.load(artifact)
    x = np.stack([read_image(path, program.input_shape) for path in images])
    mean, std = (np.asarray(program.preprocessing[k], np.float32)[:, None, None] for k in ("mean", "std"))
    client = connection.client(artifact, mode)
    missing = len(images) - len(client.pool.names()) if client.pool else 0
    if missing > 0:
        _top_up(client, missing, top_up)
    with client, counter("images", len(images)) as progress:
        results = []
        for i, image in enumerate(((x / np.float32(255)) - mean) / std):
            results.append(client.query(image[None], exit_above=exit_above))
            progress(i + 1, len(images))
        facts = {"mode": mode, "setup_s": client.setup_s, "online_s": sum(r.seconds for r in results)}
    facts |= {k: sum(getattr(r, k) for r in results) for k in ("bytes", "messages", "latencies")}
    names = program.preprocessing.get("class_names")
    return facts | {
        "results": [_row(path, r.logits[0], r.taken[0], names) for path, r in zip(images, results, strict=True)]
    }


def _top_up(client: Any, missing: int, allowed: bool) -> None:
    if not allowed:
        client.close()
        raise ShoalError(
            f"found {missing} prepared items too few; need one for each image; run shoal prepare, or give --top-up"
        )
    with counter("prepared items", missing) as progress:
        client.prepare(missing, progress=progress)


def _row(path: Path, logits: np.ndarray, taken: int, names: list[str] | None) -> dict[str, Any]:
    best = int(logits.argmax())
    return {"image": str(path), "class": names[best] if names else best, "exit": taken, "logits": logits.tolist()}


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
