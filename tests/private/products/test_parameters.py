"""Which steps SEAL multiplies, under which parameters, and that both parties must agree on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.products.parameters import MOST_PLAIN_BITS, STATISTICAL, choose, least_margin, packings
from shoal.private.program.program import Program, Weights
from shoal.private.program.steps import Step

ATTRS = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
STEPS = (
    Step("a", "conv2d", ("x",), (4, 8, 8), ATTRS),
    Step("b", "conv2d", ("a",), (4, 8, 8), ATTRS),
    Step("c", "conv2d", ("b",), (4, 8, 8), ATTRS),
)
RINGS = {"a": 33, "b": MOST_PLAIN_BITS, "c": MOST_PLAIN_BITS + 1}


def case(size: int = 2**15) -> tuple[Program, Weights]:
    """Three convolutions truncated exactly in different rings; weights of b have magnitude `size`."""
    program = Program("v", 15, 64, "x", (4, 8, 8), STEPS, ("c",), {}, {}, 0.0, exact=RINGS)
    arrays = {f"{s.name}.weight": np.full((4, 4, 3, 3), size if s.name == "b" else 2**15) for s in STEPS}
    weights = Weights(arrays)
    return replace(program, products=choose(program, weights)), weights


def test_steps_in_rings_that_fit_are_multiplied_by_seal() -> None:
    program, weights = case()
    assert program.products["steps"] == ["a", "b"] == list(packings(program))
    assert program.products["plain_bits"] == MOST_PLAIN_BITS
    margin = least_margin(program, weights)
    assert margin is not None
    assert margin >= STATISTICAL


def test_a_step_whose_noise_would_show_stays_with_spu_and_the_others_get_its_room() -> None:
    program, _ = case(2**24)
    assert program.products["steps"] == ["a"]
    assert program.products["plain_bits"] == 33
    assert program.products["flood_bits"] > case()[0].products["flood_bits"]


def test_a_program_without_such_steps_has_no_parameters() -> None:
    program, weights = case()
    none = replace(program, exact={"c": MOST_PLAIN_BITS + 1})
    assert choose(none, weights) == {}
    assert packings(replace(none, products={})) == {}
    assert least_margin(replace(none, products={}), weights) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"degree": 4096}, "parameters .*4096.* of products; need those of this version"),
        ({"flood_bits": 1}, "parameters .* of products; need those of this version"),
        ({"plain_bits": 60}, "parameters .* of products; need those of this version"),
        ({"steps": ["a", "nobody"]}, "products of .*nobody.*; need convolutions and linear layers"),
    ],
)
def test_other_parameters_are_refused(change: dict[str, object], words: str) -> None:
    program, _ = case()
    with pytest.raises(ShoalError, match=words):
        packings(replace(program, products=program.products | change))


def test_parameters_are_part_of_what_the_parties_compare() -> None:
    program, _ = case()
    assert program.digest() != replace(program, products=program.products | {"flood_bits": 1}).digest()
