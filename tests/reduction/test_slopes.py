"""ReLUs with learned slopes and gates: values, gradients, rates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shoal.reduction.learners.autorep import GatedReLU
from shoal.reduction.learners.soft import SlopedReLU, sloped
from shoal.reduction.quadratic import Quadratic
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.optimiser import parameter_groups
from shoal.training.schedule import Schedule
from tests.conftest import Residual, blobs

SHAPE = (1, 8, 8)
DATA = blobs(128)


def test_rates_of_their_own_have_no_weight_decay() -> None:
    plain = Residual()
    (group,) = parameter_groups(plain, 5e-4)
    assert [id(p) for p in group["params"]] == [id(p) for p in plain.parameters()]
    model = nn.Sequential(nn.Conv2d(1, 2, 3), SlopedReLU((2, 6, 6), (2, 6, 6)))
    model[1].rate_multiplier = 7.0
    weights, slopes = parameter_groups(model, 5e-4)
    assert (len(weights["params"]), weights["weight_decay"], weights["multiplier"]) == (2, 5e-4, 1.0)
    assert (slopes["params"][0] is model[1].slope, slopes["weight_decay"], slopes["multiplier"]) == (True, 0.0, 7.0)


def test_fit_moves_slopes_at_their_own_rate_and_without_decay() -> None:
    """One step of SGD without momentum moves a slope by rate x multiplier x gradient, whatever the weight decay."""
    torch.manual_seed(0)
    model = nn.Sequential(SlopedReLU(SHAPE, SHAPE), nn.Flatten(), nn.Linear(64, 4))
    model[0].rate_multiplier = 50.0
    x = DATA.normalise(DATA.train.images)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), DATA.train.labels), model[0].slope)[0]
    fit(model, DATA, Objective((cross_entropy(),)), Schedule(1, 0.1, batch_size=128, momentum=0.0, weight_decay=0.5))
    assert torch.allclose(model[0].slope.detach(), 1 - 5.0 * gradient, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5), (6,)])
@pytest.mark.parametrize("one", [False, True])
def test_sloped_relu_and_its_gradients(shape: tuple[int, ...], one: bool) -> None:
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    slope = torch.rand((1,) * len(shape) if one else shape, dtype=torch.float64, requires_grad=True)
    expected = slope * torch.relu(x) + (1 - slope) * x
    assert torch.allclose(sloped(x, slope), expected)
    assert torch.autograd.gradcheck(sloped, (x, slope))
    if len(shape) == 3:
        nhwc = x.detach().contiguous(memory_format=torch.channels_last)
        found = sloped(nhwc, slope)
        assert torch.allclose(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("quadratic", [False, True])
def test_gated_relu_passes_gradients_to_scores_input_and_coefficients(quadratic: bool) -> None:
    rest = Quadratic(3) if quadratic else None
    module = GatedReLU((3, 4, 4), rest).double()
    with torch.no_grad():
        module.score.uniform_(-1, 1)
        for parameter in rest.parameters() if rest else ():
            parameter.uniform_(-1, 1)
    module.switch()
    kept = module.score > 0.003
    assert torch.equal(module.mask, kept | (module.score.abs() <= 0.003))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    a, b, c = (v[:, None, None] for v in rest.coefficients()) if rest else (0.0, 1.0, 0.0)
    soft = module.mask.double().requires_grad_()
    other = a * x * x + b * x + c
    by_hand = soft * torch.relu(x) + (1 - soft) * other
    weights = torch.randn_like(by_hand)
    wanted = [x, soft, *(rest.parameters() if rest else ())]
    first = torch.autograd.grad((by_hand * weights).sum(), wanted)
    found = torch.autograd.grad((module(x) * weights).sum(), [x, module.score, *wanted[2:]])
    assert torch.allclose(module(x), by_hand)
    assert torch.allclose(found[0], first[0])
    assert torch.allclose(found[1], first[1] * F.softplus(module.score))
    for one, two in zip(found[2:], first[2:], strict=True):
        assert torch.allclose(one, two)


def test_hysteresis_by_hand() -> None:
    module = GatedReLU((6,))
    module.set_mask(torch.tensor([1, 1, 1, 0, 0, 0]).bool())
    with torch.no_grad():
        module.score.copy_(torch.tensor([-0.002, -0.004, 0.1, 0.002, 0.004, -1.0]))
    module.switch()
    assert module.mask.tolist() == [True, False, True, False, True, False]
