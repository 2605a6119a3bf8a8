"""`compile`, Program and Weights: saved forms, the digest, and everything that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from shoal.errors import ShoalError
from shoal.graph.graph import Graph
from shoal.graph.ops import Node
from shoal.private.compiler.compilation import compile
from shoal.private.products.parameters import MOST_FLOOD_BITS
from shoal.private.program.clear import run_clear
from shoal.private.program.program import Program, Weights
from shoal.surgery.tracing import trace
from tests.private.program.test_clear import SHAPE, half_mask, images, masked, net


@pytest.fixture(scope="module")
def compiled() -> tuple[Program, Weights]:
    graph = net()
    return compile(masked(graph, "relu2", half_mask(graph, "relu2")), images())


# --- saved forms -----------------------------------------------------------------------------------------------


def test_round_trip(compiled: tuple[Program, Weights], tmp_path: Path) -> None:
    program, weights = compiled
    program.save(tmp_path)
    weights.save(tmp_path)
    again, same = Program.load(tmp_path), Weights.load(tmp_path)
    assert again == program
    assert hash(again) == hash(program)
    assert (again.steps, again.preprocessing, again.ranges) == (program.steps, program.preprocessing, program.ranges)
    np.testing.assert_array_equal(again.keep["relu2"], program.keep["relu2"])
    for a, b in zip(run_clear(again, same, images()), run_clear(program, weights, images()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_program_without_masks_round_trips(tmp_path: Path) -> None:
    program, _ = compile(net(), images(), preprocessing={"mean": [0.5, 0.4, 0.3], "class_names": list("abcd")})
    program.save(tmp_path)
    assert Program.load(tmp_path) == program
    assert program.preprocessing == {"mean": [0.5, 0.4, 0.3], "std": [1.0] * 3, "class_names": list("abcd")}
    fitted, _ = compile(net(), images(), preprocessing={"fit": "crop"})
    assert fitted.preprocessing == {"mean": [0.0] * 3, "std": [1.0] * 3, "class_names": None, "fit": "crop"}


def test_compiling_twice_gives_one_digest(compiled: tuple[Program, Weights]) -> None:
    graph = net()
    again, _ = compile(masked(graph, "relu2", half_mask(graph, "relu2")), images())
    assert again.digest() == compiled[0].digest()
    assert len(again.digest()) == 64


def spoilt(thing: Any, name: str) -> Any:
    return replace(thing, **{name: "other"})


def test_every_field_and_attribute_changes_the_digest(compiled: tuple[Program, Weights]) -> None:
    program, _ = compiled
    others: list[Program] = [spoilt(program, k) for k in vars(program) if k not in ("steps", "keep")]
    others += [replace(program, keep={}), replace(program, keep={"relu2": program.keep["relu2"][1:]})]
    for i, step in enumerate(program.steps):
        changed = [spoilt(step, k) for k in ("name", "op", "inputs", "shape")]
        changed += [replace(step, attrs=step.attrs | {k: "other"}) for k in step.attrs]
        others += [replace(program, steps=(*program.steps[:i], c, *program.steps[i + 1 :])) for c in changed]
    digests = {other.digest() for other in others}
    assert len(digests) == len(others)
    assert program.digest() not in digests


def test_program_json_holds_no_weight(compiled: tuple[Program, Weights], tmp_path: Path) -> None:
    """No number in the text is a weight, as a word or as a float, but for small ones that are sizes too."""
    program, weights = compiled
    program.save(tmp_path)
    numbers: set[float] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            list(map(collect, value.values()))
        elif isinstance(value, list):
            list(map(collect, value))
        elif isinstance(value, (int, float)):
            numbers.add(abs(float(value)))

    body = json.loads((tmp_path / "program.json").read_text())
    assert set(body) == {"digest", *vars(program)} - {"keep"}
    collect(body)
    small = {float(n) for n in range(MOST_FLOOD_BITS + 1)}  # sizes, strides, versions and bits of parameters
    held = {abs(float(w)) for a in weights.arrays.values() for w in a.ravel()} - small
    graph = net()
    held |= {abs(float(w)) for k, t in graph.weights.items() for w in t.double().flatten()} - small
    assert not numbers & held


# --- refusals --------------------------------------------------------------------------------------------------


def lone(*layers: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Flatten()).eval(), SHAPE)


def mean_graph(shape: tuple[int, ...], keepdim: bool, *more: Node) -> Graph:
    pooled = (shape[0], 1, 1) if keepdim else shape[:1]
    nodes = (Node("x", "input", (), shape), Node("m", "mean", ("x",), pooled, {"keepdim": keepdim}), *more)
    return Graph(nodes, {}, (nodes[-1].name,))


def with_weight(name: str, value: float) -> Graph:
    graph = net()
    graph.weights[name].flatten()[0] = value
    return graph


COMPILE_REFUSES: dict[str, tuple[Callable[[], Any], str]] = {
    "batch norm": (lambda: compile(lone(nn.BatchNorm2d(4)), images()), r"batch_norm at 1; need .* fold"),
    "max pool": (
        lambda: compile(lone(nn.FractionalMaxPool2d(2, 4)), images()),
        r"FractionalMaxPool2d at 1; need nn.MaxPool2d or nn.AvgPool2d",
    ),
    "ReLU6": (lambda: compile(lone(nn.ReLU6()), images()), r"relu6 at 1; need ReLU, .* --replace relu6=relu"),
    "unknown": (lambda: compile(lone(nn.SiLU()), images()), r"SiLU at 1; need ReLU, .* --replace silu=relu"),
    "NaN weight": (lambda: compile(with_weight("a.weight", float("nan")), images()), "NaN or infinity in a.weight"),
    "inf bias": (lambda: compile(with_weight("a.bias", float("inf")), images()), "NaN or infinity in a.bias"),
    "wide weight": (lambda: compile(with_weight("a.weight", 7e4), images()), r"7e\+04 at a.weight .*need less"),
    "given bits": (
        lambda: compile(with_weight("b.weight", 300.0), images(), fraction_bits=16),
        r"300 at b.weight with 16 fraction bits; need less than 2\^8 = 256",
    ),
    "wide input": (lambda: compile(net(), images() * 1e5), r"at x with 8 fraction bits"),
    "wide product": (lambda: compile(net(), images(), fraction_bits=30), "need less"),
    "no such bits": (lambda: compile(net(), images(), fraction_bits=40), "fraction_bits 40; need an integer"),
    "no images": (lambda: compile(net(), images()[:0]), "found 0 "),
    "integer images": (lambda: compile(net(), images().long()), "int64 calibration images"),
    "image shape": (lambda: compile(net(), torch.zeros(1, 3, 9, 9)), "found images of shape"),
    "NaN image": (lambda: compile(net(), images() * float("nan")), "nan at x in calibration"),
    "margin": (lambda: compile(net(), images(), margin=0.5), "margin 0.5"),
    "mask shape": (lambda: compile(masked(net(), "relu2", torch.ones(8, dtype=torch.bool)), images()), "at relu2"),
    "mask type": (lambda: compile(masked(net(), "relu2", torch.ones(8, 8, 8)), images()), "float32 mask"),
    "preprocessing": (lambda: compile(net(), images(), preprocessing={"mean": [0.0]}), "for 3 channels"),
    "stray preprocessing": (lambda: compile(net(), images(), preprocessing={"scale": 1}), "found preprocessing"),
    "unknown fit": (lambda: compile(net(), images(), preprocessing={"fit": "squeeze"}), "as fit one of stretch, crop"),
    "broadcast add": (
        lambda: compile(mean_graph(SHAPE, True, Node("s", "add", ("x", "m"), SHAPE)), images()),
        "at s; need a form",
    ),
    "input as output": (lambda: compile(Graph((Node("x", "input", (), SHAPE),), {}, ("x",)), images()), "outputs"),
    "wide mean": (
        lambda: compile(mean_graph((1, 64, 64), False), torch.zeros(1, 1, 64, 64), fraction_bits=8),
        "average over 4096 values",
    ),
}


@pytest.mark.parametrize("case", COMPILE_REFUSES)
def test_compile_refuses(case: str) -> None:
    call, message = COMPILE_REFUSES[case]
    with pytest.raises(ShoalError, match=message):
        call()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Program], None]:
    def apply(folder: Path, program: Program) -> None:
        body = json.loads((folder / "program.json").read_text())
        change(body)
        (folder / "program.json").write_text(json.dumps(body))

    return apply


def rebuilt(change: Callable[[Program], Program]) -> Callable[[Path, Program], None]:
    """A file whose digest is right, so that the rule itself must refuse it."""
    return lambda folder, program: change(program).save(folder)


def cut(name: str) -> Callable[[Path, Program], None]:
    def apply(folder: Path, program: Program) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 9])

    return apply


def positions(*values: int, dtype: type = np.int32, name: str = "relu2") -> Callable[[Path, Program], None]:
    return rebuilt(lambda p: replace(p, keep={name: np.array(values, dtype)}))


def first_attrs(**attrs: Any) -> Callable[[Path, Program], None]:
    def change(p: Program) -> Program:
        return replace(p, steps=(replace(p.steps[0], attrs=p.steps[0].attrs | attrs), *p.steps[1:]))

    return rebuilt(change)


LOAD_REFUSES: dict[str, tuple[Callable[[Path, Program], Any], str]] = {
    "truncated json": (cut("program.json"), "no readable JSON"),
    "truncated keep": (cut("keep.safetensors"), "unreadable weight file"),
    "missing json": (lambda f, p: (f / "program.json").unlink(), "no readable JSON"),
    "missing keep": (lambda f, p: (f / "keep.safetensors").unlink(), "unreadable weight file"),
    "a list": (lambda f, p: (f / "program.json").write_text("[]"), "found program version None"),
    "version": (edited(lambda b: b.update(version="shoal-program-0")), "version 'shoal-program-0'.*compile again"),
    "altered stride": (edited(lambda b: b["steps"][0]["attrs"].update(stride=[2, 2])), "unlike what was saved"),
    "altered bound": (edited(lambda b: b.update(error_bound=0.0)), "unlike what was saved"),
    "no steps": (edited(lambda b: b.pop("steps")), "malformed program .*steps"),
    "no digest": (edited(lambda b: b.pop("digest")), "malformed program .*digest"),
    "stray field": (edited(lambda b: b.update(more=1)), "malformed program .*more"),
    "swapped keep": (
        lambda f, p: save_file({"relu2": np.array([1], np.int32)}, f / "keep.safetensors"),
        "unlike what was saved",
    ),
    "order": (rebuilt(lambda p: replace(p, steps=p.steps[::-1])), "out of order"),
    "twice": (rebuilt(lambda p: replace(p, steps=(p.steps[0], *p.steps))), "out of order"),
    "output": (rebuilt(lambda p: replace(p, outputs=("nobody",))), "found outputs"),
    "no output": (rebuilt(lambda p: replace(p, outputs=())), "found outputs"),
    "operation": (rebuilt(lambda p: replace(p, steps=(replace(p.steps[0], op="max"), *p.steps[1:]))), "'max' at stem"),
    "groups": (first_attrs(groups=2), "at stem"),
    "stride": (first_attrs(stride=[0, 1]), "at stem"),
    "shape": (first_attrs(padding=[0, 0]), r"at stem with result \(8, 8, 8\); need \(8, 6, 6\)"),
    "attribute type": (first_attrs(stride="two"), "at stem"),
    "no attribute": (rebuilt(lambda p: replace(p, steps=(replace(p.steps[0], attrs={}), *p.steps[1:]))), "without"),
    "unhashable": (rebuilt(lambda p: replace(p, outputs=([],))), "malformed"),  # type: ignore[arg-type]
    "field": (rebuilt(lambda p: replace(p, field_bits=32)), "field_bits 32"),
    "fraction": (rebuilt(lambda p: replace(p, fraction_bits=99)), "fraction_bits 99"),
    "NaN bound": (rebuilt(lambda p: replace(p, error_bound=float("nan"))), "nan as the error bound"),
    "input limit": (rebuilt(lambda p: replace(p, input_limit=2.0**25)), r"found input limit 33554432\.0"),
    "keep too far": (positions(0, 8 * 8 * 8), "at relu2; need sorted int32 below 512"),
    "keep negative": (positions(-1, 3), "at relu2"),
    "keep unsorted": (positions(3, 2), "at relu2"),
    "keep repeated": (positions(3, 3), "at relu2"),
    "keep empty": (positions(), "at relu2"),
    "keep int64": (positions(1, 2, dtype=np.int64), "at relu2"),
    "keep of no relu": (positions(1, 2, name="a"), "of 'a'"),
}


@pytest.mark.parametrize("case", LOAD_REFUSES)
def test_load_refuses(case: str, compiled: tuple[Program, Weights], tmp_path: Path) -> None:
    spoil, message = LOAD_REFUSES[case]
    compiled[0].save(tmp_path)
    spoil(tmp_path, compiled[0])
    with pytest.raises(ShoalError, match=message):
        Program.load(tmp_path)


def test_weights_load_refuses_altered_files(compiled: tuple[Program, Weights], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with pytest.raises(ShoalError, match="unreadable"):
        Weights.load(tmp_path)
    compiled[1].save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ShoalError, match="unlike what was saved"):
        Weights.load(tmp_path)
    file.write_bytes(whole[:-1])
    with pytest.raises(ShoalError, match="unreadable"):
        Weights.load(tmp_path)
    save_file({"a.weight": np.zeros(3)}, file)
    with pytest.raises(ShoalError, match="unlike what was saved"):
        Weights.load(tmp_path)
