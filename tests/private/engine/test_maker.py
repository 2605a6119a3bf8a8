"""SPU's part of the offline phase, by both parties in one process: results, bytes, and the lengths of its runs."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal.costs.model import REFILL_BYTES
from shoal.private.engine import maker
from shoal.private.engine.maker import SpuEngine, instances, pieces
from shoal.private.engine.spu import LinkLog, Settings
from shoal.private.protocol.layout import Layout
from tests.support.dealing import one_relu

Pair = tuple[np.ndarray, np.ndarray]
ROOT = Path(__file__).parents[3]
SETTINGS = Settings(64, 14, "YACL_Ferret", False, 1, 120.0, 30.0)


@pytest.mark.parametrize("length", [1, maker.MOST, maker.MOST + 1, 3 * maker.MOST - 1])
def test_pieces_are_few_and_equal(length: int) -> None:
    found = list(pieces(length))
    sizes = [piece.stop - piece.start for piece in found]
    assert len(found) == -(-length // maker.MOST)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == length
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]


def test_a_small_batch_opens_one_instance_of_ferret() -> None:
    layout = Layout(one_relu(64 * 10, 18))
    alone = maker.REFILLS * maker.REFILL // (64 * layout.word_ands)
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


class Both:
    """Both parties' engines, over memory."""

    def __init__(self, folder: Path) -> None:
        from spu import libspu

        desc = libspu.link.Desc()
        desc.id = uuid.uuid4().hex
        for rank in (0, 1):
            desc.add_party(str(rank), f"thread_{rank}")
        self.log, program = LinkLog(folder), one_relu(64, 18)

        def engine(rank: int) -> SpuEngine:
            return SpuEngine(program, libspu.link.create_mem(desc, rank), rank, SETTINGS, None)

        with ThreadPoolExecutor(2) as pool:
            self.engines = list(pool.map(engine, (0, 1)))

    def run(self, name: str, *operands: Pair) -> tuple[Pair, int]:
        """Both shares of the result, and the bytes that both parties sent."""
        self.log.read()
        with ThreadPoolExecutor(2) as pool:
            work = [pool.submit(getattr(self.engines[i], name), *(each[i] for each in operands)) for i in (0, 1)]
            shares = work[0].result(), work[1].result()
        return shares, sum(sent for sent, *_ in self.log.read())


@pytest.mark.slow
def test_operations_at_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, rng = Both(tmp_path), np.random.default_rng(0)
    monkeypatch.setattr(maker, "MOST", 100)

    def pair(count: int, top: int) -> Pair:
        return rng.integers(0, top, count, np.uint64), rng.integers(0, top, count, np.uint64)

    for count in (1, 8, 99, 100, 101, 333):
        a, b, bits, terms = pair(count, 2**64), pair(count, 2**64), pair(count, 2), pair(count, 2**64)
        both.engines[0].runs.clear()
        (x, y), sent = both.run("ands", a, b)
        assert len(both.engines[0].runs) == -(-count // 100)
        assert ((x ^ y) == (a[0] ^ a[1]) & (b[0] ^ b[1])).all()
        assert sent == 32 * count
        (x, y), _ = both.run("chosen", bits, terms)
        assert (x + y == (bits[0] ^ bits[1]) * (terms[0] + terms[1])).all()
        (x, y), sent = both.run("lifted", bits)
        assert (x + y == bits[0] ^ bits[1]).all()
        # Choice bits are padded to 128 in each run.
        assert 8 * count < sent <= 8 * count + 16 * -(-count // 100)


def test_a_process_that_makes_items_loads_no_pytorch() -> None:
    code = "import sys, shoal.private.engine.worker, shoal.private.engine.maker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
