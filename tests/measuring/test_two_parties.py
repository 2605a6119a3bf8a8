"""Networks that are measured side by side, between two processes each."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.measuring.two_parties import BATCH, Deployed, check_images, side_by_side
from shoal.private.protocol.layout import Layout
from shoal.private.transport.certs import TLS
from tests.support.parties import Case, Small, case, seeded, small_mask


def deployed(net: Case) -> Deployed:
    return Deployed(net.folder, net.graph, net.program, net.weights)


@pytest.mark.slow
@pytest.mark.private
def test_figures_of_two_networks_are_their_own(certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    whole = case(seeded(Small), tmp_path / "whole", {})
    less = case(seeded(Small), tmp_path / "less", {"relu": small_mask()})
    networks, images = {"whole": deployed(whole), "less": deployed(less)}, whole.images[: BATCH + 1]
    found = side_by_side(networks, certs["server"].cert.parent, images)
    for name, net in (("whole", whole), ("less", less)):
        figures, online = found[name], Layout(net.program).online
        assert (figures.bytes, figures.messages) == (online.bytes, online.messages)
        assert figures.argmax_equal == figures.images == len(figures.samples_s) == BATCH + 1
        assert figures.max_abs_logit_error <= figures.error_bound
        assert figures.offline_samples_s == (figures.offline_s,)  # of two batches the first one does not count
    assert found["less"].bytes < found["whole"].bytes


def test_too_few_images_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ShoalError, match="found 2 images to query; need 3 or more"):
        check_images(BATCH)
