"""Test accuracies of CIFAR-10 networks that others trained, after `shoal adopt`.

    python -m benchmarks.training.adopted CHECKPOINTS --data-dir DATA --out benchmarks/results/adopted.json

CHECKPOINTS is a folder with the files `resnet*.th` of github.com/akamaster/pytorch_resnet_cifar10. Nothing is trained:
the figures are the same on every machine, but for ties of two logits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from shoal.jobs.adopt import Request, adopt
from shoal.storage.environment import environment

STATED = {"resnet20": 8.27, "resnet32": 7.37, "resnet44": 6.90, "resnet56": 6.61}
"""Test errors in percent that the repository's README states."""


def row(path: Path, data_dir: Path) -> dict[str, Any]:
    """Figures of one checkpoint, with its SHA-256 and the error that its authors state."""
    name = path.name.partition("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            f"examples.resnet_cifar:{name}", path, "cifar10", Path(folder) / "run", data_dir, normalise="imagenet"
        )
        found = adopt(request)
    facts = {k: found[k] for k in ("accuracy", "claimed", "relus", "macs", "params")}  # type: ignore[literal-required]
    return facts | {"stated_error": STATED[name], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = {path.name: row(path, given.data_dir) for path in sorted(given.checkpoints.glob("resnet*.th"))}
    body = {"command": "python -m benchmarks.training.adopted CHECKPOINTS", "environment": environment()}
    given.out.write_text(json.dumps(body | {"networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
