"""What `compile` writes for the parties: `client/` without weights, `server/` with them; how each is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.checkpoint import write_text
from shoal.errors import ShoalError
from shoal.graph import read_json
from shoal.private.program import Program, Weights
from shoal.private.spu import Protocol, describe, spu_version

VERSION = "shoal-artifact-1"


def save_artifact(folder: Path | str, program: Program, weights: Weights, protocol: Protocol | None = None) -> None:
    """Write `folder/client` and `folder/server`. The client's half holds no weight."""
    manifest = {
        "version": VERSION,
        "spu": spu_version(),
        "digest": program.digest(),
        "mode": "direct",
        "protocol": describe(protocol or Protocol()),
    }
    for side in ("client", "server"):
        half = Path(folder) / side
        program.save(half)
        write_text(half / "manifest.json", json.dumps(manifest, indent=1))
    weights.save(Path(folder) / "server")


def load_half(folder: Path | str) -> tuple[Program, dict[str, Any]]:
    """The public program and the manifest of one half.

    Raises ShoalError for a foreign or altered artifact, another artifact version, and another SPU than installed.
    """
    folder = Path(folder)
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != VERSION:
        raise ShoalError(f"found artifact version {found!r} at {folder}; need {VERSION!r}; compile again")
    program = Program.load(folder)
    if program.digest() != manifest.get("digest"):
        raise ShoalError(f"found a program unlike its manifest at {folder}; need one compilation; compile again")
    if manifest.get("spu") != spu_version():
        raise ShoalError(f"found SPU {spu_version()}; need {manifest.get('spu')}, which {folder} was made for")
    return program, manifest


def protocol_of(manifest: dict[str, Any]) -> Protocol:
    """The protocol settings of a manifest. Raises ShoalError for unknown ones."""
    try:
        return Protocol(**manifest["protocol"])
    except (KeyError, TypeError) as error:
        raise ShoalError(f"found an unknown protocol setting in the manifest ({error}); compile again") from error


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """One sentence on the first thing in which two manifests differ, or None."""
    for key in ("version", "spu", "digest", "mode", "protocol"):
        if mine.get(key) != theirs.get(key):
            return (
                f"found {key} {str(theirs.get(key))[:200]} at the client; need {str(mine.get(key))[:200]}, the "
                "server's; use both halves of one compilation"
            )
    return None
