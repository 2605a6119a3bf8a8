"""The job of `shoal adopt`: make a run of a network that was trained elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from shoal.conversion.parity import largest_difference
from shoal.data.dataset import Dataset
from shoal.data.normalisation import NORMALISATIONS, moments_of, normalised
from shoal.errors import ShoalError, ShoalWarning
from shoal.jobs.inputs import load_data
from shoal.jobs.options import ARGUMENT, ImageOptions, OutputOption
from shoal.networks.adoption import check_logits, fit_weights
from shoal.networks.assembly import assemble, located, own_network, with_output
from shoal.networks.figures import figures
from shoal.networks.onnx_files import ENDING, open_file
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.storage.origins import Config, began
from shoal.storage.run import Run
from shoal.storage.summary import Figures, write_alone
from shoal.storage.weight_files import read_weights
from shoal.training.settings import Settings

COMPARED = 32
"""Number of test images on which a converted network is compared with its ONNX file."""
FAR = 0.5
"""Percentage points below the accuracy that a checkpoint states from which a warning is given."""


@dataclass(frozen=True)
class Request(ImageOptions, OutputOption):
    """The options of `shoal adopt`."""

    model: str = field(metadata=ARGUMENT)
    """The definition of the network: package.module:callable that returns an nn.Module, or a built-in network such as
    resnet18; or an ONNX file (.onnx), which has the weights, too."""
    data: str
    """The data set that the network was trained for: digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet, or
    the path of a folder of images."""
    out: Path
    """The run folder to write; it must be new or empty."""
    weights: Path | None = None
    """The trained weights, unless they are in an ONNX file: a file of torch.save (.pt, .pth, .th, .pth.tar) or
    .safetensors. Weights may be nested, such as under state_dict, and names may have a prefix such as module."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published. If left out, .data and /usr/share/datasets are
    searched; digits needs none."""
    normalise: str | None = field(default=None, metadata={"values": NORMALISATIONS})
    """How images were normalised in training, by name; none leaves pixels in 0 to 1. If neither this nor --mean is
    given: the mean and standard deviation of the data set."""
    mean: tuple[float, ...] = ()
    """Mean of each channel in training, in units of pixel / 255, such as 0.485,0.456,0.406."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel in training, in units of pixel / 255, such as 0.229,0.224,0.225."""
    classes: int | None = None
    """Number of classes of the network; that of the data set if left out."""
    width: float = 1.0
    """Factor for the number of channels of every layer, such as 0.5. A callable of your own must take it as `width`."""
    resolution: float = 1.0
    """Factor for the height and width of the feature maps: 1, 0.5 or 0.25. A callable of your own must take it as
    `resolution`."""
    seed: int = 0
    """Seed of the validation split."""
    limit: int | None = None
    """Use only this many training images in what follows; all if left out."""
    device: str = "cpu"
    """Device to evaluate on: cpu or cuda."""

    def config(self) -> Config:
        """The settings that the run records, without its normalisation."""
        names = ("data", "data_dir", "seed", "limit", "model", "width", "resolution", "weights")
        own = {"command": "adopt"} | {name: getattr(self, name) for name in names}
        return own | self.image_settings() | self.output_settings()

    def spec(self, data: Dataset) -> Spec:
        """The network's spec for this data set."""
        base, folder = located(self.model)
        classes = self.classes or data.classes
        return Spec(base, classes, data.shape, self.width, self.resolution, folder=folder, output=self.output)


class Adopted(Figures):
    """Figures of the network, the accuracy that its file states (or None), what was adapted, and the run folder.

    `onnx_difference` is the largest difference of a logit from onnxruntime's on test images; None for other files.
    """

    claimed: float | None
    onnx_difference: float | None
    adapted: str
    out: str


@dataclass(frozen=True)
class Trained:
    """A trained network, its spec, and what an `Adopted` says about its file."""

    spec: Spec
    network: nn.Module
    claimed: float | None
    notes: Sequence[str]
    difference: float | None = None


def adopt(request: Request) -> Adopted:
    """Write a run folder with the network, and evaluate it on the test split.

    The file's own statement of its accuracy is returned beside the measured one; a warning says if the measured one is
    lower. Raises ShoalError, before anything is written, when the data, the network or its weights cannot be read or do
    not fit together.
    """
    settings = Settings(device=request.device)
    settings.check()
    moments = moments_of(request.normalise, request.mean, request.std)
    Run(request.out).check_free()
    is_file = _is_onnx(request)
    data = load_data(request.config(), request.data_dir, request.device)
    data = normalised(data, *moments) if moments else data
    found = _from_onnx(request, data) if is_file else _from_weights(request, data)
    check_logits(found.network, found.spec)
    model = assemble(found.spec, found.network).eval()
    measured = figures(model.to(request.device), data, found.spec, settings)
    _compare(measured["accuracy"], found.claimed, data)
    config = request.config() | {"mean": list(data.mean), "std": list(data.std)}
    run = Run.create(request.out, began(config, data, request.data_dir))
    save_network(run, found.spec, model.cpu())
    write_alone(run, data.name, found.spec.base, measured)
    adapted = "; ".join(found.notes) or "nothing"
    return Adopted(
        **measured, claimed=found.claimed, onnx_difference=found.difference, adapted=adapted, out=str(request.out)
    )


def _is_onnx(request: Request) -> bool:
    """Whether the network is an ONNX file. Raises ShoalError for options that do not go with it, or lack."""
    if not request.model.endswith(ENDING):
        if request.weights is None:
            raise ShoalError(
                f"found no weights for {request.model}; need them, unless the network is an ONNX file; give --weights"
            )
        return False
    if request.weights is not None:
        raise ShoalError(
            f"found --weights {request.weights} beside {request.model}; need one of them, because an ONNX file has its "
            "own weights; leave out --weights"
        )
    if request.output is not None:
        raise ShoalError(
            f"found --output {request.output} with {request.model}; need none, because a network of an ONNX file has "
            "one output; leave it out"
        )
    if (request.width, request.resolution) != (1.0, 1.0):
        raise ShoalError(
            f"found --width or --resolution with {request.model}; need neither, because an ONNX file has one size; "
            "leave them out"
        )
    return True


def _from_weights(request: Request, data: Dataset) -> Trained:
    assert request.weights is not None
    spec = request.spec(data)
    # With all outputs, since the file also has the weights of those that are left out.
    network, weights = own_network(replace(spec, output=None)), read_weights(request.weights)
    notes = fit_weights(network, weights)
    return Trained(spec, with_output(network, spec), weights.claimed, notes)


def _from_onnx(request: Request, data: Dataset) -> Trained:
    spec, converted = open_file(Path(request.model), data, request.classes)
    images = data.normalise(data.test.images[:COMPARED]).cpu()
    return Trained(spec, converted.network, None, converted.notes, largest_difference(converted, images))


def _compare(accuracy: float, claimed: float | None, data: Dataset) -> None:
    """Warn if a network is less accurate than its file states, or no better than guessing."""
    guess = 100.0 / data.classes
    below = claimed is not None and accuracy < claimed - FAR
    if below or accuracy < 1.5 * guess:
        stated = f"where its file states {claimed:.2f} %" if below else f"where guessing gives {guess:.2f} %"
        mean, std = (", ".join(f"{v:.4g}" for v in part) for part in (data.mean, data.std))
        warnings.warn(
            f"found {accuracy:.2f} % test accuracy, {stated}; need the images as in training; check --normalise (used: "
            f"mean {mean}, standard deviation {std}), the order of the classes and the image size",
            ShoalWarning,
            stacklevel=2,
        )
