"""Write the generated sections of README.md and of the pages in docs/, from the files in `benchmarks/results/`.

    python -m benchmarks.pages.readme

Run it after every benchmark that changed a result file. Each section stands on one page, between `<!-- name -->` and
`<!-- end -->`. With `--check` nothing is written: the exit status says whether the pages agree with the files.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages.gpu_sections import paper, steps
from benchmarks.pages.grid_sections import PAPERS, grids
from benchmarks.pages.private_sections import MAKERS, checkpoint, forecast, offline, small_cnn
from benchmarks.pages.result_tables import ROOT, result, table, wrapped
from benchmarks.pages.training_sections import (
    adopted,
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
from shoal.report.record import ROWS
from shoal.storage.summary import Summary

DEMO = {
    "accuracy": "test accuracy (%)",
    "relus": "ReLUs",
    "macs": "multiply-accumulates of the convolutions (MACs)",
    "depth": "convolutions on the longest path",
    "params": "parameters",
    "prepared.offline_s": "offline phase: time per image (s)",
    "prepared.offline_bytes": "offline phase: traffic per image (MB)",
    "prepared.online_s": "online phase: time per image (s)",
    "prepared.bytes": "online phase: traffic per image (MB)",
    "prepared.messages": "online phase: messages per image",
    "prepared.max_abs_logit_error": "largest error of a logit",
}
"""The rows of the demo's table, by their path in a summary, in words for a reader who is new to shoal."""


def demo() -> str:
    summary = result("demo")
    seen, clear, machine = summary["agreement"], summary["reduced"]["clear"], summary["environment"]
    error = max(seen["max_abs_logit_error"], clear["max_abs_logit_error"])
    whole = f"{clear['argmax_equal']} of {clear['images']} images (the whole test set)"
    paths = {label: path for path, label, _ in ROWS}
    rows = [(DEMO[paths[label]], *figures) for label, *figures in comparison(Summary.of(summary, Path("demo.json")))]
    return f"""{table(("", "original network", "reduced network", "change"), rows)}

The private result was compared with the plaintext result of the reduced network. The predicted class (argmax) is the
same for {seen["argmax_equal"]} of {seen["images"]} images between two processes, and for {whole}
in the clear executor, which does the same integer arithmetic in one process without encryption. The largest error of a
logit is {error:.5f}; the compiled program states an upper bound of {seen["error_bound"]:.5f}.

Made by `shoal demo --out runs/demo` with seed {summary["seed"]} on a shared machine
({machine["processor"]}, {machine["cores"]} cores), between two processes over TLS on loopback. Queries of the two
networks, and batches of their items, alternate; times are medians over {summary["reduced"]["prepared"]["images"]}
queries of one image each, and over the batches. Raw figures: `benchmarks/results/demo.json`."""


def direct() -> str:
    body = result("private_direct")
    ratios, settings = body["figures"], body["settings"]
    full, less = (body["reduced_beside_baseline"][k] for k in ("baseline", "reduced"))
    peaks = [max(row["client_peak_bytes"], row["server_peak_bytes"]) / 2**30 for row in (full, less)]
    faster, share = ratios["total_baseline_over_reduced"], ratios["relu_seconds_reduced_over_baseline"]
    rows = [
        ("time per query (s)", f"{full['seconds']:.1f}", f"{less['seconds']:.1f} ({faster:.2f}x faster)"),
        ("time in ReLUs (s)", f"{full['relu_s']:.2f}", f"{less['relu_s']:.2f} ({share:.1%} of it)"),
        ("time in linear layers (s)", f"{full['linear_s']:.1f}", f"{less['linear_s']:.1f}"),
        ("traffic (bytes)", f"{full['bytes']:,.0f}", f"{less['bytes']:,.0f}"),
        ("messages", f"{full['messages']:,.0f}", f"{less['messages']:,.0f}"),
        ("peak memory of one party (GiB)", f"{peaks[0]:.2f}", f"{peaks[1]:.2f}"),
    ]
    head = ("", "all ReLUs", f"{ratios['kept_relus']:.1%} of the ReLUs, {settings['blocks']} blocks replaced")
    out = "benchmarks/results/private_direct.json"
    command = f"python -m benchmarks.private.direct --rounds {settings['rounds']} --out {out}"
    shared = ratios["linear_server_owned_over_shared"]
    cut = "are cut so that each has one answer" if settings.get("cut") else "share encryptions of zero"
    return f"""**ResNet18 shape inside SPU** (3x32x32 images, 100 classes, random weights, two processes on loopback,
means of {settings["rounds"]} queries that alternate between the two networks; matrix products {cut}):
`{command}`

{table(head, rows)}

If the server alone owns the weights, the homomorphic products take {shared:.2f}x the time that they take with weights
shared between the parties (measured on ResNet18 x {settings["small_width"]}). In a masked ReLU layer only the kept
ReLUs go through the protocol. Each party picks their values from its own share, and puts the results back into it."""


def phases() -> str:
    body = result("private_phases")
    networks, figures = body["networks"], body["figures"]
    direct_s = next(iter(networks.values()))["direct_s"]
    head = ("ReLUs", "convolutions", "online (s)", "online against all in SPU", "online / floor", "one-way latencies")
    head += ("online traffic (MB)", "offline (s)", "(offline + online) / all in SPU", "disk, client + server (MB)")
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
    return f"""**ResNet18 shapes** (3x32x32 images, 100 classes, random weights, two processes, TLS on
loopback, medians of {rounds} queries):
`python -m benchmarks.private.phases --out benchmarks/results/private_phases.json`

{table(head, rows)}

"All in SPU" is the unreduced network (all ReLUs) entirely inside SPU: {direct_s:.1f} s in the same run. The floor is
the time of the same messages without any computation, plus the time of the float convolutions."""


def others() -> str:
    body = result("private_others")
    head = ("ReLUs", "shoal online (s)", "shoal offline (s)", "CrypTen (s)", "CrypTen: of which triples (s)")
    head += ("shoal online traffic (MB)", "CrypTen traffic (MB)", "DELPHI, published, CIFAR-100, nearest ReLU count")
    head += ("DELPHI, published, Tiny-ImageNet, nearest ReLU count", "DELPHI, fitted line (s)")
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
    return f"""**Other systems**: the same networks in the library CrypTen 0.4.1, and the published online latencies of
DELPHI, another protocol, by ReLU count: `python -m benchmarks.private.others --out
benchmarks/results/private_others.json`

{table(head, rows)}

The columns were not measured under equal conditions:

- *shoal*: the networks of the table of phases above. TLS is on. The offline phase has its own column.
- *CrypTen*: the same kind of machine at another time, two processes with {settings["threads"]} thread each, no TLS,
  medians of {settings["rounds"]}, largest logit error {error:.4f}. Its first party is trusted: **insecure, for
  comparison only**. The server makes the triples (random data that
  multiplications use up) in the clear, within the seconds shown, and could see the image.
  To make them securely, as shoal's offline phase does, would cost more.
- *DELPHI*: published figures (DeepReDuce, Tables 4 and 5), with garbled circuits, other ResNet18 networks, the
  authors' machine, and the online phase only. The fitted line is {line["intercept_s"]:.3f} s +
  {line["us_per_relu"]:.2f} us per ReLU."""


def networks() -> str:
    body = result("private_networks")
    head = ("", "ReLUs", "convolutions", "one-way latencies", "traffic (MB)", "loopback (s)", "LAN (s)", "WAN (s)")
    head += ("WAN against all ReLUs",)
    first, rows = next(iter(body["networks"].values()))["networks"]["wan"]["online_s"], []
    for name, row in body["networks"].items():
        none, lan, wan = (row["networks"][k] for k in ("none", "lan", "wan"))
        seconds = [f"{network['online_s']:.3f}" for network in (none, lan, wan)]
        counts = (f"{row['relus']:,}", str(row["depth"]), str(none["latencies"]), f"{none['bytes'] / 1e6:.1f}")
        rows.append((name, *counts, *seconds, f"{first / wan['online_s']:.2f}x faster"))
    measured = next(iter(body["networks"].values()))["networks"]
    achieved = {k: measured[k]["achieved"] for k in ("lan", "wan")}
    rates = {k: f"{v['rtt_s'] * 1e3:.2f} ms and {v['rate'] / 1e6:.0f} Mbit/s" for k, v in achieved.items()}
    return f"""**LAN and WAN**: ResNet18 shapes over a relay that imitates a LAN (3 Gbit/s, round trip 0.3 ms) and a WAN
(400 Mbit/s, round trip 40 ms); medians of {body["rounds"]} prepared queries with rehearsal items (random words in place
of prepared randomness): `python -m benchmarks.private.networks --machine machine.json --out
benchmarks/results/private_networks.json`

{table(head, rows)}

The relay was tested before the measurement and achieved {rates["lan"]} (LAN), {rates["wan"]} (WAN). "Auxiliary exit"
is the unreduced network with the auxiliary classifier before its last stage."""


def cost_model() -> str:
    body = result("cost_model")
    rows = []
    for name, title in (("forecast", "compiled"), ("forecast_uncompiled", "not yet compiled")):
        for key, row in body["forecast_over_measured"][name].items():
            ends = [f"{row[k]:.2f}" for k in ("median", "least", "most")]
            ends += [f"{row[k]:.0%}" for k in ("median_error", "worst_error")]
            rows.append((f"{title}: {key.replace('_s', ' seconds').replace('_bytes', ' bytes')}", *ends))
    count = len(body["networks"])
    head = ("forecast / measurement", "median", "smallest", "largest", "median error", "largest error")
    return f"""**Cost model**: forecast divided by measurement, for {count} networks that were not used for calibration;
masked products by {MAKERS[body["products"]]}:
`shoal calibrate --out machine.json`, then `python -m benchmarks.private.cost_model --machine machine.json --out
benchmarks/results/cost_model.json`

{table(head, rows)}"""


def images() -> str:
    body = result("private_images")
    whole, rows = body["test_set"], []
    for name, title in (("to the end", "always the last exit"), ("early exit", "early exit")):
        row = body[name]
        taken = ", ".join(f"{v} at exit {int(k) + 1}" for k, v in sorted(row["exits_taken"].items()))
        equal = f"{row['argmax_equal']} of {row['images']}"
        figures = (f"{row['online_s'] * 1e3:.1f}", f"{row['latencies']:.1f}", f"{row['bytes'] / 1e3:.0f}")
        rows.append((title, equal, f"{row['max_abs_logit_error']:.5f}", f"{row['accuracy']:.2f}", *figures, taken))
    head = (
        "",
        "argmax as in plaintext",
        "largest logit error",
        "accuracy (%)",
        "mean latency (ms)",
        "one-way latencies",
    )
    head += ("traffic (kB)", "exits taken")
    clear = whole["clear"]
    alone = ", ".join(f"{whole[f'exit_{i}_accuracy']:.2f}" for i in range(len(whole["exits_taken"])))
    settings = body["settings"]
    return f"""**Many images, and early exit in private inference**: resnet10 x {settings["width"]} with three exits,
trained on digits (seed {settings["seed"]}); {settings["images"]} test images between two processes.
The threshold {body["threshold"]} was chosen on the validation split, so that at most 0.2 points are lost there:
`python -m benchmarks.private.images --out benchmarks/results/private_images.json`

{table(head, rows)}

The compiled program states an error bound of {body["to the end"]["error_bound"]:.5f}. On the whole test set, in the
clear executor, the argmax is equal for {clear["argmax_equal"]} of {clear["images"]} images and the largest error is
{clear["max_abs_logit_error"]:.5f}. The exits alone have accuracies of {alone} %; with early exit the accuracy is
{whole["leaving_accuracy"]:.2f} %."""


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "private_direct": direct,
    "private_phases": phases,
    "private_others": others,
    "private_networks": networks,
    "cost_model": cost_model,
    "private_images": images,
    "private_offline": offline,
    "private_forecast": forecast,
    "private_small_cnn": small_cnn,
    "checkpoint": checkpoint,
    "training": training,
    "architectures": architectures,
    "adopted": adopted,
    "fashion_mnist": reducers("fashion_mnist"),
    "cifar100": reducers("cifar100"),
    "sweep": sweep,
    "learners_fashion_mnist": learners("learners_fashion_mnist"),
    "learners_cifar100": learners("learners_cifar100"),
    "self_fashion_mnist": teaching("self_fashion_mnist"),
    "inplace_fashion_mnist": teaching("inplace_fashion_mnist"),
    "osakd_fashion_mnist": teaching("osakd_fashion_mnist"),
    "self_cifar100": teaching("self_cifar100"),
    "self_superclasses": teaching("self_superclasses"),
    "inplace_cifar100": teaching("inplace_cifar100"),
    "osakd_cifar100": teaching("osakd_cifar100"),
    "dynamic": dynamic,
    "pruning": pruning,
    "paper": paper,
    "steps": steps,
    **{name: grids(name) for name in PAPERS},
}


MARKED = re.compile(r"(<!-- (\w+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
"""A section: the line that begins it, its name, its text, the line that ends it."""


def pages() -> dict[str, str]:
    """The README and every page of docs/, by path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def filled(texts: dict[str, str]) -> dict[str, str]:
    """The pages with every section's figures. Exits with one sentence unless each section is on one page, once."""
    found = Counter(match[2] for text in texts.values() for match in MARKED.finditer(text))
    if unknown := sorted(found.keys() - SECTIONS.keys()):
        sys.exit(f"found markers of {', '.join(unknown)}; need sections of SECTIONS; add them there")
    for name in SECTIONS:
        if found[name] != 1:
            sys.exit(f"found {found[name]} times the markers of {name!r}; need <!-- {name} --> ... <!-- end --> once")
    return {page: MARKED.sub(lambda m: m[1] + wrapped(SECTIONS[m[2]]()) + m[4], text) for page, text in texts.items()}


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each line of a page that is unlike the result files: the page, its line, and what belongs there."""
    lines = []
    for page, text in before.items():
        for line in difflib.unified_diff(text.splitlines(), after[page].splitlines(), n=0, lineterm=""):
            if line[0] in "+-" and not line.startswith(("+++", "---")):
                lines.append(f"{page}: {'has' if line[0] == '-' else 'needs'}: {line[1:]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 and list stale lines")
    arguments = parser.parse_args()
    before = pages()
    after = filled(before)
    stale = differences(before, after)
    if arguments.check:
        head = "found figures unlike benchmarks/results; need the same; run python -m benchmarks.pages.readme"
        sys.exit("\n".join([head, *stale]) if stale else 0)
    for page, text in after.items():
        if text != before[page]:
            (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
