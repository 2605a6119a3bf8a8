"""An artifact on disk: a `client` half without weights, and a `server` half with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.private.program.program import Program, Weights
from shoal.storage.files import read_json, write_text

VERSION = "shoal-artifact-2"
SPU_VERSION = "0.9.5"
OT_KINDS = ("YACL_Ferret", "YACL_Softspoken")
SERVER_ADVICE = {
    "spu": "install the same SPU at both",
    "jax": "install the same JAX at both",
    "artifact": "use one version of shoal at both",
    "items": "use one version of shoal at both",
}
"""Advice for terms of the two parties that differ, where the cause is not the artifact's contents."""


@dataclass(frozen=True)
class Artifact:
    """One half of an artifact, as a party reads it. `terms` must be equal at both parties."""

    folder: Path
    program: Program
    terms: dict[str, Any]


def save_artifact(folder: Path | str, program: Program, weights: Weights, *, ot_kind: str = OT_KINDS[0]) -> None:
    """Write `client/` (program, manifest) and `server/` (the same and the weights) into `folder`.

    `ot_kind` chooses SPU's oblivious transfers. "YACL_Ferret" sends an eighth of the bytes for a ReLU, and takes half
    the time when there are few ReLUs. "YACL_Softspoken" starts in under a second, where Ferret takes seconds, and
    needs about 0.5 GB less memory; it suits a single query over a fast network. Raises ShoalError when weights and
    program do not belong together.
    """
    if ot_kind not in OT_KINDS:
        raise ShoalError(f"found ot_kind {ot_kind!r}; need one of {', '.join(OT_KINDS)}; leave it at its default")
    weights.check(program)
    for half in ("client", "server"):
        program.save(Path(folder) / half)
        manifest = _terms(program, ot_kind)
        write_text(Path(folder) / half / "manifest.json", json.dumps(manifest, indent=1))
    weights.save(Path(folder) / "server")


def load_artifact(folder: Path | str, half: str) -> Artifact:
    """Read the `half` ("client" or "server") of an artifact; `folder` is the whole artifact or that half.

    Raises ShoalError for another version, and for files that are missing, altered or of different artifacts.
    """
    folder = Path(folder)
    folder = folder / half if (folder / half).is_dir() else folder
    _check_half(folder, half)
    terms = read_json(folder / "manifest.json")
    version = terms.get("artifact") if isinstance(terms, dict) else None
    if version != VERSION:
        raise ShoalError(f"found artifact version {version!r} at {folder}; need {VERSION!r}; compile it again")
    program = Program.load(folder)
    if terms != _terms(program, terms.get("ot_kind")) or terms["ot_kind"] not in OT_KINDS:
        raise ShoalError(
            f"found a manifest that does not fit the program at {folder}; need one artifact's; save it again"
        )
    return Artifact(folder, program, terms)


def _check_half(folder: Path, half: str) -> None:
    """Raise ShoalError when `folder` is the other half of an artifact: only the server's has weights."""
    whole, weights = (folder / "manifest.json").exists(), (folder / "weights.safetensors").exists()
    if whole and weights != (half == "server"):
        other = "server" if weights else "client"
        raise ShoalError(
            f"found the {other}'s half of an artifact at {folder}; need the {half}'s; give {half}/ of what shoal "
            "compile wrote"
        )


def _terms(program: Program, ot_kind: Any) -> dict[str, Any]:
    return {
        "artifact": VERSION,
        "compiled_for_spu": SPU_VERSION,
        "protocol": "CHEETAH",
        "digest": program.digest(),
        "field_bits": program.field_bits,
        "fraction_bits": program.fraction_bits,
        "ot_kind": ot_kind,
        "products": program.products,
    }
