"""Learners of masks, which decide which positions keep their ReLU: one file per method and a table of them."""

from __future__ import annotations

from shoal.reduction.learners.autorep import AutoReP, AutoRePLinear
from shoal.reduction.learners.coordinate_descent import CoordinateDescent
from shoal.reduction.learners.depthshrinker import DepthShrinker
from shoal.reduction.learners.magnitude import Magnitude
from shoal.reduction.learners.relupruner import ReLUPruner
from shoal.reduction.learners.search import Problem, Search, kept
from shoal.reduction.learners.senet import Random, SENet
from shoal.reduction.learners.snl import SNL, LayerFolding

LEARNERS: dict[str, type[Search]] = {
    "senet": SENet,
    "random": Random,
    "magnitude": Magnitude,
    "snl": SNL,
    "relupruner": ReLUPruner,
    "autorep": AutoReP,
    "autorep-linear": AutoRePLinear,
    "coordinate-descent": CoordinateDescent,
    "layer-folding": LayerFolding,
    "depthshrinker": DepthShrinker,
}
"""The methods, by the name that `Options.masks` and ``--masks`` accept."""

SUMMARIES = {
    "senet": "in each site, the positions where teacher and student differ most",
    "random": "random positions in each site, to compare with",
    "magnitude": "in each site, the positions whose values the ReLU changes most",
    "snl": "learns a slope for each position under an L1 penalty, and keeps the largest",
    "relupruner": "removes step by step the ReLUs that the loss needs least, by a second-order estimate",
    "autorep": "learns a score for each position, and makes the rest quadratic functions, which cannot run in private",
    "autorep-linear": "like autorep, but makes the rest the identity, which can run in private",
    "coordinate-descent": "again and again removes, of several random groups of ReLUs, the one that hurts least",
    "layer-folding": "learns a slope for each layer, and removes the ReLUs of whole layers",
    "depthshrinker": "learns a score for each block, and removes the inner ReLUs of whole blocks",
}
"""One line of help for each method."""

__all__ = ["LEARNERS", "SUMMARIES", "Problem", "Search", "kept"]
