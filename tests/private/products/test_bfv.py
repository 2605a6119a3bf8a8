"""Masked products under BFV: exact, fresh in every answer, and refused for bytes that do not fit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.products import bfv
from shoal.private.products.exchange import MaskSender, Multiplier
from shoal.private.products.packing import Convolution, pack
from shoal.private.products.parameters import DEGREE, MOST_PLAIN_BITS, STATISTICAL, flood_bits, noise_bits
from shoal.private.products.workers import Crew, Desk
from shoal.private.program.steps import Step
from tests.private.products.test_packing import convolve
from tests.support.waiting import HANG

BITS = 40
CONV = Convolution(6, 8, 8, 5, (3, 3), (2, 2), (1, 1), groups=1)
STEP = Step("c", "conv2d", ("x",), (5, 4, 4))


class Pipe:
    """One end of a connection in memory; keeps what it received."""

    def __init__(self, out: queue.Queue[bytes], into: queue.Queue[bytes]) -> None:
        self.out, self.into, self.heard = out, into, list[bytes]()

    def send(self, data: bytes) -> None:
        self.out.put(data)

    def receive(self) -> bytes:
        self.heard.append(self.into.get(timeout=HANG))
        return self.heard[-1]


def crew(count: int = 2) -> Crew:
    """Workers in this process."""
    return Crew([Desk() for _ in range(count)])


def run(
    weights: np.ndarray, masks: np.ndarray, conv: Convolution = CONV, step: Step = STEP, workers: int = 2
) -> tuple[np.ndarray, np.ndarray, Pipe, Pipe]:
    """Shares of both parties for the step, and both ends of the connection."""
    a: queue.Queue[bytes] = queue.Queue()
    b: queue.Queue[bytes] = queue.Queue()
    client, server = Pipe(a, b), Pipe(b, a)
    packings, made = {step.name: pack(conv, DEGREE)}, list[np.ndarray]()

    def serve() -> None:
        multiplier = Multiplier(packings, BITS, {step.name: weights}, crew(workers))
        made.extend(share for _, share in multiplier.products(server, [step], len(masks)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    sender = MaskSender(packings, BITS, crew())
    ((_, mine),) = sender.products(client, [step], lambda _: masks, len(masks))
    thread.join(HANG)
    return mine, made[0], client, server


def exchange(
    weights: np.ndarray, masks: np.ndarray, client: Crew, server: Crew, batches: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shares of both parties for CONV, for each of `batches` with the same workers."""
    packings = {"c": pack(CONV, DEGREE)}
    sender, multiplier = MaskSender(packings, BITS, client), Multiplier(packings, BITS, {"c": weights}, server, 1 << 30)
    for _ in range(batches):
        a, b = queue.Queue[bytes](), queue.Queue[bytes]()
        with ThreadPoolExecutor(1) as other:
            made = other.submit(list, multiplier.products(Pipe(b, a), [STEP], len(masks)))
            ((_, mine),) = sender.products(Pipe(a, b), [STEP], lambda _: masks, len(masks))
            yield mine, made.result(HANG)[0][1]


def random_case(seed: int, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = random.integers(-(2**15), 2**15, (5, 6, 3, 3))
    return weights, random.integers(0, 2**64, (count, 6, 8, 8), np.uint64)


ROWS: list[tuple[str, Callable[[np.ndarray], None]]] = [
    ("random", lambda w: None),
    ("largest", lambda w: w.fill(2**15 - 1)),
    ("smallest", lambda w: w.fill(-(2**15))),
    ("a filter of zeros", lambda w: w[2].fill(0)),
    ("a channel of zeros", lambda w: w[:, 3].fill(0)),
    ("all zeros", lambda w: w.fill(0)),
]


@pytest.mark.parametrize(("name", "change"), ROWS, ids=[name for name, _ in ROWS])
def test_shares_sum_to_the_product(name: str, change: Callable[[np.ndarray], None]) -> None:
    weights, masks = random_case(0)
    change(weights)
    mine, theirs, _, _ = run(weights, masks)
    want = np.stack([convolve(CONV, mask, weights.astype(np.uint64)) for mask in masks])
    assert not ((mine + theirs - want) & np.uint64(2**BITS - 1)).any()


EQUAL = Convolution(3, 32, 32, 16, (3, 3), (1, 1), (1, 1)), Step("c", "conv2d", ("x",), (16, 32, 32))


def received(weights: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polynomials [n, DEGREE] in a run with EQUAL: c1 of the answers, and these with all that the server receives."""
    _, _, client, server = run(weights, masks, *EQUAL, workers=1)
    read = pack(EQUAL[0], DEGREE).positions.size
    answers = np.concatenate([np.frombuffer(data, "<u8").reshape(-1, DEGREE + read) for data in client.heard[1:]])
    ciphertexts = [np.frombuffer(data, "<u8").reshape(-1, DEGREE) for data in server.heard[1:]]
    return answers[:, :DEGREE], np.concatenate([answers[:, :DEGREE], *ciphertexts])


def require_unrelated(polynomials: np.ndarray) -> None:
    """Fail unless all differences of two polynomials look uniform: no coefficient is zero, and all sizes are as usual.

    Polynomials are modulo primes just below 2^60, so modulo 2^60 differences of uniform ones are uniform, too.
    """
    for i, one in enumerate(polynomials):
        differences = (polynomials[:i] - one) & np.uint64(2**60 - 1)
        assert differences.all(), "equal coefficients"
        for row in differences >> np.uint64(56):
            counts = np.bincount(row.astype(np.int64), minlength=16)
            assert ((counts - DEGREE / 16) ** 2).sum() / (DEGREE / 16) < 90, (
                "differences of uneven sizes"
            )  # chance 1e-12


def equal_rows(seed: int) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).integers(-(2**15), 2**15, (1, 3, 3, 3)), 16, 0)


def equal_masks(seed: int) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).integers(0, 2**64, (1, 3, 32, 32), np.uint64), 2, 0)


@pytest.mark.slow
def test_nothing_that_a_party_receives_is_related_to_anything_else() -> None:
    """Two weights of equal filters, and two images, each twice in a run: no two parts of what crosses are related."""
    assert pack(EQUAL[0], DEGREE).answers > 1
    require_unrelated(np.concatenate([received(equal_rows(w), equal_masks(m))[1] for w in (1, 2) for m in (3, 4)]))


def test_answers_that_share_an_encryption_of_zero_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPU's matrix products do that, so equal filters give equal parts."""
    shared = dict[int, bytes]()
    fresh = bfv.Evaluator.zero

    def zero(self: bfv.Evaluator) -> Any:
        words = shared.setdefault(id(self), self.context.words(fresh(self)).tobytes())
        return self.context.ciphertext(np.frombuffer(words, "<u8").reshape(2, 2, DEGREE))

    answers, _ = received(equal_rows(1), equal_masks(3))
    require_unrelated(answers)
    monkeypatch.setattr(bfv.Evaluator, "zero", zero)
    answers, _ = received(equal_rows(1), equal_masks(3))
    with pytest.raises(AssertionError, match="equal coefficients"):
        require_unrelated(answers)


def test_the_flooding_error_exceeds_the_noise_by_40_bits_up_to_15_bit_weights() -> None:
    weights = np.full((16, 64, 3, 3), -(2**15))
    assert flood_bits(BITS) - noise_bits(weights, 2) >= STATISTICAL


def test_weights_that_would_show_are_refused() -> None:
    weights, _ = random_case(3)
    with pytest.raises(ShoalError, match="bits between flooding and noise in products of c; need 40"):
        Multiplier({"c": pack(CONV, DEGREE)}, BITS, {"c": weights << 16}, crew())


def test_a_ciphertext_with_words_above_the_primes_is_refused() -> None:
    context = bfv.Context(BITS)
    with pytest.raises(ShoalError, match="a ciphertext that SEAL refuses"):
        context.ciphertext(np.full((2, 2, DEGREE), 2**64 - 1, np.uint64))


def test_decryption_has_room_for_the_whole_flooding_error() -> None:
    """The largest error in every coefficient still decrypts to the masked value."""
    context = bfv.Context(MOST_PLAIN_BITS)
    public, secret = bfv.make_keys(context)
    keys, evaluator = bfv.Keys(context, secret), bfv.Evaluator(bfv.Context(MOST_PLAIN_BITS), public)
    mask = bfv.random_bits(DEGREE, MOST_PLAIN_BITS)
    largest = np.zeros((2, 2, DEGREE), np.uint64)
    for at, prime in enumerate(context.primes):
        largest[0, at] = ((1 << evaluator.flood_bits) - 1) % prime
    evaluator.flood = lambda: largest  # type: ignore[method-assign]
    no_weights = evaluator.weights(np.zeros(DEGREE, np.int64))
    pairs = [(evaluator.load(keys.encrypt(mask)), no_weights)]
    assert np.array_equal(keys.decrypt(evaluator.answer(pairs, mask)), mask)


@pytest.mark.parametrize("key", [b"", b"no key", bytes(393_329)])
def test_a_public_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(ShoalError, match="found a public key that SEAL refuses"):
        bfv.Evaluator(bfv.Context(BITS), key)


@pytest.mark.parametrize("bits", [20, 30, BITS, MOST_PLAIN_BITS])
def test_flooding_errors_are_one_number_modulo_both_primes(bits: int) -> None:
    context = bfv.Context(bits)
    evaluator = bfv.Evaluator(context, bfv.make_keys(context)[0])
    words, (p, q) = evaluator.flood(), context.primes
    found = [a + p * ((b - a) * pow(p, -1, q) % q) for a, b in zip(*words[0, :, :64].tolist(), strict=True)]
    assert max(found) < 1 << evaluator.flood_bits
    assert max(found) > 1 << (evaluator.flood_bits - 10)
    assert not words[1].any()
