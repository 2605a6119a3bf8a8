"""Workers in processes: exact, ended with their parent, with a bounded cache, and light to start."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.products import bfv
from shoal.private.products.packing import Convolution, pack
from shoal.private.products.parameters import DEGREE
from shoal.private.products.tasks import POLYNOMIAL_BYTES, Answers, Layer
from shoal.private.products.workers import Crew, Desk, Process, hire
from tests.private.products.test_bfv import BITS, CONV, convolve, exchange, random_case
from tests.support.waiting import HANG


@pytest.mark.slow
def test_processes_make_shares_of_the_product_batch_after_batch() -> None:
    weights, masks = random_case(0)
    client, server = hire("2"), hire("2")
    assert all(isinstance(worker, Process) for worker in client.workers)
    for mine, theirs in exchange(weights, masks, client, server, batches=2):
        want = np.stack([convolve(CONV, mask, weights.astype(np.uint64)) for mask in masks])
        assert not ((mine + theirs - want) & np.uint64(2**BITS - 1)).any()
    assert Crew([Desk()]).memory() == 0 < server.memory()
    client.close()
    server.close()


@pytest.mark.slow
def test_actors_of_a_local_cluster_make_shares_of_the_product_and_report_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    weights, masks = random_case(0)
    server = hire("ray")
    try:
        assert len(server) == 2
        ((mine, theirs),) = exchange(weights, masks, Crew([Desk()]), server, batches=1)
        want = np.stack([convolve(CONV, mask, weights.astype(np.uint64)) for mask in masks])
        assert not ((mine + theirs - want) & np.uint64(2**BITS - 1)).any()
        with pytest.raises(ShoalError, match=r"error in an actor of the products: .*public key that SEAL refuses"):
            server.each("start", [(b"no key",)])
        server.workers[0].close()
        with pytest.raises(ShoalError, match="an actor of the products gone"):
            server.each("start", [(b"no key",)])
        server.workers.pop(0)
        server.close()
    finally:
        ray.shutdown()


def test_ray_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what makes `import ray` fail, installed or not
    with pytest.raises(ShoalError, match="found no Ray; need it for --workers ray"):
        hire("ray")


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_an_error_of_its_task_too() -> None:
    crew = hire("2")
    crew.each("build", [("masks", BITS)] * 2)
    with pytest.raises(ShoalError, match=r"RuntimeError in a worker process|ValueError in a worker process"):
        crew.each("start", [(b"no key",)])
    crew.workers[1].process.kill()  # type: ignore[attr-defined]
    with pytest.raises(ShoalError, match=r"worker process .* dead .*look for lack of memory"):
        crew.submit(1, "start", b"no key").result()
    crew.close()


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "from shoal.private.products.workers import hire; import time; crew = hire('2'); "
        "crew.each('build', [('masks', 40)] * 2); "
        "print(*[w.process.pid for w in crew.workers], flush=True); time.sleep(600)"
    )
    # The workers inherit the write end of standard output, so it ends only when all of them have ended.
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert len(parent.stdout.readline().split()) == 2
    parent.kill()
    assert parent.communicate(timeout=HANG)[0] == ""


def test_a_worker_imports_no_torch() -> None:
    code = "import sys, shoal.private.products.workers, shoal.private.products.tasks; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(("room", "kept", "held"), [(0, 0, 0), (3, 3, 0), (3, 3, 2), (99, 8, 0)])
def test_the_cache_keeps_the_first_weights_and_no_more(
    monkeypatch: pytest.MonkeyPatch, room: int, kept: int, held: int
) -> None:
    packing = pack(Convolution(12, 16, 16, 16, (3, 3), (1, 1), (1, 1)), DEGREE)
    pairs = len(packing.pairs)
    assert pairs == 8
    weights = np.ones((16, 12, 3, 3), np.int64)
    layer = Layer(packing, {at: packing.rows(weights, at) for at in range(packing.answers)})
    task = Answers(BITS, {"c": layer}, room * POLYNOMIAL_BYTES, held * POLYNOMIAL_BYTES)
    public, secret = bfv.make_keys(task.context)
    task.start(public)
    keys, made = bfv.Keys(task.context, secret), []
    transform = bfv.Evaluator.weights
    monkeypatch.setattr(bfv.Evaluator, "weights", lambda self, w: made.append(1) or transform(self, w))
    words = np.stack([keys.encrypt(np.ones(DEGREE, np.uint64)) for _ in range(packing.inputs)])
    task.answer("c", words)
    task.answer("c", words)
    assert (len(task.kept), len(task.held)) == (kept, held)
    assert len(made) == pairs + pairs - kept - held


def test_weights_of_zero_take_as_many_products_as_others() -> None:
    context = bfv.Context(BITS)
    public, secret = bfv.make_keys(context)
    evaluator, keys = bfv.Evaluator(context, public), bfv.Keys(context, secret)
    cipher, zero = evaluator.load(keys.encrypt(np.ones(DEGREE, np.uint64))), np.zeros(DEGREE, np.int64)
    counts = []
    for second in (zero, zero + 1):
        context.evaluator = Mock(wraps=bfv.Context(BITS).evaluator)
        evaluator.answer([(cipher, evaluator.weights(w)) for w in (zero + 1, second)], zero.view(np.uint64))
        counts.append(context.evaluator.multiply_plain.call_count)
    assert counts == [2, 2]


def test_a_crew_runs_calls_of_one_worker_in_order() -> None:
    class Log:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def call(self, method: str, *arguments: int) -> int:
            self.seen.append(arguments[0])
            return arguments[0]

        def close(self) -> None:
            self.seen.append(-1)

    log = Log()
    crew = Crew([log])
    assert [call.result() for call in [crew.submit(0, "note", n) for n in range(20)]] == list(range(20))
    crew.close()
    assert log.seen == [*range(20), -1]
