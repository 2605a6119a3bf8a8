"""The offline phase of a ResNet18 shape by batch and by who multiplies: seconds and bytes an item, by kind of product.

    python -m benchmarks.private.offline --relus 49600 --blocks 3 --out benchmarks/results/private_offline.json

Batches share SPU's packing of answers, and SEAL's transforms of weights. Weights are random. Server and client are
processes of their own, over mutual TLS on loopback. Rows of SEAL have the cost model's forecast of the same products,
which leaves out the keys that SPU makes for a session.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.private.direct import SHAPE
from benchmarks.private.phases import process, sized, tls_of
from benchmarks.private.spu_parties import WAIT_S
from shoal.costs.machine import Machine
from shoal.costs.offline import packed, seal_share, spu_share
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import PRODUCTS, ClientOptions
from shoal.private.transport.certs import make_certificates
from shoal.storage.environment import environment


def measure(folder: Path, certificates: Path, products: str, batch: int, a: argparse.Namespace) -> dict[str, Any]:
    """One session that makes whole batches, `a.least` items or more; the first batch fills the weight cache."""
    count = batch * -(-a.least // batch)
    with process("--serve", folder, certificates, products, a.workers) as address:
        pool = folder / f"pool-{products}-{batch}"
        options = ClientOptions(timeout_s=WAIT_S, pool=pool, workers=a.client_workers)
        client = Client(folder, address, tls_of(certificates, "client"), options)
        begun = time.perf_counter()
        made = client.prepare(count, batch=batch)
        seconds = time.perf_counter() - begun
        client.close()
    kinds = {kind: {k: v / count for k, v in row.items()} for kind, row in made.kinds.items()}
    batches = [{k: facts["kinds"][k]["seconds"] / size for k in facts["kinds"]} for size, facts in made.batches]
    row = {"products": products, "batch": batch, "items": count, "seconds": seconds / count, "kinds": kinds}
    return row | {"seconds_by_batch": batches, "memory_bytes": [facts["memory"] for _, facts in made.batches]}


def forecast(layout: Layout, machine: Machine, batch: int) -> dict[str, float]:
    """Seconds and bytes of all linear layers' products for one item, by SEAL where the ring fits."""
    shares = (seal_share(packed(layout, batch), machine, batch), spu_share(layout, machine, batch))
    return {"seconds": sum(share.seconds for share in shares), "bytes": sum(share.bytes for share in shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--relus", type=int, default=557_056)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS)
    parser.add_argument("--workers", default="2", help="workers of SEAL at the server")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--least", type=int, default=4, help="items to make at least")
    parser.add_argument("--client-workers", default="1", help="workers of SEAL at the client")
    parser.add_argument("--machine", type=Path, help="constants for the forecasts, from shoal calibrate")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows, machine = [], Machine.load(a.machine) if a.machine else Machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_certificates(folder / "certs")
        graph = sized(a.relus, a.blocks, "resnet18")
        program, weights = compile(graph, torch.rand(16, *SHAPE) * 2 - 1)
        save_artifact(folder / "artifact", program, weights)
        for products, batch in itertools.product(a.products, a.batches):
            rows.append(measure(folder / "artifact", folder / "certs", products, batch, a))
            if products == "seal":
                rows[-1]["forecast"] = forecast(Layout(program), machine, batch)
            print(json.dumps(rows[-1]), flush=True)
    settings = {k: v for k, v in vars(a).items() if k not in ("machine", "out")} | {"calibrated": a.machine is not None}
    if a.out:
        a.out.write_text(
            json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
