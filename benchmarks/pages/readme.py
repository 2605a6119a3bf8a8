"""Write the figures of the README and of pages in docs/ from `benchmarks/results/`, between their
markers; `--check` only says whether they agree.

    python -m benchmarks.pages.readme

Run it after any benchmark that changed a result file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from benchmarks.pages.gpu_sections import paper, steps
from benchmarks.pages.result_tables import ROOT, result, table
from benchmarks.pages.training_sections import (
    architectures,
    dynamic,
    learners,
    pruning,
    reducers,
    sweep,
    teaching,
    training,
)
from shoal.report import comparison


def demo() -> str:
    summary = result("demo")
    seen, clear, machine = summary["agreement"], summary["reduced"]["clear"], summary["environment"]
    error = max(seen["max_abs_logit_error"], clear["max_abs_logit_error"])
    whole = f"{clear['argmax_equal']} of {clear['images']} (the whole test set)"
    rows = [tuple(row) for row in comparison(summary)]
    return f"""{table(("", "baseline", "reduced", "ratio"), rows)}

Private against plaintext, reduced network: argmax equal on {seen["argmax_equal"]} of {seen["images"]} images in two
processes and on {whole} in the clear executor;
largest logit error {error:.5f}, stated bound {seen["error_bound"]:.5f}.

Seed {summary["seed"]}; `shoal demo --out runs/demo`; {machine["processor"]}, {machine["cores"]} cores, shared machine.
Raw figures: `benchmarks/results/demo.json`. Times are medians of five single-image queries between two processes over
TLS on loopback."""


def direct() -> str:
    body = result("private_direct")
    ratios, settings = body["figures"], body["settings"]
    full, less = (body["reduced_beside_baseline"][k] for k in ("baseline", "reduced"))
    peaks = [max(row["client_peak_bytes"], row["server_peak_bytes"]) / 2**30 for row in (full, less)]
    faster, share = ratios["total_baseline_over_reduced"], ratios["relu_seconds_reduced_over_baseline"]
    rows = [
        ("seconds", f"{full['seconds']:.1f}", f"{less['seconds']:.1f} ({faster:.2f}x faster)"),
        ("of it ReLU", f"{full['relu_s']:.2f}", f"{less['relu_s']:.2f} ({share:.1%})"),
        ("of it linear", f"{full['linear_s']:.1f}", f"{less['linear_s']:.1f}"),
        ("bytes", f"{full['bytes']:,.0f}", f"{less['bytes']:,.0f}"),
        ("messages", f"{full['messages']:,.0f}", f"{less['messages']:,.0f}"),
        ("peak memory of a party, GiB", f"{peaks[0]:.2f}", f"{peaks[1]:.2f}"),
    ]
    head = ("", "all ReLUs", f"{ratios['kept_relus']:.1%} of the ReLUs, {settings['blocks']} blocks replaced")
    out = "benchmarks/results/private_direct.json"
    command = f"python -m benchmarks.private.direct --rounds {settings['rounds']} --out {out}"
    shared = ratios["linear_server_owned_over_shared"]
    return f"""**Direct private inference of a ResNet18 shape** (3x32x32, 100 classes, random weights, two processes,
TLS on loopback, means of {settings["rounds"]} alternated queries): `{command}`

{table(head, rows)}

Server-owned weights take {shared:.2f}x the homomorphic time of shared ones (ResNet18 x {settings["small_width"]}).
Of a masked ReLU only the kept values go through the protocol; each party picks them from, and puts them back into, its
own share."""


def phases() -> str:
    body = result("private_phases")
    networks, figures = body["networks"], body["figures"]
    direct_s = next(iter(networks.values()))["direct_s"]
    head = ("ReLUs", "convs", "online, s", "against direct", "over floor", "one-way latencies", "MB online")
    head += ("offline, s", "offline + online against direct", "MB on disk, client + server")
    rows = []
    for name, row in networks.items():
        ratios, disk = figures[name], sum(row["disk_bytes"].values())
        rows.append(
            (
                f"{row['relus']:,}",
                str(row["depth"]),
                f"{row['online_s']:.3f}",
                f"{ratios['online_times_faster_than_direct']:.0f}x faster",
                f"{ratios['online_over_floor']:.1f}x",
                str(row["latencies"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['offline_s']:.1f}",
                f"{ratios['offline_and_online_over_direct']:.2f}x",
                f"{disk / 1e6:.1f}",
            )
        )
    rounds = body["settings"]["rounds"]
    return f"""**Prepared private inference of ResNet18 shapes** (3x32x32, 100 classes, random weights, two processes,
TLS on loopback, medians of {rounds} queries; direct: the unreduced network all in SPU, {direct_s:.1f} s in the same
run): `python -m benchmarks.private.phases --out benchmarks/results/private_phases.json`

{table(head, rows)}

The floor is the same messages without computing plus the float convolutions."""


def others() -> str:
    body = result("private_others")
    head = ("ReLUs", "shoal online, s", "shoal offline, s", "CrypTen, s", "of it triples, s", "shoal MB online")
    head += ("CrypTen MB", "DELPHI, nearest CIFAR-100 point", "nearest TinyImageNet point", "DELPHI, line, s")
    rows = []
    for row in body["networks"].values():
        ours, crypten, delphi = row["shoal"], row["crypten"], row["delphi"]
        points = delphi["nearest_published"].values()
        rows.append(
            (
                f"{ours['relus']:,}",
                f"{ours['online_s']:.3f}",
                f"{ours['offline_s']:.1f}",
                f"{crypten['online_s']:.2f}",
                f"{crypten['of_it_triples_s']:.2f}",
                f"{ours['bytes'] / 1e6:.1f}",
                f"{crypten['bytes'] / 1e6:.0f}",
                *(f"{point['online_s']:g} s at {point['relus']:,}" for point in points),
                f"{delphi['fitted_online_s']:.2f}",
            )
        )
    error = max(row["crypten"]["logit_error"] for row in body["networks"].values())
    line, settings = body["published_fit"], body["settings"]
    return f"""**Beside others**: the same networks in CrypTen 0.4.1, and DELPHI's published online latencies by
ReLU count: `python -m benchmarks.private.others --out benchmarks/results/private_others.json`

{table(head, rows)}

Not one contest. *shoal*: the rows above; TLS; its offline phase stands beside it. *CrypTen*: the same kind of machine
at another time, two processes, {settings["threads"]} thread each, no TLS, medians of {settings["rounds"]}, largest
logit error {error:.4f}; trusted first party: **insecure, for comparison only**. The server makes the triples in the
clear, within these seconds, and could see the image; making them securely, as shoal's offline phase does, would cost
more. *DELPHI*: published (DeepReDuce, Tables 4 and 5), garbled circuits, other ResNet18 networks,
their machine, online phase only; line: {line["intercept_s"]:.3f} s + {line["us_per_relu"]:.2f} us a ReLU."""


def networks() -> str:
    body = result("private_networks")
    head = ("", "ReLUs", "convs", "waits", "MB", "no network, s", "LAN, s", "WAN, s", "WAN against all ReLUs")
    first, rows = next(iter(body["networks"].values()))["networks"]["wan"]["online_s"], []
    for name, row in body["networks"].items():
        none, lan, wan = (row["networks"][k] for k in ("none", "lan", "wan"))
        seconds = [f"{network['online_s']:.3f}" for network in (none, lan, wan)]
        counts = (f"{row['relus']:,}", str(row["depth"]), str(none["latencies"]), f"{none['bytes'] / 1e6:.1f}")
        rows.append((name, *counts, *seconds, f"{first / wan['online_s']:.2f}x faster"))
    direct = next(iter(body["networks"].values()))["networks"]
    forecast = ", ".join(f"{direct[k]['direct_forecast_s']:.0f}" for k in ("none", "lan", "wan"))
    achieved = {k: direct[k]["achieved"] for k in ("lan", "wan")}
    given = "; ".join(f"{k}: {v['rtt_s'] * 1e3:.2f} ms, {v['rate'] / 1e6:.0f} Mbit/s" for k, v in achieved.items())
    return f"""**Networks**: ResNet18 shapes over a relay like a LAN (3 Gbit/s, 0.3 ms there and back) and a WAN
(400 Mbit/s, 40 ms), medians of {body["rounds"]} prepared queries with rehearsal items; waits are one-way latencies:
`python -m benchmarks.private.networks --machine machine.json --out benchmarks/results/private_networks.json`

{table(head, rows)}

Achieved by the relay before measuring: {given}. Direct mode was not measured over networks; the cost model's forecasts
for the unreduced one are {forecast} s."""


def cost_model() -> str:
    body = result("cost_model")
    rows = []
    for name, title in (("forecast", "compiled"), ("forecast_uncompiled", "before compiling")):
        for key, row in body["forecast_over_measured"][name].items():
            ends = [f"{row[k]:.2f}" for k in ("median", "least", "most")]
            ends += [f"{row[k]:.0%}" for k in ("median_error", "worst_error")]
            rows.append((f"{title}: {key.replace('_s', ' seconds').replace('_bytes', ' bytes')}", *ends))
    count = len(body["networks"])
    return f"""**Cost model**: forecast over measurement for {count} networks that calibration did not see:
`shoal calibrate --out machine.json`, `python -m benchmarks.private.cost_model --machine machine.json --out
benchmarks/results/cost_model.json`

{table(("forecast / measured", "median", "least", "most", "median error", "worst"), rows)}"""


def images() -> str:
    body = result("private_images")
    whole, rows = body["test_set"], []
    for name in ("to the end", "early exit"):
        row = body[name]
        taken = ", ".join(f"{v} at exit {int(k) + 1}" for k, v in sorted(row["exits_taken"].items()))
        equal = f"{row['argmax_equal']} of {row['images']}"
        figures = (f"{row['online_s'] * 1e3:.1f}", f"{row['latencies']:.1f}", f"{row['bytes'] / 1e3:.0f}")
        rows.append((name, equal, f"{row['max_abs_logit_error']:.5f}", f"{row['accuracy']:.2f}", *figures, taken))
    head = ("", "argmax as plaintext", "largest error", "accuracy, %", "mean ms", "waits", "kB", "exits taken")
    clear = whole["clear"]
    alone = ", ".join(f"{whole[f'exit_{i}_accuracy']:.2f}" for i in range(len(whole["exits_taken"])))
    settings = body["settings"]
    return f"""**Many images, and early exit in private**: resnet10 x {settings["width"]} with three exits, trained on
digits (seed {settings["seed"]}), {settings["images"]} test images from prepared randomness in two
processes; the threshold {body["threshold"]} was chosen on the validation split (at most 0.2 points lost there):
`python -m benchmarks.private.images --out benchmarks/results/private_images.json`

{table(head, rows)}

Stated bound of the error: {body["to the end"]["error_bound"]:.5f}. The whole test set in the clear executor: argmax
equal on {clear["argmax_equal"]} of {clear["images"]}, largest error {clear["max_abs_logit_error"]:.5f}; accuracy of
the exits alone {alone} %, leaving early {whole["leaving_accuracy"]:.2f} %."""


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "private_direct": direct,
    "private_phases": phases,
    "private_others": others,
    "private_networks": networks,
    "cost_model": cost_model,
    "private_images": images,
    "training": training,
    "architectures": architectures,
    "fashion_mnist": reducers("fashion_mnist"),
    "cifar100": reducers("cifar100"),
    "sweep": sweep,
    "learners_fashion_mnist": learners("learners_fashion_mnist"),
    "learners_cifar100": learners("learners_cifar100"),
    "self_fashion_mnist": teaching("self_fashion_mnist"),
    "inplace_fashion_mnist": teaching("inplace_fashion_mnist"),
    "osakd_fashion_mnist": teaching("osakd_fashion_mnist"),
    "self_cifar100": teaching("self_cifar100"),
    "inplace_cifar100": teaching("inplace_cifar100"),
    "osakd_cifar100": teaching("osakd_cifar100"),
    "dynamic": dynamic,
    "pruning": pruning,
    "paper": paper,
    "steps": steps,
}


PAGES = ("README.md", "docs/results.md", "docs/your_network.md", "docs/gpu.md")


def filled(texts: dict[str, str]) -> dict[str, str]:
    """The pages with every section's figures; each section stands on one of them."""
    out = dict(texts)
    for name, write in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        found = [page for page, text in out.items() if pattern.search(text)]
        if len(found) != 1:
            sys.exit(f"found the markers of {name!r} on {found}; need <!-- {name} --> ... <!-- end --> on one page")
        body = write()
        out[found[0]] = pattern.sub(lambda m, body=body: m[1] + body + m[2], out[found[0]])  # type: ignore[misc]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a page is stale")
    arguments = parser.parse_args()
    before = {page: (ROOT / page).read_text() for page in PAGES}
    after = filled(before)
    if arguments.check:
        sys.exit(0 if before == after else "found figures on a page unlike benchmarks/results; run this script")
    for page, text in after.items():
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
