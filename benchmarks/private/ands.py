"""What one run of SPU costs in the offline phase, by its length: seconds, seconds of a core, bytes, messages, memory.

    python -m benchmarks.private.ands --out benchmarks/results/private_ands.json

Two processes on loopback, without TLS. A run in which Ferret made new transfers is marked: its messages are many. The
seconds of a core are those of one party, and vary little on a busy machine; the other seconds vary much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.private.spu_parties import free_port
from shoal.private.engine.maker import SpuEngine
from shoal.private.engine.runs import MOST, REFILL
from shoal.private.engine.spu import LinkLog, Settings, open_link
from shoal.private.program.program import VERSION, Program
from shoal.private.program.steps import Step
from shoal.private.protocol.bitslice import WORD
from shoal.storage.environment import environment

FEW = 100
"""More messages than this in one run are those of a refill."""
RUNS = {"ands": (2, (WORD, WORD)), "chosen": (2, (1, WORD)), "lifted": (1, (1,))}
"""Of each operation, the transfers per bit or word, and the bits of its operands."""


def engine(rank: int, hosts: tuple[str, str], folder: Path) -> tuple[SpuEngine, LinkLog, dict[str, float]]:
    """One party's engine, its log, and the cost of its start."""
    log, settings = LinkLog(folder), Settings(64, 14, "YACL_Ferret", False, 1, 600.0, 60.0)
    facts: dict[str, Any] = {"preprocessing": {}, "error_bound": 0.0, "sign_bits": {"r": 18}}
    program = Program(VERSION, 14, 64, "x", (64,), (Step("r", "relu", ("x",), (64,)),), ("r",), {}, **facts)
    link = open_link(rank, hosts, "ands", None, settings)
    wall, core = time.perf_counter(), time.process_time()
    made = SpuEngine(program, link, rank, settings, None)
    return made, log, cost(log, wall, core)


def cost(log: LinkLog, wall: float, core: float) -> dict[str, float]:
    """What passed since the clocks showed `wall` and `core`."""
    lines = log.read()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = {"seconds": time.perf_counter() - wall, "core_s": time.process_time() - core, "peak_mib": memory}
    return spent | {"bytes": sum(a + b for a, b, _, _ in lines), "messages": sum(c + d for *_, c, d in lines)}


def party(rank: int, hosts: tuple[str, str], plan: list[tuple[str, int, int]], out: Path) -> None:
    """Run all of `plan` at one party: (operation, words, repetitions)."""
    made, log, start = engine(rank, hosts, out.parent)
    rows, rng = [{"operation": "start", "words": 0} | start], np.random.default_rng(rank)
    for name, count, repetitions in plan:
        for _ in range(repetitions):
            operands = [rng.integers(0, 2**bits, count, np.uint64) for bits in RUNS[name][1]]
            wall, core = time.perf_counter(), time.process_time()
            getattr(made, name)(*operands)
            rows.append({"operation": name, "words": count} | cost(log, wall, core))
    out.write_text(json.dumps(rows))
    # SPU's threads may still wait for the peer, and a normal exit would wait for them.
    os._exit(0)


def limits(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Core seconds of the start, a refill, a run and a word; and of a bit's AND with its part of a refill."""
    each = [r for r in rows if r["operation"] == "ands"]
    plain = [r for r in each if r["messages"] < FEW]
    small, large = (f(r["words"] for r in plain) for f in (min, max))
    # The first run of an operation also compiles it, so the least is taken.
    run = min(r["core_s"] for r in plain if r["words"] == small)
    word = (min(r["core_s"] for r in plain if r["words"] == large) - run) / (large - small)
    refilled = [r for r in each if r["messages"] > FEW]
    refill = statistics.median(r["core_s"] - run - word * r["words"] for r in refilled)
    traffic = statistics.median(r["bytes"] - 32 * r["words"] for r in refilled)
    found = {"start_s": rows[0]["core_s"], "run_s": run, "word_s": word, "refill_s": refill}
    found |= {"bit_us": 1e6 * (word / WORD + refill / REFILL), "of_it_transfers_us": 1e6 * refill / REFILL}
    return found | {"bit_bytes": 32 / WORD + traffic / REFILL, "refill_bytes": traffic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[5, 8, 11, 14, 17], help="log2 of the lengths")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--party", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    plan = [(name, 1 << bits, a.repetitions) for name in RUNS for bits in a.bits]
    if a.party:
        rank, *hosts, out = a.party
        party(int(rank), (hosts[0], hosts[1]), plan, Path(out))
    with tempfile.TemporaryDirectory() as scratch:
        hosts = [f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(2)]
        files = [Path(scratch) / str(rank) / "rows.json" for rank in range(2)]
        for file in files:
            file.parent.mkdir()
        command = [sys.executable, "-m", "benchmarks.private.ands", "--repetitions", str(a.repetitions)]
        command += ["--bits", *map(str, a.bits), "--party"]
        started = [subprocess.Popen([*command, str(i), *hosts, str(file)]) for i, file in enumerate(files)]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit("found a party that failed; see its message above")
        rows, busy = json.loads(files[0].read_text()), os.getloadavg()
    body = {"settings": {"bits": a.bits, "repetitions": a.repetitions, "most": MOST}, "load": busy}
    body |= {"environment": environment(), "limits": limits(rows), "rows": rows}
    print(json.dumps(body["limits"], indent=1))
    if a.out:
        a.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
