"""Eight clients at once, each a process with a pool of its own: nothing lost, nothing mixed, all accounted for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.waiting import HANG

SECONDS = float(os.environ.get("SHOAL_CROWD_SECONDS", "4"))
"""For longer there is the script itself, benchmarks/private/soak.py."""
CLIENTS = 8


@pytest.mark.slow
@pytest.mark.private
def test_a_crowd_of_clients_is_served_without_loss(tmp_path: Path, spu: None) -> None:
    out = tmp_path / "soak.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.private.soak",
        "--clients",
        str(CLIENTS),
        "--minutes",
        str(SECONDS / 60),
    ]
    done = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=HANG + 3 * SECONDS,
        cwd=ROOT,
    )
    assert out.exists(), done.stderr
    figures = json.loads(out.read_text())["figures"]
    for name in ("client_errors", "server_errors"):
        assert figures[name] == []
    for name in ("wrong", "lost", "repeated", "unequal_ledgers", "unaccounted", "left"):
        assert figures[name] == 0, name
    assert figures["seconds"] >= SECONDS
    assert figures["queries"] >= 8 * CLIENTS
    assert figures["worst_error"] <= figures["error_bound"]
    assert done.returncode == 0, done.stderr
