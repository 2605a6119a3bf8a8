"""Import paths of release 0.1, kept for one release: each name warns where it is now.

A finder serves modules that no longer exist; packages that took over a module's name forward its names themselves.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, dict[str, str]] = {
    "shoal.branch": dict.fromkeys(
        ("add_branches", "branched_blocks", "commit_branches", "set_gate"), "shoal.reduction.gates"
    ),
    "shoal.budget": dict.fromkeys(("Budget", "allocate"), "shoal.reduction.budget"),
    "shoal.channels": {"keep_channels": "shoal.channels.cut"},
    "shoal.cost": {"Cost": "shoal.graph.counting", "cost": "shoal.graph.counting", "count": "shoal.surgery.tracing"},
    "shoal.data": dict.fromkeys(("Dataset", "Split"), "shoal.data.dataset") | {"load": "shoal.data.loading"},
    "shoal.depth": {"choose_blocks": "shoal.reduction.depth"},
    "shoal.distill": dict.fromkeys(("Objective", "Term"), "shoal.training.objective"),
    "shoal.early": {},
    "shoal.early.cascade": dict.fromkeys(("Cascade", "cascade"), "shoal.exits.cascades"),
    "shoal.early.dynamic": dict.fromkeys(("Decisions", "infer"), "shoal.exits.inference"),
    "shoal.early.genetic": {"Genetic": "shoal.exits.genetic"},
    "shoal.exits": dict.fromkeys(("add_exits", "keep_exit"), "shoal.exits.classifiers"),
    "shoal.export": {"load_exported": "shoal.exits.onnx"},
    "shoal.fold": {"fold": "shoal.graph.folding"},
    "shoal.graph": {"Graph": "shoal.graph.graph", "Node": "shoal.graph.ops"},
    "shoal.mask": dict.fromkeys(("MaskedReLU", "add_masks"), "shoal.reduction.masks"),
    "shoal.private.artifact": {"save_artifact": "shoal.private.program.artifact"},
    "shoal.private.deploy": {"deploy": "shoal.private.compiler.deployment"},
    "shoal.run": {"Run": "shoal.storage.run"},
    "shoal.sensitivity": {"pruning_sensitivity": "shoal.reduction.sensitivity"},
    "shoal.sites": dict.fromkeys(("ReluSite", "find_blocks", "relu_sites"), "shoal.surgery.sites"),
    "shoal.spec": {"Spec": "shoal.networks.spec", "assemble": "shoal.networks.assembly"},
    "shoal.stages": {"train_teacher": "shoal.recipes.stages"},
    "shoal.substitution": {"substitute": "shoal.surgery.substitution"},
    "shoal.surgery": {"trace": "shoal.surgery.tracing"},
    "shoal.train": {
        "Schedule": "shoal.training.schedule",
        "Settings": "shoal.training.settings",
        "evaluate": "shoal.training.evaluation",
        "fit": "shoal.training.loop",
    },
}
"""Of each old module, the names that README, docs or `shoal` itself showed, and the module that defines them now."""


def forward(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of an old module, or of the package that has its name now."""

    def getattr_(name: str) -> Any:
        if name not in MOVED[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place = MOVED[module][name]
        warnings.warn(
            f"{module}.{name} is now {place}.{name}; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(place), name)

    return getattr_


class _Finder(MetaPathFinder, Loader):
    """Finds the old modules that exist no longer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old module, or None. Asked last, so no module that exists is hidden."""
        return ModuleSpec(fullname, self, is_package=fullname == "shoal.early") if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the old module its `__getattr__`."""
        module.__getattr__ = forward(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Have imports of old modules served. Once is enough; more do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
