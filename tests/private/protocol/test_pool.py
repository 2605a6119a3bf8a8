"""Prepared items on disk: used once, whatever crashes; both parties end up with the same ones."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.private.program.program import Program
from shoal.private.protocol import pool as pool_module
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.offline import prepare
from shoal.private.protocol.pool import Pool, stage
from shoal.private.protocol.randomness import Half, new_seed
from shoal.private.serving.room import require_room
from tests.support.dealing import Dealer, both
from tests.support.forked import forked, heard
from tests.support.parties import Case
from tests.support.waiting import HANG, eventually

NAMES = [f"{i:032x}-{i:06d}" for i in range(6)]
ONCE = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Crash(BaseException):
    """What a process that ends here would do: nothing more."""


@pytest.fixture(scope="module")
def halves(small: Case) -> tuple[Half, Half]:
    layout, dealer = Layout(small.program), Dealer(small.program, small.weights)
    return both(lambda client: prepare(layout, dealer.engine(client), client, [new_seed()])[0])


def filled(folder: Path, small: Case, half: Half, names: list[str], client: bool = True) -> Pool:
    """A pool with ready items."""
    pool = Pool(folder, Layout(small.program), client)
    for name in names:
        stage(folder, name, half, pool.digest, client)
    pool.commit(names)
    return pool


def test_an_item_serves_once(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = filled(tmp_path / "pool", small, halves[0], NAMES[:2])
    copy = tmp_path / "copy"
    shutil.copy(tmp_path / "pool" / f"{NAMES[0]}.item", copy)
    taken = pool.claim(NAMES[0])
    assert taken.seed == halves[0].seed
    assert all((taken[k] == halves[0][k]).all() for k in halves[0])
    assert pool.names() == NAMES[1:2]
    assert not list((tmp_path / "pool").glob(f"{NAMES[0]}*"))
    with pytest.raises(ShoalError, match="used already"):
        pool.claim(NAMES[0])
    pool.close()
    shutil.copy(copy, tmp_path / "pool" / f"{NAMES[0]}.item")  # a backup that somebody put back
    again = Pool(tmp_path / "pool", Layout(small.program), True)
    with pytest.raises(ShoalError, match="used already"):
        again.claim(NAMES[0])
    assert NAMES[0] not in again.names()
    with pytest.raises(ShoalError, match="found no item"):
        again.claim(NAMES[5])
    again.close()


STEPS = range(7)


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_of_a_claim_never_gives_an_item_twice(
    small: Case, halves: tuple[Half, Half], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[:2])
    calls = 0

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Crash
            return real(*arguments, **more)

        return call

    given_out = 0
    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "rename"),
            (Path, "unlink"),
            (os, "fsync"),
            (os, "open"),
            (pool_module, "safe_open"),
        ):
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        try:
            pool.claim(NAMES[0])
            given_out += 1
        except Crash:
            pass
    pool.close()
    again = Pool(tmp_path, Layout(small.program), True)
    if NAMES[0] in again.names():
        again.claim(NAMES[0])
        given_out += 1
    assert given_out <= 1
    assert NAMES[1] in again.names()  # nothing but that item is burned
    again.close()


@ONCE
@given(st.lists(st.sampled_from(["none", "staged", "ready"]), min_size=12, max_size=12), st.booleans())
def test_after_agreeing_both_have_the_same_items(
    small: Case, halves: tuple[Half, Half], tmp_path: Path, states: list[str], server_first: bool
) -> None:
    pools = []
    for client in (True, False):
        folder = tmp_path / str(client)
        shutil.rmtree(folder, ignore_errors=True)
        pool = Pool(folder, Layout(small.program), client)
        for name, state in zip(NAMES, states[::2] if client else states[1::2], strict=True):
            if state != "none":
                stage(folder, name, halves[not client], pool.digest, client)
            if state == "ready":
                pool.commit([name])
        pools.append(pool)
    lists = [pool.everything() for pool in pools]
    for i in (1, 0) if server_first else (0, 1):
        pools[i].agree(lists[1 - i])
    common = set(lists[0]) & set(lists[1])
    for pool in pools:
        assert set(pool.names()) == common
        assert not pool.staged()
        pool.close()


def test_items_in_the_making_survive_an_agreement(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = Pool(tmp_path, Layout(small.program), True)
    with pool.making() as expect:
        expect(NAMES[:1])
        stage(tmp_path, NAMES[0], halves[0], pool.digest, True)
        assert pool.agree([]) == []
        pool.commit(NAMES[:1])
        assert pool.agree([]) == NAMES[:1]  # the peer's list may be a moment old
        with pytest.raises(ShoalError, match="made before"):
            expect(NAMES[:1])
    assert pool.agree([]) == []
    pool.close()


def test_an_item_asked_for_survives_an_agreement(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[:2])
    with pool.asking(NAMES[1]):
        assert pool.agree(NAMES[:1]) == NAMES[:2]  # the server claimed its half a moment ago
        pool.claim(NAMES[1])
        assert pool.listed() == [NAMES[1], NAMES[0]]  # and here it may not have, yet
    assert pool.listed() == NAMES[:1]
    pool.close()


def test_files_are_the_owners_alone(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = filled(tmp_path / "pool", small, halves[0], NAMES[:1])
    pool.claim(NAMES[0])
    pool.close()
    (tmp_path / "pool" / ".tmpAbCdEf").write_bytes(b"half an item")
    pool = Pool(tmp_path / "pool", pool.layout, True)
    filled_again = [*(tmp_path / "pool").iterdir()]
    assert stat.S_IMODE((tmp_path / "pool").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in filled_again)
    pool.close()


def test_anothers_items_are_refused_and_burned_alone(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[:4])
    (tmp_path / f"{NAMES[0]}.item").write_bytes(b"not a safetensors file")
    stage(tmp_path, NAMES[1], halves[1], pool.digest, False)  # the other party's half
    stage(tmp_path, NAMES[2], halves[0], "0" * 64, True)  # another program's
    pool.commit(NAMES[1:3])
    for name, match in zip(NAMES, ("unreadable", "another item", "another item"), strict=False):
        with pytest.raises(ShoalError, match=match):
            pool.claim(name)
    assert pool.names() == NAMES[3:4]
    for hostile in ("../x", "", 7, "0" * 32, None):
        with pytest.raises(ShoalError, match="name of a prepared item"):
            pool.claim(hostile)
    pool.close()


def test_a_full_disk_loses_no_finished_item(
    small: Case, halves: tuple[Half, Half], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[:1])

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pool_module, "save_file", full)
    with pytest.raises(ShoalError, match=r"no room .*No space left"):
        stage(tmp_path, NAMES[1], halves[0], pool.digest, True)
    assert pool.everything() == NAMES[:1]
    assert pool.claim(NAMES[0]).seed == halves[0].seed
    pool.close()


def hold(pipe: Connection, artifact: Path, folder: Path) -> None:
    """Try to open a pool that another process holds, then wait for it; says what came of both."""
    layout = Layout(Program.load(artifact))
    try:
        Pool(folder, layout, True)
    except ShoalError as error:
        pipe.send(str(error))
    Pool(folder, layout, True, wait_s=HANG)
    pipe.send("mine")


@pytest.mark.slow
def test_one_process_holds_a_pool(small: Case, tmp_path: Path) -> None:
    pool = Pool(tmp_path, Layout(small.program), True)
    assert not pool.wanted()
    with forked(hold, small.folder / "client", tmp_path) as (_, other):
        assert "in use by another process" in heard(other)
        assert eventually(pool.wanted)
        pool.close()
        pool.close()  # twice does no harm
        assert heard(other) == "mine"


def test_seeds_do_not_repeat(small: Case) -> None:
    seeds = {new_seed() for _ in range(1000)}
    assert len(seeds) == 1000
    layout, dealer = Layout(small.program), Dealer(small.program, small.weights)
    made = both(lambda client: prepare(layout, dealer.engine(client), client, [new_seed(), new_seed()]))
    for one, two in made:
        for name in one:
            if one[name].size > 2:
                assert not np.array_equal(one[name], two[name])


def test_items_with_one_seed_are_not_made(small: Case) -> None:
    seed = new_seed()
    with pytest.raises(ShoalError, match="found one seed for several prepared items"):
        prepare(Layout(small.program), Mock(), True, [seed, new_seed(), seed])


def test_a_spent_name_is_not_made_again(small: Case, halves: tuple[Half, Half], tmp_path: Path) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[:1])
    pool.claim(NAMES[0])
    assert pool.everything() == []
    with pool.making() as expect, pytest.raises(ShoalError, match=f"found item {NAMES[0]} made before"):
        expect(NAMES[:1])
    assert not pool.fresh
    pool.close()


@pytest.mark.parametrize("staged", [0, 1, 2])
@pytest.mark.parametrize(("more", "room", "fits"), [(1, 3, True), (2, 3, False), (1, 2, False)])
def test_room_is_counted_for_every_batch(
    small: Case, halves: tuple[Half, Half], tmp_path: Path, more: int, room: int, fits: bool, staged: int
) -> None:
    pool = filled(tmp_path, small, halves[0], NAMES[: 2 - staged])
    for name in NAMES[2 - staged : 2]:  # left by a session that broke off; the disk holds them all the same
        stage(tmp_path, name, halves[0], pool.digest, True)
    with contextlib.nullcontext() if fits else pytest.raises(ShoalError, match=f"need room for {more} more"):
        require_room(pool, more, room)
    pool.close()
