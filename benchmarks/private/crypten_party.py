"""One of CrypTen's two processes in `private_others.py`, which starts both; party 0 is the server, party 1 the client.

python -m benchmarks.private.crypten_party RANK FOLDER ROUNDS THREADS
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.private.direct import SHAPE
from shoal.graph.graph import Graph

SERVER, CLIENT = 0, 1


def load_crypten() -> Any:
    """CrypTen 0.4.1 under a PyTorch newer than it knows."""
    # Only its importer of ONNX models, unused here, needs these two: the first need not be installed, the second is
    # gone from PyTorch. They are taken away again because PyTorch itself looks whether there is an `onnx`.
    stubs = {name: ModuleType(name) for name in ("onnx", "torch.onnx.symbolic_registry") if name not in sys.modules}
    for stub in stubs.values():
        stub.__dict__["numpy_helper"] = None
    sys.modules |= stubs
    crypten = importlib.import_module("crypten")
    for name in stubs:
        del sys.modules[name]
    return crypten


def relu(p: dict[str, Any], a: dict[str, Any], x: Any) -> Any:
    """ReLU of the kept positions of one image; as in shoal, only they go through the protocol."""
    if "mask" not in p:
        return x.relu()
    kept = p["mask"].flatten().nonzero().squeeze(1)
    flat = x.flatten()
    whole = flat.clone()
    whole[kept] = flat[kept].relu()
    return whole.view(*x.size())


def conv2d(p: dict[str, Any], a: dict[str, Any], x: Any) -> Any:
    y = x.conv2d(p["weight"], **{k: a[k] for k in ("stride", "padding", "dilation", "groups")})
    return y + p["bias"].view(1, -1, 1, 1) if "bias" in p else y


def linear(p: dict[str, Any], a: dict[str, Any], x: Any) -> Any:
    y = x.matmul(p["weight"].t())
    return y + p["bias"] if "bias" in p else y


OPS: dict[str, Callable[..., Any]] = {
    "conv2d": conv2d,
    "linear": linear,
    "relu": relu,
    "add": lambda p, a, x, y: x + y,
    "avg_pool2d": lambda p, a, x: x.avg_pool2d(a["kernel"], stride=a["stride"]),
    "mean": lambda p, a, x: x.mean((2, 3), keepdim=a["keepdim"]),
    "flatten": lambda p, a, x: x.flatten(1),
    "concat": lambda p, a, *xs: type(xs[0]).cat(list(xs), dim=1),
    "subsample": lambda p, a, x: x[:, :, :: a["stride"][0], :: a["stride"][1]],
    "pad": lambda p, a, x: x.pad(a["pads"]),
}
"""What each node type is on CrypTensors: (parameters, attributes, inputs) -> value."""


def image() -> torch.Tensor:
    """The image of `private_phases.py`."""
    return torch.from_numpy((np.random.default_rng(0).random((1, *SHAPE)) * 2 - 1).astype(np.float32))


class Timer:
    """Seconds spent in the calls that it watches, none of which calls another."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        setattr(owner, name, timed)


def party(rank: int, folder: Path, rounds: int, threads: int) -> None:
    """One of the two processes: `rounds` queries after one that is not counted, written to `<rank>.json`."""
    crypten = load_crypten()
    torch.set_num_threads(threads)
    crypten.cfg.mpc.provider = "TFP"
    crypten.cfg.communicator.verbose = True  # this alone makes it count bytes and rounds
    crypten.init()
    making = Timer()
    for name in ("generate_additive_triple", "generate_binary_triple", "B2A_rng"):  # all that two parties ask for
        making.watch(crypten.mpc.get_default_provider(), name)
    graph = Graph.load(folder / str(rank))
    with crypten.no_grad():
        shares = {k: crypten.cryptensor(w, src=SERVER) for k, w in graph.weights.items() if w.is_floating_point()}
        secret = replace(graph, weights=graph.weights | shares)
        x = image() if rank == CLIENT else torch.zeros(1, *SHAPE)
        rows = [query(crypten, secret, x, making) for _ in range(rounds + 1)][1:]
    (folder / f"{rank}.json").write_text(json.dumps(rows))


def query(crypten: Any, graph: Graph, x: torch.Tensor, making: Timer) -> dict[str, Any]:
    """One inference, from sharing the client's image to the client's logits."""
    wire = crypten.comm.get()
    wire.barrier()
    wire.reset_communication_stats()
    making.seconds = 0.0
    begun = time.perf_counter()
    values = {graph.input.name: crypten.cryptensor(x, src=CLIENT)}
    for node in graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = OPS[node.op](graph.parameters(node), node.attrs, *inputs)
    logits = values[graph.outputs[-1]].get_plain_text(dst=CLIENT)
    seconds = time.perf_counter() - begun
    row = {"seconds": seconds, "triples_s": making.seconds, "logits": None if logits is None else logits.tolist()}
    return row | wire.get_communication_stats()


if __name__ == "__main__":
    party(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
