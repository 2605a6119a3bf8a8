"""Channels cut out of a plain network and of a self-distilled one, each trained on (*Self-Distillation*, Fig. 6).

    python -m benchmarks.training.pruning --runs runs/pruning --out benchmarks/results/pruning.json

Both networks come from one `shoal self-distill`: the same first weights, images, schedule and epochs. Both are pruned
by `shoal prune --method channels` with the same rate and epochs. Finished commands are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shoal.networks.stored import load_network, save_network
from shoal.storage.environment import environment
from shoal.storage.run import Run

NETWORK = ("resnet10", "--width", "0.25", "--resolution", "0.5")


def command(out: Path, finished: str, *words: str) -> list[str]:
    """Run `shoal` on one thread into `out` unless it holds the file `finished`; returns the words."""
    whole = ["shoal", *words, "--out", str(out)]
    if not (out / finished).exists():
        begun = time.monotonic()
        own = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *whole, "--json"], check=True, stdout=subprocess.DEVNULL, env=own)
        (out / "seconds.json").write_text(json.dumps(time.monotonic() - begun))
    return whole


def trained(folder: Path, a: argparse.Namespace, seed: int) -> tuple[list[list[str]], dict[str, Path]]:
    """The command that trains both networks of a seed, and a run folder of each."""
    out, plain = folder / "self-distilled", folder / "plain"
    options = ("--data", a.data, "--limit", str(a.limit), "--epochs", str(a.epochs), "--seed", str(seed))
    whole = command(out, "summary.json", "self-distill", *NETWORK, *options)
    if not (plain / "model.json").exists():
        run = Run.create(plain, Run(out).config(), resume=True)
        save_network(run, *load_network(Run(out), "baseline"))
    return [whole], {"plain": plain, "self-distilled": out}


def cell(folder: Path, a: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Rows of both networks of one seed, and how they were made."""
    commands, sources = trained(folder, a, seed)
    seconds, found = json.loads((folder / "self-distilled" / "seconds.json").read_text()), {}
    for kind, source in sources.items():
        out, amounts = folder / f"{kind}-channels", ",".join(f"{x:g}" for x in a.amounts)
        options = ("--amount", amounts, "--method", "channels", "--epochs", str(a.after), "--rate", f"{a.rate:g}")
        commands.append(command(out, "pruning.json", "prune", str(source), *options))
        seconds += json.loads((out / "seconds.json").read_text())
        body = Run(out).read_json("pruning.json")
        found[kind], tool = body["rows"], body["torch_pruning"]
    return found | {"commands": [" ".join(c) for c in commands], "seconds": seconds, "torch_pruning": tool}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--limit", type=int, default=15_000)
    parser.add_argument("--epochs", type=int, default=6, help="of both networks")
    parser.add_argument("--after", type=int, default=2, help="epochs after pruning")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    settings = {k: v for k, v in vars(a).items() if k not in ("runs", "out")} | {"network": NETWORK}
    body: dict[str, Any] = {"settings": settings, "environment": environment(), "seeds": {}}
    for seed in a.seeds:
        body["seeds"][str(seed)] = cell(a.runs / str(seed), a, seed)
        a.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
