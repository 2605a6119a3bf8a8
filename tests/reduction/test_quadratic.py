"""Quadratics of a channel in the place of ReLUs: their fit, their node, their counts and their price."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shoal.costs.protocols import SpuConstants, delphi, spu_cheetah
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.private.compiler.compilation import compile
from shoal.reduction.masks import masked_sites
from shoal.reduction.quadratic import Quadratic, add_quadratics, fit_quadratic
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace
from tests.conftest import Residual, randomise

SHAPE = (1, 8, 8)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 0.5), (-1.2, 2.0)])
def test_the_fitted_quadratic_is_the_nearest_one(mean: float, deviation: float) -> None:
    """Least squares on a fine grid under the normal density."""
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    x, weight = mean + deviation * z, torch.exp(-z.square() / 4)  # the density's square root
    basis = torch.stack([x.square(), x, torch.ones_like(x)], 1)
    nearest = torch.linalg.lstsq(basis * weight[:, None], (torch.relu(x) * weight)[:, None]).solution[:, 0]
    tensors = (torch.tensor([v], dtype=torch.float64) for v in (mean, deviation))
    assert torch.allclose(torch.cat(fit_quadratic(*tensors)), nearest, atol=1e-4)


def quadratic_network() -> nn.Module:
    torch.manual_seed(1)
    plain = randomise(Residual())
    masks = {s.name: torch.rand(s.shape) < 0.25 for s in relu_sites(plain, SHAPE)}
    model = add_quadratics(plain, masks)
    for module in model.modules():
        if isinstance(module, Quadratic):
            module.observe(torch.randn(8, len(module.mean), 4, 4))
    return model.eval()


def test_a_quadratic_is_a_node_that_folds_counts_saves_and_has_its_price(tmp_path: Path) -> None:
    model = quadratic_network()
    graph, x = trace(model, SHAPE), torch.randn(3, *SHAPE)
    assert torch.allclose(graph(x)[0], model(x), atol=1e-5)
    folded = fold(graph)
    assert torch.allclose(folded(x)[0], model(x), atol=1e-4)
    assert [n.name for n in fold(folded)] == [n.name for n in folded]
    folded.save(tmp_path)
    assert torch.equal(Graph.load(tmp_path)(x)[0], folded(x)[0])
    total, kept = cost(folded), sum(int(m.mask.sum()) for m in masked_sites(model).values())
    assert (total.relus, total.quadratics) == (kept, sum(s.relus for s in relu_sites(model, SHAPE)) - kept)
    free = SpuConstants(value_product_s=0.0, product_bytes=0.0)
    paid = SpuConstants(value_product_s=1.0, product_bytes=0.0)
    assert spu_cheetah(folded, paid).seconds - spu_cheetah(folded, free).seconds == pytest.approx(2 * total.quadratics)
    with pytest.raises(ShoalError, match="quadratics"):
        delphi(total)
    with pytest.raises(ShoalError, match=r"found quadratic at .*autorep-linear"):
        compile(folded, x)
