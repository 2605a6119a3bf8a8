"""Files of weights as people save them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.storage.weight_files import NESTED, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, Tensor]) -> bool:
    return list(found) == list(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".pth.tar", ".bin", ".ckpt"])
@pytest.mark.parametrize("key", [None, *NESTED])
def test_weights_alone_or_under_a_key(suffix: str, key: str | None, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    torch.save(STATE if key is None else {"epoch": 3, key: STATE}, path)
    found = read_weights(path)
    assert same(found.tensors)
    assert found.claimed is None


def test_safetensors_and_nesting_twice(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "net.safetensors")
    torch.save({"state_dict": {"model": STATE}}, tmp_path / "net.pt")
    assert all(same(read_weights(tmp_path / name).tensors) for name in ("net.pt",))
    assert read_weights(tmp_path / "net.safetensors").tensors.keys() == STATE.keys()


@pytest.mark.parametrize(
    ("key", "value", "claimed"),
    [
        ("best_prec1", 91.78, 91.78),
        ("best_acc", 0.9178, 91.78),
        ("best_acc1", torch.tensor(91.5), 91.5),
        ("acc", torch.tensor([90.0]), 90.0),
        ("accuracy", "high", None),
        ("test_acc", 120.0, None),
        ("epoch", 90, None),
    ],
)
def test_the_accuracy_that_a_file_states(key: str, value: Any, claimed: float | None, tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, key: value}, tmp_path / "net.pth")
    assert read_weights(tmp_path / "net.pth").claimed == pytest.approx(claimed)


class Gift:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("unpickled"),)


def whole(path: Path) -> None:
    torch.save(nn.Linear(2, 3), path)


def hostile(path: Path) -> None:
    torch.save({"state_dict": STATE, "extra": Gift()}, path)


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (whole, r"found Python objects at .* \(torch.nn.modules.linear.Linear\).*run code; need.*state_dict\(\)"),
        (hostile, r"found Python objects at .* .getattr., and.*run code; need"),
        (scripted, r"found no readable weights at .*net\.pth"),
        (lambda path: path.write_bytes(b"not a zip file"), r"found .*at .*net\.pth"),
        (lambda path: path.write_bytes(b""), r"found no readable weights at .*net\.pth"),
        (lambda path: None, r"found no readable weights at .*net\.pth.*check the path"),
        (lambda path: torch.save({"epoch": 3, "lr": 0.1}, path), "found the keys epoch, lr at .*but no weights"),
        (lambda path: torch.save([1, 2], path), "found a list at .*but no weights"),
        (lambda path: torch.save({}, path), "found a dict at .*but no weights"),
        (lambda path: torch.save({"state_dict": STATE | {"odd": 3}}, path), "found the keys a.weight, a.bias, odd"),
    ],
)
def test_other_files_are_refused_with_what_to_do(
    make: Callable[[Path], None], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "net.pth")
    with pytest.raises(ShoalError, match=text):
        read_weights(tmp_path / "net.pth")
    assert not Path("unpickled").exists()
