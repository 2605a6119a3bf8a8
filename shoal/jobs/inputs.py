"""The loading and checking of data sets, networks and teachers, which several jobs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.data.normalisation import normalised
from shoal.errors import ShoalError
from shoal.exits.classifiers import check_one_classifier
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.recipes.stages import check_teacher
from shoal.storage.files import read_json
from shoal.storage.origins import CACHE, IMAGES, Config, difference, fingerprints, placed
from shoal.storage.run import Run
from shoal.training.schedule import Schedule

T = TypeVar("T")


def preset_of(name: str, presets: Mapping[str, T]) -> T:
    """The preset of this name. Raises ShoalError, which lists all names, for an unknown one."""
    if name not in presets:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(presets)}; choose one")
    return presets[name]


def epochs_of(text: str, stages: Sequence[str]) -> tuple[int, ...]:
    """The numbers of epochs in text such as ``2,6,16``, one for each of `stages`. Raises ShoalError for other text."""
    parts = text.split(",")
    if len(parts) != len(stages) or not all(part.strip().isdigit() for part in parts):
        raise ShoalError(f"found --epochs {text!r}; need {len(stages)} numbers: {','.join(stages)}; correct it")
    return tuple(int(part) for part in parts)


def load_data(config: Config, data_dir: Path | None, device: str = "cpu", other: bool = False) -> Dataset:
    """The data set of a run's configuration, from `data_dir` or else from where the run read it.

    Raises ShoalError, unless `other`, when the data are not those that the configuration has a fingerprint of: if an
    image was added or removed, the splits would be drawn anew, and training images could be tested.
    """
    there, size = placed(config, data_dir), config.get("size")
    data = load(
        there["data"],
        there.get("data_dir"),
        seed=config["seed"],
        limit=config.get("limit"),
        size=size if size is None or isinstance(size, int) else tuple(size),
        fit=config.get("fit"),
        channels=config.get("channels"),
        cache=config.get(CACHE),
    )
    if config.get("mean"):
        data = normalised(data, config["mean"], config["std"])
    known = fingerprints(config).get("data")
    if known is not None and not other and known != data.fingerprint():
        raise ShoalError(
            f"found other data at {there.get('data_dir') or there['data']} than the run began with (images or labels "
            "changed, came or went); need the same, because the splits depend on them; restore them, give --data-dir "
            "the folder that holds them, or train anew"
        )
    return data.to(device)


def longer(schedule: Schedule, epochs: int | None) -> Schedule:
    """The schedule with another number of epochs, and drops of the learning rate moved in proportion.

    None keeps the number. Raises ShoalError for fewer than 1.
    """
    if epochs is None:
        return schedule
    if epochs < 1:
        raise ShoalError(f"found {epochs} epochs; need 1 or more")
    part = epochs / schedule.epochs
    return replace(schedule, epochs=epochs, milestones=tuple(max(1, round(m * part)) for m in schedule.milestones))


def teacher_of(folder: Path) -> tuple[Spec, nn.Module, Config]:
    """The spec, network and configuration of a teacher's run. Raises ShoalError for a reduced network."""
    source = Run(folder)
    spec, network = load_network(source)
    check_teacher(spec)
    return spec, network, source.config()


def other_teacher(folder: Path | None, config: Config, device: str) -> tuple[Spec | None, nn.Module | None]:
    """The spec and network of a further teacher's run, for a job with the configuration `config`; None without one.

    Raises ShoalError for a reduced network, and unless it was trained on the same images.
    """
    if folder is None:
        return None, None
    spec, network, origin = teacher_of(folder)
    _check_same_images(config, origin, "teacher")
    return spec, network.to(device)


def _check_same_images(config: Config, origin: Config, kind: str) -> None:
    """Raise ShoalError unless a `kind` of network, of the configuration `origin`, was trained on `config`'s images."""
    names = ("data", "limit", "seed", *IMAGES)
    name = difference(*({key: known.get(key) for key in names} for known in (origin, config)))
    if name is not None:
        what = f"the images' {name}" if name in ("mean", "std") else f"--{name}"
        raise ShoalError(
            f"found {what} {config.get(name)} and a {kind} of {name} {origin.get(name)}; need the same, so that "
            f"images and the validation split are the same; train a {kind} with it"
        )


def plain_network(run: Run, given: Path | None) -> tuple[Spec, nn.Module] | None:
    """The plain network that a run's exits are compared with: the run's own baseline, or that of the run `given`.

    A run of self-distill or distill has a baseline, which was trained for as long. Of any other run it is the network
    itself. None if nothing is given and the run has no baseline. Raises ShoalError for a network with several
    classifiers, and unless it was trained on the same images.
    """
    source = run if given is None else Run(given)
    if source.has("baseline.json"):
        spec, network = load_network(source, "baseline")
    elif given is None:
        return None
    else:
        spec, network, _ = teacher_of(given)
    _check_same_images(run.config(), source.config(), "baseline")
    check_one_classifier(network, spec.base)
    return spec, network


def given_sensitivity(path: Path | None) -> dict[str, float] | None:
    """The sensitivities in a JSON file, by site. Raises ShoalError unless it maps names to numbers."""
    if path is None:
        return None
    body = read_json(path)
    numbers = isinstance(body, dict) and all(isinstance(v, (int, float)) for v in body.values())
    if not body or not numbers:
        raise ShoalError(f"found no sensitivities at {path}; need JSON with a number for each site; mend the file")
    return dict(body)
