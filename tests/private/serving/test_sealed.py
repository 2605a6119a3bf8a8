"""Products of SEAL during preparation, between two parties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.transport.certs import TLS
from tests.support.forked import serving
from tests.support.parties import Everything, case, seeded

UNITS = 12


@pytest.mark.slow
@pytest.mark.private
def test_items_with_products_of_seal_give_the_same_answers(certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    net = case(seeded(Everything), tmp_path / "net", {})
    with serving(net.folder, certs["server"], products="seal") as (_, address):
        client = Client(net.folder, address, certs["client"], ClientOptions(pool=tmp_path / "client"))
        made = client.prepare(2, batch=2)
        assert set(net.program.products["steps"]) <= set(made.steps)
        with client:
            answer = client.query(net.images[:2].numpy())
    assert np.abs(answer.logits - net.truth(2)).max() <= UNITS * net.unit
