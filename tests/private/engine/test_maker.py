"""SPU's part of the offline phase, by both parties in one process: results, bytes, and the lengths of its runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.costs.offline import REFILL_BYTES
from shoal.private.engine import runs
from shoal.private.engine.runs import instances, pieces
from shoal.private.protocol.layout import Layout
from tests.support.dealing import one_relu

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("length", [1, runs.MOST, runs.MOST + 1, 3 * runs.MOST - 1])
def test_pieces_are_few_and_equal(length: int) -> None:
    found = list(pieces(length))
    sizes = [piece.stop - piece.start for piece in found]
    assert len(found) == -(-length // runs.MOST)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == length
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]


def test_a_small_batch_opens_one_instance_of_ferret() -> None:
    layout = Layout(one_relu(64 * 10, 18))
    alone = runs.REFILLS * runs.REFILL // (64 * layout.word_ands)
    assert instances(layout, 1) == instances(layout, alone) == instances(layout, 2 * alone - 1) == 1
    assert instances(layout, 2 * alone + 2) == 2  # each makes its own transfers


def test_the_stated_limit_of_an_and_is_the_measured_one() -> None:
    found = json.loads((ROOT / "benchmarks/results/private_ands.json").read_text())["limits"]
    page = " ".join((ROOT / "docs/private_inference.md").read_text().split())
    assert f"takes {found['bit_us']:.2f} us of a core, of which {found['of_it_transfers_us']:.2f} us" in page
    assert f"takes {found['bit_bytes']:.2f} bytes, both directions together" in page
    assert f"takes {found['start_s']:.1f} s of a core and 1.5 MB, and a refill {found['refill_s']:.1f} s" in page
    assert f"A run of SPU takes {1000 * found['run_s']:.0f} ms" in page
    assert found["refill_bytes"] == 2 * REFILL_BYTES


@pytest.mark.slow
@pytest.mark.private
def test_operations_at_any_length(tmp_path: Path) -> None:
    """In a process of its own: JAX and a process that forks, as tests do, do not go together."""
    subprocess.run([sys.executable, "-m", "tests.private.engine.operations", tmp_path], cwd=ROOT, check=True)


def test_a_process_that_makes_items_loads_no_pytorch() -> None:
    code = "import sys, shoal.private.engine.worker, shoal.private.engine.maker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
