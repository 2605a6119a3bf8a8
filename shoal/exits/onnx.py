"""Dynamic inference outside Python: one ONNX file for each stage of a network with exits, and JSON that links them.

A single file for the whole network would compute all exits for all images. Instead the caller runs a stage, lets images
leave, and runs the next stage on the remaining images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.exits.cascades import Cascade
from shoal.exits.inference import check_thresholds
from shoal.storage.files import read_json, replacing

FORMAT = "shoal-cascade-1"
FILE = "cascade.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest allowed difference between a logit of the exported stages and of the original ones."""


def check_installed() -> None:
    """Raise ShoalError unless the packages for ONNX export are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ShoalError(f"found no {missing[0]}; need {', '.join(NEEDED)} for ONNX; pip install shoal[export]")


def write_stages(network: Cascade, images: Tensor, out: Path) -> list[dict[str, Any]]:
    """Write every stage to `out`; returns for each its file name and the names of its inputs and outputs.

    `images` [N, C, H, W] are example inputs for the exporter.
    """
    carried: tuple[Tensor, ...] = (images,)
    rows = []
    for i, stage in enumerate(network.stages):
        with torch.no_grad():
            _, *left = stage(*carried)
        inputs = [f"stage{i}_input{k}" for k in range(len(carried))] if i else ["images"]
        outputs = ["logits", *(f"stage{i + 1}_input{k}" for k in range(len(left)))]
        with replacing(out / f"stage{i}.onnx") as scratch:
            _write_onnx(stage, carried, inputs, outputs, scratch)
        rows.append({"file": f"stage{i}.onnx", "inputs": inputs, "outputs": outputs})
        carried = tuple(left)
    return rows


def _write_onnx(
    stage: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str], path: Path
) -> None:
    images = torch.export.Dim("images", min=1)
    with warnings.catch_warnings():
        # The exporter warns of its own deprecated calls, and that all inputs share one batch size, which is intended.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            stage,
            example,
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: images} for _ in example),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


class OnnxStage(nn.Module):
    """One stage in onnxruntime on the CPU. It maps tensors to tensors, as the stage it was exported from."""

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise ShoalError(f"found no usable ONNX at {path} ({error}); need the file that shoal wrote") from error
        self.inputs, self.outputs = list(inputs), list(outputs)

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """The logits and the tensors that the next stage reads."""
        given = {name: np.ascontiguousarray(t.numpy()) for name, t in zip(self.inputs, carried, strict=True)}
        return tuple(torch.from_numpy(value) for value in self.session.run(self.outputs, given))


@dataclass(frozen=True)
class Exported:
    """An exported network for `infer`: its stages in onnxruntime, the thresholds, and whether an ensemble answers."""

    network: Cascade
    thresholds: tuple[float, ...]
    ensemble: bool


def load_exported(folder: Path) -> Exported:
    """Open a folder that `shoal export` wrote. Raises ShoalError when it is damaged or onnxruntime is missing."""
    check_installed()
    body = read_json(folder / FILE)
    try:
        return open_stages(body, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShoalError(
            f"found {error!r} missing or malformed in {folder / FILE}; need what shoal export wrote"
        ) from error


def open_stages(body: dict[str, Any], folder: Path) -> Exported:
    """Build the stages in `folder` from the contents `body` of its JSON file. Raises ShoalError for another format."""
    if body["format"] != FORMAT:
        raise ShoalError(f"found format {body['format']!r} in {folder}; need {FORMAT!r}; export the run again")
    check_thresholds(body["thresholds"], len(body["stages"]), body["ensemble"])
    stages = [OnnxStage(folder / row["file"], row["inputs"], row["outputs"]) for row in body["stages"]]
    network = Cascade(stages, tuple(body["macs"]), tuple(body["alone"]), tuple(body["uncounted"]))
    return Exported(network, tuple(body["thresholds"]), body["ensemble"])


@torch.no_grad()
def largest_error(network: Cascade, exported: Exported, images: Tensor) -> float:
    """The largest absolute difference between both networks' logits. Raises ShoalError above `TOLERANCE`."""
    pairs = zip(network(images), exported.network(images), strict=True)
    error = max(float((a - b).abs().max()) for a, b in pairs)
    if error > TOLERANCE:
        raise ShoalError(
            f"found that onnxruntime's logits differ by {error:.3g}; need {TOLERANCE:g} or less; report this network"
        )
    return error
