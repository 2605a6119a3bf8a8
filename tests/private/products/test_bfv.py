"""Masked products under BFV: exact, fresh in every answer, and refused for bytes that do not fit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.products import bfv
from shoal.private.products.exchange import MaskSender, Multiplier
from shoal.private.products.packing import Convolution, pack
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


def run(
    weights: np.ndarray, masks: np.ndarray, conv: Convolution = CONV, step: Step = STEP
) -> tuple[np.ndarray, np.ndarray, Pipe, Pipe]:
    """Shares of both parties for the step, and both ends of the connection."""
    a: queue.Queue[bytes] = queue.Queue()
    b: queue.Queue[bytes] = queue.Queue()
    client, server = Pipe(a, b), Pipe(b, a)
    packings, made = {step.name: pack(conv, bfv.DEGREE)}, list[np.ndarray]()

    def serve() -> None:
        multiplier = Multiplier(server, packings, BITS, {step.name: weights})
        made.extend(share for _, share in multiplier.products([step], len(masks)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    sender = MaskSender(client, packings, BITS)
    ((_, mine),) = sender.products([step], lambda _: masks, len(masks))
    thread.join(HANG)
    return mine, made[0], client, server


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


def test_no_two_answers_share_a_ciphertext_part() -> None:
    """With equal filters, equal images and twice the same run, all ciphertexts and answers differ in every part.

    SPU's matrix products reuse one encryption of zero for several answers, so equal filters give equal parts.
    """
    conv, step = Convolution(3, 32, 32, 16, (3, 3), (1, 1), (1, 1)), Step("c", "conv2d", ("x",), (16, 32, 32))
    assert pack(conv, bfv.DEGREE).answers > 1
    random = np.random.default_rng(1)
    weights = np.repeat(random.integers(-(2**15), 2**15, (1, 3, 3, 3)), 16, 0)
    masks = np.repeat(random.integers(0, 2**64, (1, 3, 32, 32), np.uint64), 2, 0)
    parts = list[bytes]()
    for _ in range(2):
        _, _, client, server = run(weights, masks, conv, step)
        answers = np.concatenate([np.frombuffer(data, "<u8") for data in client.heard])
        sent = np.concatenate([np.frombuffer(data, "<u8") for data in server.heard[1:]])
        parts += [
            piece.tobytes() for whole in (answers, sent) for piece in whole[: len(whole) // 16 * 16].reshape(-1, 16)
        ]
    assert len(set(parts)) == len(parts)


def test_the_flooding_error_exceeds_the_noise_by_40_bits_up_to_15_bit_weights() -> None:
    weights = np.full((16, 64, 3, 3), -(2**15))
    assert bfv.flood_bits(BITS) - bfv.noise_bits(weights, 2) >= bfv.STATISTICAL


def test_weights_that_would_show_are_refused() -> None:
    weights, _ = random_case(3)
    with pytest.raises(ShoalError, match="bits in products of c; need at most"):
        Multiplier(Pipe(queue.Queue(), queue.Queue()), {"c": pack(CONV, bfv.DEGREE)}, BITS, {"c": weights << 16})


def test_a_ciphertext_with_words_above_the_primes_is_refused() -> None:
    context = bfv.Context(BITS)
    with pytest.raises(ShoalError, match="a ciphertext that SEAL refuses"):
        context.ciphertext(np.full((2, 2, bfv.DEGREE), 2**64 - 1, np.uint64))


def test_decryption_has_room_for_the_whole_flooding_error() -> None:
    """The largest error in every coefficient still decrypts to the masked value."""
    context = bfv.Context(bfv.MOST_PLAIN_BITS)
    keys = bfv.Keys(context)
    evaluator = bfv.Evaluator(bfv.Context(bfv.MOST_PLAIN_BITS), keys.public)
    mask = bfv.random_bits(bfv.DEGREE, bfv.MOST_PLAIN_BITS)
    largest = np.zeros((2, 2, bfv.DEGREE), np.uint64)
    for at, prime in enumerate(context.primes):
        largest[0, at] = ((1 << evaluator.flood_bits) - 1) % prime
    evaluator.flood = lambda: largest  # type: ignore[method-assign]
    assert np.array_equal(keys.decrypt(evaluator.answer([], mask)), mask)


@pytest.mark.parametrize("key", [b"", b"no key", bytes(393_329)])
def test_a_public_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(ShoalError, match="found a public key that SEAL refuses"):
        bfv.Evaluator(bfv.Context(BITS), key)


@pytest.mark.parametrize("bits", [20, 30, BITS, bfv.MOST_PLAIN_BITS])
def test_flooding_errors_are_one_number_modulo_both_primes(bits: int) -> None:
    context = bfv.Context(bits)
    evaluator = bfv.Evaluator(context, bfv.Keys(context).public)
    words, (p, q) = evaluator.flood(), context.primes
    found = [a + p * ((b - a) * pow(p, -1, q) % q) for a, b in zip(*words[0, :, :64].tolist(), strict=True)]
    assert max(found) < 1 << evaluator.flood_bits
    assert max(found) > 1 << (evaluator.flood_bits - 10)
    assert not words[1].any()
