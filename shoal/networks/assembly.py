"""Building the module that a `Spec` describes."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from shoal.channels.cut import keep_channels
from shoal.channels.cut import parse as parse_channels
from shoal.channels.slimmable import narrowed, slimmable
from shoal.errors import ShoalError, first_line
from shoal.exits.attention import add_aligned_exits
from shoal.exits.classifiers import add_exits, count_exits, keep_exit
from shoal.exits.pooled import add_pooled_exits
from shoal.models import KNOWN, build
from shoal.networks.onnx_files import ENDING, network_in_file
from shoal.networks.spec import GIVEN, Spec
from shoal.reduction.dropping import drop_blocks, drop_relus
from shoal.reduction.gates import add_branches, commit_branches, set_gate
from shoal.reduction.masks import add_masks
from shoal.reduction.quadratic import add_quadratics
from shoal.surgery.normal_form import NORMAL, normalise
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.substitution import parse, substitute


def own_network(spec: Spec) -> nn.Module:
    """The base network of `spec`; a user's own module is searched for in `spec.folder` and in the current folder.

    Raises ShoalError when it cannot be found or built, also when the user's code raises another exception.
    """
    try:
        with _searched_first(spec.folder):
            return base_model(spec)
    except ShoalError:
        raise
    except Exception as error:
        raise ShoalError(
            f"found that {spec.base!r} gives no network ({type(error).__name__}: {first_line(error)}); need "
            "package.module:callable without arguments, or with `classes` alone; wrap yours in such a function"
        ) from error


@contextmanager
def _searched_first(folder: str) -> Iterator[None]:
    """Put `folder`, if it exists, and the current folder first in the import path.

    `python -m` puts the current folder there, and a console script does not.
    """
    places = [place for place in (folder, os.getcwd()) if place and os.path.isdir(place)]
    sys.path[:0] = places
    try:
        yield
    finally:
        for place in places:
            sys.path.remove(place)


def located(reference: str) -> tuple[str, str]:
    """The `base` and `folder` of a `Spec` for a network as a user names it.

    That is a built-in name, ``package.module:callable``, or ``folder/file.py:callable``. The folder is that of the
    file, or the current one if the module is there; it is empty for built-in networks and installed packages. Raises
    ShoalError for a file or module without a callable.
    """
    module, colon, name = reference.rpartition(":")
    if not colon:
        return _checked_name(reference), ""
    if module.endswith(".py"):
        path = Path(module).absolute()
        return f"{path.stem}:{name}", str(path.parent)
    top = Path(module.partition(".")[0])
    here = top.name != "" and (top.with_suffix(".py").exists() or top.is_dir())
    return reference, str(Path.cwd()) if here else ""


def _checked_name(reference: str) -> str:
    if reference.endswith(ENDING):
        raise ShoalError(
            f"found an ONNX file, {reference!r}; need a run or a definition in PyTorch; make a run of it with "
            "shoal adopt"
        )
    file = Path(reference if reference.endswith(".py") else f"{reference}.py")
    if reference not in KNOWN and file.exists():
        raise ShoalError(
            f"found {reference!r}, a file without the name of a network; need {reference}:NAME, with the class or the "
            "function that returns the network; add its name"
        )
    return reference


def base_model(spec: Spec) -> nn.Module:
    """The base network of `spec`, newly initialised, after `output`, `replaced` and `base_channels` but no others.

    Raises ShoalError when it cannot be found or called, and when it does not have what these fields name.
    """
    model = with_output(_found(spec), spec)
    if spec.replaced:
        model = substitute(model, parse(spec.replaced), spec.shape)
    return keep_channels(model, spec.shape, parse_channels(spec.base_channels)) if spec.base_channels else model


def with_output(model: nn.Module, spec: Spec) -> nn.Module:
    """`model` with only the output that `spec` names; `model` itself if that is all, or if the others were cut before.

    Raises ShoalError when there is no such output.
    """
    cut = isinstance(model, fx.GraphModule) and model.meta.get(NORMAL) and count_exits(model) == 1
    return model if spec.output is None or cut else normalise(model, spec.shape, spec.output)


def _found(spec: Spec) -> nn.Module:
    if spec.digest:
        return network_in_file(spec)
    if spec.base in KNOWN:
        return build(spec.base, spec.classes, channels=spec.shape[0], width=spec.width, resolution=spec.resolution)
    if ":" in spec.base:
        return _call(_import(spec.base), spec)
    if spec.base == GIVEN:
        raise ShoalError("found a spec of a module given in memory; need that module; pass base= to assemble")
    return build(spec.base, spec.classes)  # raises an error that lists the known names


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ShoalError(
            f"found no {reference!r} ({error}); need package.module:callable on the Python path"
        ) from error


def _call(factory: Any, spec: Spec) -> nn.Module:
    # A user's function may or may not have these arguments.
    takes = inspect.signature(factory).parameters
    scales = {k: v for k, v in (("width", spec.width), ("resolution", spec.resolution)) if v != 1.0}
    missing = [name for name in scales if name not in takes]
    if missing:
        raise ShoalError(
            f"found {missing[0]} {scales[missing[0]]:g} for {spec.base}; need a function that takes `{missing[0]}`; "
            "add that argument, or leave the network at its own size"
        )
    arguments: dict[str, Any] = {"classes": spec.classes, "num_classes": spec.classes, **scales}
    model = factory(**{k: v for k, v in arguments.items() if k in takes})
    if not isinstance(model, nn.Module):
        raise ShoalError(f"found that {spec.base} gives a {type(model).__name__}; need a torch.nn.Module")
    return model


def assemble(spec: Spec, base: nn.Module | None = None) -> nn.Module:
    """The network that `spec` describes: newly initialised, or made from a copy of `base` with its weights.

    `base` must be like the result of `base_model`, with `replaced` and `base_channels` already applied; it may still
    have all outputs. Raises ShoalError when the base network does not have a named output, site or block, or no longer
    has it.
    """
    model: nn.Module = normalise(with_output(base, spec) if base is not None else base_model(spec), spec.shape)
    if spec.dropped_blocks:
        model = drop_blocks(model, spec.shape, spec.dropped_blocks)
    if spec.dropped:
        model = drop_relus(model, spec.dropped)
    if spec.masked:
        shapes = {site.name: site.shape for site in relu_sites(model, spec.shape)}
        _check_names(spec.masked, shapes)
        masks = {name: torch.ones(shapes[name], dtype=torch.bool) for name in spec.masked}
        model = add_quadratics(model, masks) if spec.rest == "quadratic" else add_masks(model, masks)
    if spec.branches:
        blocks = {block.name: block for block in find_blocks(model, spec.shape)}
        _check_names(spec.branches, blocks)
        model = add_branches(model, [blocks[name] for name in spec.branches], keep_skip=spec.keep_skip)
    if spec.exits:
        model = _with_exits(model, spec)
    model = _finish(model, spec)
    model = _slimmed(model, spec) if spec.widths else model
    return keep_channels(model, spec.shape, parse_channels(spec.kept_channels)) if spec.kept_channels else model


def _with_exits(model: nn.Module, spec: Spec) -> nn.Module:
    if spec.exit_kind == "plain":
        return add_exits(model, spec.exits, spec.classes, spec.shape)
    if spec.exit_kind == "pooled":
        return add_pooled_exits(model, spec.exits, spec.classes, spec.shape)
    return add_aligned_exits(model, spec.exits, spec.classes, spec.shape, kind=spec.exit_kind)


def _slimmed(model: nn.Module, spec: Spec) -> nn.Module:
    slim = slimmable(model, spec.shape, spec.widths, shared_affine=spec.shared_affine)
    return slim if spec.kept_width is None else narrowed(slim, spec.kept_width, spec.shape)


def _check_names(wanted: tuple[str, ...], known: dict[str, Any]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ShoalError(
            f"found no site {missing[0]!r} in the base network; need the network that the spec was made for"
        )


def _finish(model: nn.Module, spec: Spec) -> nn.Module:
    if spec.kept_exit is not None:
        model = keep_exit(model, spec.kept_exit)
    if spec.committed:
        set_gate(model, 1.0)
        model = commit_branches(model)
    return model
