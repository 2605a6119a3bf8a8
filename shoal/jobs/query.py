"""The jobs of private inference: `shoal compile`, `certs`, `prepare` and `query`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal import units
from shoal.data.images import STRETCH, read_image
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.jobs.inputs import load_data
from shoal.networks.figures import counts
from shoal.networks.stored import load_network
from shoal.private.compiler.deployment import deploy
from shoal.private.compiler.truncation import MAX_FAILURE
from shoal.private.products.parameters import least_margin
from shoal.private.program.artifact import OT_KINDS, save_artifact
from shoal.private.program.images import check_limit
from shoal.private.program.program import Program
from shoal.private.serving.client import ON_DEMAND, Client
from shoal.private.serving.options import ADDRESS, ClientOptions
from shoal.private.serving.result import Result
from shoal.private.transport.certs import TLS, fingerprint_of_file, make_certificates
from shoal.progress import counter
from shoal.report.layout import Grid
from shoal.storage.run import Run

TOP = 5
"""Number of classes that a query shows for each image."""


@dataclass(frozen=True)
class Compilation:
    """The options of `shoal compile`."""

    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the run's own if left out. Some training images are
    used to choose the range of the fixed-point numbers."""
    fraction_bits: int | None = None
    """Number of bits after the point of the fixed-point numbers; chosen with training images if left out."""
    teacher: bool = False
    """Compile the run's teacher, the network before the reduction, instead of the reduced network."""
    max_failure: float = MAX_FAILURE
    """Highest allowed probability that a local truncation (rounding by each party alone) fails in one inference and
    gives an arbitrary value. The default is 2^-20, about one in a million. A lower value makes more truncations exact,
    and each of them may cost one more exchange of messages."""
    ot_kind: str = OT_KINDS[0]
    """Which oblivious transfer, a building block of its protocol, SPU uses: YACL_Ferret (sends fewer bytes) or
    YACL_Softspoken (starts within a second)."""


def compile_run(folder: Path, out: Path, chosen: Compilation) -> dict[str, Any]:
    """Compile a run's network and write the artifact to `out`; returns its figures and counts.

    Raises ShoalError for a network that cannot run in private, and for missing data.
    """
    run = Run(folder)
    _, network = load_network(run, "teacher" if chosen.teacher else "model")
    data = load_data(run.config(), chosen.data_dir)
    bits, failure = chosen.fraction_bits, chosen.max_failure
    graph, program, weights = deploy(network, data, fraction_bits=bits, max_failure=failure)
    save_artifact(out, program, weights, ot_kind=chosen.ot_kind)
    facts = {"digest": program.digest(), "fraction_bits": program.fraction_bits, "error_bound": program.error_bound}
    facts |= {"failure_bound": program.failure_bound, "exact_truncations": len(program.exact)}
    facts |= {"seal_steps": len(program.products.get("steps", ())), "least_margin_bits": least_margin(program, weights)}
    return {"client": str(out / "client"), "server": str(out / "server")} | facts | counts(cost(graph))


def certs(folder: Path, names: list[str], overwrite: bool) -> dict[str, Any]:
    """Make test certificates in `folder` for parties with these host names or addresses.

    The result has the SHA-256 fingerprint of each party's certificate, for `ServerOptions.allow`.
    Raises ShoalError when certificates are there and `overwrite` is false.
    """
    made = make_certificates(folder, tuple(names), overwrite=overwrite)
    prints = {f"fingerprint of {party}.pem": fingerprint_of_file(tls.cert) for party, tls in made.items()}
    return {"ca": str(folder / "ca.pem"), "names": ", ".join(names), "folder": str(folder)} | prints


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """The PEM files of one party as options of its commands: all three, or none."""

    cert: Path | None = None
    """This party's certificate (PEM file). Needed with --key and --ca, unless --insecure."""
    key: Path | None = None
    """This party's private key (PEM file)."""
    ca: Path | None = None
    """Certificate of the authority that signed the other party's certificate (PEM file)."""

    def tls(self) -> TLS | None:
        """The three files for TLS, or None if none is given. Raises ShoalError for only one or two of them."""
        if self.cert is None and self.key is None and self.ca is None:
            return None
        if self.cert is None or self.key is None or self.ca is None:
            raise ShoalError(
                "found only some of --cert, --key and --ca; need all three for mutual TLS (see shoal certs)"
            )
        return TLS(self.cert, self.key, self.ca)


@dataclass(frozen=True, kw_only=True)
class Connection(Certificates):
    """How a client reaches its server."""

    connect: str = ADDRESS
    """host:port of the server."""

    def client(self, artifact: Path, options: ClientOptions) -> Client:
        """A `Client` of `artifact` that is not open yet."""
        return Client(artifact, self.connect, self.tls(), options)


def with_pool_wait(options: ClientOptions) -> ClientOptions:
    """The options for a command: it waits for a pool that is in use as long as for the server."""
    return replace(options, pool_wait_s=options.timeout_s)


@dataclass(frozen=True)
class Preparation:
    """Options of `shoal prepare`: how many items it makes."""

    count: int = 1
    """Number of items to make. One item serves one query of one image."""
    batch: int = 1
    """Number of items to make together. Larger batches take less time per item and more memory."""
    keep: int | None = None
    """Keep running, and make items whenever fewer than this many are ready, until SIGTERM or Ctrl-C."""


def prepare(artifact: Path, wanted: Preparation, connection: Connection, options: ClientOptions) -> dict[str, Any]:
    """Make `wanted.count` items with the server; returns seconds and bytes by kind of product, and the pool's size.

    Raises ShoalError for less than one item, and when the server cannot be reached or fails.
    """
    if wanted.count < 1 or wanted.batch < 1:
        raise ShoalError(f"found {wanted.count} items in batches of {wanted.batch}; need 1 or more of each")
    client = connection.client(artifact, with_pool_wait(options))
    try:
        with counter("prepared items", wanted.count) as progress:
            made = client.prepare(wanted.count, batch=wanted.batch, progress=progress)
        facts = {f"{kind}_{what}": row[what] for kind, row in made.kinds.items() for what in ("seconds", "bytes")}
        return facts | {"made": wanted.count, "ready": client.ready, "bytes": client.pool.bytes()}
    finally:
        client.close()


@dataclass(frozen=True)
class Query:
    """Options of `shoal query`: the images, and how to classify them."""

    images: tuple[Path, ...] = field(metadata={"cli": "argument"})
    """Image files. They must have the model's input size, unless the model was trained with --size: then other images
    are brought to that size by the same rule (--fit)."""
    top_up: bool = False
    """If there are fewer prepared items than images, make all missing ones before the first query. Otherwise a query
    that finds none makes at most 8 when it needs them."""
    exit_above: float | None = None
    """For networks with early exits: stop at the first exit whose largest softmax probability is at least this (0 to
    1). The server must run with --early-exit."""


def query(artifact: Path, asked: Query, connection: Connection, options: ClientOptions) -> dict[str, Any]:
    """Classify image files privately. Missing items are made, first if `asked.top_up`, else when they are needed.

    Raises ShoalError for unreadable or unfit images, and when the server cannot be reached or fails.
    """
    program = Program.load(artifact)
    x = np.stack([pixels_of(path, program) for path in asked.images])
    mean, std = (np.asarray(program.preprocessing[k], np.float32)[:, None, None] for k in ("mean", "std"))
    images = ((x / np.float32(255)) - mean) / std
    for path, image in zip(asked.images, images, strict=True):
        check_limit(program, image, str(path))
    with connection.client(artifact, with_pool_wait(options)) as client:
        # The session is open: errors of the server or the certificates come before those of making items.
        missing = len(x) - client.ready
        if asked.top_up and missing > 0:
            with counter("prepared items", missing) as progress:
                client.prepare(missing, progress=progress)
        results = _classify(client, images, asked.exit_above)
        facts = {"setup_s": client.setup_s, "items_left": client.ready}
    sums = {"online_s": "seconds"} | {k: k for k in ("bytes", "messages", "latencies", "made", "making_s")}
    facts |= {name: sum(getattr(r, figure) for r in results) for name, figure in sums.items()}
    names = program.preprocessing.get("class_names")
    answers = [(logits, taken) for r in results for logits, taken in zip(r.logits, r.taken, strict=True)]
    return facts | {"results": [_row(path, *a, names) for path, a in zip(asked.images, answers, strict=True)]}


def _classify(client: Client, images: np.ndarray, exit_above: float | None) -> list[Result]:
    """The results of the normalised images [N, C, H, W], asked in groups for which a query makes missing items."""
    results = []
    with counter("images", len(images)) as progress:
        for i in range(0, len(images), ON_DEMAND):
            results.append(client.query(images[i : i + ON_DEMAND], exit_above=exit_above))
            progress(min(i + ON_DEMAND, len(images)), len(images))
    return results


def _row(path: Path, logits: np.ndarray, taken: int, names: list[str] | None) -> dict[str, Any]:
    """One image's answer: its class, the softmax probability of that, and the same of the five likeliest classes."""
    chances = np.exp(logits.astype(np.float64) - logits.max())
    chances /= chances.sum()
    order = [int(i) for i in np.argsort(-logits, kind="stable")[:TOP]]
    top = [{"class": names[i] if names else i, "probability": float(chances[i])} for i in order]
    return {"image": str(path)} | top[0] | {"exit": taken, "logits": logits.tolist(), "top": top}


def pixels_of(path: Path, program: Program) -> np.ndarray:
    """The pixels of an image file, float32 [C, H, W] in 0..255, as in training (see `read_image`).

    An image of another size than the program's input is fitted by the rule of the training, if there is one. Raises
    ShoalError for an unreadable image, and for another size without a rule.
    """
    channels, height, width = program.input_shape
    fit = program.preprocessing.get("fit")
    pixels = read_image(path, channels, size=None if fit is None else (height, width), fit=fit or STRETCH)
    if pixels.shape != program.input_shape:
        raise ShoalError(
            f"found an image of {pixels.shape[2]}x{pixels.shape[1]} (width x height) at {path}; need {width}x{height}; "
            "resize it first"
        )
    return pixels.astype(np.float32)


def query_table(body: dict[str, Any]) -> Grid:
    """A table of the images with their classes, and the cost of the queries in its title."""
    spent = f"{units.seconds(body['online_s'])} s, {units.megabytes(body['bytes'])} MB"
    sent = f"{units.count(body['messages'])} messages, {units.count(body['latencies'])} one-way latencies"
    title = f"set-up {units.seconds(body['setup_s'])} s; all queries {spent}, {sent}"
    rows = [[row["image"], str(row["class"]), _percent(row), _others(row["top"])] for row in body["results"]]
    notes = [f"prepared items left: {units.count(body['items_left'])}"]
    if body["made"]:
        notes.insert(0, f"no item was ready; made {units.count(body['made'])} in {units.seconds(body['making_s'])} s")
    head = ["image", "class", "probability, %", "next likeliest, %"]
    return Grid(title, head, rows, texts=(0, 1, 3), shorten=True, caption="; ".join(notes))


def _percent(row: dict[str, Any]) -> str:
    return units.percent(100 * row["probability"])


def _others(top: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['class']} {_percent(row)}" for row in top[1:])
