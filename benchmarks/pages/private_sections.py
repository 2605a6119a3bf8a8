"""Sections of docs/results.md about the offline phase of private inference."""

from __future__ import annotations

from benchmarks.pages.result_tables import result, table

MAKERS = {"spu": "SPU", "seal": "SEAL"}


def offline() -> str:
    body = result("private_offline")
    given, rows = body["settings"], []
    base = {row["batch"]: row["kinds"]["product"]["seconds"] for row in body["rows"] if row["products"] == "spu"}
    for row in body["rows"]:
        kinds, product = row["kinds"], row["kinds"]["product"]
        traffic = sum(kind["bytes"] for kind in kinds.values()) / 1e6
        part = product["seconds"] / base[row["batch"]]
        figures = (f"{product['seconds']:.1f}", f"{part:.2f}x", f"{product['bytes'] / 1e6:.0f}")
        rest = (f"{kinds['and']['seconds']:.1f}", f"{kinds['chosen']['seconds']:.1f}")
        rows.append(
            (MAKERS[row["products"]], str(row["batch"]), *figures, *rest, f"{row['seconds']:.1f}", f"{traffic:.0f}")
        )
    head = (
        "products by",
        "items together",
        "products (s)",
        "of SPU's",
        "products (MB)",
        "ANDs (s)",
        "bits times words (s)",
    )
    head += ("whole (s)", "whole (MB)")
    command = f"python -m benchmarks.private.offline --relus {given['relus']} --blocks {given['blocks']}"
    command += f" --batches {' '.join(map(str, given['batches']))} --least {given['least']}"
    return f"""**Who multiplies weights and masks** (ResNet18 with about {given["relus"]:,} ReLUs and {given["blocks"]}
blocks replaced; random weights; two processes over mutual TLS on two cores; seconds and megabytes for one item, of both
directions; "whole" has the start of the processes and the keys):
`{command} --out benchmarks/results/private_offline.json`

{table(head, rows)}

SEAL's products send more bytes, because its ciphertexts carry no seeds: seal-python cannot write seeded ones."""
