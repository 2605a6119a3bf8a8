"""Feature losses: FitNets, attention transfer, similarity, relations, and the feature overhaul.

Each is a `Term` that reads the same taps in student and teacher (`adapters.attach` gives them the same names). Weights
and layers are those that RepDistiller, mdistiller and the code of the overhaul's authors agree on (docs/papers/osakd.md
lists them). No gradient reaches the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.distillation.losses import attention_transfer
from shoal.outputs import Outputs
from shoal.training.objective import Term, taught


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [N, C, H, W], with the larger one average-pooled to the height and width of the smaller one."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    a, b = (F.adaptive_avg_pool2d(x, size) if x.shape[2:] != size else x for x in (student, teacher))
    return a, b


def _pairs(student: Outputs, teacher: Outputs | None, taps: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    known = taught(teacher).taps
    return ((student.taps[tap].float(), known[tap].detach().float()) for tap in taps)


def fitnet(tap: str, weight: float = 100.0, name: str = "fitnet") -> Term:
    """Mean squared difference at a hint layer, where a regressor adapts the student's features (FitNets).

    It is trained together with the cross-entropy, as in both public codes, not in an earlier stage.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        ((a, b),) = _pairs(student, teacher, (tap,))
        return F.mse_loss(*matched(a, b))

    return Term(name, weight, loss, (tap,))


def attention(taps: Sequence[str], weight: float = 1000.0, name: str = "attention") -> Term:
    """Attention transfer (Zagoruyko and Komodakis, ICLR'17) with p = 2, summed over `taps`.

    For each tap: square the features, average over channels, flatten, normalise, and take the mean squared difference.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        pairs = [matched(a, b) for a, b in _pairs(student, teacher, taps)]
        return torch.stack([attention_transfer(a, b) for a, b in pairs]).sum()

    return Term(name, weight, loss, tuple(taps))


def _similarities(x: Tensor) -> Tensor:
    """[N, ...] -> [N, N]: inner products between samples, each row normalised to length 1."""
    flat = x.flatten(1)
    return F.normalize(flat @ flat.T)


def similarity(tap: str, weight: float = 3000.0, name: str = "similarity") -> Term:
    """Similarity-preserving distillation (Tung and Mori, ICCV'19): ||G_t - G_s||^2 / N^2."""

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        ((a, b),) = _pairs(student, teacher, (tap,))
        return (_similarities(b) - _similarities(a)).square().mean()

    return Term(name, weight, loss, (tap,))


def _distances(x: Tensor) -> Tensor:
    """[N, D] -> [N, N]: Euclidean distances, divided by their mean over distinct points (RKD)."""
    squares = (x[:, None] - x[None]).square().sum(2)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # The square root's gradient is infinite at 0, the distance from a point to itself or to an equal one.
    found = squares.clamp_min(1e-12).sqrt() * (apart & (squares > 0))
    return found / found.sum().clamp_min(1e-12) * (found > 0).sum()


def _angles(x: Tensor) -> Tensor:
    """[N, D] -> [N, N, N]: cosines of the angles at each point between two others (RKD)."""
    edges = x[None] - x[:, None]
    # The constant is inside the root, so that equal embeddings do not get an infinite gradient.
    edges = edges / (edges.square().sum(2, keepdim=True) + 1e-8).sqrt()
    return edges @ edges.transpose(1, 2)


def relations(
    tap: str, weight: float = 1.0, distance: float = 25.0, angle: float = 50.0, name: str = "relations"
) -> Term:
    """Relational distillation (Park et al., CVPR'19) of embeddings [N, D]: Huber losses of distances and angles."""

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        ((a, b),) = _pairs(student, teacher, (tap,))
        a, b = a.flatten(1), b.flatten(1)
        far = F.smooth_l1_loss(_distances(a), _distances(b))
        return distance * far + angle * F.smooth_l1_loss(_angles(a), _angles(b))

    return Term(name, weight, loss, (tap,))


def _partial(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences, without those where student <= teacher <= 0 (overhaul)."""
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum()


def overhaul(taps: Sequence[str], weight: float = 1e-3, name: str = "overhaul") -> Term:
    """The overhaul of feature distillation (Heo et al., ICCV'19), per image, over `taps` from first to last.

    The taps are the student's connectors and the teacher's margin ReLUs, both before the ReLU. Each stage has half the
    weight of the next one. The sum is divided by the batch size; `weight` is the authors' 1/1000.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        pairs = [matched(a, b) for a, b in _pairs(student, teacher, taps)]
        parts = [_partial(a, b) / 2 ** (len(taps) - 1 - i) for i, (a, b) in enumerate(pairs)]
        return torch.stack(parts).sum() / len(labels)

    return Term(name, weight, loss, tuple(taps))
