"""Sections of the papers' pages: which grid makes which table, with how many runs, and in how many minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pages.result_tables import result, table

STUDIES = "self_distillation_studies"
IMAGENET = "self_distillation_imagenet"


@dataclass(frozen=True)
class Row:
    """A table or figure of a paper, and the grid and stages that make it; without a grid, the reason why."""

    title: str
    grid: str = ""
    stages: tuple[str, ...] = ()
    remark: str = ""


SHALLOW = (
    Row("Table 1, ResNet18 on CIFAR-10", "cifar10", ("gated",), "at 82k ReLUs"),
    Row("Table 1, ResNet18 on CIFAR-100", "resnet18", ("gated",)),
    Row("Table 1, WRN-22-8 on CIFAR-100", "wrn22_8", ("gated",)),
    Row("Table 2, CIFAR-10 (3.94x and 5.07x)", "cifar10", ("auxiliary",), "at 150k ReLUs"),
    Row("Table 2, CIFAR-100; Fig. 1", "resnet18", ("auxiliary",)),
    Row("Fig. 2: sensitivities of SENet and SNL", "resnet18", ("masked", "learner")),
)
DEEPREDUCE = (
    Row("Table 1, ResNet18", "deepreduce", ("taught", "labels")),
    Row("Table 1, ResNet34", "deepreduce_resnet34", ("taught", "labels")),
    Row("Table 2", "deepreduce", ("table4", "taught", "labels")),
    Row("Table 3, ResNet18 and ResNet34 on Tiny-ImageNet", "deepreduce_tiny_imagenet",
        ("resnet18-taught", "resnet18-labels", "resnet34-taught", "resnet34-labels")),
    Row("Table 4; Fig. 1", "deepreduce", ("table4",)),
    Row("Table 5", "deepreduce_tiny_imagenet", ("table5",)),
    Row("Table 6", "deepreduce", ("table4",), "its points are those of Table 4; the others are published figures"),
    Row("Table 7", "deepreduce",
        ("table4", "taught", "labels", "resnet10-taught", "resnet10-labels", "resnet9-taught", "resnet9-labels")),
    Row("Table 8", "deepreduce_resnet56", ("cifar10", "cifar100"), "without the pruned networks of He et al."),
    Row("Table 9", remark="the appendix with its networks is not known to us"),
    Row("Tables 10 and 11; Fig. 5", "deepreduce_fronts", ("vgg16",), "the whole grid, not the appendix's steps"),
    Row("Tables 12 and 13; Fig. 6", "deepreduce_fronts", ("mobilenetv1", "mobilenetv1-scaled"),
        "the whole grid, not the appendix's steps"),
    Row("Table 14", "deepreduce_resnet56",
        ("cifar10-stages", "cifar10-stages-labels", "cifar100-stages", "cifar100-stages-labels"),
        "on both data sets, because the appendix is not known to us"),
    Row("Figs. 3 and 7", remark="they show no accuracy: `shoal count --layers`"),
)  # fmt: skip
SELF = (
    Row("Table 1; Fig. 4", "self_distillation", ("self",)),
    Row("Table 2; Fig. 5", IMAGENET, ("self",), "you give ImageNet; without AutoAugment"),
    Row("Table 3", "self_distillation_comparison",
        ("resnet18", "resnet50", "mutual", "resnet18-beside", "resnet50-beside", "mutual-beside"),
        "each method with its own published schedule"),
    Row("Table 3", "self_distillation_setting",
        ("resnet18", "resnet50", "mutual", "resnet18-beside", "resnet50-beside", "mutual-beside"),
        "all methods with the paper's setting"),
    Row("Table 4", "self_distillation_modelnet", ("clouds",)),
    Row("Table 5; Fig. 8", "self_distillation", ("self",), "then `shoal exits` on the runs of the ResNets"),
    Row("Table 6; Fig. 7", IMAGENET, ("self",), "then `shoal exits` on the runs of the ResNets"),
    Row("Table 7", STUDIES, ("path", "labels")),
    Row("Table 8", STUDIES, ("kind",)),
    Row("Table 9", STUDIES, ("scheme",), "baselines: Table 1"),
    Row("Table 10", STUDIES, ("loss-kl", "loss-l2"), "baseline and both losses: Table 1"),
    Row("Table 11", STUDIES, ("separability",), "then `shoal analyse` on the run"),
    Row("Section 4.9", STUDIES, ("every",)),
    Row("Fig. 6", "self_distillation_pruning", ("self-pruned", "plain-pruned"), "methods and amounts are our choice"),
    Row("Fig. 9", STUDIES, ("count",), "networks are our choice; baselines: Table 1"),
    Row("Fig. 10", STUDIES, ("alpha", "lambda")),
    Row("Figs. 12 and 14 to 17", "self_distillation", ("self",), "then `shoal analyse` on the run of ResNet18"),
    Row("Fig. 13", remark="it shows no accuracy"),
)  # fmt: skip
INPLACE = (
    Row("Table I; Fig. 1", "inplace", ("exits",)),
    Row("Table II; Fig. 2", "inplace", ("widths",)),
)
OSAKD = (
    Row("Table I; Fig. 1: CIFAR-10 and SVHN", "osakd", ("table1",)),
    Row("Table I; Fig. 1: Fashion-MNIST", "osakd", ("table1-fashion",)),
    Row("Table I; Fig. 1: Tiny-ImageNet", "osakd", ("table1-tiny",)),
    Row("Table II", "osakd", ("table2", "table2-branches"), "all networks with the same setting"),
    Row("GFLOPs of ResNet-32 and ResNet-110", remark="no accuracy: `shoal count`"),
)
PAPERS: dict[str, Sequence[Row]] = {
    "grids_shallow": SHALLOW,
    "grids_deepreduce": DEEPREDUCE,
    "grids_self_distillation": SELF,
    "grids_inplace": INPLACE,
    "grids_osakd": OSAKD,
}
"""Section -> the tables and figures of a paper. Section `grids_X` is on docs/papers/X.md."""


def needed(stages: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The stages `names` of a grid, and all that these need."""
    found = dict.fromkeys(names)
    for name in names:
        found |= dict.fromkeys(needed(stages, stages[name]["needs"]))
    return list(found)


def two_digits(value: float) -> str:
    """A number rounded to two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _cells(row: Row, grids: dict[str, Any]) -> tuple[str, ...]:
    if not row.grid:
        return (row.title, f"none: {row.remark}", "", "")
    stages = grids[row.grid]
    names = needed(stages, row.stages)
    runs, minutes = (sum(stages[name][what] for name in names) for what in ("runs", "minutes"))
    remark = f" ({row.remark})" if row.remark else ""
    return (row.title + remark, f"`examples/paper/{row.grid}.yaml`", str(runs), two_digits(minutes))


def grids(name: str) -> Callable[[], str]:
    return lambda: grids_table(PAPERS[name])


def grids_table(rows: Sequence[Row]) -> str:
    body = result("grid_minutes")
    head = ("table", "grid", "runs", "minutes")
    command = "python -m benchmarks.training.grid_minutes --out benchmarks/results/grid_minutes.json"
    return f"""{table(head, [_cells(row, body["grids"]) for row in rows])}

Runs include the teachers and masks that a table needs; tables of one grid share them. Minutes are a forecast for one
thread of this machine ({body["environment"]["processor"]}) in fp32, from one step of each network, rounded to two
digits: `{command}`. The machine was shared: {body["settings"]["shared"]}."""
