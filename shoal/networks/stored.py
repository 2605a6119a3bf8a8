"""Saving and loading networks of a run folder: a `Spec` as JSON, and the weights."""

from __future__ import annotations

from torch import nn

from shoal.errors import ShoalError
from shoal.networks.assembly import assemble, own_network
from shoal.networks.onnx_files import found_in, keep_file
from shoal.networks.spec import GIVEN, Spec
from shoal.storage.run import Run
from shoal.storage.tensors import load_state, read_tensors, write_tensors

WHOLE = "slimmable"
"""Name of a run's slimmable network with all widths; the network `model` has the widest one only."""


def save_network(run: Run, spec: Spec, model: nn.Module, name: str = "model") -> None:
    """Store a network as `<name>.json` (its spec) and `<name>.safetensors` (weights, in several files if large).

    The ONNX file of a network that was made from one is copied into the run.
    """
    state = dict(model.state_dict())
    write_tensors(run.folder / f"{name}.safetensors", state, shard_bytes=run.shard_bytes)
    if spec.digest:
        keep_file(spec, run.folder)
    spec.save(run.folder / f"{name}.json")


def load_whole(run: Run) -> tuple[Spec, nn.Module]:
    """The run's slimmable network with all widths, in eval mode; if it has none, its network `model`.

    Raises ShoalError as `load_network` does.
    """
    return load_network(run, WHOLE if run.has(f"{WHOLE}.json") else "model")


def load_network(run: Run, name: str = "model", base: nn.Module | None = None) -> tuple[Spec, nn.Module]:
    """The stored network `name`, in eval mode; a network made in memory needs its base module as `base`.

    Raises ShoalError when there is no such network, when a needed `base` is missing, and when the weights are damaged.
    """
    if not run.has(f"{name}.json"):
        raise ShoalError(f"found no finished network {name!r} in {run.folder}; need a run that ended; resume it")
    spec, weights = Spec.load(run.folder / f"{name}.json"), run.folder / f"{name}.safetensors"
    if spec.digest:
        spec = found_in(run.folder, spec)
    if base is None and spec.base == GIVEN:
        raise ShoalError(
            f"found a network made in memory at {run.folder}; need its module; load it in Python, "
            "with load_network(run, base=...)"
        )
    model = assemble(spec, own_network(spec) if base is None else base)
    load_state(model, read_tensors(weights), weights)
    return spec, model.eval()
