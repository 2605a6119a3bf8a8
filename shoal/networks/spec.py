"""`Spec`: a description of a network as data. `assemble` builds it; with a state dict it stores a trained network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shoal.channels.cut import Kept, composed, written
from shoal.channels.cut import parse as parse_channels
from shoal.errors import ShoalError
from shoal.storage.files import read_json, write_text

GIVEN = "given"
"""The `base` of a Spec whose base module exists only in the caller's memory."""
NAMED = ("dropped_blocks", "dropped", "masked", "branches", "exits")
"""The fields of a Spec that name sites."""
CHANNELS = ("base_channels", "kept_channels")
"""The fields of a Spec that name the channels to keep."""
RESTS = ("identity", "quadratic")
"""Functions at the positions of masked sites that have no ReLU."""
EXIT_KINDS = ("plain", "aligned", "attention", "attention-se", "attention-cbam", "attention-bam", "pooled")
"""Kinds of classifiers at `exits`.

``plain`` is a convolution, ``aligned`` an alignment network, ``attention`` the same after the attention module of
*Self-Distillation*, ``attention-se``, ``-cbam`` and ``-bam`` the same after that of SENet, CBAM and BAM, and ``pooled``
an MLP on pooled features, which point clouds need.
"""


@dataclass(frozen=True, repr=False)
class Spec:
    """A base network and the changes to it, which `assemble` makes in the order below.

    - `base` is a zoo name, ``package.module:callable``, ``given``, or the name of an ONNX file; `classes`, `width` and
      `resolution` are its arguments. A module of the user's own is imported from `folder`, or from the current folder
      if `folder` is empty or is no longer there. `shape` is the images' [C, H, W], which cannot change once there are
      masks.
    - `digest` is the SHA-256 of an ONNX file in `folder`, and empty for other networks.
    - `output`: index (from 0) of the only output of the base network that is kept, such as its logits without its
      features; None keeps all.
    - `replaced`: kinds of layers to replace, such as ``relu6=relu``. `base_channels`: the output channels that layers
      keep, such as ``conv1=0-3,5/16`` (see `shoal.channels.cut.written`). Neither is applied to a module that is passed
      to `assemble`.
    - `dropped_blocks`: residual blocks to remove, named by their inner ReLU sites. `dropped`: ReLU sites to remove.
    - `masked`: ReLU sites to mask; `rest` is the function at their positions without a ReLU (see `RESTS`).
    - `branches`: gated blocks, named by their inner ReLU sites; with `keep_skip` their skip paths stay.
    - `exits`: places of classifiers, which are ReLU sites for the kind ``plain`` and submodules for the others;
      `exit_kind` is one of `EXIT_KINDS`.
    - `kept_exit`: index of the only classifier that is kept. `committed`: whether gated blocks have been replaced by
      their branches.
    - `widths` makes the network slimmable; with `shared_affine` its batch norms share scales and shifts. `kept_width`:
      index of the only width that is kept.
    - `kept_channels`: the output channels that layers of the resulting network keep.
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
    folder: str = ""
    digest: str = ""
    output: int | None = None

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{f.name}={values[f.name]!r}" for f in fields(self) if values[f.name] != f.default]
        return f"Spec({', '.join(shown)})"

    @property
    def is_reduced(self) -> bool:
        """Whether the spec changes the base network, other than by `output`, `replaced` and `base_channels`."""
        done = any(getattr(self, name) for name in (*NAMED, "widths", "kept_channels"))
        return done or self.kept_exit is not None

    def save(self, path: Path) -> None:
        """Write the spec as JSON; the file is replaced atomically."""
        write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read what `save` wrote. Raises ShoalError when the file is missing, damaged or of another kind."""
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
        if not isinstance(output := body.get("output"), int | None) or isinstance(output, bool) or (output or 0) < 0:
            raise ShoalError(f"found a bad 'output' in {path}; need a spec.json that shoal wrote")
        if not re.fullmatch(r"([0-9a-f]{64})?", str(body.get("digest", ""))):
            raise ShoalError(f"found a bad 'digest' in {path}; need a spec.json that shoal wrote")
        for name in CHANNELS:
            parse_channels(body.get(name, []))  # raises ShoalError for a wrong format
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        return cls(**values)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def committed(spec: Spec, kept_exit: int) -> Spec:
    """The spec after training: only exit `kept_exit` stays, and gated blocks are replaced by their branches."""
    return replace(spec, kept_exit=kept_exit, committed=bool(spec.branches))


def pruned_spec(spec: Spec, kept: Mapping[str, Kept]) -> Spec:
    """The spec of the network of `spec` after its layers were pruned to the output channels `kept`.

    If `spec` makes no other change, the channels are those of the base network, so that it can be reduced later;
    otherwise they are cut last.
    """
    field = "kept_channels" if spec.is_reduced else "base_channels"
    before = parse_channels(getattr(spec, field))
    return replace(spec, **{field: written(composed(before, kept))})  # type: ignore[arg-type]
