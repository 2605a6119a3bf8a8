"""Sections of docs/results.md about the offline phase of private inference."""

from __future__ import annotations

from benchmarks.pages.result_tables import result, table

DEFAULT = "the default constants, which were rounded with this measurement in view"
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


def forecast() -> str:
    body, rows = result("private_offline"), []
    for row in body["rows"]:
        if row["products"] == "seal":
            seconds, size = ((row["kinds"]["product"][k], row["forecast"][k]) for k in ("seconds", "bytes"))
            figures = [f"{value:.1f}" for value in seconds] + [f"{value / 1e6:.0f}" for value in size]
            rows.append((str(row["batch"]), *figures))
    head = ("items together", "measured (s)", "forecast (s)", "measured (MB)", "forecast (MB)")
    given = body["settings"]
    constants = "constants of `shoal calibrate`" if given["calibrated"] else DEFAULT
    return f"""**Products of linear layers, measured and forecast** (ResNet18 with about {given["relus"]:,} ReLUs and
{given["blocks"]} blocks replaced; for one item; with {constants}; from the same file as the
[table of both engines](results.md#private-inference)). The measurement includes the keys that SPU makes once for a
session, about 19 MB and a few seconds, divided among its items. The forecast leaves them out.

{table(head, rows)}"""
