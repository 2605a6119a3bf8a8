"""Sections about training: what a step costs, and how accurate each method is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.pages.result_tables import result, table


def training() -> str:
    speed, memory = result("training_overhead"), result("fit_memory")
    masked, bare = speed["masked_step_over_plain_step"]["ratio"], speed["fit_over_bare_loop"]["ratio"]
    base = "the same networks' forward and backward passes alone"
    rows = [("a step with masked ReLUs", "a step without", f"{masked:.3f}x")]
    rows += [("`fit`, the training loop", "a minimal loop", f"{bare:.3f}x")]
    for name, row in speed["search_step_over_plain_step"].items():
        rows.append(
            (f"a step of the mask search `{name}`", "a plain step; teacher forward in both", f"{row['ratio']:.2f}x")
        )
    for name, row in speed["osakd_step_over_plain_step"].items():
        rows.append((f"a step with k-NN labels: {name}", "a plain step", f"{row['ratio']:.3f}x"))
    for name, row in speed["flexible_step_over_bare_passes"].items():
        rows.append((f"a whole step that trains all exits or widths at once: {name}", base, f"{row['ratio']:.3f}x"))
    return f"""**Training overhead**: `python -m benchmarks.training.training_overhead` (unless the row says otherwise:
ResNet18 x 0.5, batch 32; one thread; both are timed alternately)

{table(("time of", "compared with", "ratio"), rows)}

On 50,000 images, `fit` takes at most {memory["beyond_gib"]:.2f} GiB of memory in addition to the data and the model
(`python -m benchmarks.training.fit_memory`, ResNet18, batch 128)."""


def sweep() -> str:
    body, rows = result("sweep"), []
    for width, row in body["widths"].items():
        alone, together = (sum(side["seconds"] for side in row[k]) for k in ("one_after_the_other", "together"))
        rows.append((f"resnet10 x {width}", f"{alone:.0f}", f"{together:.0f}", f"{row['ratio']:.2f}x"))
    given = body["settings"]
    head = ("", "one run after the other (s)", f"on {given['workers']} workers (s)", "speed-up")
    return f"""**Sweeps**: {given["runs"]} runs of {given["epochs"]} epochs on digits. A run that has the machine to
itself uses both cores: `python -m benchmarks.training.sweep --out benchmarks/results/sweep.json`

{table(head, rows)}"""


def learners(name: str) -> Callable[[], str]:
    return lambda: learners_table(result(name))


def learners_table(body: dict[str, Any]) -> str:
    """One row per method, one column per budget: accuracy and its spread over seeds."""
    parts, cells = body["settings"]["parts"], body["table"]
    whole = cells["teacher"]["relus"]
    head = ("", *(f"1/{part} of the ReLUs ({whole // part:,})" for part in parts))
    head += (f"squares at 1/{parts[0]}", "seconds per run")
    rows = [(label, *[_accuracy(cells[kind])] * len(parts), "", "") for kind, label in ALL_RELUS.items()]
    for method in dict.fromkeys(kind.split("/")[2] for kind in cells if kind.count("/") == 3):
        found = [cells[f"1/{part}/{method}/no gates"] for part in parts]
        seconds = sum(cell["seconds_mean"] for cell in found) / len(found)
        squares = f"{found[0]['quadratics']:,}" if found[0]["quadratics"] else ""
        rows.append((f"`{method}`", *(_accuracy(cell) for cell in found), squares, f"{seconds:.0f}"))
    return table(head, rows)


LONGER = "teacher, trained on for as long"
ALL_RELUS = {"teacher": "teacher, all ReLUs", "baseline": LONGER}


def _accuracy(cell: dict[str, Any]) -> str:
    spread = "" if cell["accuracy_sd"] is None else f" ± {cell['accuracy_sd']:.2f}"
    return f"{cell['accuracy_mean']:.2f}{spread}"


def teaching(name: str) -> Callable[[], str]:
    return lambda: teaching_table(result(name))


def teaching_table(body: dict[str, Any]) -> str:
    """One row per method: the deployed classifier, its gain over the baseline of the same seeds, every classifier."""
    cells = body["table"]
    most = max(len(cell["classifiers"]) for cell in cells.values())
    head = (
        "",
        "deployed",
        "gain over the baseline",
        "mean of all",
        *(f"classifier {i + 1}" for i in range(most)),
        "seconds",
    )
    rows = []
    for method, cell in cells.items():
        each = [_accuracy(part) for part in cell["classifiers"]] if len(cell["classifiers"]) > 1 else []
        gain = "" if method == "baseline" else _moments(cell, "gain", "+")
        values = (_accuracy(cell), gain, _moments(cell, "mean") if each else "")
        rows.append((f"`{method}`", *values, *each, *[""] * (most - len(each)), f"{cell['seconds_mean']:.0f}"))
    return table(head, rows)


def _moments(cell: dict[str, Any], name: str, sign: str = "") -> str:
    mean, spread = cell[f"{name}_mean"], cell[f"{name}_sd"]
    return f"{mean:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def dynamic() -> str:
    body = result("dynamic")
    macs, right, other = body["macs"], body["accuracy"], body["earlyon"]
    rows = []
    for batch, taken in sorted(body["seconds"].items(), key=lambda item: -int(item[0])):
        for way, seconds in taken.items():
            accuracy = other["accuracy"] if way == "earlyon" else right[way]
            speed = "" if way == "full" else f"{taken['full'] / seconds:.2f}x"
            average = f"{macs[way] / 1e6:.2f}" if way in macs else ""
            rows.append((batch, way, f"{accuracy:.2f}", average, f"{1e3 * seconds:.3f}", speed))
    searched = "; ".join(
        f"`{method}` {row['seconds']:.2f} s, fitness {row['fitness']:.4f}"
        for method, row in body["searches_of_10000"].items()
    )
    head = ("batch", "inference", "test accuracy (%)", "MACs per image (M)", "ms per image", "speed-up over full")
    network = body["network"]
    settings = body["settings"]
    command = "python -m benchmarks.training.dynamic runs/dynamic --out benchmarks/results/dynamic.json"
    return f"""**Dynamic inference** of {network["base"]} x {network["width"]:g} with {body["exits"]} exits on
Fashion-MNIST, with thresholds that lose no validation accuracy; {settings["threads"]} thread,
medians of {settings["rounds"]} rounds: `{command}`

{table(head, rows)}

Time to search thresholds for 10,000 images: {searched}."""


def pruning() -> str:
    body = result("pruning")
    kinds, seeds, settings = ("plain", "self-distilled"), list(body["seeds"].values()), body["settings"]
    rows = []
    for i, first in enumerate(seeds[0]["plain"]):
        left = (f"{first['macs'] / 1e6:.2f}", f"{first['relus']:,}", f"{first['params']:,}")
        figures: list[str] = []
        for kind in kinds:
            deepest = [[row["accuracy"][-1] for row in seed[kind]] for seed in seeds]
            lost = [found[i] - found[0] for found in deepest]
            figures += [_each([found[i] for found in deepest], "{:.2f}"), _each(lost, "{:+.2f}") if i else ""]
        exits = [sum(seed["self-distilled"][i]["accuracy"][:-1]) / 3 for seed in seeds]
        rows.append((f"{first['amount']:.0%}", *left, *figures, _each(exits, "{:.2f}")))
    head = ("channels cut", "MACs (M)", "ReLUs", "parameters", "plain network (%)", "change")
    head += ("self-distilled network (%)", "change", "its shallow classifiers (%)")
    seconds = ", ".join(f"{seed['seconds']:.0f}" for seed in seeds)
    return f"""**Channels removed** by Torch-Pruning {seeds[0]["torch_pruning"]} (resnet10 x 0.25 at half resolution,
{settings["epochs"]} epochs, three attention exits; {settings["after"]} more epochs after the cut, from labels alone):
`python -m benchmarks.training.pruning --runs runs/pruning --out benchmarks/results/pruning.json`

{table(head, rows)}

Accuracies are test accuracies of the deepest classifier, for seeds {" and ".join(body["seeds"])}. MACs, ReLUs and
parameters are those of the plain network. The last column is the mean of the three shallow classifiers. All trainings
of a seed together took {seconds} s on one thread."""


def _each(values: list[float], form: str) -> str:
    return ", ".join(form.format(value) for value in values)


def reducers(name: str) -> Callable[[], str]:
    return lambda: accuracy_table(result(name))


def accuracy_table(body: dict[str, Any]) -> str:
    rows = []
    for kind, cell in body["table"].items():
        label = {"baseline": LONGER}.get(kind, kind)
        spread = "" if cell["accuracy_sd"] is None else f"{cell['accuracy_sd']:.2f}"
        counts = tuple(f"{cell[k]:,}" for k in ("relus", "macs", "depth"))
        rows.append((label, f"{cell['accuracy_mean']:.2f}", spread, str(cell["runs"]), *counts))
    return table(("", "accuracy (%)", "standard deviation", "seeds", "ReLUs", "MACs", "depth"), rows)


def architectures() -> str:
    body, rows = result("architectures"), []
    for name, row in body["networks"].items():
        figures = [f"{row[k]:,}" for k in ("relus", "comparisons", "macs", "depth")]
        needs = "; ".join(dict.fromkeys(r["found"] for r in row["refused"]))
        waits = f"{row['online']['latencies']:,}" if row["online"] else ""
        rows.append((name, *figures, str(len(row["blocks"])), waits, f"no: {needs}" if needs else "yes"))
    head = ("network", "ReLUs", "comparisons", "MACs", "depth", "blocks", "one-way latencies", "runs in private")
    size = "x".join(map(str, body["shape"]))
    return f"`python -m benchmarks.training.architectures`, images of {size}:\n\n{table(head, rows)}"


def adopted() -> str:
    body, rows = result("adopted"), []
    for name, row in body["networks"].items():
        stated, measured = f"{100 - row['stated_error']:.2f}", f"{row['accuracy']:.2f}"
        rows.append((f"`{name}`", stated, f"{row['claimed']:.2f}", measured, f"{row['relus']:,}", f"{row['macs']:,}"))
    head = ("file", "its README, %", "the file itself, %", "shoal adopt, %", "ReLUs", "MACs")
    return f"`{body['command']}`, test accuracy on CIFAR-10:\n\n{table(head, rows)}"
