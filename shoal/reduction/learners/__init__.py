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
    "senet": "per site, where teacher and student differ most",
    "random": "per site at random, an ablation",
    "magnitude": "per site, where the ReLU changes most",
    "snl": "slopes under an L1 penalty",
    "relupruner": "second-order loss estimates, pruned step by step",
    "autorep": "learned scores, quadratics elsewhere",
    "autorep-linear": "learned scores, identity elsewhere",
    "coordinate-descent": "greedy drops of random blocks of ReLUs",
    "layer-folding": "whole layers by one slope each",
    "depthshrinker": "whole blocks' inner ReLUs by one score each",
}
"""One line of help for each method."""

__all__ = ["LEARNERS", "SUMMARIES", "Problem", "Search", "kept"]
