"""ONNX, stage by stage: onnxruntime computes what the network does, and chains as the JSON says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.exits import onnx as exporting
from shoal.exits.cascades import cascade
from shoal.exits.inference import infer
from shoal.exits.onnx import load_exported
from shoal.networks.stored import load_network, save_network
from shoal.storage.run import Run
from tests.cli.test_commands import call
from tests.jobs.test_exits import trained


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in exporting.NEEDED:
        pytest.importorskip(name)
    torch.set_num_threads(1)
    folder = trained(tmp_path_factory.mktemp("export") / "run")
    call("exits", str(folder), "--budget", "0.7", "--rounds", "1", "--json")
    return folder


@pytest.fixture(scope="module")
def exported(multi: Path) -> Path:
    out = multi.parent / "onnx"
    body = json.loads(call("export", str(multi), "--out", str(out), "--json"))
    assert body["stages"] == 3
    assert body["max_abs_logit_error"] < 1e-4
    return out


@pytest.mark.slow
def test_onnxruntime_agrees_on_mixed_batches(multi: Path, exported: Path) -> None:
    spec, model = load_network(Run(multi))
    data, found = load("digits", seed=0), load_exported(exported)
    images = data.normalise(data.test.images[:50])
    network = cascade(model, spec.shape)
    mine = infer(network, images, found.thresholds, ensemble=found.ensemble)
    theirs = infer(found.network, images, found.thresholds, ensemble=found.ensemble)
    assert len(set(mine.exits.tolist())) > 1
    assert torch.equal(mine.exits, theirs.exits)
    assert (mine.logits - theirs.logits).abs().max() < 1e-4
    assert found.network.macs == network.macs


def test_the_json_says_how_to_chain(exported: Path) -> None:
    body = json.loads((exported / "cascade.json").read_text())
    assert body["stages"][0]["inputs"] == ["images"]
    for row, after in zip(body["stages"], [*body["stages"][1:], {"inputs": []}], strict=True):
        assert row["outputs"] == ["logits", *after["inputs"]]
        assert (exported / row["file"]).exists()
    assert {"mean", "std", "thresholds", "ensemble", "shape"} <= set(body)


def test_damage_is_named(exported: Path, tmp_path: Path) -> None:
    body = json.loads((exported / "cascade.json").read_text())
    for change, pattern in (
        ({"format": "other"}, "format 'other'"),
        ({"thresholds": [0.5]}, "need 2 numbers"),
        ({"stages": [{"file": "absent.onnx", "inputs": [], "outputs": []}] * 3}, "no usable ONNX"),
        ({"stages": 3}, "need what shoal export wrote"),
    ):
        (tmp_path / "cascade.json").write_text(json.dumps(body | change))
        with pytest.raises(ShoalError, match=pattern):
            load_exported(tmp_path)


def test_a_full_folder_and_missing_thresholds_are_refused(multi: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="found files at"):
        call("export", str(multi), "--out", str(exported))
    spec, model = load_network(Run(multi))
    bare = Run.create(tmp_path / "bare", Run(multi).read_json("config.json"))
    save_network(bare, spec, model)
    with pytest.raises(ShoalError, match=r"no thresholds.json"):
        call("export", str(tmp_path / "bare"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_extra_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ShoalError, match=r"pip install shoal\[export\]"):
        call("export", str(tmp_path), "--out", str(tmp_path / "out"))
