"""`shoal bench`: prepared queries over a relay, counted at both ends."""

from __future__ import annotations

import pytest

from shoal.errors import ShoalError
from tests.support.parties import Case


@pytest.mark.slow
@pytest.mark.private
def test_a_wan_costs_its_latencies_and_the_relay_sees_the_bytes(small: Case, spu: None) -> None:
    from shoal.measuring.bench import Request, bench

    body = bench(small.folder, Request(("none", "wan"), rounds=2, batch=6))
    none, wan = body["networks"]["none"], body["networks"]["wan"]
    assert {k: none[k] for k in ("bytes", "messages", "latencies")} == {
        k: wan[k] for k in ("bytes", "messages", "latencies")
    }
    # The claim of an item is one more round trip. A WAN's latencies are what a query there takes, at the least. The
    # count has one too many: the client sends its wraps of the logits with its last masked value, so the server's wraps
    # and its share of the logits arrive together.
    assert wan["online_s"] >= (wan["latencies"] - 1 + 2) * 0.02
    assert wan["online_s"] > none["online_s"]
    for row in (none, wan):
        assert row["link_s"] + row["rest_s"] == pytest.approx(row["online_s"])
    assert none["link_s"] == 0.0
    assert wan["link_s"] >= (wan["latencies"] + 2) * 0.02
    assert body["cores"] >= 1
    seen = wan["relay_bytes"]["up"] + wan["relay_bytes"]["down"]
    assert seen > 3 * wan["bytes"]  # three queries, their claims, TLS and the handshake
    assert seen < 3 * wan["bytes"] + 40_000


def test_an_unknown_network_is_refused(small: Case) -> None:
    from shoal.measuring.bench import Request, bench

    with pytest.raises(ShoalError, match=r"found links .'moon'.*need some of none, lan, wan"):
        bench(small.folder, Request(("moon",)))
