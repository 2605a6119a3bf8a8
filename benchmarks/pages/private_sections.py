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
    alone = next(r for r in body["rows"] if r["products"] == "seal" and r["batch"] == 1)["seconds_by_batch"]
    first, second = (f"{batch['product']:.1f}" for batch in alone[:2])
    return f"""**Products of linear layers, measured and forecast** (ResNet18 with about {given["relus"]:,} ReLUs and
{given["blocks"]} blocks replaced; for one item; with {constants}; from the same file as the
[table of both engines](results.md#private-inference)). Of the items made one at a time, the first took {first} s and
the second {second} s, because the server's workers keep the weights of a session. The forecast has no such cache.

{table(head, rows)}"""


def small_cnn() -> str:
    body, rows = result("private_small_cnn"), []
    orion, ours = body["rows"]["orion"], body["rows"]["shoal"]
    rows.append(("activations", "squares", "ReLUs"))
    for name, key, form in (
        ("test accuracy, %", "accuracy", "{:.2f}"),
        ("same class as the plain network", "same_class", "{} of 100"),
        ("largest error of a logit", "error", "{:.2g}"),
    ):
        rows.append((name, form.format(orion[key]), form.format(ours[key])))
    rows.append(("set-up or preparation (s)", f"{orion['setup_s']:.1f} once", f"{ours['offline_s']:.3f} a query"))
    rows.append(("a query (s)", f"{orion['online_s']:.3f}", f"{ours['online_s']:.4f}"))
    command = f"python -m benchmarks.private.small_cnn --orion ORION/bin/python --images {orion['images']}"
    return f"""**A small CNN on digits** (Orion's example `LoLA` for 16x16, with 420 activations; medians of
{orion["images"]} queries, one machine, one run):
`{command} --out benchmarks/results/private_small_cnn.json`

{table(("", "Orion 1.0.2 (CKKS)", "shoal"), rows)}

The work is divided differently. Orion's server computes alone on ciphertexts, so its time hardly depends on the link.
shoal's parties prepare items in advance and exchange messages. Orion's network has squares in place of ReLUs."""


def checkpoint() -> str:
    body = result("checkpoint")
    before, after = body["rows"]["adopted"], body["rows"]["reduced"]
    rows = [
        (name, form.format(before[key]), form.format(after[key]))
        for name, key, form in (
            ("ReLUs", "relus", "{:,}"),
            ("MACs", "macs", "{:,}"),
            ("test accuracy in fixed point, %", "accuracy", "{:.2f}"),
        )
    ]
    for name, key, form, unit in (
        ("queries with the class of the plain network", "same_class", "{} of 16", 1),
        ("offline, an item (s)", "offline_s", "{:.2f}", 1),
        ("offline, an item (MB)", "offline_bytes", "{:.1f}", 1e6),
        ("online, a query (s)", "online_s", "{:.4f}", 1),
        ("online, a query (MB)", "online_bytes", "{:.2f}", 1e6),
    ):
        pair = [row["queries"][key] if unit == 1 else row["queries"][key] / unit for row in (before, after)]
        rows.append((name, *(form.format(value) for value in pair)))
    return f"""`python -m benchmarks.private.checkpoint ADOPTED REDUCED --out benchmarks/results/checkpoint.json`
(two cores, two processes over mutual TLS on loopback, items in batches of {body["settings"]["batch"]}):

{table(("", "adopted", "reduced"), rows)}"""
