"""The notebooks: stored without outputs, valid, and they run from the first cell to the last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that the notebook printed, with three epochs for each training."""
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    monkeypatch.setenv("SHOAL_EPOCHS", "3")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(name)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") != "stderr")


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["ask_a_private_question.ipynb", "reduce_a_network.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_holds_no_output(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_reduce_a_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = execute("reduce_a_network.ipynb", tmp_path, monkeypatch)
    before, after = re.findall(r"^ReLUs +([\d,]+) +([\d,]+)$", printed, re.M)[0]
    assert before == "7,424"
    assert 0 < int(after.replace(",", "")) <= 600
    deep, shallow = re.findall(r"^convolutions in a row +(\d+) +(\d+)$", printed, re.M)[0]
    assert int(shallow) < int(deep)


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.usefixtures("spu")
def test_ask_a_private_question_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    printed = execute("ask_a_private_question.ipynb", tmp_path, monkeypatch)
    assert "largest difference" in printed
