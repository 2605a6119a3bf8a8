"""Shoal's prepared inference beside a CrypTen run of the same networks and DELPHI's published online latencies.

    pip install --no-deps crypten==0.4.1 omegaconf
    python -m benchmarks.private.others --out benchmarks/results/private_others.json

CrypTen is no dependency of shoal: install it into an environment of its own that also has shoal, without its
dependencies, of which `sklearn` cannot be installed any more and most are not needed here.

It runs as two processes over gloo on loopback, without TLS, with its default provider, the trusted first party. That
is insecure, for comparison only: party 0, here the server, makes all triples in the clear, so it could compute the
client's image. Weights are shared beforehand; a query's seconds go from sharing the image to the client's logits, and
the triples are made within them.

Shoal's figures are read from `benchmarks/results/private_phases.json`, not measured again. DELPHI's are those that
DeepReDuce published: its networks, its machines, the online phase alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.private.crypten_party import CLIENT, SERVER, image
from benchmarks.private.delphi import PUBLISHED, beside, fit
from benchmarks.private.phases import sized
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.storage.environment import environment

OURS = Path(__file__).parents[1] / "results" / "private_phases.json"
CRYPTEN = "0.4.1"
TOLERANCE = 0.05
"""Largest logit error of a run that counts: CrypTen keeps 16 bits, and these logits are of the order of 1 to 10."""


def check_crypten() -> None:
    """Leave with one sentence unless the CrypTen that this file is written for is there."""
    try:
        found = f"crypten {version('crypten')}"
    except PackageNotFoundError:
        found = "no crypten"
    if found != f"crypten {CRYPTEN}":
        sys.exit(f"found {found} in {sys.prefix}; need {CRYPTEN}; install it as `{Path(__file__).name} --help` says")


def measure(graph: Graph, folder: Path, a: argparse.Namespace) -> dict[str, Any]:
    """CrypTen's figures for `graph`."""
    graph.save(folder / str(SERVER))
    # The client knows the architecture and the masks, as in shoal, and no weight.
    public = {k: torch.zeros_like(w) if w.is_floating_point() else w for k, w in graph.weights.items()}
    replace(graph, weights=public).save(folder / str(CLIENT))
    run_parties(folder, a)
    server, client = (json.loads((folder / f"{rank}.json").read_text()) for rank in (SERVER, CLIENT))
    with torch.no_grad():
        truth = graph(image())[-1]
    error = max(float((torch.tensor(row["logits"]) - truth).abs().max()) for row in client)
    if not error < TOLERANCE:
        sys.exit(f"found CrypTen's logits {error} away from the plain network's; need at most {TOLERANCE}; run again")
    return {
        "online_s": statistics.median(row["seconds"] for row in client),
        "of_it_triples_s": statistics.median(row["triples_s"] for row in client),
        "all_online_s": [row["seconds"] for row in client],
        # Each party counts what it sends and what it receives, so half of their sum went over the wire.
        "bytes": round((server[0]["bytes"] + client[0]["bytes"]) / 2),
        "rounds": client[0]["rounds"],
        "logit_error": error,
        "largest_logit": float(truth.abs().max()),
    }


def run_parties(folder: Path, a: argparse.Namespace) -> None:
    """Run both parties to their end; whatever happens, none is left running."""
    shared = {"WORLD_SIZE": "2", "RENDEZVOUS": f"file://{folder}/meet", "DISTRIBUTED_BACKEND": "gloo"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(a.threads)}
    command = [sys.executable, "-m", "benchmarks.private.crypten_party"]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(folder), str(a.rounds), str(a.threads)],
            env=os.environ | shared | {"RANK": str(rank)},
        )
        for rank in (SERVER, CLIENT)
    ]
    try:
        for rank, child in enumerate(children):
            if child.wait():
                sys.exit(f"found that CrypTen's party {rank} failed (exit {child.returncode}); see its message above")
    finally:
        for child in children:
            child.kill()
            child.wait()


def compare(name: str, i: int, phases: dict[str, Any], a: argparse.Namespace) -> dict[str, Any]:
    """The figures of all three for the network that `private_phases.json` has under `name`."""
    settings, row = phases["settings"], phases["networks"][name]
    graph = sized(settings["relus"][i], settings["blocks"][i], settings["model"])
    if (relus := cost(graph).relus) != row["relus"]:
        sys.exit(f"found {relus} ReLUs, but {row['relus']} in {OURS}; need the same; run private_phases.py again")
    keys = ("relus", "depth", "online_s", "offline_s", "bytes", "latencies", "logit_error")
    with tempfile.TemporaryDirectory() as folder:
        crypten = measure(graph, Path(folder), a)
    return {"shoal": {k: row[k] for k in keys}, "crypten": crypten, "delphi": beside(relus)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each of CrypTen's two processes")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    check_crypten()
    load = os.getloadavg()[0]  # others on the machine slow CrypTen's two busy processes by up to two
    phases, rows = json.loads(OURS.read_text()), {}
    for i, name in enumerate(phases["networks"]):
        rows[name] = compare(name, i, phases, a)
        print(json.dumps(rows[name]), flush=True)
    write(a, rows, phases["environment"]["threads"], load)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    theirs, online, offline = row["crypten"]["online_s"], row["shoal"]["online_s"], row["shoal"]["offline_s"]
    return {
        "crypten_over_shoal_online": theirs / online,
        "crypten_without_triples_over_shoal_online": (theirs - row["crypten"]["of_it_triples_s"]) / online,
        "crypten_over_shoal_offline_and_online": theirs / (offline + online),
    }


def write(a: argparse.Namespace, rows: dict[str, Any], our_threads: int, load: float) -> None:
    conditions = {
        "shoal": "prepared; two processes, mutual TLS on loopback; offline phase stated separately; read from "
        f"private_phases.json; threads a process: {our_threads}",
        "crypten": "trusted first party: insecure, for comparison only; gloo on loopback, no TLS; triples made by "
        f"party 0 in the clear, inside the online time, at no bytes; threads a process: {a.threads}",
        "delphi": "published, their machine, online phase only; DeepReDuce, Tables 4 and 5 (ResNet18 networks of "
        "other structure); fit: least squares line through all of these points",
    }
    machine, figures = environment(), {name: ratios(row) for name, row in rows.items()}
    machine["packages"]["crypten"] = CRYPTEN
    machine["load_average_before"] = load
    settings = {"rounds": a.rounds, "threads": a.threads}
    body = {"settings": settings, "environment": machine, "conditions": conditions, "figures": figures}
    body |= {"networks": rows, "published": PUBLISHED, "published_fit": fit()}
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
