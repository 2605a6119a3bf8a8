"""A trusted dealer and an in-memory wire: both parties of a prepared inference in one process, for tests only."""

from __future__ import annotations

import queue
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from shoal.private.program.clear import ring_products
from shoal.private.program.program import Program, Weights
from shoal.private.program.steps import Step
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.offline import Masks, prepare
from shoal.private.protocol.pool import Pool, stage
from shoal.private.protocol.randomness import new_seed
from shoal.private.transport.certs import fingerprint
from shoal.private.transport.wire import Traffic
from tests.support.parties import Case
from tests.support.waiting import HANG

T = TypeVar("T")
CLIENT, SERVER = True, False


class Dealer:
    """Sees both parties' inputs and splits each result at random: what SPU does without seeing anything."""

    def __init__(self, program: Program, weights: Weights, seed: int = 0) -> None:
        self.ring = ring_products(program, weights)
        self.rng = np.random.default_rng(seed)
        self.barrier = threading.Barrier(2, timeout=HANG)
        self.inputs: dict[bool, Any] = {}
        self.shares: dict[bool, np.ndarray] = {}

    def meet(self, client: bool, mine: Any, compute: Callable[[Any, Any], np.ndarray], xor: bool) -> np.ndarray:
        self.inputs[client] = mine
        if self.barrier.wait() == 0:
            whole = compute(self.inputs[CLIENT], self.inputs[SERVER])
            mask = self.rng.integers(0, 2**64, whole.shape, np.uint64)
            self.shares = {CLIENT: mask, SERVER: whole ^ mask if xor else whole - mask}
        self.barrier.wait()
        share = self.shares[client]
        self.barrier.wait()
        return share

    def engine(self, client: bool) -> Engine:
        return Engine(self, client)


class Engine:
    """One party's door to the dealer."""

    def __init__(self, dealer: Dealer, client: bool) -> None:
        self.dealer, self.client = dealer, client

    def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.dealer.meet(self.client, (a, b), lambda c, s: (c[0] ^ s[0]) & (c[1] ^ s[1]), True)

    def chosen(self, bits: np.ndarray, words: np.ndarray) -> np.ndarray:
        return self.dealer.meet(self.client, (bits, words), lambda c, s: (c[0] ^ s[0]) * (c[1] + s[1]), False)

    def lifted(self, bits: np.ndarray) -> np.ndarray:
        return self.dealer.meet(self.client, bits, lambda c, s: c ^ s, False)

    def products(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        for step in steps:

            def compute(mine: np.ndarray, _: None, step: Step = step) -> np.ndarray:
                return self.dealer.ring[step.name](torch.from_numpy(mine.view(np.int64))).numpy().view(np.uint64)

            yield step, self.dealer.meet(self.client, None if masks is None else masks(step), compute, False)


class MemoryWire:
    """One end of a pair of queues; keeps every message that it received."""

    def __init__(self, out: queue.Queue[np.ndarray], into: queue.Queue[np.ndarray]) -> None:
        self.out, self.into = out, into
        self.traffic = Traffic()
        self.heard: list[np.ndarray] = []

    def send(self, mine: np.ndarray) -> None:
        self.traffic.latencies += 1
        self.traffic.messages += 1
        self.traffic.sent += mine.nbytes
        self.out.put(mine.ravel().copy())

    def receive(self, words: int) -> np.ndarray:
        theirs = self.into.get(timeout=HANG)
        assert theirs.size == words
        self.traffic.latencies += 1
        self.traffic.messages += 1
        self.traffic.received += theirs.nbytes
        self.heard.append(theirs)
        return theirs

    def exchange(self, mine: np.ndarray) -> np.ndarray:
        self.send(mine)
        theirs = self.receive(mine.size)
        self.traffic.latencies -= 1
        return theirs


def one_relu(count: int, bits: int) -> Program:
    """A program of one relu step, r, over `count` values below 2^bits."""
    step = {"name": "r", "op": "relu", "inputs": ["x"], "shape": [count], "attrs": {}}
    body = {"input_shape": [count], "outputs": ["r"], "exact": {}, "steps": [step], "sign_bits": {"r": bits}}
    more = {"version": "", "fraction_bits": 4, "field_bits": 64, "input": "x", "preprocessing": {}}
    return Program._parse(body | more | {"error_bound": 0.0}, {})


def wires() -> tuple[MemoryWire, MemoryWire]:
    a: queue.Queue[np.ndarray] = queue.Queue()
    b: queue.Queue[np.ndarray] = queue.Queue()
    return MemoryWire(a, b), MemoryWire(b, a)


def both(work: Callable[[bool], T]) -> tuple[T, T]:
    """`work(client)` for client and server at the same time."""
    with ThreadPoolExecutor(2) as pool:
        client, server = pool.submit(work, CLIENT), pool.submit(work, SERVER)
        return client.result(HANG), server.result(HANG)


def folders(
    case: Case, client_root: Path, server_root: Path, certificate: Path, name: str = "0" * 16
) -> tuple[Path, Path]:
    """Where a client of this certificate and own name keeps its items, and its server the other halves."""
    digest = case.program.digest()[:16]
    print_ = fingerprint(ssl.PEM_cert_to_DER_cert(certificate.read_text()))
    found = client_root / digest, server_root / digest / f"{print_}-{name}"
    for folder in found:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (client_root / "client-id").write_text(name)
    return found


def deal(case: Case, where: tuple[Path, Path], count: int) -> list[str]:
    """Stage dealt items in both folders, together, which costs a millisecond each; ready when the two next agree."""
    layout, dealer, digest = Layout(case.program), Dealer(case.program, case.weights), case.program.digest()
    names = [f"{secrets.token_hex(16)}-{i:06d}" for i in range(count)]
    made = both(lambda client: prepare(layout, dealer.engine(client), client, [new_seed() for _ in names]))
    for folder, halves, client in zip(where, made, (CLIENT, SERVER), strict=True):
        for name, half in zip(names, halves, strict=True):
            stage(folder, name, half, digest, client, "" if client else case.weights.digest())
    return names


def stock(
    case: Case, client_root: Path, server_root: Path, certificate: Path, count: int, name: str = "0" * 16
) -> tuple[Path, Path]:
    """Fill the pools of a client (with this certificate) and its server with dealt items; returns their folders."""
    where = folders(case, client_root, server_root, certificate, name)
    names = deal(case, where, count)
    for folder, client in zip(where, (CLIENT, SERVER), strict=True):
        pool = Pool(folder, Layout(case.program), client, weights="" if client else case.weights.digest())
        pool.commit(names)
        pool.close()
    return where
