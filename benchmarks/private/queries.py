"""Items and queries of one program between two processes, over mutual TLS on loopback; used by other benchmarks."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.private.phases import WAIT_S, process, tls_of
from shoal.private.compiler.deployment import compare
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.transport.certs import make_certificates


def measure(
    program: Program, weights: Weights, images: Tensor, batch: int, folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of normalised `images`, one query each, and the medians of seconds and bytes for one image.

    Items are made in batches of `batch`. The first batch is left out of the seconds, because it includes the start of
    the processes and the keys, unless there is only one.
    """
    save_artifact(folder / "artifact", program, weights)
    make_certificates(folder / "certs")
    options = ClientOptions(timeout_s=WAIT_S)
    with process("--serve", folder / "artifact", folder / "certs", "seal") as address:
        client = Client(folder / "artifact", address, tls_of(folder / "certs", "client"), options)
        made = client.prepare(len(images), batch=batch)
        with client:
            results = [client.query(image[None].numpy()) for image in images]
    batches = made.batches[1:] or made.batches
    figures = {
        "batch": batch,
        "offline_s": statistics.median(facts["seconds"] / items for items, facts in batches),
        "offline_bytes": statistics.median((facts["sent"] + facts["received"]) / items for items, facts in batches),
        "online_s": statistics.median(result.seconds for result in results[1:]),
        "online_bytes": results[0].bytes,
    }
    return np.concatenate([result.logits for result in results]), figures


def agreement(exact: np.ndarray, private: np.ndarray) -> dict[str, Any]:
    """How many images have the same class by both kinds of logits [N, classes], and the largest difference."""
    found = compare(exact, private)
    return {"images": found.images, "same_class": found.argmax_equal, "error": found.max_abs_logit_error}
