"""The networks of the papers that shoal implements, by name: `build("resnet18", classes=100)`.

Every network in `NAMES` has these properties, which the tests check:

- it maps images (N, channels, H, W) to logits (N, classes), or to a tuple of logits, weakest classifier first; H and W
  are not fixed;
- every ReLU is an `nn.ReLU` of its own that is called once, so a path such as `layer1.0.relu1` names one site;
- `torch.fx.symbolic_trace` can trace it;
- neither `resolution` nor the input's size changes the shape of a weight.

The networks in `CLOUDS` are for point clouds (N, channels, P, 1). The same holds for them, except that they have no
image size and no resolution.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from torch import nn

from shoal.errors import ShoalError
from shoal.models import bottleneck, mobile, mobilenet, msdnet, resgcn, resnet, small, vgg, wide_resnet

__all__ = ["CLOUDS", "KNOWN", "NAMES", "build", "list_models"]

_BUILDERS: dict[str, Callable[..., nn.Module]] = (
    resnet.BUILDERS
    | bottleneck.BUILDERS
    | wide_resnet.BUILDERS
    | vgg.BUILDERS
    | mobilenet.BUILDERS
    | mobile.BUILDERS
    | msdnet.BUILDERS
    | small.BUILDERS
)

NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""Every network for images that `build` knows."""

CLOUDS: tuple[str, ...] = tuple(resgcn.BUILDERS)
"""Every network for point clouds that `build` knows."""

KNOWN = NAMES + CLOUDS
"""Every name that `build` knows."""


def list_models() -> list[str]:
    """Names of the networks for images, grouped by family; those for point clouds are in `CLOUDS`."""
    return list(NAMES)


def build(name: str, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0) -> nn.Module:
    """A newly initialised network: (N, channels, H, W) -> logits (N, classes).

    `width` and `resolution` are alpha and rho of DeepReDuce's reshaping (ICML'21, section 3.3). `width` multiplies
    every channel count, also the stem's, and so the number of ReLUs. `resolution` (1, 0.5 or 0.25) multiplies the
    height and width of every map, by the stride of the stem, and so the number of ReLUs by its square. Raises
    ShoalError for an unknown name and for other values of the arguments.

    >>> net = build("resnet18", classes=100, width=0.5)
    """
    _check_name(name)
    _check_count("classes", classes)
    _check_count("channels", channels)
    _check_width(width)
    _check_resolution(resolution)
    return (_BUILDERS | resgcn.BUILDERS)[name](classes, channels=channels, width=width, resolution=resolution)


def _check_name(name: str) -> None:
    if name in KNOWN:
        return
    close = difflib.get_close_matches(str(name).lower(), KNOWN, n=3)
    remedy = f"try {' or '.join(close)}" if close else "choose one of them"
    remedy += f", or for point clouds one of {', '.join(CLOUDS)}"
    raise ShoalError(f"found {name!r} at build(name); need one of {', '.join(NAMES)}; {remedy}")


def _check_count(argument: str, value: int) -> None:
    # A bool is an int in Python, but `classes=True` is a mistake.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    raise ShoalError(f"found {value!r} at build({argument}); need an integer of at least 1; pass {argument}=10, say")


def _check_width(width: float) -> None:
    if isinstance(width, (int, float)) and math.isfinite(width) and width > 0:
        return
    raise ShoalError(f"found {width!r} at build(width); need a finite number above 0; pass width=0.5, say")


def _check_resolution(resolution: float) -> None:
    if isinstance(resolution, (int, float)) and resolution in resnet.STEM_STRIDE:
        return
    raise ShoalError(
        f"found {resolution!r} at build(resolution); need 1, 0.5 or 0.25 (the stem's stride is 1, 2 or 4); "
        "pass one of these, and use width for finer steps"
    )
