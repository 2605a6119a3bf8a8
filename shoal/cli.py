"""The command line. Thin: each command calls one part of the library and prints a table or JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shoal import bench as measuring
from shoal import commands, deployment, training
from shoal.errors import ShoalError
from shoal.report import comparison_table

HELP = """Make a trained CNN shallow and ReLU-light, then run it privately between two parties.

A first tour (each command explains itself with --help):

  shoal demo --out runs/demo                      everything below, on embedded data

  shoal count resnet18 --input 3x32x32 --classes 100

  shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher

  shoal reduce runs/teacher --budget 49600 --preset paper --out runs/reduced

  shoal compile runs/reduced --out artifact; shoal certs certs

  shoal serve artifact/server --cert certs/server.pem --key certs/server.key --ca certs/ca.pem

  shoal prepare artifact/client --count 10 --cert certs/client.pem --key certs/client.key --ca certs/ca.pem

  shoal query artifact/client IMAGE.png --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty, unless --resume.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the data set lies in its published layout.")]
Seed = Annotated[int, typer.Option(help="Decides initial weights, batches and the validation split.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Stop at a checkpoint before this many seconds, all stages together.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out.")]
Preset = Annotated[str, typer.Option(help="Schedules and losses: quick, paper or reference-code.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of the preset's number.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events (extra).")]
Cert = Annotated[Path | None, typer.Option(help="This party's certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="This party's private key (PEM).")]
Ca = Annotated[Path | None, typer.Option(help="The certificate authority that signed the peer's certificate.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain TCP; only on loopback.")]
Connect = Annotated[str, typer.Option(help="The server's host:port.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the peer in any step.")]
ClientAddress = Annotated[
    str | None, typer.Option(help="host:port at which the server reaches this machine for SPU's own connection.")
]
ClientPool = Annotated[Path | None, typer.Option(help="Where prepared items are kept; beside the artifact.")]


def show(body: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print `body` as JSON, or what `table` makes of it; under torchrun only the first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(commands.dump(body) + "\n")
    else:
        Console().print(table())


def grid(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A table; every column but the first is right-aligned."""
    table = Table(title=title, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def pairs(title: str, body: dict[str, Any]) -> Table:
    """Plain values of `body`, a row each."""
    rows = [
        [k, f"{v:,.4g}" if isinstance(v, float) else str(v)] for k, v in body.items() if not isinstance(v, (dict, list))
    ]
    return grid(title, ["", ""], rows)


@app.command()
def count(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable that returns an nn.Module.")],
    input: Annotated[str, typer.Option(help="Image size, channels x height x width.")] = "3x32x32",
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    json: Json = False,
) -> None:
    """Count ReLUs, MACs, conv depth and parameters, and list every ReLU site.

    MACs are those of convolutions, 1x1 shortcuts included; depth is convolutions on the longest path.
    """
    body = commands.count(model, input, classes, width, resolution)
    head = [
        f"{body['relus']:,} ReLUs",
        f"{body['macs']:,} MACs",
        f"depth {body['depth']}",
        f"{body['params']:,} parameters",
    ]
    rows = [
        [s["name"], "x".join(map(str, s["shape"])), f"{s['relus']:,}", str(s["stage"]), str(s["block"])]
        for s in body["sites"]
    ]
    show(
        body, json, lambda: grid(f"{model}: {', '.join(head)}", ["ReLU site", "shape", "ReLUs", "stage", "block"], rows)
    )
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable.")],
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet or a folder.")
    ],
    out: Out,
    data_dir: DataDir = None,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    preset: Preset = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = "fp32",
    max_seconds: MaxSeconds = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    json: Json = False,
) -> None:
    """Train an all-ReLU network: the teacher of a reduction, or a baseline.

    Several GPUs or processes: torchrun --nproc-per-node=N -m shoal train ...
    """
    shared = training.Shared(out, seed, device, precision, max_seconds, resume, tensorboard)
    body = training.train(model, data, data_dir, width, resolution, preset, epochs, limit, shared)
    show(body, json, lambda: pairs(f"{model} on {data}", body))


@app.command()
def reduce(
    teacher: Annotated[Path, typer.Argument(help="A run folder of `shoal train`.")],
    budget: Annotated[int, typer.Option(help="ReLUs to keep in the whole network.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="shallow: Making Models Shallow Again.")] = "shallow",
    preset: Preset = "quick",
    d_th: Annotated[float, typer.Option("--d-th", help="Gate blocks whose assigned ratio is below this.")] = 0.05,
    gates: Annotated[
        bool, typer.Option("--gates/--no-gates", help="Replace low-budget blocks by one convolution.")
    ] = True,
    exit: Annotated[bool, typer.Option("--exit/--no-exit", help="Train an auxiliary classifier (AKD).")] = True,
    keep: Annotated[str, typer.Option(help="The classifier to deploy: final or auxiliary.")] = "final",
    masks: Annotated[str, typer.Option(help="senet, or random as an ablation at equal budget.")] = "senet",
    granularity: Annotated[str, typer.Option(help="pixel or channel.")] = "pixel",
    ramp: Annotated[str, typer.Option(help="How gates open: linear or cosine.")] = "linear",
    sensitivity: Annotated[Path | None, typer.Option(help="JSON {site: value} instead of stage 1.")] = None,
    data_dir: DataDir = None,
    epochs: Annotated[str | None, typer.Option(help="sensitivity,mask,finetune instead of the preset's.")] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    max_seconds: MaxSeconds = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    json: Json = False,
) -> None:
    """Reduce a trained network to a ReLU budget by sensitivity, learned masks, gated branches and an exit.

    Prints the baseline beside the reduced network, and the MACs by both accountings of replaced blocks.
    """
    shared = training.Shared(out, 0, device, precision, max_seconds, resume, tensorboard)
    choices = {"d_th": d_th, "gates": gates, "exit": exit, "keep": keep, "masks": masks, "granularity": granularity}
    choices |= {"ramp": ramp, "budget": budget}
    body = training.reduce(teacher, recipe, preset, choices, sensitivity, data_dir, epochs, shared)
    show(body, json, lambda: comparison_table(body))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    data_dir: DataDir = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Also in fixed point, in the clear, on the whole test set.")
    ] = False,
    json: Json = False,
) -> None:
    """Test accuracy and counts of a run's network; --fixed adds the private arithmetic, bit for bit."""
    body = commands.evaluate(run, data_dir, fixed)
    show(body, json, lambda: pairs(str(run), body))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with a summary.json.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    json: Json = False,
) -> None:
    """One table over runs, and each run's training curves as curves.png in its folder."""
    body = commands.report(runs, csv)
    show(body, json, lambda: commands.report_table(body))


@app.command("compile")
def compile_(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    out: Annotated[Path, typer.Option(help="The artifact: writes client/ and server/.")],
    data_dir: DataDir = None,
    fraction_bits: Annotated[int | None, typer.Option(help="Fixed-point fraction bits; chosen if left out.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Compile the network that the run started from.")] = False,
    max_failure: Annotated[
        float, typer.Option(help="Most chance of a failed local truncation in one inference; less costs exchanges.")
    ] = 2.0**-20,
    ot_kind: Annotated[
        str, typer.Option(help="Oblivious transfers: YACL_Ferret (few bytes) or YACL_Softspoken (starts in a second).")
    ] = "YACL_Ferret",
    json: Json = False,
) -> None:
    """Fold, calibrate and compile a network; client/ holds no weight, server/ holds them."""
    body = deployment.compile_run(run, out, data_dir, teacher, fraction_bits, max_failure, ot_kind)
    show(body, json, lambda: pairs(str(out), body))


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Where to write ca.pem, server.pem/.key, client.pem/.key.")],
    name: Annotated[list[str] | None, typer.Option(help="Host name or address of a party; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the certificates in that folder.")] = False,
    json: Json = False,
) -> None:
    """Make test certificates for mutual TLS. In production use your own authority's."""
    body = deployment.certs(folder, name or ["localhost", "127.0.0.1"], overwrite)
    show(body, json, lambda: pairs("certificates", body))


@app.command()
def serve(
    artifact: Annotated[Path, typer.Argument(help="The server/ half of an artifact.")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    sessions: Annotated[int | None, typer.Option(help="Stop after so many sessions.")] = None,
    timeout: Timeout = 120.0,
    pool: Annotated[Path | None, typer.Option(help="Where prepared items are kept; beside the artifact.")] = None,
    pool_gib: Annotated[float, typer.Option(help="GiB of prepared items that each client may have here.")] = 4.0,
    max_clients: Annotated[int, typer.Option(help="Sessions at once; more are refused.")] = 8,
    engines: Annotated[int, typer.Option(help="SPU processes at once (direct queries, preparation).")] = 1,
    early_exit: Annotated[
        bool, typer.Option("--early-exit", help="Let clients end at an exit; the server learns which was taken.")
    ] = False,
    link_port: Annotated[int | None, typer.Option(help="Port of SPU's own connection; a free one.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here once listening.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Run the server's side: it holds the weights and learns nothing of the images but their number.

    It serves prepared queries, their preparation, and direct queries alike: the client chooses.
    """
    choices = {"insecure": insecure, "timeout_s": timeout, "pool": pool, "pool_bytes": int(pool_gib * 2**30)}
    choices |= {"max_clients": max_clients, "engines": engines, "link_port": link_port, "early_exit": early_exit}
    deployment.serve(artifact, listen, deployment.tls(cert, key, ca), sessions, ready_file, json, choices)


@app.command()
def prepare(
    artifact: Annotated[Path, typer.Argument(help="The client/ half of an artifact.")],
    count: Annotated[int, typer.Option(help="Items to make: each serves one image, once.")] = 1,
    batch: Annotated[int, typer.Option(help="Items made together; more share SPU's packing and take more memory.")] = 1,
    connect: Connect = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    timeout: Timeout = 120.0,
    client_address: ClientAddress = None,
    pool: ClientPool = None,
    json: Json = False,
) -> None:
    """Make randomness with the server, ahead of time, for queries that are then mostly waiting for messages.

    What is finished stays if this is stopped; run it again for the rest.
    """
    tls = deployment.tls(cert, key, ca)
    connection = deployment.Connection(connect, tls, insecure, timeout, client_address, pool)
    body = deployment.prepare(artifact, connection, count, batch)
    show(body, json, lambda: pairs("prepared", body))


@app.command()
def query(
    artifact: Annotated[Path, typer.Argument(help="The client/ half of an artifact.")],
    images: Annotated[list[Path], typer.Argument(help="Image files; resized to nothing: their size must fit.")],
    mode: Annotated[str, typer.Option(help="prepared (spends what shoal prepare made) or direct.")] = "prepared",
    top_up: Annotated[bool, typer.Option("--top-up", help="Make the items that are missing first.")] = False,
    exit_above: Annotated[
        float | None, typer.Option(help="Leave at the first exit that is as sure (0 to 1); the server must allow it.")
    ] = None,
    connect: Connect = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    timeout: Timeout = 120.0,
    client_address: ClientAddress = None,
    pool: ClientPool = None,
    json: Json = False,
) -> None:
    """Run the client's side: ask the server to classify images that it never sees."""
    tls = deployment.tls(cert, key, ca)
    connection = deployment.Connection(connect, tls, insecure, timeout, client_address, pool)
    body = deployment.query(artifact, images, connection, mode, top_up, exit_above)
    show(body, json, lambda: deployment.query_table(body))


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact with both halves.")],
    network: Annotated[list[str] | None, typer.Option(help="none, lan or wan; repeatable. All if left out.")] = None,
    rounds: Annotated[int, typer.Option(help="Queries whose median is shown.")] = 5,
    batch: Annotated[int, typer.Option(help="Items made together.")] = 1,
    json: Json = False,
) -> None:
    """Time prepared queries between two processes here, over a relay that behaves like a LAN or a WAN."""
    body = measuring.bench(artifact, network or list(measuring.NETWORKS), rounds, batch)
    head = ["network", "online, s", "bytes", "messages", "one-way latencies"]
    rows = [
        [name, f"{row['online_s']:.4f}", f"{row['bytes']:,}", f"{row['messages']:,}", str(row["latencies"])]
        for name, row in body["networks"].items()
    ]
    show(body, json, lambda: grid(f"prepared queries; {body['offline_s']:.2f} s an item offline", head, rows))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to write.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    images: Annotated[int, typer.Option(help="Test images queried between the two processes.")] = 32,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train, reduce, fold and privately run a network on scikit-learn's digits; under 6 minutes on two cores."""
    body = training.demo(out, overwrite, images, seed)
    show(body, json, lambda: comparison_table(body))


def main() -> None:
    """Run the command line; a ShoalError is one clear sentence on standard error and exit status 1."""
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        Console(stderr=True, soft_wrap=True).print(f"shoal: {error}", markup=False, highlight=False)
        sys.exit(1)
