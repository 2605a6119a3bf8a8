"""*Making Models Shallow Again*: sensitivity, learned masks, gated branches, an auxiliary classifier."""

from shoal.recipes.shallow.options import Choices, Options, check_options
from shoal.recipes.shallow.presets import PRESETS, Preset, paper, quick, reference_code
from shoal.recipes.shallow.recipe import Result, reduce

__all__ = [
    "PRESETS", "Choices", "Options", "Preset", "Result", "check_options", "paper", "quick", "reduce", "reference_code",
]  # fmt: skip
