"""`shoal exits` on a trained run with three exits: what it writes, prints and refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli.exits import exits_table
from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.exits.thresholds import read_thresholds
from shoal.jobs.exits import Wanted
from shoal.jobs.inputs import plain_network
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.support.tables import fast_first

FIGURES = {"accuracy", "macs", "shares"}


def trained(folder: Path) -> Path:
    """A run whose network has three exits, all trained by cross-entropy on digits."""
    data = load("digits", seed=0, limit=600)
    base = assemble(Spec("resnet10", data.classes, data.shape, 0.125))
    sites = [site.name for site in relu_sites(base, data.shape)]
    spec = Spec("resnet10", data.classes, data.shape, 0.125, exits=(sites[2], sites[5]))
    torch.manual_seed(0)
    network = assemble(spec)
    terms = tuple(cross_entropy(exit=i, name=f"exit{i}") for i in range(3))
    fit(network, data, Objective(terms), Schedule(3, 0.1, (2,), batch_size=32), settings=Settings())
    run = Run.create(folder, {"command": "self-distill", "data": "digits", "seed": 0, "limit": 600, "data_dir": None})
    save_network(run, spec, network)
    return folder


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("exits") / "run")


def exits(run: Path, *more: str) -> dict[str, object]:
    return json.loads(call("exits", str(run), "--rounds", "1", *more, "--json"))


@pytest.mark.slow
def test_no_loss_on_validation_is_the_usual_goal(multi: Path) -> None:
    body = exits(multi)
    assert body["validation"]["accuracy"] >= body["full"]["validation"]
    assert body["goal"] == {"loss": 0.0}
    assert set(body["validation"]) == set(body["test"]) == FIGURES
    assert math.isclose(sum(body["test"]["shares"]), 1.0)
    assert len(body["thresholds"]) == 2
    assert body["fitness"] == pytest.approx(body["full"]["macs"] / body["validation"]["macs"])
    assert set(body["seconds"]) == {"64", "1"}
    assert all(row["speedup"] == row["full"] / row["dynamic"] for row in body["seconds"].values())
    assert body["lost"] is (body["test"]["accuracy"] < body["full"]["accuracy"])
    assert read_thresholds(Run(multi), 3) == (tuple(body["thresholds"]), False)
    assert Run(multi).read_json("thresholds.json") == body
    assert (multi / "exits.png").read_bytes()[:4] == b"\x89PNG"
    macs = [row["validation_macs"] for row in body["curve"]]
    assert macs == sorted(macs)
    assert macs[0] == pytest.approx(body["exits"][0]["macs"])  # at the cheap end all leave at the first exit


@pytest.mark.parametrize("method", fast_first(["grid", "genetic", "evolution"]))
def test_a_budget_is_kept(multi: Path, method: str) -> None:
    body = exits(multi, "--budget", "0.7", "--method", method, "--ensemble")
    assert body["validation"]["macs"] <= 0.7 * body["full"]["macs"] * (1 + 1e-6)
    assert (len(body["thresholds"]), body["ensemble"], body["method"]) == (3, True, method)


@pytest.mark.slow
def test_seconds_and_the_papers_fitness(multi: Path) -> None:
    assert exits(multi, "--budget", "60s", "--batch", "16")["goal"] == {"budget": "60s", "batch": 16}
    slow, fast = exits(multi, "--beta", "100"), exits(multi, "--beta", "0.0001")
    assert fast["test"]["shares"][0] == 1.0  # speed alone counts
    assert slow["validation"]["accuracy"] >= fast["validation"]["accuracy"]


@pytest.mark.slow
def test_the_table(multi: Path) -> None:
    text = call("exits", str(multi), "--rounds", "1")
    assert "exit 3 alone" in text
    assert "ms per image; the full network" in " ".join(text.split())


@pytest.mark.slow
def test_all_widths_of_a_run_are_its_exits(tmp_path: Path) -> None:
    """Also for studies; what is stored as the run's network is the widest alone."""
    words = ("resnet10", "--data", "digits", "--limit", "200", "--width", "0.125", "--epochs", "1", "--widths", "0.5,1")
    made = json.loads(call("inplace", *words, "--out", str(tmp_path / "run"), "--json"))
    body = exits(tmp_path / "run", "--loss", "100")
    assert [row["macs"] for row in body["exits"]] == [row["macs"] for row in made["anytime"]]
    assert [row["accuracy"] for row in body["exits"]] == pytest.approx([row["accuracy"] for row in made["anytime"]])
    studies = json.loads(call("analyse", str(tmp_path / "run"), "--study", "separability", "--images", "50", "--json"))
    assert studies["separability"]["rows"] == 2
    with pytest.raises(ShoalError, match="found a slimmable network"):
        call("prune", str(tmp_path / "run"), "--out", str(tmp_path / "pruned"))
    assert not (tmp_path / "pruned").exists()


def plain_run(folder: Path, *, seed: int = 0, name: str = "model", exits: tuple[str, ...] = ()) -> Path:
    """A run with an untrained plain network on the images of `trained`."""
    run = Run.create(folder, {"command": "train", "data": "digits", "seed": seed, "limit": 600, "data_dir": None})
    spec = Spec("resnet10", 10, (1, 16, 16), 0.125, exits=exits)
    torch.manual_seed(3)
    save_network(run, spec, assemble(spec), name)
    return folder


@pytest.mark.slow
def test_the_plain_network_is_the_baseline_that_is_given(multi: Path, tmp_path: Path) -> None:
    plain = plain_run(tmp_path / "plain")
    accuracy = json.loads(call("evaluate", str(plain), "--json"))["accuracy"]
    body = exits(multi, "--baseline", str(plain))
    assert body["baseline"]["accuracy"] == pytest.approx(accuracy)
    assert body["baseline"]["macs"] == body["full"]["macs"]  # one architecture, without the other exits
    assert body["goal"] == {"loss": 0.0, "against": "baseline"}
    assert body["lost"] is (body["test"]["accuracy"] < accuracy)
    # An untrained network is easy to match: the search may lose what the full network has beyond it.
    assert body["baseline"]["validation"] <= body["validation"]["accuracy"]
    assert body["validation"]["macs"] <= exits(multi)["validation"]["macs"]
    assert {"full", "dynamic", "baseline", "speedup"} == set(body["seconds"]["1"])


@pytest.mark.slow
def test_a_runs_own_baseline_is_shown_and_changes_no_goal(tmp_path: Path, multi: Path) -> None:
    run = Path(shutil.copytree(multi, tmp_path / "run"))
    spec = Spec("resnet10", 10, (1, 16, 16), 0.125)
    torch.manual_seed(3)
    save_network(Run(run), spec, assemble(spec), "baseline")
    before, after = exits(multi), exits(run)
    assert "baseline" not in before
    assert {name: after[name] for name in ("thresholds", "goal", "lost", "test")} == {
        name: before[name] for name in ("thresholds", "goal", "lost", "test")
    }
    given = exits(run, "--baseline", str(run))
    assert given["baseline"] == after["baseline"]
    assert given["goal"] == {"loss": 0.0, "against": "baseline"}
    text = " ".join(call("exits", str(run), "--rounds", "1").split())
    assert "plain network (baseline)" in text
    assert "Early exits against the plain network: test accuracy" in text


def test_the_baseline_of_exits_is_the_given_network_or_the_runs_own(tmp_path: Path) -> None:
    run, plain = Run(plain_run(tmp_path / "run", exits=("relu",))), plain_run(tmp_path / "plain")
    assert plain_network(run, None) is None
    found = plain_network(run, plain)
    assert found is not None
    assert torch.equal(found[1].get_parameter("fc.weight"), load_network(Run(plain))[1].get_parameter("fc.weight"))
    spec = Spec("resnet10", 10, (1, 16, 16), 0.25)
    save_network(run, spec, assemble(spec), "baseline")
    for given in (None, run.folder):
        found = plain_network(run, given)
        assert found is not None
        assert found[0] == spec
    other, grown = plain_run(tmp_path / "other", seed=1), plain_run(tmp_path / "grown", exits=("relu",))
    refused = [
        (other, "found --seed 0 and a baseline of seed 1; need the same"),
        (grown, "given exits; need the all-ReLU network"),
        (tmp_path / "nowhere", "no finished network"),
    ]
    for place, message in refused:
        with pytest.raises(ShoalError, match=message):
            plain_network(run, place)


@pytest.mark.parametrize(("against", "name"), [("baseline", "plain"), (None, "full")])
def test_a_lost_comparison_names_the_network_that_the_goal_counts_from(against: str | None, name: str) -> None:
    one = {"accuracy": 70.0, "validation": 70.0, "macs": 4e6}
    goal = {"loss": 0.0} | ({"against": against} if against else {})
    body: Any = {"thresholds": [0.5], "exits": [one] * 2, "full": one, "goal": goal, "seconds": {}, "uncounted": []}
    body |= {"test": {"accuracy": 68.5, "macs": 2e6, "shares": [0.5, 0.5]}, "baseline": one | {"accuracy": 69.0}}
    caption = str(exits_table("run", body | {"lost": True}).caption)
    assert "Early exits against the plain network: test accuracy -0.50 points, MACs 2.00x lower." in caption
    worth = "69.00" if against else "70.00"
    assert f"Early exits lost: 68.50 % test accuracy, against {worth} % of the {name} network." in caption
    assert "lost" not in str(exits_table("run", body | {"lost": False}).caption)


def test_help_teaches() -> None:
    for command in ("exits", "export", "analyse", "prune"):
        assert len(call(command, "--help")) > 400


def test_budgets() -> None:
    for text, amount, seconds in (("0.5", 0.5, False), ("2ms", 0.002, True), ("0.25s", 0.25, True)):
        wanted = Wanted(text)
        assert (wanted.amount(), wanted.in_seconds) == (pytest.approx(amount), seconds)
    assert Wanted("0.5").goal(30.0, 70.0).budget == 15.0
    assert Wanted("2ms").goal(30.0, 70.0).budget == pytest.approx(0.002)


def test_refused_and_nothing_written(multi: Path, tmp_path: Path) -> None:
    single = Run.create(tmp_path / "one", {"data": "digits", "seed": 0, "limit": 100, "data_dir": None})
    spec = Spec("resnet10", 10, (1, 16, 16), 0.125)
    save_network(single, spec, assemble(spec))
    rows = [
        ((str(single.folder),), "one classifier"),
        ((str(tmp_path),), "no finished network"),
        ((str(multi), "--method", "best"), "method 'best'"),
        ((str(multi), "--rounds", "0"), "found 0 rounds"),
        ((str(multi), "--budget", "0.5", "--loss", "1"), "need one goal"),
        ((str(multi), "--loss", "nan"), "found --loss nan"),
        ((str(multi), "--beta", "inf"), "found --beta inf"),
        ((str(multi), "--batch", "8"), "no budget in seconds"),
        ((str(multi), "--budget", "1s", "--batch", "0"), "batches of 0"),
        ((str(multi), "--budget", "half"), "--budget 'half'"),
        ((str(multi), "--budget", "-1ms"), "--budget '-1ms'"),
        ((str(multi), "--budget", "0.001"), "no thresholds that meet the goal"),
        ((str(multi), "--device", "meta"), "device 'meta'"),
    ]
    before = (multi / "thresholds.json").read_bytes() if (multi / "thresholds.json").exists() else None
    for words, pattern in rows:
        with pytest.raises(ShoalError, match=pattern):
            call("exits", *words)
    after = (multi / "thresholds.json").read_bytes() if (multi / "thresholds.json").exists() else None
    assert before == after
    assert not (tmp_path / "one" / "thresholds.json").exists()


@pytest.mark.parametrize("body", [[], {}, {"thresholds": ["a", 1], "ensemble": False}, {"thresholds": [0.5] * 2}])
def test_damaged_thresholds_are_refused(tmp_path: Path, body: object) -> None:
    run = Run(tmp_path)
    with pytest.raises(ShoalError, match=r"found no thresholds.json"):
        read_thresholds(run, 3)
    run.write_json("thresholds.json", body)
    with pytest.raises(ShoalError, match="no usable thresholds"):
        read_thresholds(run, 3)
