"""Grid files: by-hand expansions, what is refused before anything runs, and how places on machines are dealt out."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.cli.sweep import commands
from shoal.errors import ShoalError
from shoal.sweep.grid import Planned, read_grid
from shoal.sweep.processes import assign, count_slots, share, visible_gpus

KNOWN = commands(typer.main.get_command(app))
TWO_STAGES = """
stages:
  - name: teacher
    command: train
    model: resnet10
    data: digits
    grid: {width: [0.125, 0.25], seed: [0, 1]}
  - name: reduced
    command: reduce
    teacher: "{teacher}"
    epochs: 1,1,{long}
    gates: false
    d-th: 0.1
    grid: {seed: [0, 1], width: [0.25], long: [2, 3], exit: [true, false]}
"""


def plan(tmp_path: Path, text: str) -> tuple[Planned, ...]:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(path, KNOWN, Path("out"))


def test_what_may_be_swept_makes_runs_that_resume() -> None:
    assert {"train", "reduce"} <= set(KNOWN)
    assert not {"demo", "count", "serve", "sweep"} & set(KNOWN)


def test_stages_by_hand(tmp_path: Path) -> None:
    runs = plan(tmp_path, TWO_STAGES.replace("d-th: 0.1", "d-th: 0.1\n    budget: 300"))
    assert len(runs) == 2 * 2 + 2 * 2 * 2
    assert [r.name for r in runs[:4]] == [f"teacher-width={w}-seed={s}" for w in (0.125, 0.25) for s in (0, 1)]
    last = runs[-1]
    assert last.name == "reduced-seed=1-width=0.25-long=3-exit=false"
    assert last.folder == Path("out/runs") / last.name
    assert last.needs == ("teacher-width=0.25-seed=1",)
    words = ["reduce", "--out", f"out/runs/{last.name}", "--epochs", "1,1,3", "--no-gates", "--d-th", "0.1"]
    words += ["--budget", "300", "--no-exit", "--", "out/runs/teacher-width=0.25-seed=1"]
    assert list(last.words) == words
    assert all(r.needs == () for r in runs[:4])


def test_one_stage_needs_no_list_and_keeps_its_names(tmp_path: Path) -> None:
    text = "command: reduce\nteacher: runs/t-{seed}\nbudget: 300\ngate: [a, b]\ngrid: {seed: [0, 1], masks: [senet]}\n"
    runs = plan(tmp_path, text)
    assert [r.name for r in runs] == ["reduce-seed=0-masks=senet", "reduce-seed=1-masks=senet"]
    assert runs[1].words[-1] == "runs/t-1"
    assert runs[1].words[3:9] == ("--budget", "300", "--gate", "a", "--gate", "b")
    more = plan(tmp_path, text.replace("[0, 1]", "[2, 1]").replace("budget: 300", "budget: 400"))
    assert [r.name for r in more] == ["reduce-seed=2-masks=senet", "reduce-seed=1-masks=senet"]


TRAIN = "command: train\nmodel: resnet10\ndata: digits\n"
REFUSED = [
    ("[1, 2", "no grid at"),
    ("- 1\n", "no stages"),
    ("stages: []\n", "no stages"),
    ("stages: [{command: train}]\nseed: 1\n", "'seed' beside `stages`"),
    ("command: demo\n", "command 'demo' in a stage; need one of train, reduce"),
    (TRAIN + "name: a/b\n", "stage name 'a/b'"),
    (TRAIN + "data-dir: here\ndata_dir: there\n", "found an option twice, with - and with _"),
    (TRAIN + "widht: 0.5\n", "no option 'widht' of train; need 'width', the nearest"),
    (TRAIN + "grid: {widht: [0.5]}\n", "no option 'widht' of train; need 'width', the nearest"),
    (TRAIN + "out: x\n", "option 'out', which the sweep sets itself"),
    (TRAIN + "grid: {max-seconds: [1]}\n", "option 'max_seconds', which the sweep sets itself"),
    (TRAIN + "grid: {seed: []}\n", r"found \[\] as axis 'seed'"),
    (TRAIN + "grid: {seed: 3}\n", "found 3 as axis 'seed'"),
    (TRAIN + "grid: 3\n", "found 3 as `grid`"),
    (TRAIN + "grid:\n", "found None as `grid`"),
    (TRAIN + "seed: 1\ngrid: {seed: [0]}\n", "'seed' fixed and in the grid"),
    (TRAIN + "seed: 1\nseed: 2\n", "'seed' twice"),
    (TRAIN + "seed: [1, 2]\n", "put lists under `grid`"),
    (TRAIN + "tensorboard: 1\n", "need true or false"),
    (TRAIN + "grid: {seed: [0, '0']}\n", "run 'train-seed=0' twice"),
    (TRAIN + "grid: {data_dir: [a/b, 'a:b']}\n", "run 'train-data_dir=a-b' twice"),
    (f"stages: [{{command: train, model: m, data: {'d' * 9}, grid: {{data_dir: [{'x' * 300}]}}}}]\n", "characters"),
    (TRAIN + "epochs: many\n", "shoal train refuses .*Invalid value for '--epochs'"),
    ("command: train\nmodel: resnet10\n", "shoal train refuses .*Missing option '--data'"),
    ("command: train\ndata: digits\n", "no 'model' at stage 'train'"),
    (TRAIN + "width: '{wide}'\n", "found {wide} at stage 'train'; need an axis or an earlier stage"),
    ("stages: [{command: reduce, teacher: '{reduce}', budget: 9}]\n", "found {reduce} at stage"),
    (TWO_STAGES.replace("width: [0.25], ", ""), "has no axis 'width'"),
    (TWO_STAGES.replace("width: [0.25]", "width: [0.5]"), "no run of stage 'teacher' with width=0.5, seed=0"),
    (TWO_STAGES.replace('"{teacher}"', "runs/t-{seed}"), "no option 'width' of reduce"),
    (TWO_STAGES.replace("name: reduced", "name: teacher"), "stage 'teacher' twice"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_grid_is_refused_before_anything_runs(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=message):
        plan(tmp_path, text)


def test_the_command_refuses_before_it_writes(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(TRAIN + "grid: {seed: [0]}\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("")
    rows = [
        ((grid, "--out", out, "--workers", "0"), "found --workers 0"),
        ((grid, "--out", out, "--retries", "-1"), "found --retries -1"),
        ((grid, "--out", full), "found files at"),
        ((tmp_path / "none.yaml", "--out", out), "no grid at"),
    ]
    for words, message in rows:
        done = CliRunner().invoke(app, ["sweep", *map(str, words)])
        assert isinstance(done.exception, ShoalError)
        assert message in str(done.exception)
        assert not out.exists()
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]


def test_slots_go_round_the_gpus() -> None:
    gpus = ["0", "GPU-8a"]
    dealt = [assign(slot, gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(count_slots(None, 3, len(gpus), 1))]
    assert sorted(dealt) == ["0"] * 3 + ["GPU-8a"] * 3
    assert dealt[:2] == gpus
    assert assign(1, []) == {}


@pytest.mark.parametrize(
    ("visible", "found", "names"),
    [(None, 2, ["0", "1"]), (None, 0, []), ("3, GPU-8a", 2, ["3", "GPU-8a"]), ("", 2, [])],
)
def test_gpus_are_those_that_the_sweep_itself_may_use(visible: str | None, found: int, names: list[str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environment, found) == names


@pytest.mark.parametrize(
    ("workers", "per_gpu", "gpus", "slots"), [(None, None, 4, 7), (3, None, 0, 3), (None, 2, 4, 8), (3, 2, 4, 3)]
)
def test_slots_by_hand(workers: int | None, per_gpu: int | None, gpus: int, slots: int) -> None:
    assert count_slots(workers, per_gpu, gpus, default=7) == slots


@pytest.mark.parametrize(
    ("workers", "per_gpu", "gpus", "message"),
    [(0, None, 0, "--workers 0"), (None, 0, 1, "--per-gpu 0"), (None, 2, 0, "no GPU"), (9, 2, 4, "at most 8")],
)
def test_slots_that_cannot_be(workers: int | None, per_gpu: int | None, gpus: int, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        count_slots(workers, per_gpu, gpus, default=7)


def test_cores_are_divided_and_none_is_left_without() -> None:
    assert [share(8, workers)["OMP_NUM_THREADS"] for workers in (1, 2, 3, 8, 20)] == ["8", "4", "2", "1", "1"]
