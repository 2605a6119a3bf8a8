"""SPU's operations on bits and words of any length, by both parties in one process: results, bytes, and runs.

    python -m tests.private.engine.operations FOLDER

`test_maker` runs this. FOLDER takes SPU's log.
"""

from __future__ import annotations

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shoal.private.engine import runs
from shoal.private.engine.maker import SpuEngine
from shoal.private.engine.spu import LinkLog, Settings
from tests.support.dealing import one_relu

Pair = tuple[np.ndarray, np.ndarray]
SETTINGS = Settings(64, 14, "YACL_Ferret", 1, 120.0, 30.0)


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


def main() -> None:
    both, rng = Both(Path(sys.argv[1])), np.random.default_rng(0)
    runs.MOST = 100

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


if __name__ == "__main__":
    main()
