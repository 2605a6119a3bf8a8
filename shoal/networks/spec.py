"""`Spec`: what a training network is, as data; `assemble` builds it. With a state dict it is its persistent form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shoal.channels.cut import Kept, composed, written
from shoal.channels.cut import parse as parse_channels
from shoal.errors import ShoalError
from shoal.storage.files import read_json, write_text

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
