"""What a process must never hold: the client's the server's weights, the server's the client's image."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from shoal.private.program.program import Weights
from shoal.private.serving.client import Client
from shoal.private.transport import wire
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel
from tests.support.dealing import stock
from tests.support.forked import forked, heard, serve
from tests.support.memory import Secrets
from tests.support.parties import Case
from tests.support.processes import children


def kernels(net: Case) -> dict[str, np.ndarray]:
    """The server's kernels in every form that they take: of the float network, and of the compiled one."""
    forms: dict[str, np.ndarray] = {}
    for name, words in net.weights.arrays.items():
        if name.endswith(".weight"):
            kernel = net.graph.weights[name].numpy()
            kernel, words = (a if a.ndim == 4 else a[:, :, None, None] for a in (kernel, words))
            forms |= {f"{name} int64": words, f"{name} int32": words.astype(np.int32)}
            forms |= {f"{name} {t.__name__}": kernel.astype(t) for t in (np.float32, np.float64)}
            forms |= {f"{name} rounded {t.__name__}": (words * net.unit).astype(t) for t in (np.float32, np.float64)}
    return forms


def encoded(net: Case, image: np.ndarray) -> dict[str, np.ndarray]:
    return {"image int64": np.rint(image.astype(np.float64) / net.unit).astype(np.int64), "image float32": image}


def live(pipe: Connection, folder: Path, tls: TLS, address: str, image: np.ndarray, make: int) -> None:
    """A client that makes items if asked to, queries twice, says all that it heard, and last loads what it is told."""
    received: list[bytes] = []
    exactly, move = Channel._exactly, wire._move

    def listening(self: Channel, count: int) -> bytes:
        received.append(data := exactly(self, count))
        return data

    def moving(sock: Any, out: memoryview, into: memoryview, limit: float) -> None:
        move(sock, out, into, limit)
        received.append(bytes(into))

    Channel._exactly, wire._move = listening, moving  # type: ignore[method-assign]
    client = Client(folder, address, tls)
    if make:
        client.prepare(make, batch=1, progress=lambda *_: (pipe.send("made"), pipe.recv()))
    with client:
        logits = [client.query(image).logits for _ in range(2)]
        pipe.send((logits, b"".join(received)))
        weights, forms = Weights.load(pipe.recv()), dict(np.load(pipe.recv()))
        pipe.send(len(weights.arrays) + len(forms))
        pipe.recv()


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("make", [0, 1])
def test_a_client_holds_no_weight_and_a_server_no_image(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, make: int
) -> None:
    forms, image = kernels(small), small.images[:1].numpy()
    images = encoded(small, image)
    secrets = Secrets(forms | images)
    folder = copytree(small.folder / "client", tmp_path / "client", ignore=lambda *_: ["pool"])
    stock(small, folder / "pool", tmp_path / "s", certs["client"].cert, 2 - make)
    with forked(serve, small.folder, certs["server"], tmp_path / "s") as (server, words):
        mine = folder, certs["client"], heard(words), image, make
        with forked(live, *mine) as (client, pipe):
            for _ in range(make):
                assert heard(pipe) == "made"
                (near,), (far,) = (children(int(p.pid or 0)) for p in (client, server))
                assert secrets.within_process(near) == set()  # the client's SPU process
                assert set() != secrets.within_process(far) <= set(forms)  # the server's
                pipe.send("go on")
            logits, received = heard(pipe)
            assert np.abs(np.stack(logits) - small.truth(1)).max() <= 12 * small.unit
            assert len(received) > 5_000
            disk = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
            assert secrets.within(received) == secrets.within(disk) == set()
            # The same search finds in each process what is its own.
            assert secrets.within_process(client.pid) == set(images)
            assert secrets.within_process(server.pid) <= set(forms)
            np.savez(tmp_path / "forms.npz", **forms)  # type: ignore[arg-type]
            pipe.send(small.folder / "server")
            pipe.send(tmp_path / "forms.npz")
            assert heard(pipe) > len(forms)
            assert set(forms) <= secrets.within_process(client.pid) <= set(forms | images)


def test_the_search_finds_a_run_at_any_offset(small: Case) -> None:
    secrets, file = Secrets(kernels(small)), (small.folder / "server" / "weights.safetensors").read_bytes()
    for offset in range(8):
        assert {name for name in secrets.within(bytes(offset) + file) if name.endswith(" int64")}
        run = next(iter(kernels(small).values())).ravel()[:4]
        assert secrets.within(bytes(offset + 100) + run.tobytes() + b"\1")
        assert not secrets.within(bytes(offset + 100) + run[:3].tobytes() + b"\1" * 100)
