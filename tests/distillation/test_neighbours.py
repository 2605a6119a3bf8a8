"""k-NN soft labels against values by hand and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.distillation.neighbours import (
    LOSSES,
    SPACES,
    Neighbourhood,
    NeighbourTeacher,
    neighbour_labels,
    neighbours,
)
from shoal.errors import ShoalError
from shoal.outputs import Outputs

LOGITS = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
LABELS = torch.tensor([0, 1, 3])
"""Squared distances: 0-1 is 5, 0-2 is 13, 1-2 is 10."""


def soft(k: int, **choices: object) -> list[list[float]]:
    return NeighbourTeacher(Neighbourhood(k, **choices), 4).soft_labels(LOGITS, LABELS).tolist()  # type: ignore[arg-type]


def test_soft_labels_by_hand() -> None:
    zero, one, three = [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]
    assert soft(1) == [one, zero, one]
    assert soft(2) == [[0, 0.5, 0, 0.5], [0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0]]
    assert soft(1, exclude_self=False) == [zero, one, three]
    assert soft(2, exclude_self=False) == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]]
    # Softmax squeezes the distances: p = (.711, .096, .096, .096), (.175, .475, .175, .175), (.044, .044, .870, .044).
    assert soft(1, space="softmax") == [one, zero, one]


def test_spaces_differ_where_logits_are_large() -> None:
    """Logits 4 and 9 lie far apart, and their softmax close together; the origin is the other way round."""
    logits = torch.tensor([[4.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    found = {s: NeighbourTeacher(Neighbourhood(1, s), 3).soft_labels(logits, torch.arange(3)) for s in SPACES}
    assert found["logits"][0].tolist() == [0, 0, 1]
    assert found["softmax"][0].tolist() == [0, 1, 0]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_by_hand(loss: str) -> None:
    targets = soft(2)
    rows = [softmax(row) for row in LOGITS.tolist()]
    squares = sum((s - p) ** 2 for ss, ps in zip(targets, rows, strict=True) for s, p in zip(ss, ps, strict=True))
    crossed = sum(
        s * math.log(s / p) for ss, ps in zip(targets, rows, strict=True) for s, p in zip(ss, ps, strict=True) if s
    )
    expected = {"mse-sum": squares / 3, "mse-mean": squares / 12, "kl": crossed / 3}[loss]
    term = neighbours(NeighbourTeacher(Neighbourhood(2), 4), 1.0, loss)
    assert float(term.loss(Outputs((LOGITS,)), None, LABELS)) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_takes_the_soft_labels_as_given() -> None:
    """d/dz of sum_c (s_c - p_c)^2 / N with s constant: -(2 / N) p * ((s - p) - <s - p, p>)."""
    logits = LOGITS.clone().requires_grad_()
    term = neighbours(NeighbourTeacher(Neighbourhood(2), 4), 1.0, "mse-sum")
    term.loss(Outputs((logits,)), None, LABELS).backward()
    p, s = LOGITS.softmax(1), torch.tensor(soft(2))
    gap = s - p
    expected = -(2 / 3) * p * (gap - (gap * p).sum(1, keepdim=True))
    assert logits.grad is not None
    assert (logits.grad - expected).abs().max() < 1e-6


def brute_force(points: list[list[int]], references: list[list[int]], labels: list[int], k: int, own: bool) -> Tensor:
    """By sorting (distance, position); integer coordinates make equal distances exactly equal."""
    result = torch.zeros(len(points), max(labels) + 1)
    for i, point in enumerate(points):
        order = sorted((math.dist(point, other), j) for j, other in enumerate(references) if own or j != i)
        for _, j in order[:k]:
            result[i, labels[j]] += 1 / k
    return result


@settings(max_examples=60)
@given(st.data())
def test_soft_labels_are_those_of_brute_force(data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, 3))
    # Few places, so that many distances are equal.
    place = st.lists(st.integers(-2, 2), min_size=dimensions, max_size=dimensions)
    references = data.draw(st.lists(place, min_size=2, max_size=40))
    count = data.draw(st.integers(1, len(references)))
    labels = data.draw(st.lists(st.integers(0, 4), min_size=len(references), max_size=len(references)))
    own = data.draw(st.booleans())
    k = data.draw(st.integers(1, len(references) - (not own)))
    found = neighbour_labels(
        torch.tensor(references[:count]).float(), torch.tensor(references).float(), torch.tensor(labels), k,
        max(labels) + 1, exclude_self=not own,
    )  # fmt: skip
    assert (found - brute_force(references[:count], references, labels, k, own)).abs().max() < 1e-6
    assert (found.sum(1) - 1).abs().max() < 1e-6


def test_a_bank_holds_the_last_outputs_and_goes_on_after_a_reload() -> None:
    teacher = NeighbourTeacher(Neighbourhood(1, bank=4), 4)
    assert teacher.state() == {}
    teacher.soft_labels(LOGITS, LABELS)
    teacher.soft_labels(LOGITS + 10, LABELS)
    state = teacher.state()
    assert state["points"].tolist() == [*(LOGITS + 10).tolist(), LOGITS[0].tolist()]
    assert state["labels"].tolist() == [0, 1, 3, 0]
    again = NeighbourTeacher(Neighbourhood(1, bank=4), 4)
    again.load({name: value.clone() for name, value in state.items()})
    near, label = LOGITS[:1] + 0.1, torch.tensor([2])
    # Alone in its batch, the sample has no neighbour but those of the bank; the nearest is the last one there.
    assert torch.equal(teacher.soft_labels(near, label), again.soft_labels(near, label))
    assert again.soft_labels(near, label).tolist() == [[0, 0, 1.0, 0]]


def test_without_a_bank_batches_are_apart() -> None:
    teacher = NeighbourTeacher(Neighbourhood(1), 4)
    first = teacher.soft_labels(LOGITS, LABELS)
    teacher.soft_labels(LOGITS + 10, LABELS.flip(0))
    assert torch.equal(teacher.soft_labels(LOGITS, LABELS), first)
    assert teacher.state() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighbourhood(0), "found k 0"),
        (lambda: Neighbourhood(4, bank=-1), "a bank of -1"),
        (lambda: Neighbourhood(4, "cosine"), "found space 'cosine'; need one of logits, softmax"),
        (lambda: Neighbourhood(8).check(8), "found k 8 with 8 samples in a batch; need 9"),
        (lambda: soft(3), "found 3 samples for k 3"),
        (lambda: neighbours(NeighbourTeacher(Neighbourhood(1), 4), 1.0, "mse"), "found loss 'mse'; need one of mse-s"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        make()  # type: ignore[operator]


def test_what_is_just_enough() -> None:
    Neighbourhood(8).check(9)
    Neighbourhood(8, exclude_self=False).check(8)
