"""Dynamic, dilated k-NN graphs over point clouds [N, C, P, 1], in one module that torch.fx treats as a leaf.

Sources: Wang et al., *Dynamic Graph CNN* (TOG'19), section 3: edges (x_i, x_j - x_i) to neighbours in feature space,
recomputed in every layer; Li et al., *DeepGCNs* (ICCV'19), "Dilated Aggregation": every d-th neighbour, or sometimes in
training random ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.graph import Lowered, unknown


def nearest(points: Tensor, count: int) -> Tensor:
    """Indices of the `count` nearest points of each point, itself included: [N, C, P] -> int64 [N, P, count].

    The nearest comes first; the order of equally distant points is not fixed. Distances are Euclidean, and computed in
    at least float32 even under autocast.
    """
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        x = points.detach()
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        squares = x.square().sum(1)
        # |x_j|^2 - 2 x_i x_j, without |x_i|^2, which is the same for all neighbours of a point.
        distances = torch.baddbmm(squares[:, None], x.transpose(1, 2), x, alpha=-2)
        return distances.topk(count, dim=2, largest=False).indices


class EdgeFeatures(nn.Module):
    """(x_i, x_j - x_i) for `k` neighbours j of every point i: [N, C, P, 1] -> [N, 2C, P, k].

    With dilation d the neighbours are every d-th of the k * d nearest points; a smaller cloud uses the largest d that
    fits. In training, with probability `epsilon`, k random ones of the k * d nearest are used instead, of the same
    ranks for all points of a batch (DeepGCNs' stochastic dilation, there with 0.2). Raises ShoalError for an input that
    is not [N, C, P, 1] or has fewer than k points.
    """

    def __init__(self, k: int, dilation: int = 1, epsilon: float = 0.2) -> None:
        super().__init__()
        self.k, self.dilation, self.epsilon = k, dilation, epsilon

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        points = x.squeeze(3)
        count, channels, size = points.shape
        dilation = min(self.dilation, size // self.k)
        near, drawn = nearest(points, self.k * dilation), self._drawn(dilation)
        chosen = near[:, :, ::dilation] if drawn is None else near[:, :, drawn.to(x.device)]
        # `gather` and not indexing, whose backward pass on CUDA adds in an order that varies from run to run.
        where = chosen.reshape(count, 1, -1).expand(-1, channels, -1)
        neighbours = points.gather(2, where).reshape(count, channels, size, self.k)
        own = x.expand(-1, -1, -1, self.k)
        return torch.cat((own, neighbours - own), dim=1)

    @property
    def recordable(self) -> bool:
        """Whether a training step may be recorded (see `shoal.training.stepping`); not if it draws random numbers."""
        return self.dilation == 1 or not self.epsilon

    def _drawn(self, dilation: int) -> Tensor | None:
        """Random ranks [k] of the neighbours to use, with probability `epsilon` in training; else None."""
        if self.training and dilation > 1 and float(torch.rand(())) < self.epsilon:
            return torch.randperm(self.k * dilation)[: self.k]
        return None

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[3] != 1 or x.shape[2] < self.k:
            raise ShoalError(
                f"found a batch of shape {tuple(x.shape)} at a graph of {self.k} neighbours; need clouds [N, C, P, 1] "
                f"of at least {self.k} points; give a point cloud set, or an input such as 3x1024x1"
            )

    def to_node(self) -> Lowered:
        """An unknown operation: neighbours depend on the data, so private inference cannot compute them."""
        return unknown("dynamic k-NN graph")

    def extra_repr(self) -> str:
        return f"k={self.k}, dilation={self.dilation}, epsilon={self.epsilon}"
