"""The designs of a trained network: turns names and places in the grid into specs and ReLU counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import nn

from shoal.errors import ShoalError
from shoal.networks.assembly import assemble, own_network
from shoal.networks.spec import GIVEN, Spec
from shoal.recipes.deepreduce.designs import Design, design_spec, grid, only, parse, positions
from shoal.recipes.deepreduce.front import check_budget
from shoal.recipes.stages import fresh
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count


@dataclass(frozen=True)
class Planned:
    """A design's name, the spec of its network, and its ReLU count."""

    name: str
    spec: Spec
    relus: int


class DesignSpace:
    """The designs of `teacher`, the all-ReLU network of `spec`. `stages` are numbers of stages with ReLUs, from 1."""

    def __init__(self, spec: Spec, teacher: nn.Module) -> None:
        self.spec, self.teacher = spec, teacher
        self.sites = relu_sites(teacher, spec.shape)
        self.stages = sorted({site.stage for site in self.sites} - {0})
        self.size = 5 * (len(self.stages) - 1)

    def base(self, spec: Spec) -> nn.Module:
        """The all-ReLU network of `spec`, with new random weights.

        Raises ShoalError for a network given in memory when `spec` has another width or resolution.
        """
        if spec.base != GIVEN:
            return own_network(spec)
        if (spec.width, spec.resolution) != (self.spec.width, self.spec.resolution):
            raise ShoalError(
                "found a reshaped design of a network made in memory; need a function that builds it at any `width` "
                "and `resolution`; give that as package.module:callable, or name designs without -a and -r"
            )
        return fresh(self.teacher)

    def plan(self, design: Design) -> Planned:
        """Build the network of `design` to check and count it. Raises ShoalError for a design that cannot be built."""
        spec = design_spec(self.spec, design, self.teacher)
        network = assemble(spec, self.base(spec))
        return Planned(design.name(self.stages), spec, count(network, spec.shape).relus)

    def alone(self, stage: int) -> Spec:
        """The spec of the network that keeps the ReLUs of `stage` only."""
        return design_spec(self.spec, only(stage, self.stages), self.teacher)

    def needs_grid(self, designs: Sequence[str]) -> bool:
        """Whether `designs` names places in the grid, or is empty (the whole grid). Only then criticality is needed."""
        return not designs or any(positions(text, self.size) for text in designs)

    def check(self, designs: Sequence[str], budget: int | None) -> None:
        """Raise ShoalError, before any training, for impossible designs, or a budget below the ReLUs of each."""
        named = [self.plan(parse(text, self.stages)) for text in designs if not positions(text, self.size)]
        if self.needs_grid(designs):
            if not self.size:
                raise ShoalError("found a network with one stage; need two or more for a grid; name designs")
            places = {i for text in designs for i in positions(text, self.size)} or {self.size - 1}
            named += [self.plan(design) for design in self._possible(places)]
        check_budget(budget, [planned.relus for planned in named])

    def _possible(self, places: Collection[int]) -> list[Design]:
        """All designs that can be at these places of the grid. Criticality, not known yet, decides which one is."""
        orders = permutations(self.stages)
        grids = [grid({stage: float(rank) for rank, stage in enumerate(order)}) for order in orders]
        return list(dict.fromkeys(whole[i] for whole in grids for i in sorted(places)))

    def wanted(self, designs: Sequence[str], critical: Callable[[], Mapping[int, float]]) -> list[Planned]:
        """The designs to train, without duplicates, in the given order. `critical` is called only for the grid."""
        whole = grid(critical()) if self.needs_grid(designs) else ()
        chosen = [] if designs else list(whole)
        for text in designs:
            places = positions(text, self.size)
            chosen += [whole[i] for i in places] if places else [parse(text, self.stages)]
        return [self.plan(design) for design in dict.fromkeys(chosen)]
