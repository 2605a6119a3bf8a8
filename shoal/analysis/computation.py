"""The computation of a network's parts in training (*Self-Distillation*, section 5.6, Fig. 13).

A training step computes all classifiers, and its backward pass costs about twice the multiply-adds of the forward pass
in every layer. So the parts have the same shares of a step as of a forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from shoal.exits.classifiers import PREFIX
from shoal.graph.counting import cost
from shoal.graph.graph import Graph, live

BACKBONE, ATTENTION, CLASSIFIER = "backbone", "attention module", "shallow classifier"


class PartRow(TypedDict):
    """One part of the layers that an exit adds: multiply-adds for one image, their fraction of all, and parameters.

    The last exit has the backbone; an exit before it has an attention module, if there is one, and a classifier.
    """

    exit: int
    part: str
    macs: int
    share: float
    params: int


def parts_of(graph: Graph) -> list[PartRow]:
    """The parts of a traced network, by exit. Multiply-adds are those of convolutions and linear layers.

    The backbone is what the last exit needs. Each other layer belongs to the weakest exit that needs it.
    """
    whole, last = cost(graph), len(graph.outputs) - 1
    owner: dict[str, tuple[int, str]] = {}
    for exit in (last, *range(last)):
        for name in live(replace(graph, outputs=graph.outputs[exit : exit + 1])):
            owner.setdefault(name, (exit, BACKBONE if exit == last else _kind(name)))
    macs_of = {row.name: row.macs + row.linear_macs for row in whole.rows}
    total = max(1, sum(macs_of.values()))
    found = []
    for exit, part in sorted(set(owner.values())):
        names = {name for name, own in owner.items() if own == (exit, part)}
        macs = sum(value for name, value in macs_of.items() if name in names)
        params = sum(row.params for row in whole.rows if row.name in names)
        found.append(PartRow(exit=exit, part=part, macs=macs, share=macs / total, params=params))
    return found


def _kind(name: str) -> str:
    return ATTENTION if name.startswith(PREFIX) and ".attention." in name else CLASSIFIER
