"""shoal: make a trained CNN shallow and ReLU-light, then run it privately between a client and a server.

This page lists the public names by subject. Each is imported when it is first used, so `import shoal` is quick and a
process that only serves never loads the training code.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from shoal import moved
from shoal.errors import ShoalError, ShoalWarning, StoppedError

try:
    __version__ = version("shoal")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.2.0"

PLACES: dict[str, tuple[str, ...]] = {
    # data
    "shoal.data.dataset": ("Dataset", "Split"),
    "shoal.data.images": ("read_image",),
    "shoal.data.loading": ("load",),
    "shoal.data.arrays": ("from_arrays", "from_loader"),
    "shoal.data.normalisation": ("normalised",),
    # networks, as they are trained and as they are deployed
    "shoal.models": ("build",),
    "shoal.outputs": ("Outputs", "forward"),
    "shoal.networks.spec": ("Spec",),
    "shoal.networks.adoption": ("adopt",),
    "shoal.networks.assembly": ("assemble",),
    "shoal.networks.stored": ("load_network", "save_network"),
    "shoal.storage.run": ("Run",),
    "shoal.graph.graph": ("Graph",),
    "shoal.graph.ops": ("Node",),
    "shoal.graph.folding": ("fold",),
    "shoal.graph.counting": ("Cost", "cost"),
    # surgery
    "shoal.surgery.tracing": ("count", "trace"),
    "shoal.surgery.sites": ("ReluSite", "find_blocks", "relu_sites"),
    "shoal.surgery.substitution": ("substitute",),
    # training
    "shoal.training.settings": ("Settings",),
    "shoal.training.schedule": ("Schedule",),
    "shoal.training.loop": ("fit",),
    "shoal.training.evaluation": ("evaluate",),
    "shoal.training.objective": ("Objective", "Term"),
    "shoal.recipes.stages": ("Stages", "train_teacher"),
    # reduction
    "shoal.reduction.sensitivity": ("pruning_sensitivity",),
    "shoal.reduction.budget": ("Budget", "allocate"),
    "shoal.reduction.masks": ("MaskedReLU", "add_masks"),
    "shoal.reduction.gates": ("add_branches", "branched_blocks", "commit_branches", "set_gate"),
    "shoal.recipes.shallow.options": ("Options",),
    "shoal.recipes.shallow.presets": ("Preset", "paper", "quick"),
    "shoal.recipes.shallow.recipe": ("reduce",),
    # exits
    "shoal.exits.classifiers": ("add_exits", "keep_exit"),
    "shoal.exits.cascades": ("Cascade", "cascade"),
    "shoal.exits.inference": ("Decisions", "infer"),
    # private inference
    "shoal.private.compiler.deployment": ("deploy",),
    "shoal.private.program.artifact": ("save_artifact",),
    "shoal.private.program.program": ("Program", "Weights"),
    "shoal.private.serving.client": ("Client",),
    "shoal.private.serving.options": ("ClientOptions", "ServerOptions"),
    "shoal.private.serving.server": ("Server",),
    "shoal.private.transport.certs": ("TLS",),
}
"""The public names and the modules that define them."""

_HOME = {name: module for module, names in PLACES.items() for name in names}

__all__ = ["ShoalError", "ShoalWarning", "StoppedError", "__version__", *sorted(_HOME)]


class _Contents(ModuleType):
    """The module `shoal`, in which no submodule replaces a public name.

    Importing a submodule makes it an attribute of its package. The old modules ``shoal.cost`` and ``shoal.fold`` have
    the names of public functions, which must stay what they are.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Contents
moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
