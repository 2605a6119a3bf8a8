"""The job of `shoal pool`: how many prepared items a party has on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.private.monitoring.metrics import short_name
from shoal.private.program.artifact import load_artifact
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import ready_names
from shoal.private.serving.budget import read_spent


def pool(artifact: Path, root: Path | None) -> dict[str, Any]:
    """The ready items of one half of an artifact, read from disk: the client's pool, or all pools of the server.

    `root` is the folder of the items, the folder `pool` next to the artifact if None. ``clients`` has the number of
    items of each client at the server, by the short name that its log uses, and ``spent`` the queries that each
    certificate has spent, by the first 16 hex digits of its fingerprint. Raises ShoalError for a wrong artifact.
    """
    server = (artifact / "weights.safetensors").exists()
    half = load_artifact(artifact, "server" if server else "client")
    folder = (half.folder / "pool" if root is None else root) / half.terms["digest"][:16]
    size = Layout(half.program).stored_bytes(not server)
    if not server:
        ready = len(ready_names(folder))
        return {"folder": str(folder), "ready": ready, "bytes": ready * size}
    clients = {short_name(path.name): len(ready_names(path)) for path in sorted(folder.glob("*-*"))}
    ready = sum(clients.values())
    return {
        "folder": str(folder),
        "ready": ready,
        "bytes": ready * size,
        "clients": clients,
        "spent": read_spent(folder),
    }
