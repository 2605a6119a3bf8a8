"""`shoal pool`: the items that are left at either party, read from disk."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.jobs.pool import pool
from shoal.private.transport.certs import TLS
from tests.support.dealing import stock
from tests.support.parties import Case


def test_both_parties_count_their_items(small: Case, certs: dict[str, TLS], tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert pool(small.folder / "client", mine)["ready"] == 0
    stock(small, mine, theirs, certs["client"].cert, 3)
    assert pool(small.folder / "client", mine)["ready"] == 3
    server = pool(small.folder / "server", theirs)
    assert server["ready"] == 3
    assert list(server["clients"].values()) == [3]
    for half, root in (("client", mine), ("server", theirs)):
        said = CliRunner().invoke(app, ["pool", str(small.folder / half), "--pool", str(root), "--json"])
        assert json.loads(said.stdout)["ready"] == 3
        assert "3" in CliRunner().invoke(app, ["pool", str(small.folder / half), "--pool", str(root)]).stdout
