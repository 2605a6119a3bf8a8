"""What a hostile or broken peer may send instead of ciphertexts and answers: one sentence for each."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.products import bfv
from shoal.private.products.exchange import AHEAD, READY, MaskSender, Multiplier
from shoal.private.products.packing import pack
from shoal.private.products.parameters import DEGREE
from tests.private.products.test_bfv import BITS, CONV, STEP, Pipe, crew, random_case

PACKING = pack(CONV, DEGREE)
CIPHERTEXTS = PACKING.inputs * 2 * 2 * DEGREE
"""Words of one message of the client."""


def serve(key: bytes, *messages: bytes) -> None:
    """The server's side of a batch of as many inferences as there are messages."""
    heard = queue.Queue[bytes]()
    for message in (key, *messages):
        heard.put(message)
    weights, _ = random_case(0)
    multiplier = Multiplier({"c": PACKING}, BITS, {"c": weights}, crew())
    list(multiplier.products(Pipe(queue.Queue(), heard), [STEP], max(1, len(messages))))


def words(change: Callable[[np.ndarray], None]) -> bytes:
    random = np.random.default_rng(0).integers(0, 2**59, CIPHERTEXTS, np.uint64)
    change(random)
    return random.tobytes()


def good_key() -> bytes:
    return bfv.make_keys(bfv.Context(BITS))[0]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"", "found 0 bytes of ciphertexts from the peer; need"),
        (words(lambda w: None)[:-8], "bytes of ciphertexts from the peer; need"),
        (words(lambda w: None) * 2, "bytes of ciphertexts from the peer; need"),
        (words(lambda w: w.fill(2**64 - 1)), "found a ciphertext that SEAL refuses"),
        (words(lambda w: w.__setitem__(7, 2**60)), "found a ciphertext that SEAL refuses"),
    ],
    ids=["nothing", "too little", "too much", "above the primes", "one word above the primes"],
)
def test_a_client_that_sends_no_ciphertexts_is_refused_with_a_sentence(message: bytes, sentence: str) -> None:
    key = good_key()
    with pytest.raises(ShoalError, match=sentence):
        serve(key, message)
    with pytest.raises(ShoalError, match=sentence):
        serve(key, words(lambda w: None), message)


@pytest.mark.parametrize("plain_bits", [30, BITS + 1])
def test_a_key_for_another_plaintext_modulus_is_refused(plain_bits: int) -> None:
    with pytest.raises(ShoalError, match="found a public key that SEAL refuses"):
        serve(bfv.make_keys(bfv.Context(plain_bits))[0])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([b"hello"], "found other bytes than need before the answers"),
        ([READY, b""], "found 0 bytes of answers from the peer; need"),
        ([READY, bytes(8 * PACKING.answers * (DEGREE + PACKING.positions.size) + 8)], "bytes of answers from the peer"),
        (
            [READY, b"\xff" * (8 * PACKING.answers * (DEGREE + PACKING.positions.size))],
            "found a ciphertext that SEAL refuses",
        ),
    ],
    ids=["not ready", "nothing", "too much", "above the prime"],
)
def test_a_server_that_sends_no_answers_is_refused_with_a_sentence(messages: list[bytes], sentence: str) -> None:
    heard = queue.Queue[bytes]()
    for message in messages:
        heard.put(message)
    _, masks = random_case(0, 1)
    with pytest.raises(ShoalError, match=sentence):
        list(MaskSender({"c": PACKING}, BITS, crew()).products(Pipe(queue.Queue(), heard), [STEP], lambda _: masks, 1))


class Late(Pipe):
    """Gives READY, then a wrong answer once more messages than allowed were sent, or after a while."""

    def receive(self) -> bytes:
        if not self.heard:
            self.heard.append(READY)
            return READY
        until = time.monotonic() + 0.3
        while self.out.qsize() < 1 + AHEAD + 1 and time.monotonic() < until:
            time.sleep(0.005)
        return b"no answer"


def test_a_client_never_has_more_than_its_messages_under_way() -> None:
    """Without an answer it stops after its key and AHEAD messages, so a server's queue of that size never fills."""
    sent = queue.Queue[bytes]()
    _, masks = random_case(0, AHEAD + 3)
    pipe = Late(sent, queue.Queue())
    with pytest.raises(ShoalError, match="bytes of answers"):
        next(MaskSender({"c": PACKING}, BITS, crew()).products(pipe, [STEP], lambda _: masks, len(masks)))
    assert sent.qsize() == 1 + AHEAD
