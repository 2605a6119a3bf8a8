"""*DeepReDuce* (ICML'21): a grid of designs, each trained in a run folder of its own."""

from shoal.recipes.deepreduce.recipe import (
    PRESETS,
    Options,
    Result,
    check_options,
    paper,
    paper_cifar10,
    quick,
    reduce,
    trained_points,
)
from shoal.recipes.deepreduce.training import Preset, Teaching

__all__ = [
    "PRESETS", "Options", "Preset", "Result", "Teaching", "check_options", "paper", "paper_cifar10", "quick",
    "reduce", "trained_points",
]  # fmt: skip
