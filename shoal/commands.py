"""What each command does, as functions that return JSON-ready data."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from shoal.cost import cost
from shoal.data import Dataset, load
from shoal.errors import ShoalError
from shoal.graph import read_json
from shoal.progress import bars
from shoal.recipes import shallow
from shoal.report import collect, gated_macs, plot_budget, plot_comparison, plot_curves, write_csv
from shoal.run import Run, environment
from shoal.sites import relu_sites
from shoal.spec import Spec, base_model
from shoal.surgery import trace
from shoal.train import Schedule, Settings, join
from shoal.train import evaluate as judge


def dump(body: Any) -> str:
    """JSON for `--json`."""
    return json.dumps(body, indent=1, default=str)


@dataclass(frozen=True)
class Shared:
    """Options that all training commands have."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    max_seconds: float | None = None
    resume: bool = False
    tensorboard: bool = False

    def settings(self, seed: int | None = None) -> Settings:
        """The loop's settings."""
        chosen = self.seed if seed is None else seed
        return Settings(chosen, self.device, self.precision, max_seconds=self.max_seconds, resume=self.resume)


def parse_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W) of text like 3x32x32. Raises ShoalError otherwise."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --input {text!r}; need channels x height x width, such as 3x32x32")
    c, h, w = (int(p) for p in parts)
    return c, h, w


def count(model: str, size: str, classes: int, width: float, resolution: float) -> dict[str, Any]:
    """Counts of a zoo or a user's network."""
    shape = parse_shape(size)
    network = base_model(Spec(model, classes, shape, width, resolution))
    total = cost(trace(network, shape))
    sites = [
        {"name": s.name, "shape": s.shape, "relus": s.relus, "stage": s.stage, "block": s.block}
        for s in relu_sites(network, shape)
    ]
    return _counts(total) | {"unknown": total.unknown, "sites": sites}


def _counts(total: Any) -> dict[str, Any]:
    return {k: getattr(total, k) for k in ("relus", "macs", "depth", "params", "linear_macs", "relu_layers")}


def _load_data(config: dict[str, Any], data_dir: Path | None, device: str = "cpu") -> Dataset:
    root = data_dir if data_dir is not None else config.get("data_dir")
    return load(config["data"], root, seed=config["seed"], limit=config.get("limit")).to(device)


def train(
    model: str,
    data: str,
    data_dir: Path | None,
    width: float,
    resolution: float,
    preset: str,
    epochs: int | None,
    limit: int | None,
    shared: Shared,
) -> dict[str, Any]:
    """Train an all-ReLU network into a run folder."""
    config: dict[str, Any] = {
        "command": "train",
        "data": data,
        "data_dir": data_dir,
        "seed": shared.seed,
        "limit": limit,
    }
    config |= {"preset": preset, "epochs": epochs, "model": model, "width": width, "resolution": resolution}
    dataset = _load_data(config, data_dir, shared.device)
    schedule = _longer(_preset(preset).teacher, epochs)
    spec = Spec(model, dataset.classes, dataset.shape, width, resolution)
    rank, size = join()
    run = Run.create(shared.out, config, shared.resume) if rank == 0 else Run(shared.out)
    if size > 1:
        torch.distributed.barrier()
    with bars({"teacher": schedule.epochs}) as shown:
        network, history = shallow.train_teacher(
            spec, dataset, schedule, shared.settings(), run=run, listen=shown.listen, tensorboard=shared.tensorboard
        )
    if rank == 0:
        run.save_model(spec, network)
        plot_curves(run, run.folder / "curves.png")
    return _result(network, dataset, spec, shared.settings()) | {
        "best_epoch": history.best_epoch,
        "validation": history.best,
        "out": str(shared.out),
    }


def _preset(name: str) -> shallow.Preset:
    if name not in shallow.PRESETS:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(shallow.PRESETS)}")
    return shallow.PRESETS[name]()


def _longer(schedule: Schedule, epochs: int | None) -> Schedule:
    """The schedule over another number of epochs, its drops moved in proportion."""
    if epochs is None:
        return schedule
    if epochs < 1:
        raise ShoalError(f"found {epochs} epochs; need 1 or more")
    part = epochs / schedule.epochs
    return replace(schedule, epochs=epochs, milestones=tuple(max(1, round(m * part)) for m in schedule.milestones))


def _result(network: nn.Module, data: Dataset, spec: Spec, settings: Settings) -> dict[str, Any]:
    accuracy = judge(network, data, data.test, settings)[-1]
    return {"accuracy": accuracy} | _counts(cost(trace(network, spec.shape)))


def reduce(
    teacher: Path,
    recipe: str,
    preset: str,
    choices: dict[str, Any],
    sensitivity: Path | None,
    data_dir: Path | None,
    epochs: str | None,
    shared: Shared,
) -> dict[str, Any]:
    """Reduce the network of a teacher's run into a run folder of its own."""
    if recipe != "shallow":
        raise ShoalError(f"found recipe {recipe!r}; need 'shallow'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found reduce under torchrun; need one process; use torchrun for shoal train")
    source = Run(teacher)
    spec, network = source.load_model()
    origin = source.read_json("config.json")
    given = read_json(sensitivity) if sensitivity else None
    options = shallow.Options(**choices, sensitivity=given)
    config = {k: origin.get(k) for k in ("data", "data_dir", "seed", "limit")}
    config |= {"command": "reduce", "preset": preset, "epochs": epochs, "options": options, "teacher": teacher}
    data = _load_data(config, data_dir, shared.device)
    plan = _stages(_preset(preset), epochs)
    shallow.check_options(options, plan, relu_sites(network, spec.shape))  # before anything is written
    run = Run.create(shared.out, config, shared.resume)
    run.save_model(spec, network, "teacher")
    settings = shared.settings(config["seed"])
    return _reduce(run, spec, network, data, options, plan, settings, shared.tensorboard)


def _stages(plan: shallow.Preset, epochs: str | None) -> shallow.Preset:
    if epochs is None:
        return plan
    parts = epochs.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise ShoalError(f"found --epochs {epochs!r}; need three numbers: sensitivity,mask,finetune")
    a, b, c = (int(p) for p in parts)
    plans = (plan.sensitivity, plan.mask, plan.finetune)
    s, m, f = (_longer(stage, n) for stage, n in zip(plans, (a, b, c), strict=True))
    return replace(plan, sensitivity=s, mask=m, finetune=f)


def _reduce(
    run: Run,
    spec: Spec,
    network: nn.Module,
    data: Dataset,
    options: shallow.Options,
    plan: shallow.Preset,
    settings: Settings,
    tensorboard: bool = False,
) -> dict[str, Any]:
    epochs = {"sensitivity": plan.sensitivity.epochs, "mask": plan.mask.epochs, "finetune": plan.finetune.epochs}
    with bars(epochs) as shown:
        result = shallow.reduce(
            spec, network, data, options, plan, settings, run=run, listen=shown.listen, tensorboard=tensorboard
        )
    run.save_model(result.spec, result.model)
    run.write_json("budget.json", asdict(result.budget))
    honest, paper = gated_macs(network, spec.shape, result.spec.branches)
    summary = {
        "data": data.name,
        "model": spec.base,
        "baseline": _result(network, data, spec, settings),
        "reduced": _result(result.model, data, result.spec, settings)
        | {"replaced_blocks": list(result.spec.branches), "macs_accounting": {"honest": honest, "paper": paper}},
        "selected_on": plan.select,
        "environment": environment(),
        "seed": settings.seed,
    }
    run.write_json("summary.json", summary)
    plot_budget(result.sites, result.budget.counts, result.spec.branches, run.folder / "budget.png")
    plot_curves(run, run.folder / "curves.png")
    return summary


def evaluate(folder: Path, data_dir: Path | None, fixed: bool) -> dict[str, Any]:
    """Test accuracy and counts of a run's network, in float and if asked in fixed point."""
    run = Run(folder)
    spec, network = run.load_model()
    data = _load_data(run.read_json("config.json"), data_dir)
    body = _result(network, data, spec, Settings())
    if fixed:
        from shoal.private.deploy import clear_agreement, deploy

        graph, program, weights = deploy(network, data)
        images = data.normalise(data.test.images)
        agreement, accuracy = clear_agreement(graph, program, weights, images, data.test.labels)
        body |= {"fixed_accuracy": accuracy, "error_bound": program.error_bound} | asdict(agreement)
    return body


def report(folders: list[Path], csv: Path | None) -> list[dict[str, Any]]:
    """Flat rows of every run with a summary; draws each run's curves."""
    rows = collect(folders)
    for folder in folders:
        if Run(folder).has("metrics.jsonl"):
            plot_curves(Run(folder), folder / "curves.png")
    if csv is not None:
        write_csv(rows, csv)
    return rows


def report_table(rows: list[dict[str, Any]]) -> Table:
    """Runs down, figures across."""
    table = Table(header_style="bold")
    shown: tuple[str, ...] = (
        "run",
        "data",
        "baseline.accuracy",
        "reduced.accuracy",
        "reduced.relus",
        "reduced.macs",
        "reduced.depth",
    )
    shown += ("baseline.private.online_s", "reduced.private.online_s")
    for name in shown:
        table.add_column(name, justify="left" if name in ("run", "data") else "right")
    for row in rows:
        table.add_row(*(f"{v:,.6g}" if isinstance(v := row.get(k), (int, float)) else str(v or "") for k in shown))
    return table


def compile_run(
    folder: Path, out: Path, data_dir: Path | None, fraction_bits: int | None, teacher: bool, ot_kind: str
) -> dict[str, Any]:
    """Write the artifact of a run's network."""
    from shoal.private.artifact import save_artifact
    from shoal.private.deploy import deploy

    run = Run(folder)
    _, network = run.load_model("teacher" if teacher else "model")
    data = _load_data(run.read_json("config.json"), data_dir)
    graph, program, weights = deploy(network, data, fraction_bits=fraction_bits)
    save_artifact(out, program, weights, ot_kind=ot_kind)
    facts = {"digest": program.digest(), "fraction_bits": program.fraction_bits, "error_bound": program.error_bound}
    return {"client": str(out / "client"), "server": str(out / "server")} | facts | _counts(cost(graph))


def certs(folder: Path, names: list[str]) -> dict[str, Any]:
    """Make test certificates."""
    from shoal.private.certs import make_certificates

    make_certificates(folder, tuple(names))
    return {"ca": str(folder / "ca.pem"), "names": ", ".join(names), "folder": str(folder)}


def tls(cert: Path | None, key: Path | None, ca: Path | None) -> Any:
    """The TLS files of a party, or None when none is given. Raises ShoalError for some of them."""
    from shoal.private.party import TLS

    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise ShoalError("found only some of --cert, --key and --ca; need all three for mutual TLS (see shoal certs)")
    return TLS(cert, key, ca)


def serve(
    artifact: Path, listen: str, tls: Any, insecure: bool, sessions: int | None, timeout: float, ready: Path | None
) -> None:
    """Serve sessions until stopped."""
    from shoal.private.party import Server

    with Server(artifact, listen, tls, timeout_s=timeout, insecure=insecure) as server:
        if ready is not None:
            ready.write_text(server.address + "\n")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.info("serving %s at %s", artifact, server.address)
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
            server.serve(sessions)


def query(artifact: Path, images: list[Path], connect: str, tls: Any, insecure: bool, timeout: float) -> dict[str, Any]:
    """Classify image files privately."""
    from shoal.private.party import Client
    from shoal.private.program import Program

    program = Program.load(artifact)
    x = np.stack([read_image(path, program.input_shape) for path in images])
    mean, std = (np.asarray(program.preprocessing[k], np.float32)[:, None, None] for k in ("mean", "std"))
    with Client(artifact, connect, tls, timeout_s=timeout, insecure=insecure) as client:
        result = client.query(((x / np.float32(255)) - mean) / std)
        facts = {"setup_s": client.setup_s, "online_s": result.seconds, "bytes": result.bytes}
    names = program.preprocessing.get("class_names")
    rows = []
    for path, logits in zip(images, np.asarray(result.logits), strict=True):
        best = int(logits.argmax())
        rows.append({"image": str(path), "class": names[best] if names else best, "logits": logits.tolist()})
    return {"mode": result.mode, "messages": result.messages, "results": rows} | facts


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels [C, H, W] in 0..255 as float32. Raises ShoalError unless the file is an image of `shape`."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"), np.float32)
    except (OSError, ValueError) as error:
        raise ShoalError(f"found no readable image at {path} ({error}); need a PNG or JPEG file") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != tuple(shape):
        raise ShoalError(f"found an image of shape {pixels.shape} at {path}; need {tuple(shape)}; resize it first")
    return pixels


def query_table(body: dict[str, Any]) -> Table:
    """Images down, their classes, and what the query cost."""
    cost_ = f"{body['online_s']:.2f} s, {body['bytes']:,} bytes, {body['messages']:,} messages"
    table = Table(title=f"{body['mode']}: set-up {body['setup_s']:.1f} s, query {cost_}", header_style="bold")
    table.add_column("image")
    table.add_column("class", justify="right")
    table.add_column("logit", justify="right")
    for row in body["results"]:
        table.add_row(row["image"], str(row["class"]), f"{max(row['logits']):.4f}")
    return table


DEMO = shallow.Options(budget=1900, d_th=0.12)
DEMO_WIDTH = 0.25


def demo(out: Path, overwrite: bool, images: int, seed: int) -> dict[str, Any]:
    """The whole job on scikit-learn's digits."""
    from shoal import demo as demonstration
    from shoal.private.certs import make_certificates

    demonstration.clean(out, overwrite)
    say: Callable[[str], None] = lambda text: Console(stderr=True).print(text, highlight=False)  # noqa: E731
    data = load("digits", seed=seed)
    plan, settings = shallow.quick(teacher=20, sensitivity=3, mask=8, finetune=30), Settings(seed=seed)
    spec = Spec("resnet10", data.classes, data.shape, DEMO_WIDTH)
    run = Run.create(out, {"command": "demo", "data": "digits", "seed": seed, "options": DEMO, "preset": plan})
    say(f"training an all-ReLU {spec.base} (width {spec.width}) on digits")
    with bars({"teacher": plan.teacher.epochs}) as shown:
        teacher, _ = shallow.train_teacher(spec, data, plan.teacher, settings, run=run, listen=shown.listen)
    run.save_model(spec, teacher, "teacher")
    say(f"reducing it to {DEMO.budget:,} ReLUs: sensitivity, masks, gated branches and auxiliary classifier")
    summary = _reduce(run, spec, teacher, data, DEMO, plan, settings)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # keys never lie in a run folder, nor outlive the demo
        make_certificates(Path(folder))
        for name, which in (("baseline", "teacher"), ("reduced", "model")):
            network = run.load_model(which)[1]
            summary[name] |= demonstration.measure(name, network, data, out, Path(folder), images, say)
    summary["agreement"] = demonstration.agreement_of(summary["reduced"])
    run.write_json("summary.json", summary)
    plot_comparison(summary, out / "comparison.png")
    return summary
