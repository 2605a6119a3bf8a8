"""What a file computes, the converted network computes, too."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from shoal.conversion.network import RULES, convert
from shoal.conversion.parity import TOLERANCE, largest_difference
from shoal.conversion.source import read_content
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.graph.ops import OPS
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import check_trace
from tests.conftest import Residual, randomise
from tests.conversion.specimens import SPECIMENS, content, keras_style, torch_style, uncounted
from tests.support.documents import text_of


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_file_gives_the_logits_of_onnxruntime_and_can_be_traced(name: str) -> None:
    make, shape, sites = SPECIMENS[name]
    converted = convert(content(make()), shape, name)
    images = torch.randn(3, *shape)
    assert largest_difference(converted, images) <= TOLERANCE
    logits = converted.network(images).detach()
    assert logits.shape == (3, 4)
    assert float(logits.std()) > 0.01
    graph = check_trace(converted.network, shape)
    assert {node.op for node in graph} <= {*OPS, "input"}
    assert len(relu_sites(converted.network, shape)) == sites


def test_pools_that_no_graph_has_are_converted_all_the_same() -> None:
    converted = convert(content(uncounted()), (2, 8, 8), "net.onnx")
    assert largest_difference(converted, torch.randn(3, 2, 8, 8)) <= TOLERANCE


def test_layers_keep_the_names_of_the_file_and_take_up_constants() -> None:
    network = convert(content(torch_style()), (2, 8, 8), "net.onnx").network
    names = [step.name for step in network.steps]
    assert names[:4] == ["stem_conv_Conv", "stem_bn_BatchNormalization", "stem_relu_Relu", "block_conv_Conv"]
    keras = convert(content(keras_style()), (2, 8, 8), "net.onnx")
    assert keras.notes == ("removed Softmax at the end (model/dense/Softmax)",)
    names = [step.name for step in keras.network.steps]
    assert names[-1] == "model_dense_MatMul"  # with the bias of the operator after it
    assert not [name for name in names if "Add" in name or "Transpose" in name or "Reshape" in name]
    assert keras.network.get_submodule("model_conv_Conv2D").bias is not None


def test_batch_norms_fold_into_convolutions() -> None:
    graph = check_trace(convert(content(torch_style()), (2, 8, 8), "net.onnx").network, (2, 8, 8))
    assert "batch_norm" in {node.op for node in graph}
    assert "batch_norm" not in {node.op for node in fold(graph)}


def test_other_logits_than_those_of_the_file_are_refused() -> None:
    converted = convert(content(torch_style()), (2, 8, 8), "net.onnx")
    images = torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        converted.network.get_submodule("head").bias += 2 * TOLERANCE
    with pytest.raises(ShoalError, match=r"found logits that differ by 0.0002 from onnxruntime's for net.onnx"):
        largest_difference(converted, images)
    with torch.no_grad():
        converted.network.get_submodule("head").bias *= float("nan")
    with pytest.raises(ShoalError, match="found logits that differ by nan"):
        largest_difference(converted, images)


def exported(path: Path, dynamo: bool) -> nn.Module:
    """A small network that PyTorch has written to `path`."""
    model = randomise(Residual())
    options: dict[str, Any] = {"dynamo": dynamo}
    options |= {"dynamic_shapes": ({0: torch.export.Dim("images")},)} if dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2 if dynamo else 1, 1, 8, 8),), str(path), verbose=False, **options)
    return model


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_pytorch_exports_comes_back(dynamo: bool, tmp_path: Path) -> None:
    path, images = tmp_path / "net.onnx", torch.randn(3, 1, 8, 8)
    model = exported(path, dynamo)
    converted = convert(read_content(path), (1, 8, 8), "net.onnx")
    assert torch.allclose(converted.network(images), model(images), atol=1e-5)
    assert largest_difference(converted, images) <= TOLERANCE
    assert len(relu_sites(converted.network, (1, 8, 8))) == len(relu_sites(model, (1, 8, 8)))


def test_the_page_lists_every_operator() -> None:
    table = text_of("docs/your_checkpoint.md").partition("| operators | accepted |")[2].partition("\n\n")[0]
    assert set(RULES) <= set(re.findall(r"\w+", table))
