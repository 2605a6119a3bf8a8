"""Learners of masks against each other at equal budget, data, epochs and seeds, gated branches on and off.

    python -m benchmarks.training.reducers --data fashion-mnist --seeds 0 1 2 --out fashion_mnist.json
    python -m benchmarks.training.reducers --masks senet snl autorep --parts 8 16 32 --gates off --out reducers.json

Everything is chosen on the validation split; test accuracy is reported. The baseline is the teacher trained on for as
many epochs as stages 2 and 3 take together. Teacher and stage 1 are shared among cells; `seconds` are those of epochs
in stages 2 and 3, and a Pareto plot lies beside the result. Finished cells are read back, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.networks.spec import Spec
from shoal.recipes import shallow
from shoal.recipes.stages import Stages, train_teacher
from shoal.reduction.learners import LEARNERS
from shoal.storage.environment import environment
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

METHODS = (*LEARNERS, "senet++")
"""Learners of masks, and SENet's with two widths in one network: its narrower one goes along as `narrower`."""
GATES = {"off": (False,), "on": (True,), "both": (False, True)}


def schedule(epochs: int, lr: float, batch: int, drop: tuple[int, ...] = ()) -> Schedule:
    return Schedule(epochs, lr, drop, kind="cosine", warmup=0.3, batch_size=batch)


def preset(a: argparse.Namespace) -> shallow.Preset:
    teacher, sensitivity, mask, finetune = a.epochs
    return shallow.Preset(
        schedule(teacher, 0.1, a.batch),
        schedule(sensitivity, 0.05, a.batch),
        schedule(mask, 0.02, a.batch),
        schedule(finetune, 0.03, a.batch, (max(1, finetune // 2),)),
        beta=a.beta,
        rewirings=16,
    )


def result_of(model: Any, data: Dataset, settings: Settings) -> dict[str, Any]:
    total = cost(fold(trace(model, data.shape)))
    accuracy = evaluate(model, data, data.test, settings)[-1]
    counts = {"relus": total.relus, "quadratics": total.quadratics, "macs": total.macs, "depth": total.depth}
    return {"accuracy": accuracy} | counts


def cells(a: argparse.Namespace, data: Dataset, seed: int, save: Any, done: dict[str, Any]) -> None:
    """Teacher, baseline trained on, and one cell a (budget, masks, gates), for one seed."""
    plan, settings = preset(a), Settings(seed=seed)
    spec = Spec(a.model, data.classes, data.shape, a.width, a.resolution)
    epochs = "-".join(map(str, a.epochs))
    name = f"{a.data}-{a.model}-{a.width:g}-{a.resolution:g}-{epochs}-{a.batch}-{a.limit}-{a.beta:g}-{seed}"
    folder = Path(a.work) / name
    run = Run(folder)
    resume = replace(settings, resume=True)
    teacher, _ = train_teacher(spec, plan.teacher, Stages(data, resume, run))
    if f"teacher/{seed}" not in done:
        save(f"teacher/{seed}", result_of(teacher, data, settings))
    if f"baseline/{seed}" not in done:
        longer = copy.deepcopy(teacher)
        plain = schedule(a.epochs[2] + a.epochs[3], 0.03, a.batch)
        fit(longer, data, Objective((cross_entropy(),)), plain, settings=settings)
        save(f"baseline/{seed}", result_of(longer, data, settings))
    total = sum(site.relus for site in relu_sites(teacher, data.shape))
    for part in a.parts:
        for masks in a.masks:
            for gates in GATES[a.gates]:
                name = f"1/{part}/{masks}/{'gates' if gates else 'no gates'}/{seed}"
                if name not in done:
                    options = shallow.Options(total // part, d_th=a.d_th, gates=gates, exit=False, masks=masks)
                    if masks == "senet++":
                        options = replace(options, masks="senet", widths=(0.5, 1.0))
                    cell(name, spec, teacher, data, options, plan, resume, run, save)


def cell(
    name: str, spec: Spec, teacher: Any, data: Dataset, options: Any, plan: Any, settings: Settings, run: Any, save: Any
) -> None:
    """One reduction; stages 1 and 2 are shared with the other cells through checkpoints in subfolders."""
    own = Run(run.folder / f"{options.budget}-{options.masks}{'++' if options.widths else ''}")
    own.folder.mkdir(parents=True, exist_ok=True)
    shared = run.folder / "sensitivity.json"
    if shared.exists():
        options = replace(options, sensitivity=json.loads(shared.read_text()))
    stale = list((own.folder / "stages").glob("finetune.*"))
    for path in stale:
        path.unlink()
    result = shallow.reduce(spec, teacher, options, plan, Stages(data, settings, own))
    if result.sensitivity and not shared.exists():
        shared.write_text(json.dumps(result.sensitivity))
    row = result_of(result.model, data, Settings(seed=settings.seed))
    spent = sum(epoch["seconds"] for stage in ("mask", "finetune") for epoch in result.histories[stage].rows)
    row |= {"replaced": list(result.spec.branches), "budget": options.budget, "seconds": spent}
    if result.narrower:
        row["narrower"] = {w: result_of(m, data, Settings(seed=settings.seed)) for w, (_, m) in result.narrower.items()}
    save(name, row)


def table(done: dict[str, Any]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every kind of cell."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, row in done.items():
        kinds.setdefault(name.rpartition("/")[0], []).append(row)
    summary = {}
    for kind, rows in kinds.items():
        values = [row["accuracy"] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        last = rows[-1]
        summary[kind] = {"accuracy_mean": statistics.mean(values), "accuracy_sd": spread, "runs": len(rows)}
        summary[kind] |= {k: last.get(k) for k in ("relus", "quadratics", "macs", "depth")}
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        summary[kind]["seconds_mean"] = statistics.mean(seconds) if seconds else None
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy against ReLUs, a line a learner, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = {name: row for name, row in summary.items() if name in ("teacher", "baseline")}
    lines: dict[str, list[dict[str, Any]]] = {}
    for kind, row in summary.items():
        if kind not in whole:
            lines.setdefault(kind.split("/", 2)[-1].removesuffix("/no gates"), []).append(row)
    figure, axes = plt.subplots(figsize=(8, 5))
    for (name, row), style in zip(whole.items(), ("--", ":"), strict=False):
        axes.axhline(row["accuracy_mean"], color="black", ls=style, lw=1, label=f"{name}, {row['relus']:,} ReLUs")
    best_first = sorted(lines.items(), key=lambda line: -max(row["accuracy_mean"] for row in line[1]))
    for i, (label, rows) in enumerate(best_first):
        # Beside each other, or the spreads of equal budgets would hide one another.
        x = [row["relus"] * 1.02 ** (i - len(lines) / 2) for row in rows]
        y, spread = [row["accuracy_mean"] for row in rows], [row["accuracy_sd"] or 0.0 for row in rows]
        style = {"marker": "osD^v<>PX*pdh"[i % 13], "color": plt.get_cmap("tab20")(i % 20), "ms": 5, "lw": 1}
        axes.errorbar(x, y, spread, capsize=2, label=label, **style)
    axes.set(xscale="log", xlabel="ReLUs an image", ylabel="test accuracy, %")
    ticks = sorted({row["relus"] for rows in lines.values() for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="resnet10")
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--resolution", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--masks", nargs="+", choices=METHODS, default=["senet", "random"])
    parser.add_argument("--gates", choices=GATES, default="both")
    parser.add_argument("--parts", type=int, nargs="+", default=[8, 32])
    parser.add_argument(
        "--epochs", type=int, nargs=4, default=[5, 1, 2, 4], metavar=("TEACHER", "SENS", "MASK", "FINE")
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--d-th", type=float, default=0.05)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default="runs/reducers")
    parser.add_argument("--merge", type=Path, nargs="+", help="result files of other seeds, to make one table of")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    body = json.loads(a.out.read_text()) if a.out.exists() else {}
    done = body.get("cells", {})

    def write() -> None:
        facts = {k: v for k, v in vars(a).items() if k not in ("work", "data_dir", "out", "merge")}
        body.update(settings=facts, environment=environment(), table=table(done), cells=done)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")
        plot(body["table"], a.out.with_suffix(".png"))

    def save(name: str, row: dict[str, Any]) -> None:
        done[name] = row
        write()
        print(f"{name}: {row['accuracy']:.2f} %, {row['relus']:,} ReLUs, {row['macs']:,} MACs", flush=True)

    if a.merge:
        bodies = [json.loads(path.read_text()) for path in a.merge]
        kept = [{k: v for k, v in found["settings"].items() if k not in ("seeds", "masks")} for found in bodies]
        if any(settings != kept[0] for settings in kept):
            parser.error(f"found results of different settings in {a.merge}; need those that differ by seeds and masks")
        for found in bodies:
            done |= found["cells"]
        for name, value in kept[0].items():
            setattr(a, name, value)
        for name in ("seeds", "masks"):
            setattr(a, name, list(dict.fromkeys(value for found in bodies for value in found["settings"][name])))
        return write()
    if "senet++" in a.masks and a.gates != "off":
        parser.error("found senet++ with gates; need --gates off: widths go with neither gates nor an exit")
    for seed in a.seeds:
        data = load(a.data, a.data_dir, seed=seed, limit=a.limit)
        cells(a, data, seed, save, done)


if __name__ == "__main__":
    main()
