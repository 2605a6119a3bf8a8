"""Rehearsal items: random words in the shape of prepared items, to time queries without preparation.

A query that uses one takes as long as any other, but its logits are meaningless. Use them only in pools made for the
measurement, with a server started for it.
"""

from __future__ import annotations

import secrets
import ssl
from pathlib import Path

import numpy as np

from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool, stage
from shoal.private.protocol.randomness import Half, new_seed
from shoal.private.transport.certs import fingerprint


def stock(layout: Layout, roots: tuple[Path, Path], certificate: Path, count: int, weights: str) -> None:
    """Add `count` rehearsal items to the pools of a client and its server, in the folders `roots` (client, server).

    `weights` is the digest of the server's weights.
    """
    digest, name = layout.program.digest(), "0" * 16
    owner = fingerprint(ssl.PEM_cert_to_DER_cert(certificate.read_text()))
    folders = roots[0] / digest[:16], roots[1] / digest[:16] / f"{owner}-{name}"
    for folder, client in zip(folders, (True, False), strict=True):
        Pool(folder, layout, client).close()
    (roots[0] / "client-id").write_text(name)
    for i in range(count):
        item = f"{secrets.token_hex(16)}-{i:06d}"
        for folder, client in zip(folders, (True, False), strict=True):
            stage(folder, item, _noise(layout, client), digest, client, "" if client else weights)
            (folder / f"{item}.staged").rename(folder / f"{item}.item")


def _noise(layout: Layout, client: bool) -> Half:
    fields = list(layout.fields(client))
    generator = np.random.default_rng(0)
    stored = {f.name: generator.integers(0, 2**64, f.shape, np.uint64) for f in fields if not f.seeded}
    return Half(new_seed(), stored, fields)
