"""Import paths of release 0.1, which still work for one release, with a warning that states the new path.

An import finder provides the modules that no longer exist. A package with the name of an old module forwards that
module's names in its own `__getattr__`.
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
"""For each old module: its names in the README, the docs or `shoal`, and the modules that define them now."""


def forward(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of the old module `module`, or of the package that now has its name."""

    def getattr_(name: str) -> Any:
        if name not in MOVED[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place = MOVED[module][name]
        warnings.warn(
            f"{module}.{name} is now {place}.{name}; the next release will not have the old path",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(place), name)

    return getattr_


class _Finder(MetaPathFinder, Loader):
    """An import finder for old modules that no longer exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import spec of an old module, or None; called last, so it hides no existing module."""
        return ModuleSpec(fullname, self, is_package=fullname == "shoal.early") if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Set the `__getattr__` of the old module."""
        module.__getattr__ = forward(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Add the finder for old modules to `sys.meta_path`; further calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
