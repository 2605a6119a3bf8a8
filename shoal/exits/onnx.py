"""Dynamic inference outside of Python: a network with exits as one ONNX file a stage, and JSON that chains them.

One file for the whole network would compute all exits for all images. Here the caller runs a stage, lets images leave,
and runs the next stage on those that are left.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.checkpoint import replacing, write_text
from shoal.early.cascade import Cascade, cascade
from shoal.early.dynamic import check_thresholds
from shoal.early_exit import read_thresholds
from shoal.errors import ShoalError
from shoal.graph import read_json
from shoal.run import Run
from shoal.training import load_data

FORMAT = "shoal-cascade-1"
FILE = "cascade.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""The most by which a logit of the exported stages may differ."""


def export(folder: Path, out: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Write a run's stages as `stage0.onnx`, ... and then `cascade.json` into the new or empty folder `out`.

    Stage 0 reads float32 images [N, C, H, W], (pixel / 255 - mean) / std; the first output of each stage is its
    logits, the others are the inputs of the next stage in order. Every tensor has one row an image and any number
    of them. Raises ShoalError without the extra, without thresholds, and when onnxruntime computes anything else.
    """
    _check_installed()
    run = Run(folder)
    spec, model = run.load_whole()
    network = cascade(model, spec.shape)
    thresholds, ensemble = read_thresholds(run, len(network))
    Run(out).check_free()
    data = load_data(run.config(), data_dir)
    out.mkdir(parents=True, exist_ok=True)
    images = data.normalise(data.test.images[:16])
    body = {"format": FORMAT, "classes": spec.classes, "shape": list(spec.shape), "mean": data.mean, "std": data.std}
    body |= {"thresholds": list(thresholds), "ensemble": ensemble, "macs": list(network.macs)}
    body |= {"alone": list(network.alone), "uncounted": list(network.uncounted)}
    body["stages"] = _write_stages(network, images[:2], out)
    error = _error(network, _loaded(body, out), images)
    write_text(out / FILE, json.dumps(body, indent=1))
    return {"out": str(out), "stages": len(network), "max_abs_logit_error": error}


def _check_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ShoalError(f"found no {missing[0]}; need {', '.join(NEEDED)} for ONNX; pip install shoal[export]")


def _write_stages(network: Cascade, images: Tensor, out: Path) -> list[dict[str, Any]]:
    """Write every stage, and say of each its file and the names of its inputs and outputs."""
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
        # The exporter warns of its own deprecated calls, and that inputs share the number of images, as they are to.
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
    """One stage in onnxruntime, on the CPU: tensors in, tensors out, as the stage that it was made from."""

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base but Exception
            raise ShoalError(f"found no usable ONNX at {path} ({error}); need the file that shoal wrote") from error
        self.inputs, self.outputs = list(inputs), list(outputs)

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """Logits and what the next stage reads."""
        given = {name: np.ascontiguousarray(t.numpy()) for name, t in zip(self.inputs, carried, strict=True)}
        return tuple(torch.from_numpy(value) for value in self.session.run(self.outputs, given))


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, for `dynamic.infer`: its stages in onnxruntime, thresholds, whether an ensemble answers."""

    network: Cascade
    thresholds: tuple[float, ...]
    ensemble: bool


def load_exported(folder: Path) -> Exported:
    """Open a folder that `export` wrote. Raises ShoalError when it is damaged, and without onnxruntime."""
    _check_installed()
    body = read_json(folder / FILE)
    try:
        return _loaded(body, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShoalError(f"found {error!r} missing or odd in {folder / FILE}; need what shoal export wrote") from error


def _loaded(body: dict[str, Any], folder: Path) -> Exported:
    if body["format"] != FORMAT:
        raise ShoalError(f"found format {body['format']!r} in {folder}; need {FORMAT!r}; export the run again")
    check_thresholds(body["thresholds"], len(body["stages"]), body["ensemble"])
    stages = [OnnxStage(folder / row["file"], row["inputs"], row["outputs"]) for row in body["stages"]]
    network = Cascade(stages, tuple(body["macs"]), tuple(body["alone"]), tuple(body["uncounted"]))
    return Exported(network, tuple(body["thresholds"]), body["ensemble"])


@torch.no_grad()
def _error(network: Cascade, exported: Exported, images: Tensor) -> float:
    """The largest difference of a logit. Raises ShoalError above `TOLERANCE`."""
    pairs = zip(network(images), exported.network(images), strict=True)
    error = max(float((a - b).abs().max()) for a, b in pairs)
    if error > TOLERANCE:
        raise ShoalError(
            f"found that onnxruntime's logits differ by {error:.3g}; need {TOLERANCE:g} or less; report this network"
        )
    return error
