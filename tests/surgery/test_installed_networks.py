"""torchvision's and timm's networks, where those are installed: they count, fold and run, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shoal.graph.folding import fold
from shoal.jobs.inspect import examine
from shoal.surgery.tracing import trace
from tests.conftest import randomise

SHAPE = (3, 64, 64)

TORCHVISION = {
    **dict.fromkeys(("resnet18", "resnext50_32x4d", "alexnet", "vgg11_bn", "densenet121", "squeezenet1_1"), ""),
    **dict.fromkeys(("googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf"), ""),
    "mobilenet_v2": "relu6",
    "regnet_y_400mf": "Sigmoid",
    "efficientnet_b0": "SiLU",
}
TIMM = {
    **dict.fromkeys(("resnet18", "resnext50_32x4d", "densenet121", "regnetx_002", "repvgg_a0", "xception41"), ""),
    **dict.fromkeys(("dla34", "res2net50_26w_4s", "mobileone_s0", "resnetv2_50"), ""),
    "mobilenetv2_100": "relu6",
    "hrnet_w18_small": "Upsample",
    "ghostnet_100": "Hardsigmoid",
    "convnext_atto": "permute",
}
"""Network -> the first thing refused, nothing where it runs in private."""


def check(model: nn.Module, refused: str) -> None:
    body, x = examine(randomise(model), SHAPE), torch.randn(2, *SHAPE)
    assert [r["found"] for r in body["refused"]][:1] == ([refused] if refused else [])
    assert all(r["need"] for r in body["refused"])
    if not refused:
        with torch.no_grad():
            truth, folded = model(x), fold(trace(model, SHAPE))(x)[0]
        assert (folded - truth).abs().max() < 1e-4 * truth.abs().max().clamp(min=1.0)


def build(maker: Callable[..., nn.Module], name: str) -> nn.Module:
    torch.manual_seed(0)
    return maker(name, **({"aux_logits": False, "init_weights": False} if name == "googlenet" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    check(build(lambda n, **more: models.get_model(n, weights=None, num_classes=10, **more), name), TORCHVISION[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    check(build(lambda n: timm.create_model(n, num_classes=10), name), TIMM[name])
