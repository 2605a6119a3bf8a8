"""Who may import whom: the levels of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

LEVELS = [
    {"errors", "outputs", "data", "readers", "graph", "reshape", "surgery", "checkpoint", "clock"}
    | {"schedule", "settings"}
    | {"augment", "point_clouds", "shards", "shard_index"}
    | {"lowering", "arithmetic", "indexing", "pooling", "idioms", "max_pool"}
    | {"private.fixed", "private.carry", "private.bitslice"},
    {
        "models",
        "sites",
        "exits",
        "exit_points",
        "attention_exits",
        "pooled_exits",
        "optimiser",
        "stepping",
        "batches",
        "evaluation",
        "train",
        "cost",
        "equivalence",
    },
    {"mask", "quadratic", "branch", "dropping", "sensitivity", "budget", "distill", "linear_tail", "merging", "front"}
    | {"teaching", "teachers", "batch_norm", "pruning"}
    | {"substitution", "slim", "slim_layers", "channel_flow", "channels", "channel_pruning"},
    {"learners", "spec", "fold", "private.certs"},
    {"designs", "figures", "depth", "early", "analysis"},
    {"run", "origins", "private.program", "private.clear", "private.channel", "private.truncation", "private.lifting"}
    | {"private.images", "private.refusal"},
    {"private.artifact", "private.deploy", "private.segments", "private.shares", "private.spu", "report", "recipes"}
    | {"stages", "design_space", "design_training", "lessons"}
    | {"private.plan", "private.randomness", "private.wire", "private.signs", "private.offline", "private.online"}
    | {"private.pool", "private.emit", "private.maker", "private.compilation", "private.cost_model"}
    | {"target", "planner", "plans"},
    {"private.session"},
    {"private.line", "private.engine", "private.direct", "private.prepared", "private.server", "private.party"}
    | {"private.metrics", "private.pools", "private.journal", "private.monitor", "private.refill"}
    | {"private.network"},
    {"earlier_masks", "loopback", "rehearsal", "progress", "signals", "__init__"},
    {"demo", "bench", "calibration"},
    {"deployment", "training", "serving", "grid_reduction", "self_distillation", "flexible", "distillation"}
    | {"early_exit", "export", "analysing", "prune_grid"},
    {"commands", "costing", "planning", "check", "sweep"},
    {"options"},
    {"private_cli", "cost_cli", "sweep_cli", "self_distill_cli", "inplace_cli", "osakd_cli", "dynamic_cli"},
    {"cli", "__main__"},
]
"""A module may import its own level and those before it."""


def _module(path: Path, root: Path) -> str:
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("private.") else name.split(".")[0]


def _level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


def test_imports_go_one_way() -> None:
    root = Path(__file__).parents[1] / "shoal"
    for path in root.rglob("*.py"):
        name = _module(path, root)
        if name == "private":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shoal."):
                target = str(node.module).removeprefix("shoal.")
                target = ".".join(target.split(".")[:2]) if target.startswith("private.") else target.split(".")[0]
                assert _level(target) <= _level(name), f"{name} imports {target}"
                assert not (name.startswith("private") and target == "train"), f"{name} imports train"
