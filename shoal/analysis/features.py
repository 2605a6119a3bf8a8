"""The input of each exit's linear layer (section 5.4): separability by class, and principal components."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.surgery.normal_form import edit
from shoal.surgery.results import results_of
from shoal.surgery.sizes import operands


def with_features(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` in eval mode that returns each exit's features [N, D] instead of its logits.

    Features are the input of the linear layer that computes the logits. Raises ShoalError when logits are not the
    result of a linear layer.
    """

    def change(traced: fx.GraphModule) -> None:
        sources = []
        for result in results_of(traced.graph):
            linear = result.op == "call_module" and isinstance(traced.get_submodule(str(result.target)), nn.Linear)
            if not linear and result.target is not torch.nn.functional.linear:
                raise ShoalError(f"found logits from {result}; need a linear layer's, whose input is the features")
            sources.append(operands(result)[0])
        next(n for n in traced.graph.nodes if n.op == "output").args = (tuple(sources),)

    return edit(model, change).eval()


@torch.no_grad()
def collect_features(model: nn.Module, images: Tensor, batch: int = 250) -> list[Tensor]:
    """Features of every exit, weak to strong, float64 [N, D] on the CPU.

    `images` are normalised, float32 [N, C, H, W]. Raises ShoalError when logits are not the result of a linear layer.
    """
    network = with_features(model)
    parts = [network(x) for x in images.split(batch)]
    return [torch.cat(exit).double().cpu() for exit in zip(*parts, strict=True)]


class Separability(NamedTuple):
    """Sums of squares of features [N, D] within classes (`sse`) and between classes (`ssb`), divided by N.

    `sse` is over features about their class means, `ssb` over class means (one per row) about the overall mean. They
    add up to the features' variance. The smaller their ratio, the better the classes are separated (Table 11). The
    paper does not say how it scales the sums; the ratio does not depend on it.
    """

    sse: float
    ssb: float

    @property
    def ratio(self) -> float:
        """SSE / SSB; infinite when all class means are equal."""
        return self.sse / self.ssb if self.ssb else float("inf")


def separability(features: Tensor, labels: Tensor) -> Separability:
    """Separability of `features` [N, D] by the classes in `labels` (int64 [N])."""
    _, place, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), features.shape[1], dtype=features.dtype).index_add_(0, place, features)
    means /= counts[:, None]
    sse = (features - means[place]).square().sum() / len(features)
    ssb = (counts[:, None] * (means - features.mean(0)).square()).sum() / len(features)
    return Separability(float(sse), float(ssb))


def principal_components(features: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Coordinates [N, count] of `features` [N, D] on their principal components, and shares [count] of variance.

    Components beyond D or N are zeros.
    """
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    shares = s.square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    coordinates = torch.zeros(len(features), count, dtype=features.dtype)
    kept = min(count, len(s))
    coordinates[:, :kept] = u[:, :kept] * s[:kept]
    return coordinates, torch.cat((shares[:kept], shares.new_zeros(count - kept)))
