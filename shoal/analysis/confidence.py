"""Threshold curves (Fig. 8): how many images an exit would answer alone at each threshold, and how well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.exits.evidence import Evidence


def threshold_curve(evidence: Evidence, thresholds: Sequence[float]) -> list[dict[str, float | int | None]]:
    """For each exit and threshold: the number of images above it, and the exit's accuracy in percent on those.

    Where there is no image, the accuracy is None.
    """
    rows: list[dict[str, float | int | None]] = []
    for exit in range(evidence.exits):
        for threshold in thresholds:
            sure = evidence.confidence[:, exit] > threshold
            images = int(np.count_nonzero(sure))
            accuracy = 100 * float(evidence.right[sure, exit].mean()) if images else None
            rows.append({"exit": exit, "threshold": float(threshold), "images": images, "accuracy": accuracy})
    return rows
