"""Threshold curves (Fig. 8): how many images an exit is confident about at each threshold, and its accuracy on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.exits.evidence import Evidence


def threshold_curve(evidence: Evidence, thresholds: Sequence[float]) -> list[dict[str, float | int | None]]:
    """Rows for each exit and threshold: the number of images with more confidence, and the accuracy on them.

    The accuracy is the exit's, in percent; it is None where there is no image.
    """
    rows: list[dict[str, float | int | None]] = []
    for exit in range(evidence.exits):
        for threshold in thresholds:
            sure = evidence.confidence[:, exit] > threshold
            images = int(np.count_nonzero(sure))
            accuracy = 100 * float(evidence.right[sure, exit].mean()) if images else None
            rows.append({"exit": exit, "threshold": float(threshold), "images": images, "accuracy": accuracy})
    return rows
