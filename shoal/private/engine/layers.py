"""The linear layers of a Program as JAX functions, which SPU compiles. Values are in (N, H, W, C) order here."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shoal.private.program.steps import Step


def multiply(step: Step, x: Any, weight: Any) -> Any:
    """The convolution or matrix product of `step` without its bias, of ring words (int64) or float32 numbers."""
    return _convolve(step, x, weight) if step.op == "conv2d" else x @ weight


def _convolve(step: Step, x: Any, weight: Any) -> Any:
    a = step.attrs
    if a["kernel"] == [1, 1] and a["groups"] == step.shape[0] == x.shape[3] and a["stride"] == [1, 1]:
        # A batch norm that could not be folded into a convolution. One product for each value is cheaper than one
        # matrix product for each channel.
        edges = ((0, 0), *((p, p) for p in a["padding"]), (0, 0))
        return jnp.pad(x, edges) * weight.reshape(-1)
    groups, pads = a["groups"], [(p, p) for p in a["padding"]]
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=a["stride"],
        padding=pads,
        rhs_dilation=a["dilation"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # SPU has no grouped convolution, so each group is a convolution of its own.
    pairs = zip(jnp.split(x, groups, 3), jnp.split(weight, groups, 3), strict=True) if groups > 1 else [(x, weight)]
    parts = [convolve(*pair) for pair in pairs]
    return jnp.concatenate(parts, 3) if groups > 1 else parts[0]
