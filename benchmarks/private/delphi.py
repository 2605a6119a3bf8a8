"""DELPHI's published online latencies by ReLU count, as the DeepReDuce paper gives them for its ResNet18 networks."""

from __future__ import annotations

from typing import Any

import numpy as np

# Thousands of ReLUs and seconds: Table 4 and Table 5 of the paper.
PUBLISHED = {
    "CIFAR-100": [
        *((229.38, 4.61), (196.61, 3.94), (114.69, 2.38), (57.34, 1.37), (49.15, 1.19)),
        *((28.67, 0.74), (24.57, 0.56), (14.33, 0.52), (12.28, 0.45), (7.17, 0.21)),
    ],
    "TinyImageNet": [
        *((917.52, 17.16), (458.76, 8.87), (393.24, 7.77), (229.38, 4.61), (196.62, 4.16), (114.69, 2.47)),
        *((98.31, 2.64), (57.35, 1.85), (49.16, 1.325), (28.67, 0.678), (24.58, 0.579), (12.29, 0.455)),
    ],
}


def fit() -> dict[str, float]:
    """Least squares line through all published points."""
    thousands, seconds = np.array([point for table in PUBLISHED.values() for point in table]).T
    slope, intercept = np.polyfit(thousands * 1000, seconds, 1)
    return {"intercept_s": float(intercept), "us_per_relu": float(slope * 1e6)}


def beside(relus: int) -> dict[str, Any]:
    """The published point of each data set with the nearest ReLU count, and the line's value."""
    line = fit()
    nearest = {data: min(table, key=lambda point: abs(point[0] * 1000 - relus)) for data, table in PUBLISHED.items()}
    return {
        "nearest_published": {data: {"relus": round(k * 1000), "online_s": s} for data, (k, s) in nearest.items()},
        "fitted_online_s": line["intercept_s"] + line["us_per_relu"] * 1e-6 * relus,
    }
