"""The jobs of `shoal count`, `check` and `evaluate`: counts, layers that cannot run in private, and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Group
from torch import nn

from shoal import units
from shoal.costs.model import layout_of
from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.graph.counting import Cost, cost
from shoal.graph.folding import fold
from shoal.jobs.inputs import load_data
from shoal.jobs.options import Named
from shoal.networks.assembly import assemble, own_network
from shoal.networks.figures import counts, figures
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.private.compiler.refusal import Refusal, refusals
from shoal.recipes.deepreduce.designs import parse
from shoal.recipes.deepreduce.merging import accountings
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.report.labels import labelled
from shoal.report.layout import Grid
from shoal.storage.run import Run
from shoal.storage.summary import ALONE, FILE, Counts, Figures, write_alone
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.tracing import check_trace
from shoal.training.settings import Settings


class Refused(TypedDict):
    """A node of the graph that cannot run in private: what it is (`found`), and what is possible (`need`).

    `line` is FILE:LINE of the code that made it; empty for a layer, which its name tells.
    """

    node: str
    found: str
    need: str
    line: str


class Examined(Counts):
    """Counts of a network, its replaceable blocks, and the nodes that cannot run in private."""

    blocks: list[str]
    private: bool
    refused: list[Refused]
    online: Mapping[str, float] | None


class Site(TypedDict):
    """A ReLU site: its name, the shape [C, H, W] or [D] of its output, and its number of ReLUs."""

    name: str
    shape: tuple[int, ...]
    relus: int
    stage: int
    block: int | None


class Layer(TypedDict):
    """One layer: its name, operation, the shape of its output, and its parameters, multiply-adds and ReLUs."""

    name: str
    op: str
    shape: tuple[int, ...]
    params: int
    macs: int
    linear_macs: int
    relus: int


class Counted(Counts, total=False):
    """Counts of a network, its ReLU sites, layers of unknown cost, and a design's costs after merging layers.

    `layers` has every layer with parameters, multiply-adds or ReLUs.
    """

    unknown: tuple[str, ...]
    sites: list[Site]
    layers: list[Layer]
    merging: dict[str, dict[str, int]]


def check(named: Named) -> Examined:
    """`examine` the named network. Raises ShoalError when it cannot be built, and as `examine` does."""
    spec = named.spec()
    return examine(own_network(spec), spec.shape)


def examine(model: nn.Module, shape: tuple[int, ...]) -> Examined:
    """Counts of `model`, its replaceable blocks and what cannot run in private, for images of `shape` [C, H, W].

    ``online`` has the bytes and latencies of one prepared inference with signs of 18 bits, or None if something cannot
    run. Raises ShoalError when the model cannot be traced, fails on such images, or computes something else after
    tracing.
    """
    graph = check_trace(model, shape)
    folded = fold(graph)
    refused = refusals(folded)
    return Examined(
        **counts(cost(graph)),
        blocks=[block.name for block in find_blocks(model, shape)],
        private=not refused,
        refused=[Refused(node=own.node, found=own.found, need=own.need, line=own.line) for own in refused],
        online=None if refused else asdict(layout_of(folded).online),
    )


def summary(name: str, body: Examined) -> Group:
    """The result of `examine` as tables: counts, then the layers that cannot run in private and what to use instead."""
    totals: Mapping[str, object] = body
    rows = [labelled(k, totals[k]) for k in ("relus", "comparisons", "macs", "linear_macs", "depth", "params")]
    rows.append(("blocks that could be one convolution", units.count(len(body["blocks"]))))
    rows.append(("can run in private", "yes" if body["private"] else "no"))
    if body["online"]:
        rows.append(("prepared inference: online, MB", units.megabytes(body["online"]["bytes"])))
        rows.append(("prepared inference: one-way latencies", units.count(body["online"]["latencies"])))
    table = Grid(name, ["", ""], rows)
    return Group(table, *([_refused(body["refused"])] if body["refused"] else []))


def _refused(rows: list[Refused]) -> Grid:
    places = [Refusal(**row).place for row in rows]
    cells = [[place, row["found"], row["need"]] for place, row in zip(places, rows, strict=True)]
    return Grid("\nlayers that cannot run in private", ["layer", "found", "need"], cells, texts=(0, 1, 2))


def count(named: Named, design: str | None = None, *, layers: bool = False) -> Counted:
    """Counts of a network, or of a DeepReDuce design of it, which also has its costs after merging linear layers.

    With `layers`, also the counts of each layer. Raises ShoalError when the network cannot be built or has no such
    design, and as `check_trace` does.
    """
    spec = named.spec()
    network, merging = own_network(spec), None
    if design is not None:
        network, merging = _designed(spec, network, design)
    total = cost(check_trace(network, spec.shape))
    found_sites = relu_sites(network, spec.shape) if total.relus else ()
    sites = [Site(name=s.name, shape=s.shape, relus=s.relus, stage=s.stage, block=s.block) for s in found_sites]
    found = Counted(**counts(total), unknown=total.unknown, sites=sites)
    if merging is not None:
        found["merging"] = merging
    if layers:
        found["layers"] = _layers(total)
    return found


def _layers(total: Cost) -> list[Layer]:
    """The rows of `total` that have parameters, multiply-adds or ReLUs."""
    return [
        Layer(
            name=row.name, op=row.op, shape=row.shape, params=row.params, macs=row.macs, linear_macs=row.linear_macs,
            relus=row.relus,
        )
        for row in total.rows
        if row.params or row.macs or row.linear_macs or row.relus
    ]  # fmt: skip


def _designed(spec: Spec, full: nn.Module, design: str) -> tuple[nn.Module, dict[str, dict[str, int]]]:
    """The design's network, and its convolutions and MACs counted in all three ways."""
    space = DesignSpace(spec, full)
    own = space.plan(parse(design, space.stages)).spec
    network, whole = (assemble(s, space.base(s)) for s in (own, replace(own, dropped=())))
    return network, accountings(own, network, whole)


def count_table(model: str, body: Counted) -> Grid:
    """A table of all ReLU sites, with totals in the title and a design's merged layers in the caption."""
    rows = [
        [s["name"], _shape(s["shape"]), units.count(s["relus"]), str(s["stage"]), str(s["block"] or "")]
        for s in body["sites"]
    ]
    columns = ["ReLU site", "shape", "ReLUs", "stage", "block"]
    return Grid(_totals(model, body), columns, rows, caption=_merged_lines(body))


def layer_table(model: str, body: Counted) -> Grid:
    """A table of all layers with their parameters, multiply-adds and ReLUs; title and caption as in `count_table`."""
    rows = [
        [row["name"], row["op"], _shape(row["shape"])]
        + [units.count(n) for n in (row["params"], row["macs"] + row["linear_macs"], row["relus"])]
        for row in body["layers"]
    ]
    columns = ["layer", "operation", "shape", "parameters", "MACs", "ReLUs"]
    linear = f"The total of MACs does not include {units.count(body['linear_macs'])} of linear layers."
    caption = "\n".join(filter(None, (linear, _merged_lines(body))))
    return Grid(_totals(model, body), columns, rows, texts=(0, 1, 2), caption=caption)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _totals(model: str, body: Counted) -> str:
    found: Mapping[str, Any] = body
    totals = {key: units.count(found[key]) for key in ("relus", "comparisons", "macs", "depth", "params")}
    more = f", {totals['comparisons']} comparisons of max pools and ReLU6" if body["comparisons"] else ""
    head = f"{totals['relus']} ReLUs{more}, {totals['macs']} MACs, depth {totals['depth']}"
    return f"{model}: {head}, {totals['params']} parameters"


def _merged_lines(body: Counted) -> str:
    """One line for each way to count a design's merged layers; empty without a design."""
    return "\n".join(_merged(name, row) for name, row in body.get("merging", {}).items())


def _merged(name: str, row: dict[str, int]) -> str:
    linear = f" and {units.count(row['linear_macs'])} of linear layers" if "linear_macs" in row else ""
    return f"{name}: {row['convs']} convolutions, {units.count(row['macs'])} MACs{linear}"


class Evaluated(Figures, total=False):
    """Figures of a run's network, and in fixed point its accuracy in percent and agreement with floating point."""

    fixed_accuracy: float
    error_bound: float
    images: int
    argmax_equal: int
    max_abs_logit_error: float


@dataclass(frozen=True)
class Evaluation:
    """The options of `shoal evaluate`."""

    run: Path = field(metadata={"cli": "argument"})
    """A run folder, such as one of train, reduce or demo."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the run's own if left out."""
    fixed: bool = False
    """Also evaluate the test set in the fixed-point arithmetic of private inference, without encryption."""
    other_data: bool = False
    """Go on although the data are not those that the run began with, such as a newer test set."""


def evaluate(wanted: Evaluation) -> Evaluated:
    """Test accuracy and counts of a run's network; with `fixed` also its accuracy in fixed-point arithmetic.

    If the run has stored no figures, as those of earlier versions of shoal train, they are stored for shoal report.
    Raises ShoalError for a folder without a network, missing data, and with `fixed` for layers that cannot run in
    private.
    """
    run = Run(wanted.run)
    spec, network = load_network(run)
    data = load_data(run.config(), wanted.data_dir, other=wanted.other_data)
    body = Evaluated(**figures(network, data, spec, Settings()))
    _keep(run, data, spec, body, wanted)
    if wanted.fixed:
        from shoal.private.compiler.deployment import clear_agreement, deploy

        graph, program, weights = deploy(network, data)
        images = data.normalise(data.test.images[:])
        agreement, accuracy = clear_agreement(graph, program, weights, images, data.test.labels)
        body["fixed_accuracy"], body["error_bound"] = accuracy, program.error_bound
        body["images"], body["argmax_equal"] = agreement.images, agreement.argmax_equal
        body["max_abs_logit_error"] = agreement.max_abs_logit_error
    return body


def _keep(run: Run, data: Dataset, spec: Spec, found: Figures, wanted: Evaluation) -> None:
    """Store the figures of an unreduced network whose run has none, unless they are of other data."""
    if wanted.other_data or spec.is_reduced or run.has(ALONE) or run.has(FILE):
        return
    with suppress(ShoalError):  # a run on a read-only disk can be evaluated, too
        write_alone(run, data.name, spec.base, found.copy())
