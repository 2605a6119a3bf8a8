"""A pool's folder when the power fails or the disk is full: no name is forgotten, no half item counts."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.protocol import pool as pool_module
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool, stage
from shoal.private.protocol.randomness import Half, new_seed
from tests.support.parties import Case

NAME = f"{7:032x}-{7:06d}"


class Crash(BaseException):
    """What a process that ends here would do: nothing more."""


def fresh_half(layout: Layout) -> Half:
    """A client's half with the right shapes."""
    fields = list(layout.fields(True))
    return Half(new_seed(), {f.name: np.zeros(f.shape, np.uint64) for f in fields if not f.seeded}, fields)


@pytest.mark.parametrize("kept", [0, 1, 20, 38, 39])
def test_a_ledger_cut_short_forgets_no_name(small: Case, tmp_path: Path, kept: int) -> None:
    old, cut, new = (f"{i:032x}-{i:06d}" for i in range(3))
    (tmp_path / "spent").write_text(f"{old}\n{cut}"[: len(old) + 1 + kept])
    for name in (cut, new):
        (tmp_path / f"{name}.claimed").touch()  # the power failed while these were entered
    for _ in range(2):
        pool = Pool(tmp_path, Layout(small.program), True)
        assert {old, cut, new} <= pool.spent
        for name in (old, cut, new):
            (tmp_path / f"{name}.item").touch()
            with pytest.raises(ShoalError, match="used already"):
                pool.claim(name)
        pool.close()


def test_a_disk_too_full_for_the_ledger_gives_nothing_out(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(small.program)
    stage(tmp_path, NAME, fresh_half(layout), layout.program.digest(), True)
    pool = Pool(tmp_path, layout, True)
    pool.commit([NAME])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for match in ("No space left.*need", "used already"):
            with pytest.raises(ShoalError, match=match):
                pool.claim(NAME)
        pool.close()
        with pytest.raises(ShoalError, match=r"No space left.*need"):
            Pool(tmp_path, layout, True)
    pool = Pool(tmp_path, layout, True)  # the failure above let go of the folder
    assert pool.names() == []
    assert NAME in (tmp_path / "spent").read_text().split()
    assert not list(tmp_path.glob(f"*{NAME}*"))
    pool.close()


@pytest.mark.parametrize("step", range(6))
def test_a_crash_while_an_item_is_written_leaves_all_of_it_or_nothing(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    layout, calls = Layout(small.program), 0
    half = fresh_half(layout)

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Crash
            return real(*arguments, **more)

        return call

    steps = [(Path, "touch"), (pool_module, "save_file"), (Path, "chmod"), (os, "fsync"), (Path, "rename")]
    with monkeypatch.context() as patch:
        for owner, name in steps:
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        with contextlib.suppress(Crash):
            stage(tmp_path, NAME, half, layout.program.digest(), True)
    assert calls == min(step + 1, len(steps))
    (tmp_path / ".tmpPart").touch()  # the writer's own scratch file
    pool = Pool(tmp_path, layout, True)
    if NAME in pool.agree([NAME]):  # the peer has all of it
        assert pool.claim(NAME).seed == half.seed
        assert step == len(steps)
    assert not list(tmp_path.glob(".*"))
    pool.close()
