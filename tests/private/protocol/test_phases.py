"""Inference in two phases against its plaintext twin: every protocol function, then whole networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.private.program.clear import run_clear
from shoal.private.protocol.bitslice import pack, plane_words, slice_bits, unpack
from shoal.private.protocol.carry import Carry
from shoal.private.protocol.layout import Layout, ReluLayout
from shoal.private.protocol.offline import prepare
from shoal.private.protocol.online import Inference, Prepared
from shoal.private.protocol.randomness import expand, new_seed
from shoal.private.protocol.signs import ONES, Side, select, sign
from tests.support.dealing import Dealer, both, one_relu, wires
from tests.support.inferences import infer, new_name, truncating
from tests.support.parties import Case, Everything, case, seeded

COUNTS = (1, 63, 64, 65, 1000)
SLOW = settings(max_examples=25)


class Site:
    """A program of one relu step over `count` values below 2^bits, with dealt randomness and two wires."""

    def __init__(self, count: int, bits: int) -> None:
        program = one_relu(count, bits)
        self.layout = Layout(program)
        self.relu: ReluLayout = self.layout.relus["r"]
        dealer = Dealer(program, None)  # type: ignore[arg-type]  # no linear step, no weight
        self.halves = both(lambda c: prepare(self.layout, dealer.engine(c), c, [new_seed()])[0])
        self.wires = wires()

    def side(self, client: bool) -> Side:
        return Side(client, self.wires[not client], self.halves[not client], new_name())


def relu(site: Site, client: bool, x: np.ndarray) -> np.ndarray:
    side = site.side(client)
    positive = sign(side, site.relu, x)
    return select(side, site.relu, positive ^ ONES if client else positive, x)


def shares(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    words = values.astype(np.int64).view(np.uint64)
    mask = rng.integers(0, 2**64, values.shape, np.uint64)
    return mask, words - mask


def edge_values(rng: np.random.Generator, count: int, bits: int) -> np.ndarray:
    """Values below 2^bits in magnitude, with the ends and zero among them."""
    top = 1 << bits
    values = rng.integers(-top + 1, top, count, np.int64)
    edges = np.array([0, -1, 1, top - 1, 1 - top, -(top >> 1), top >> 1])[:count]
    values[: len(edges)] = np.clip(edges, 1 - top, top - 1)
    return values


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 63), st.integers(0, 2**32))
def test_planes_hold_the_bits(count: int, bits: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    planes = slice_bits(values, bits)
    assert planes.shape == (bits, plane_words(count))
    for j in range(bits):
        assert unpack(planes[j], count).tolist() == [int(v) >> j & 1 for v in values]
        assert (pack(unpack(planes[j], count)) == planes[j]).all()


@pytest.mark.parametrize("bits", range(1, 64))
def test_a_circuit_is_the_carry(bits: int) -> None:
    carry = Carry(bits)
    assert sum(d.width for d in carry.digits) == bits
    assert carry.exchanges == 1 + (bits > 4) + (bits > 20)
    assert [len(d.generate) for d in carry.digits] == [d.monomials for d in carry.digits]
    for digit in carry.digits:
        for u in range(1 << digit.width):
            for v in range(1 << digit.width):
                known = u == digit.monomials, v == digit.monomials
                g = sum((u & s) == s and (v & t) == t for s, t in digit.generate) % 2
                p = (sum((u & s) == s and (v & t) == t for s, t in digit.propagate) + sum(known)) % 2
                assert g == u + v >> digit.width
                assert not digit.needs_propagate or p == (u + v == digit.monomials)


@SLOW
@given(st.sampled_from(COUNTS), st.integers(1, 62), st.integers(0, 2**32))
@example(100_000, 17, 0)
@example(65, 20, 1)
@example(65, 21, 1)
@example(64, 62, 2)
def test_signs_and_relus(count: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = edge_values(rng, count, bits)
    split = shares(values, rng)
    site = Site(count, bits)
    client, server = both(lambda c: sign(site.side(c), site.relu, split[not c]))
    assert (unpack(client ^ server, count) == (values < 0)).all()
    site = Site(count, bits)
    client, server = both(lambda c: relu(site, c, split[not c]))
    assert ((client + server).view(np.int64) == np.maximum(values, 0)).all()


def test_exchanges_and_bytes_of_a_relu_are_as_stated() -> None:
    for bits in (4, 17, 20, 31):
        site, count = Site(1000, bits), 1000
        split = shares(np.arange(count) % (1 << bits), np.random.default_rng(0))
        both(lambda c, site=site, split=split: relu(site, c, split[not c]))  # type: ignore[misc]
        carry = Carry(bits)
        for wire in site.wires:
            assert wire.traffic.latencies == carry.exchanges + 1
            assert wire.traffic.sent == wire.traffic.received == 8 * plane_words(count) * (carry.opened + 1) + 8 * count


def test_expansion_is_a_function_of_the_seed() -> None:
    seed, shapes = new_seed(), {"x": (10, 10), "y": (7,)}
    a, b, other = expand(seed, shapes), expand(seed, shapes), expand(new_seed(), shapes)
    assert all((a[name] == b[name]).all() and a[name].shape == shape for name, shape in shapes.items())
    assert not any((a[name] == other[name]).any() for name in shapes)
    assert not np.isin(a["y"], a["x"]).any()


# ---------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Case:
    mask = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(5)) < 0.4
    return case(seeded(Everything), tmp_path_factory.mktemp("everything"), {"relu": mask})


@pytest.mark.parametrize("exact", ["none", "compiled", "wide", "all narrow"])
def test_a_network_gives_its_clear_logits(everything: Case, exact: str) -> None:
    program = truncating(everything.program, exact)
    images = everything.images[:4].numpy()
    clear = run_clear(everything.program, everything.weights, images)
    unit = everything.unit
    for i, image in enumerate(images):
        logits, _ = infer(everything, program, np.rint(image / unit))
        for got, want in zip(logits, clear, strict=True):
            assert np.abs(got[0] * unit - want[i]).max() <= 40 * unit


def messages(case: Case, image: np.ndarray, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that the server and the client hear over `runs` inferences of one image, each with fresh randomness."""
    heard: tuple[list[bytes], list[bytes]] = ([], [])
    for _ in range(runs):
        _, ends = infer(case, case.program, image)
        heard[0].extend(m.tobytes() for m in ends[1].heard)
        # The last things that the client hears are the logits' truncated shares: it is meant to learn what they say.
        heard[1].extend(m.tobytes() for m in ends[0].heard[: -len(case.program.outputs)])
    return tuple(np.frombuffer(b"".join(parts), np.uint8) for parts in heard)  # type: ignore[return-value]


def chi_square(data: np.ndarray) -> float:
    """Standard deviations by which the bytes' counts are off those of uniform bytes."""
    counts = np.bincount(data, minlength=256)
    expected = data.size / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


@pytest.mark.parametrize("image", ["zeros", "ones", "noise"])
def test_every_message_is_uniform_whatever_the_image(everything: Case, image: str) -> None:
    rng = np.random.default_rng(3)
    shape = everything.program.input_shape
    values = {"zeros": np.zeros(shape), "ones": np.ones(shape), "noise": rng.normal(size=shape)}[image]
    server, client = messages(everything, np.rint(values / everything.unit), 30)
    assert server.size > 50_000
    # Five standard deviations: once in millions of honest runs. A constant or repeated mask is off by thousands.
    assert abs(chi_square(server)) < 5
    assert abs(chi_square(client)) < 5


def test_the_comparison_would_notice_an_unmasked_message(everything: Case) -> None:
    image = np.rint(everything.images[0].numpy() / everything.unit)
    assert abs(chi_square(np.frombuffer(np.tile(image.astype(np.int64), 30).tobytes(), np.uint8))) > 100


@pytest.mark.parametrize("exact", ["none", "compiled", "wide", "all narrow"])
def test_the_clear_executor_simulates_the_shares_bit_for_bit(everything: Case, exact: str) -> None:
    program = truncating(everything.program, exact)
    image = np.rint(everything.images[0].numpy() / everything.unit).astype(np.int64)
    shares: dict[str, np.ndarray] = {}
    logits, _ = infer(everything, program, image, shares)
    simulated = run_clear(program, everything.weights, image[None], shares=shares)
    for got, want in zip(logits, simulated, strict=True):
        assert (got * everything.unit == want).all()


@pytest.mark.parametrize("leave", [False, True])
def test_an_early_exit_ends_both_parties(everything: Case, leave: bool) -> None:
    layout, ends, name = Layout(everything.program), wires(), new_name()
    dealer, image = Dealer(everything.program, everything.weights), everything.images[0].numpy()
    words = torch.from_numpy(np.rint(image / everything.unit).astype(np.int64))[None]
    asked: list[int] = []

    def go_on(number: int, logits: torch.Tensor) -> bool:
        asked.append(number)
        return not leave

    def work(client: bool) -> list[torch.Tensor]:
        (half,) = prepare(layout, dealer.engine(client), client, [new_seed()])
        prepared = Prepared(layout, None if client else everything.weights)
        run = Inference(prepared, Side(client, ends[not client], half, name))
        return run.run(words, go_on) if client else run.run(None, True)

    logits, none = both(work)
    clear = run_clear(everything.program, everything.weights, image[None])
    assert asked == [0]
    assert none == []
    assert len(logits) == 1 if leave else 2
    for got, want in zip(logits, clear, strict=False):
        assert np.abs(got[0].numpy() * everything.unit - want[0]).max() <= 40 * everything.unit
    if leave:
        assert ends[1].traffic.sent + ends[1].traffic.received < layout.online.bytes - 1000
