"""Every kind of damage to weights in several files, and every lie of an index, is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.storage.shard_index import Shard, _digest, read_index
from shoal.storage.shards import index_path, pack
from shoal.storage.tensors import read_tensors, write_tensors
from tests.support.sharded import FACTS, LIMIT, names, same, shards, some


def first(folder: Path) -> Path:
    return shards(folder)[0]


def forge(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the index's body and give it the checksum that goes with it."""

    def damage(folder: Path) -> None:
        path = folder / "model.index.json"
        body = json.loads(path.read_text())
        body.pop("sha256")
        body = change(body) or body
        path.write_text(json.dumps(body | {"sha256": _digest(body)} if isinstance(body, dict) else body))

    return damage


def renamed(name: str) -> Callable[[Path], None]:
    return forge(lambda body: body["files"][0].update(name=name))


def entry(name: str, **values: Any) -> Callable[[Path], None]:
    return forge(lambda body: body["tensors"][name].update(values))


def swapped(folder: Path) -> None:
    a, b = shards(folder)[:2]
    blobs_ = a.read_bytes(), b.read_bytes()
    a.write_bytes(blobs_[1])
    b.write_bytes(blobs_[0])


def another_set(folder: Path) -> None:
    """A file of another set under the same name, with its own digest in the index."""
    part = next(iter(pack({"zeros": torch.ones(10)}, LIMIT)))
    write_tensors(folder / "other.safetensors", part, None, LIMIT)
    shard = read_index(folder / "other.index.json").files[0]
    name = f"model.shard-{shard.sha256[:16]}.safetensors"
    (folder / shard.name).rename(folder / name)
    forge(lambda body: body["files"][0].update(name=name, size=shard.size, sha256=shard.sha256))(folder)


def not_safetensors(folder: Path) -> None:
    shard = Shard.of("model", b"\xff" * 100)
    (folder / shard.name).write_bytes(b"\xff" * 100)
    forge(lambda body: body["files"][0].update(vars(shard)))(folder)


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something that is no file in a shard's place."""

    def damage(folder: Path) -> None:
        name = first(folder)
        name.unlink()
        make(name)

    return damage


HUGE = 10**15
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: first(f).unlink(), "no file at .*shard-"),
    "folder": (instead(Path.mkdir), "no file at .*shard-"),
    "pipe": (instead(os.mkfifo), "no file at .*shard-"),
    "cut off": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-1]), "bytes at .*shard-"),
    "empty": (lambda f: first(f).write_bytes(b""), "0 bytes at .*shard-"),
    "altered": (
        lambda f: first(f).write_bytes(first(f).read_bytes()[:-1] + b"\7"),
        "unlike what was saved at .*shard-",
    ),
    "swapped": (swapped, "at .*shard-"),
    "of another set": (another_set, "in only one of .*shard-.* or different"),
    "no safetensors": (not_safetensors, "unreadable weight file at .*shard-"),
    "index cut off": (lambda f: (f / "model.index.json").write_text("{"), "no readable JSON at .*model.index"),
    "index a list": (lambda f: (f / "model.index.json").write_text("[]"), "damaged index .*model.index.*format"),
    "index deep": (lambda f: (f / "model.index.json").write_text("[" * 100_000), "no readable JSON"),
    "index altered": (
        lambda f: (f / "model.index.json").write_text((f / "model.index.json").read_text().replace("epoch", "xpoch")),
        "damaged index .*checksum",
    ),
    "format": (forge(lambda b: b.update(format="shoal shards 9")), "not in format"),
    "more keys": (forge(lambda b: b.update(code="x")), "missing or unknown keys"),
    "fewer keys": (forge(lambda b: b.pop("metadata") and b), "missing or unknown keys"),
    "metadata": (forge(lambda b: b["metadata"].update(epoch=3)), "metadata other than text"),
    "path up": (renamed("../x"), "a file named '../x'"),
    "path absolute": (renamed("/etc/passwd"), "a file named '/etc/passwd'"),
    "path below": (renamed("a/b.safetensors"), "a file named 'a/b"),
    "another's shard": (renamed("best.shard-0123456789abcdef.safetensors"), "a file named 'best"),
    "name no text": (renamed(["x"]), "a file named"),  # type: ignore[arg-type]
    "no digest": (forge(lambda b: b["files"][0].update(sha256="../../x")), "no SHA-256"),
    "size": (forge(lambda b: b["files"][0].update(size=HUGE)), f"need the {HUGE} bytes"),
    "size below 0": (forge(lambda b: b["files"][0].update(size=-1)), "a file of -1 bytes"),
    "size true": (forge(lambda b: b["files"][0].update(size=True)), "a file of True bytes"),
    "file twice": (forge(lambda b: b["files"].append(b["files"][0])), "a file twice"),
    "file extra key": (forge(lambda b: b["files"][0].update(url="x")), "damaged index"),
    "files no list": (forge(lambda b: b.update(files={})), "not a list"),
    "shape": (entry("large", shape=[70, 901]), "not cover tensor 'large'"),
    "shape turned": (entry("torch.bool", shape=[5, 3]), "'torch.bool' in only one of"),
    "shape huge": (entry("large", shape=[HUGE, HUGE]), "not cover tensor 'large'"),
    "shape and pieces huge": (entry("one", shape=[HUGE], pieces=[[0, 0, HUGE]]), "in only one of"),
    "shape negative": (entry("large", shape=[-70, -900]), "-70 as a count"),
    "shape no list": (entry("large", shape=None), "not a list"),
    "shape nested": (entry("large", shape=[[70], 900]), "as a count"),
    "shape of floats": (entry("large", shape=[70.0, 900.0]), "as a count"),
    "shape long": (entry("one", shape=[1] * 65), "not cover tensor 'one'"),
    "empty and huge": (entry("none", shape=[0, HUGE, HUGE]), "'none' in only one of"),
    "dtype": (entry("large", dtype="float16"), "'large' in only one of"),
    "dtype unknown": (entry("large", dtype="quantised"), "'large' in only one of"),
    "dtype no text": (entry("large", dtype=32), "tensor 'large'"),
    "no pieces": (entry("large", pieces=[]), "not cover tensor 'large'"),
    "tensor dropped": (forge(lambda b: b["tensors"].pop("large") and b), "'large' in only one of"),
    "tensor added": (forge(lambda b: b["tensors"].update(more=b["tensors"]["one"])), "'more' in only one of"),
    "overlap": (forge(lambda b: b["tensors"]["large"]["pieces"][1].__setitem__(1, 0)), "not cover tensor 'large'"),
    "gap": (forge(lambda b: b["tensors"]["large"]["pieces"].pop(1) and b), "not cover tensor 'large'"),
    "end missing": (forge(lambda b: b["tensors"]["large"]["pieces"].pop() and b), "not cover tensor 'large'"),
    "turned round": (forge(lambda b: b["tensors"]["large"]["pieces"].reverse()), "not cover tensor 'large'"),
    "no such file": (entry("one", pieces=[[999, 0, 1]]), "not cover tensor 'one'"),
    "another file": (entry("one", pieces=[[0, 0, 1]]), "'one' in only one of"),
    "piece negative": (entry("one", pieces=[[-1, 0, 1]]), "-1 as a count"),
    "piece short": (entry("one", pieces=[[0, 1]]), "damaged index"),
    "tensors no table": (forge(lambda b: b.update(tensors=[])), "not an object"),
}


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("blank")
    write_tensors(folder / "model.safetensors", some(), FACTS, LIMIT)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_one_sentence(what: str, blank: dict[str, bytes], tmp_path: Path) -> None:
    for name, blob in blank.items():
        (tmp_path / name).write_bytes(blob)
    damage, pattern = DAMAGES[what]
    damage(tmp_path)
    with pytest.raises(ShoalError, match=pattern):
        read_tensors(tmp_path / "model.safetensors")


def test_an_absurdly_large_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.index.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(ShoalError, match=r"damaged index .*200000000 bytes"):
        read_tensors(tmp_path / "a.safetensors")


def test_no_flipped_byte_changes_what_is_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "t.safetensors", {"a": torch.randn(3, 2), "b": torch.tensor(True)}
    write_tensors(path, tensors, {"progress": "{}"}, LIMIT)
    for file in (index_path(path), *shards(tmp_path)):
        blob = file.read_bytes()
        for i in range(len(blob)):
            file.write_bytes(blob[:i] + bytes([blob[i] ^ 4]) + blob[i + 1 :])
            with pytest.raises(ShoalError):
                read_tensors(path)
        file.write_bytes(blob)
    assert same(read_tensors(path), tensors)


def test_a_damaged_set_can_be_written_over(blank: dict[str, bytes], tmp_path: Path) -> None:
    for damage in ("index cut off", "missing", "path up", "altered"):
        for name, blob in blank.items():
            (tmp_path / name).write_bytes(blob)
        DAMAGES[damage][0](tmp_path)
        write_tensors(tmp_path / "model.safetensors", some(1), FACTS, LIMIT)
        assert same(read_tensors(tmp_path / "model.safetensors"), some(1))
        assert len(names(tmp_path)) == 1 + len(read_index(tmp_path / "model.index.json").files)
