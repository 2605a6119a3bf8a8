"""`Spec`: what a training network is, as data; `assemble` builds it. With a state dict it is its persistent form."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.attention_exits import add_aligned_exits
from shoal.branch import add_branches, commit_branches, set_gate
from shoal.channels import Kept, composed, keep_channels, written
from shoal.channels import parse as parse_channels
from shoal.checkpoint import write_text
from shoal.dropping import drop_blocks, drop_relus
from shoal.errors import ShoalError
from shoal.exits import add_exits, keep_exit
from shoal.graph import read_json
from shoal.mask import add_masks
from shoal.models import KNOWN, build
from shoal.pooled_exits import add_pooled_exits
from shoal.quadratic import add_quadratics
from shoal.sites import find_blocks, relu_sites
from shoal.slim import narrowed, slimmable
from shoal.substitution import parse, substitute
from shoal.surgery import normalise

GIVEN = "given"
"""The base of a Spec whose module the caller holds in memory."""

NAMED = ("dropped_blocks", "dropped", "masked", "branches", "exits")
"""The fields of a Spec that name sites."""

CHANNELS = ("base_channels", "kept_channels")
"""The fields of a Spec that say which channels stay."""

RESTS = ("identity", "quadratic")
"""What masked sites may do where they have no ReLU."""

EXIT_KINDS = ("plain", "aligned", "attention", "pooled")
"""What classifiers at `exits` are: a convolution each, an alignment net each, that behind an attention module, or
pooled features and an MLP, which point clouds need.
"""


@dataclass(frozen=True)
class Spec:
    """A base network and the surgery on it, in the order in which `assemble` does it.

    `base` is a zoo name, ``package.module:callable`` or ``given``; `shape` is the images' [C, H, W], which pixel
    masks fix. Of a base that is built by name, layers of the kinds `replaced` (``relu6=relu``) are exchanged first, and
    then its layers keep the outputs `base_channels` (``conv1=0-3,5/16``, as `channels.written` has them) alone.
    Blocks go then (`dropped_blocks`, each named by its inner ReLU site), then whole ReLU layers (`dropped`) of what is
    left; then `masked`, `branches` and `exits` name ReLU sites; `rest` is what masked sites do where they have no
    ReLU, ``identity`` or ``quadratic``; `exit_kind` is what the classifiers at `exits` (submodules, unless
    ``plain``) are; `widths` makes the network slimmable, `shared_affine` has its batch norms share scales
    and shifts, and `kept_width` (an index) cuts it to one of them; `kept_exit` cuts to one classifier and `committed`
    says that gated blocks have been replaced. Last, layers of what that gives keep the outputs `kept_channels` alone.
    """

    base: str
    classes: int
    shape: tuple[int, ...]
    width: float = 1.0
    resolution: float = 1.0
    masked: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    keep_skip: bool = True
    exits: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    kept_exit: int | None = None
    committed: bool = False
    dropped_blocks: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    rest: str = "identity"
    widths: tuple[float, ...] = ()
    kept_width: int | None = None
    exit_kind: str = "plain"
    shared_affine: bool = False
    base_channels: tuple[str, ...] = ()
    kept_channels: tuple[str, ...] = ()

    @property
    def is_reduced(self) -> bool:
        """Whether any surgery has been done on the base network, once its own layers are replaced and cut."""
        done = any(getattr(self, name) for name in (*NAMED, "widths", "kept_channels"))
        return done or self.kept_exit is not None

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read what `save` wrote. Raises ShoalError for a damaged or foreign file."""
        body = read_json(path)
        known = {f.name for f in fields(cls)}
        if not isinstance(body, dict) or not {"base", "classes", "shape"} <= set(body) <= known:
            raise ShoalError(f"found no network spec at {path}; need a spec.json that shoal wrote")
        bad = [k for k in (*NAMED, *CHANNELS) if not _is_names(body.get(k, []))]
        if bad:
            raise ShoalError(f"found no list of names at {bad[0]!r} in {path}; need a spec.json that shoal wrote")
        widths, kept = body.get("widths", []), body.get("kept_width")
        if not isinstance(widths, list) or not all(isinstance(part, (int, float)) for part in widths):
            raise ShoalError(f"found no list of numbers at 'widths' in {path}; need a spec.json that shoal wrote")
        if (kept is not None and kept not in range(len(widths))) or body.get("rest", "identity") not in RESTS:
            raise ShoalError(f"found a bad 'kept_width' or 'rest' in {path}; need a spec.json that shoal wrote")
        if body.get("exit_kind", "plain") not in EXIT_KINDS:
            raise ShoalError(f"found a bad 'exit_kind' in {path}; need a spec.json that shoal wrote")
        for name in CHANNELS:
            parse_channels(body.get(name, []))  # raises
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        return cls(**values)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def base_model(spec: Spec) -> nn.Module:
    """The base network of `spec`, without surgery but for layers `replaced` and outputs that are not `base_channels`.

    Raises ShoalError when it cannot be found or called, and when it has no such layers.
    """
    model = _found(spec)
    if spec.replaced:
        model = substitute(model, parse(spec.replaced))
    return keep_channels(model, spec.shape, parse_channels(spec.base_channels)) if spec.base_channels else model


def _found(spec: Spec) -> nn.Module:
    if spec.base in KNOWN:
        return build(spec.base, spec.classes, channels=spec.shape[0], width=spec.width, resolution=spec.resolution)
    if ":" in spec.base:
        return _call(_import(spec.base), spec)
    if spec.base == GIVEN:
        raise ShoalError("found a spec of a module given in memory; need that module; pass base= to assemble")
    return build(spec.base, spec.classes)  # raises, with the known names


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ShoalError(
            f"found no {reference!r} ({error}); need package.module:callable on the Python path"
        ) from error


def _call(factory: Any, spec: Spec) -> nn.Module:
    # A user's factory may or may not take the number of classes.
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
    """The network that `spec` describes, freshly initialised (or on `base`, which is left untouched).

    A `base` is what `base_model` gives: its layers are replaced and cut already. Raises ShoalError when a named site or
    block is not in the base network, or has been dropped before.
    """
    model: nn.Module = normalise(base if base is not None else base_model(spec))
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
    return add_aligned_exits(model, spec.exits, spec.classes, spec.shape, attention=spec.exit_kind == "attention")


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


def committed(spec: Spec, kept_exit: int) -> Spec:
    """The spec after training: one exit, open gates replaced."""
    return replace(spec, kept_exit=kept_exit, committed=bool(spec.branches))


def pruned_spec(spec: Spec, kept: Mapping[str, Kept]) -> Spec:
    """The spec of a network of `spec` whose layers keep the outputs `kept` of those that they have.

    Channels of a base without surgery are the base's own, so that it can be reduced; others are cut last.
    """
    field = "kept_channels" if spec.is_reduced else "base_channels"
    before = parse_channels(getattr(spec, field))
    return replace(spec, **{field: written(composed(before, kept))})  # type: ignore[arg-type]
