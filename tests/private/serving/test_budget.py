"""A budget of queries for each certificate: counted before an answer is given, and not forgotten by a restart."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.jobs.pool import pool as count_items
from shoal.private.protocol.online import Inference
from shoal.private.serving.budget import FILE, Budget, read_spent
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.serving.session import RefusedError
from shoal.private.transport.certs import TLS, fingerprint_of_file
from tests.support.dealing import stock
from tests.support.parties import Case
from tests.support.processes import in_thread

ME, YOU = "a" * 16, "b" * 16


def test_a_budget_outlives_the_server_and_is_each_certificates_own(tmp_path: Path) -> None:
    for _ in range(2):
        Budget(tmp_path, 2).spend(ME)
    late = Budget(tmp_path, 2)
    for refusing in (late.require, late.spend):
        with pytest.raises(RefusedError, match="found the 2 queries of this certificate's budget used up; need a new"):
            refusing(ME)
    late.spend(YOU)
    assert read_spent(tmp_path) == {ME: 2, YOU: 1}
    assert json.loads((tmp_path / FILE).read_text()) == {ME: 2, YOU: 1}


def test_an_operator_resets_a_budget_while_the_server_runs(tmp_path: Path) -> None:
    budget = Budget(tmp_path, 1)
    budget.spend(ME)
    (tmp_path / FILE).write_text("{}")
    budget.spend(ME)
    with pytest.raises(RefusedError):
        budget.spend(ME)


def test_without_a_limit_queries_are_counted_all_the_same(tmp_path: Path) -> None:
    budget = Budget(tmp_path, 0)
    for _ in range(3):
        budget.require(ME)
        budget.spend(ME)
    assert read_spent(tmp_path) == {ME: 3}


@pytest.mark.parametrize("text", ["", "[]", '{"a": -1}', '{"a": true}', '{"a": "1"}', "{"])
def test_a_damaged_file_lets_no_query_through(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    budget = Budget(tmp_path, 5)
    for refusing in (budget.require, budget.spend):
        with pytest.raises(ShoalError, match="need"):
            refusing(ME)
    assert (tmp_path / FILE).read_text() == text


@pytest.mark.private
def test_a_query_is_counted_before_its_answer(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs = stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 4)
    me, image, counts = fingerprint_of_file(certs["client"].cert)[:16], small.images[:1].numpy(), list[int]()
    real = Inference.run

    def counting(run: Inference, *arguments: object) -> object:
        counts.append(read_spent(theirs.parent)[me])
        return real(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Inference, "run", counting)
    options = ServerOptions(pool=tmp_path / "s", query_budget=2)
    own = ClientOptions(pool=tmp_path / "c")
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server:
        with Client(small.folder, server.address, certs["client"], own) as client:
            for _ in range(2):
                client.query(image)
            with pytest.raises(ShoalError, match="found the 2 queries of this certificate's budget used up"):
                client.query(image)
        assert sorted(counts) == [1, 1, 2, 2]  # at both parties, which share this process
        late = Client(small.folder, server.address, certs["client"], own)
        with contextlib.closing(late):
            for asking in (late.open, lambda: late.prepare(1)):
                with pytest.raises(ShoalError, match="budget used up"):
                    asking()
            assert late.ready == 1  # a client that is refused at once loses no item
        assert server.metrics.snapshot()["refusals"] == {"budget": 3}
    assert count_items(small.folder / "server", tmp_path / "s")["spent"] == {me: 2}
