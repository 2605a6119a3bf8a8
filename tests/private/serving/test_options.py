"""What may be chosen for a server and a client: one default for each value, and one sentence for each wrong one."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from shoal.cli.fields import docs_of
from shoal.cli.query import prepare, query
from shoal.cli.serve import serve
from shoal.errors import ShoalError
from shoal.private.serving.options import MOST_ITEMS, ClientOptions, PartyOptions, ServerOptions

PROMISED = {
    serve: "listen cert key ca insecure sessions timeout_s pool pool_gib max_pools max_clients engines early_exit "
    "certificate_sessions allow query_budget certificate_gib disk_gib memory_gib max_batch "
    "products workers weight_cache_gib threads grace_s metrics metrics_port ready_file json",
    prepare: "count batch keep connect cert key ca insecure timeout_s pool workers json",
    query: "images top_up exit_above connect cert key ca insecure timeout_s pool workers json",
}
"""The options that users of these commands know, by the names of their values."""


@pytest.mark.parametrize("command", PROMISED)
def test_the_commands_have_the_promised_options(command: Any) -> None:
    assert set(inspect.signature(command).parameters) == {"artifact", *PROMISED[command].split()}


@pytest.mark.parametrize("command", PROMISED)
def test_a_command_and_its_class_have_the_same_defaults(command: Any) -> None:
    options = ServerOptions() if command is serve else ClientOptions()
    shown = inspect.signature(command).parameters
    shared = [f.name for f in fields(options) if f.name in shown and f.metadata.get("cli", f.name)]
    assert {"timeout_s", "pool", "insecure"} <= set(shared)
    for name in shared:
        assert shown[name].default == getattr(options, name)


@pytest.mark.parametrize("cls", [ServerOptions, ClientOptions])
def test_every_option_is_explained(cls: type[PartyOptions]) -> None:
    docs = docs_of(cls)
    assert {f.name for f in fields(cls)} == set(docs)
    assert all(text.endswith(".") for text in docs.values())


@pytest.mark.parametrize(
    ("cls", "wrong", "sentence"),
    [
        (ServerOptions, {"timeout_s": 0}, "found timeout_s 0; need a number of seconds above 0; choose"),
        (ClientOptions, {"timeout_s": float("inf")}, "found timeout_s inf; need"),
        (ServerOptions, {"max_clients": 0}, "found max_clients 0; need a whole number of 1 or more"),
        (ServerOptions, {"certificate_sessions": 0}, "found certificate_sessions 0; need a whole number of 1 or more"),
        (ServerOptions, {"engines": True}, "found engines True; need a whole number"),
        (ServerOptions, {"max_pools": 1.5}, "found max_pools 1.5; need a whole number"),
        (ServerOptions, {"pool_gib": -1.0}, "found pool_gib -1.0; need a number of GiB, 0 or more"),
        (ServerOptions, {"disk_gib": float("nan")}, "found disk_gib nan; need a number of GiB, 0 or more"),
        (ServerOptions, {"certificate_gib": -1.0}, "found certificate_gib -1.0; need a number of GiB"),
        (ServerOptions, {"memory_gib": -1.0}, "found memory_gib -1.0; need a number of GiB"),
        (ServerOptions, {"query_budget": -1}, "found query_budget -1; need a whole number of 0 or more"),
        (ServerOptions, {"max_batch": 0}, "found max_batch 0; need a whole number"),
        (ServerOptions, {"weight_cache_gib": -1.0}, "found weight_cache_gib -1.0; need a number of GiB, 0 or more"),
        (ServerOptions, {"workers": "0"}, "found workers '0'; need a number from 1 to 256, or ray; leave it out"),
        (ClientOptions, {"workers": "many"}, "found workers 'many'; need a number from 1 to 256, or ray; leave it out"),
        (ServerOptions, {"spu_threads": 0}, "found spu_threads 0; need a whole number"),
        (ClientOptions, {"keep": MOST_ITEMS + 1}, "found keep=4097; need 1 to 4096 items"),
        (ClientOptions, {"keep": 0}, "found keep=0; need 1 to 4096 items"),
        (ClientOptions, {"batch": 0}, "found batch 0; need a whole number"),
        (ClientOptions, {"connect_s": -1.0}, "found connect_s -1.0; need a number of seconds, 0 or more"),
        (ClientOptions, {"pool_wait_s": float("nan")}, "found pool_wait_s nan; need a number of seconds"),
    ],
)
def test_a_value_that_cannot_work_gets_one_sentence(cls: Any, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ShoalError) as caught:
        cls(**wrong)
    assert str(caught.value).startswith(sentence)


def test_room_in_gib_is_room_in_bytes() -> None:
    assert ServerOptions().pool_bytes == 4 << 30
    assert ServerOptions(pool_gib=30_000 / 2**30).pool_bytes == 30_000
    assert ServerOptions(disk_gib=10.0).certificate_bytes == 5 << 30
    assert ServerOptions(certificate_gib=2.0).certificate_bytes == 2 << 30
    assert (ServerOptions().memory_bytes, ServerOptions(memory_gib=1.5).memory_bytes) == (None, 3 << 29)


@pytest.mark.parametrize("given", ["ray", "3", "256"])
def test_workers_are_those_asked_for(given: str) -> None:
    assert ServerOptions(workers=given).hired == given


def test_workers_are_one_for_each_core_up_to_four_and_half_as_many_at_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, hired, half in ((None, "1", "1"), (1, "1", "1"), (2, "2", "1"), (3, "3", "1"), (64, "4", "2")):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert (ServerOptions().hired, ClientOptions().hired) == (hired, half)
