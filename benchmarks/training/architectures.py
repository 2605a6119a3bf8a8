"""What `shoal check` finds of the networks in tests/architectures.py, which are written as people write them for CIFAR.

python -m benchmarks.training.architectures --out benchmarks/results/architectures.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from shoal.jobs.inspect import examine
from tests.support.architectures import ARCHITECTURES, SHAPE


def rows() -> dict[str, dict[str, Any]]:
    """`examine` of each, in eval mode, by name, without lines of code."""
    torch.manual_seed(0)
    found: dict[str, Any] = {name: examine(build().eval(), SHAPE) for name, build in ARCHITECTURES.items()}
    for body in found.values():
        body["refused"] = [{k: v for k, v in row.items() if k != "line"} for row in body["refused"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    body = {"command": "python -m benchmarks.training.architectures", "shape": SHAPE, "networks": rows()}
    parser.parse_args().out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
