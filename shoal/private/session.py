"""A worker process: one party's SPU session, driven over pipes by the party that started it.

SPU blocks in C++ and cannot be interrupted, so it lives in a process of its own: when the peer dies or a timeout
passes, the party kills the worker and goes on. The worker ends when its party does.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.artifact import load_half, protocol_of
from shoal.private.certs import TLS
from shoal.private.channel import Channel, ClosedError
from shoal.private.program import Weights
from shoal.private.spu import SERVER, Engine


class Worker:
    """The party's handle on its worker process."""

    def __init__(self, artifact: Path, rank: int, addresses: tuple[str, str], tls: TLS | None, options: dict[str, Any]):
        self.log = tempfile.TemporaryDirectory(prefix="shoal-worker-")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.private.session"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.fd = self.process.stdout.fileno()
        self.channel = Channel.of_pipe(self.fd, self.process.stdin.fileno(), "the worker process")
        files = {k: str(v) for k, v in asdict(tls).items()} if tls else None
        body = {"artifact": str(artifact), "rank": rank, "addresses": addresses, "tls": files, "log": self.log.name}
        self.channel.send("start", body | options)

    def kill(self) -> None:
        """End the worker at once."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.log.cleanup()


def _commands(channel: Channel) -> queue.Queue[tuple[str, dict[str, Any], bytes]]:
    """Frames from the party; the worker dies with it."""
    frames: queue.Queue[tuple[str, dict[str, Any], bytes]] = queue.Queue()

    def pump() -> None:
        try:
            while True:
                frames.put(channel.receive())
        except ClosedError:
            os._exit(1)  # the main thread may be inside SPU, which no exception reaches

    threading.Thread(target=pump, daemon=True).start()
    return frames


def _start(body: dict[str, Any]) -> tuple[Engine, float]:
    begun = time.perf_counter()
    program, manifest = load_half(body["artifact"])
    files = body["tls"]
    tls = TLS(**{k: Path(v) for k, v in files.items()}) if files else None
    addresses = (str(body["addresses"][0]), str(body["addresses"][1]))
    log = Path(body["log"]) / "spu.log"
    engine = Engine(program, body["rank"], addresses, tls, protocol_of(manifest), log, body["timeout_s"])
    engine.put_weights(Weights.load(body["artifact"]) if body["rank"] == SERVER else None)
    _run(engine, None if body["rank"] == SERVER else np.zeros((1, *program.input_shape), np.float32), 1)
    return engine, time.perf_counter() - begun


def _run(engine: Engine, images: np.ndarray | None, batch: int) -> tuple[dict[str, Any], bytes]:
    logits, statistics = engine.run(images, batch)
    body: dict[str, Any] = asdict(statistics) | {"peak_bytes": peak_memory()}
    if logits is None:
        return body, b""
    body["shapes"] = [list(z.shape) for z in logits]
    return body, b"".join(z.astype("<f8").tobytes() for z in logits)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Obey the party until it closes the pipe."""
    # SPU and JAX may print; only frames may reach the party.
    out = os.dup(1)
    os.dup2(2, 1)
    channel = Channel.of_pipe(0, out, "the party")
    frames = _commands(channel)
    try:
        _, body, _ = frames.get()
        engine, seconds = _start(body)
        channel.send("ready", {"seconds": seconds})
        while True:
            _, body, payload = frames.get()
            shape = (body["batch"], *engine.program.input_shape)
            images = np.frombuffer(payload, "<f4").reshape(shape) if payload else None
            channel.send("done", *_run(engine, images, body["batch"]))
    except ShoalError as error:
        channel.send("error", {"message": str(error)})
    except Exception as error:
        # Whatever SPU throws ends the session; the party must hear why.
        text = str(error).splitlines() or [type(error).__name__]
        channel.send("error", {"message": f"found that the SPU session failed ({text[0][:300]}); need a new session"})
    os._exit(1)  # SPU's own threads would wait for a peer that is gone


if __name__ == "__main__":
    main()
