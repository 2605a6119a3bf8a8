"""Whether a converted network gives the logits that onnxruntime computes from the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.conversion.network import Converted
from shoal.conversion.source import Source
from shoal.conversion.values import Numbers, Value
from shoal.errors import ShoalError, first_line

TOLERANCE = 1e-4
"""Largest allowed difference of a logit, absolute, and relative to the largest logit where that is above 1."""


@torch.no_grad()
def largest_difference(converted: Converted, images: Tensor) -> float:
    """The largest difference between a logit of the network and of onnxruntime, for images [N, C, H, W].

    Raises ShoalError where it is above `TOLERANCE`, and when onnxruntime cannot run the file.
    """
    own = converted.network.eval()(images).numpy()
    source = converted.source
    truth = _run(source, _as_in_file(images, converted.images)).reshape(own.shape)
    difference = float(np.abs(own - truth).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(truth).max())):
        raise ShoalError(
            f"found logits that differ by {difference:.3g} from onnxruntime's for {source.name}; need {TOLERANCE:g} or "
            "less; export the network again, or define it in PyTorch and give --weights"
        )
    return difference


def _as_in_file(images: Tensor, value: Value) -> Numbers:
    flat = images.numpy().reshape(len(images), -1)
    return np.ascontiguousarray(flat[:, value.places.ravel()].reshape(len(images), *value.file_shape[1:]))


def _run(source: Source, images: Numbers) -> Numbers:
    """The logits [N, classes] from onnxruntime, one image at a time if the file has a fixed batch."""
    parts = np.split(images, len(images)) if source.shape and source.shape[0] == 1 else [images]
    try:
        session = _session(source)
        return np.concatenate([np.asarray(session.run(None, {source.input: part})[0]) for part in parts])
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise ShoalError(
            f"found that onnxruntime cannot run {source.name} ({first_line(error)}); need a file that it runs; export "
            "the network again"
        ) from error


def _session(source: Source) -> Any:
    """onnxruntime with the operators that the logits need, and no others."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    del model.graph.node[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(source.nodes)
    model.graph.output.append(onnx.helper.make_tensor_value_info(source.logits, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
