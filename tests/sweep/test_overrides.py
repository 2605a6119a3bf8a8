"""`shoal sweep --set`: the same as another file, refused as one, and held to as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.sweep.engine import Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned, read_grid
from shoal.sweep.overrides import Override, read_override
from tests.sweep.test_grid import KNOWN

FILE = """
stages:
  - name: teacher
    command: train
    model: resnet10
    data: digits
    epochs: 8
    grid: {width: [0.125, 0.25], seed: [0, 1]}
  - name: cut.2
    command: reduce
    teacher: "{teacher}"
    epochs: "1,1,1"
    budget: 300
    gate: [a]
    grid: {seed: [0, 1], width: [0.125, 0.25]}
"""
AS_FILES = [
    ([], []),
    (["teacher.epochs=2"], [("epochs: 8", "epochs: 2")]),
    (["cut.2.epochs=1,2,3"], [('epochs: "1,1,1"', 'epochs: "1,2,3"')]),
    (["epochs=5"], [("epochs: 8", "epochs: 5"), ('epochs: "1,1,1"', "epochs: 5")]),
    (["teacher.epochs=2", "epochs=5"], [("epochs: 8", "epochs: 2"), ('epochs: "1,1,1"', "epochs: 5")]),
    (["width=0.5"], [("[0.125, 0.25]", "[0.5]")]),  # an axis stays one: runs keep their names, references their meaning
    (["width=[0.5, 1]", "seed=[3]"], [("[0.125, 0.25]", "[0.5, 1]"), ("[0, 1]", "[3]")]),
    (
        ["budget=[300, 600]"],
        [("    budget: 300\n", ""), ("0.25]}", "0.25], budget: [300, 600]}")],
    ),
    (["gate=[b, c]"], [("[a]", "[b, c]")]),  # --gate is repeated: its lists are no axes
    (
        ["gate=null", "data-dir=there"],
        [("gate: [a]", "gate: null\n    data_dir: there"), ("data: digits", "data: digits\n    data_dir: there")],
    ),
    (
        ["device=cuda"],
        [("data: digits", "data: digits\n    device: cuda"), ("gate: [a]", "gate: [a]\n    device: cuda")],
    ),
    (["gates=false"], [("gate: [a]", "gate: [a]\n    gates: false")]),
    (["teacher.data='{seed}'"], [("data: digits", "data: '{seed}'")]),
    (["model = 'package:a=b'"], [("model: resnet10", "model: 'package:a=b'")]),
]


def plan(folder: Path, text: str, *overrides: str) -> tuple[Planned, ...]:
    (folder / "grid.yaml").write_text(text)
    return read_grid(folder / "grid.yaml", KNOWN, Path("out"), overrides)


@pytest.mark.parametrize(("overrides", "changes"), AS_FILES, ids=range(len(AS_FILES)))
def test_an_override_is_the_same_as_another_file(
    overrides: list[str], changes: list[tuple[str, str]], tmp_path: Path
) -> None:
    text = FILE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    for order in (overrides, overrides[::-1]):
        runs = plan(tmp_path, FILE, *order)
        wanted = plan(tmp_path, text)
        assert [r.name for r in runs] == [r.name for r in wanted]
        assert [sorted(r.words) for r in runs] == [sorted(r.words) for r in wanted]
        assert [(r.words[0], r.words[-1], r.needs) for r in runs] == [
            (r.words[0], r.words[-1], r.needs) for r in wanted
        ]


def test_words_by_hand() -> None:
    assert read_override("cut.2.data-dir=[0, 1]") == Override("cut.2", "data_dir", [0, 1], "cut.2.data-dir=[0, 1]")
    assert read_override(" width = 0.5 ") == Override(None, "width", 0.5, " width = 0.5 ")
    assert read_override("epochs=1,2").value == "1,2"
    assert read_override("gates=false").value is False
    assert read_override("epochs=null").value is None


REFUSED = [
    (["width"], r"found --set 'width'; need \[STAGE.\]OPTION=VALUE"),
    (["=3"], "found --set '=3'; need"),
    (["teacher.=3"], "found --set 'teacher.=3'; need"),
    ([".width=3"], "found --set '.width=3'; need"),
    (["width="], "found --set 'width='; need .*, null for no value"),
    (["seed=[0, 1"], r"found --set 'seed=\[0, 1' \(.*\); need YAML"),
    (["seed=2024-13-45"], "found --set 'seed=2024-13-45' .*; need YAML"),
    (["data={seed}"], "need a value or a list; quote references: data='\"{axis}\"'"),
    (["teachers.width=1"], "found stage 'teachers' in --set .*; need one of the file's: teacher, cut.2; choose one"),
    (["widht=1"], "found no stage with an option 'widht' .*; need 'width', the nearest"),
    (["teacher.masks=senet"], "found no option 'masks' of train; need .*--set 'teacher.masks=senet'"),
    (["teacher.command=reduce"], "found no option 'command' of train"),
    (["grid=3"], "found no stage with an option 'grid'"),
    (["out=x"], "found option 'out', which the sweep sets itself"),
    (["teacher.max-seconds=9"], "found option 'max_seconds', which the sweep sets itself"),
    (["width=1", "width=2"], "found --set 'width=2' after another one for the same option"),
    (["cut.2.data-dir=a", "cut.2.data_dir=b"], "after another one for the same option"),
    (["seed=[]"], r"found \[\] as axis 'seed'"),
    (["seed=[0, 0]"], "run 'teacher-width=0.125-seed=0' twice"),
    (["teacher.width=0.5"], "no run of stage 'teacher' with width=0.125"),
    (["teacher.epochs=many"], "shoal train refuses .*Invalid value for '--epochs'"),
    (["gates=1"], "found gates: 1 at stage 'cut.2'; need true or false"),
    (["cut.2.teacher=runs/t-{seed}"], "no option 'width' of reduce"),
    (["teacher.data='{wide}'"], "found {wide} at stage 'teacher'"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_override_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "grid.yaml").write_text(FILE)
    words = [word for one in overrides for word in ("--set", one)]
    done = CliRunner().invoke(app, ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), *words])
    with pytest.raises(ShoalError, match=message):
        raise done.exception or AssertionError(done.output)
    assert not (tmp_path / "out").exists()


def test_what_was_overridden_holds_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sweep, "run", lambda self, watch, asked: list(self.records.values()))
    (tmp_path / "grid.yaml").write_text(FILE)

    def sweep(*words: str) -> BaseException | None:
        grid, out = str(tmp_path / "grid.yaml"), str(tmp_path / "out")
        return CliRunner().invoke(app, ["sweep", grid, "--out", out, *words]).exception

    assert isinstance(sweep("--set", "teacher.epochs=2"), SystemExit)  # status 75: all runs are waiting
    grid = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert grid["teacher-width=0.25-seed=0"][3:5] == ["--data", "digits"]
    assert grid["teacher-width=0.25-seed=0"][5:7] == ["--epochs", "2"]
    for words in ([], ["--set", "teacher.epochs=3"], ["--set", "teacher.epochs=2", "--set", "teacher.limit=9"]):
        assert "made with other options" in str(sweep("--resume", *words))
        assert json.loads((tmp_path / "out" / "grid.json").read_text()) == grid
    assert isinstance(sweep("--resume", "--set", "teacher.epochs=2"), SystemExit)
    assert isinstance(sweep("--resume", "--set", "teacher.epochs=2", "--set", "seed=[0, 1, 2]"), SystemExit)  # more
    (tmp_path / "grid.yaml").write_text(FILE.replace("epochs: 8", "epochs: 2"))
    assert isinstance(sweep("--resume"), SystemExit)  # the same runs, written in another way
    assert len(Folder(tmp_path / "out")._grid()) == 12
