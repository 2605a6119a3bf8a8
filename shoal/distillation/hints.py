"""Feature losses of distillation: FitNets, attention transfer, similarity, relations, and the feature overhaul.

Each is a `Term` that reads the same taps in student and teacher (`adapters.attach` names them so). Weights and layers
are those that RepDistiller, mdistiller and the overhaul's authors agree on (docs/papers/osakd.md lists them). No
gradient reaches a teacher.
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
    """Both maps [N, C, H, W] at the smaller one's height and width; the larger is average-pooled."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    a, b = (F.adaptive_avg_pool2d(x, size) if x.shape[2:] != size else x for x in (student, teacher))
    return a, b


def _pairs(student: Outputs, teacher: Outputs | None, taps: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    known = taught(teacher).taps
    return ((student.taps[tap].float(), known[tap].detach().float()) for tap in taps)


def fitnet(tap: str, weight: float = 100.0, name: str = "fitnet") -> Term:
    """Mean squared difference of a hint layer, which the student reaches by a regressor (FitNets).

    It is trained together with the cross-entropy, as both public codes do, and not in a stage before.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        ((a, b),) = _pairs(student, teacher, (tap,))
        return F.mse_loss(*matched(a, b))

    return Term(name, weight, loss, (tap,))


def attention(taps: Sequence[str], weight: float = 1000.0, name: str = "attention") -> Term:
    """Attention transfer (Zagoruyko and Komodakis, ICLR'17) with p = 2, summed over `taps`.

    Mean squared difference of the flattened, normalised channel means of squares.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        pairs = [matched(a, b) for a, b in _pairs(student, teacher, taps)]
        return torch.stack([attention_transfer(a, b) for a, b in pairs]).sum()

    return Term(name, weight, loss, tuple(taps))


def _similarities(x: Tensor) -> Tensor:
    """[N, ...] -> [N, N]: inner products of the samples, each row of length 1."""
    flat = x.flatten(1)
    return F.normalize(flat @ flat.T)


def similarity(tap: str, weight: float = 3000.0, name: str = "similarity") -> Term:
    """Similarity-preserving distillation (Tung and Mori, ICCV'19): ||G_t - G_s||^2 / N^2."""

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        ((a, b),) = _pairs(student, teacher, (tap,))
        return (_similarities(b) - _similarities(a)).square().mean()

    return Term(name, weight, loss, (tap,))


def _distances(x: Tensor) -> Tensor:
    """[N, D] -> [N, N]: Euclidean distances, divided by the mean of those between different points (RKD)."""
    squares = (x[:, None] - x[None]).square().sum(2)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # The square root's gradient is infinite at 0, where a point meets itself or its double.
    found = squares.clamp_min(1e-12).sqrt() * (apart & (squares > 0))
    return found / found.sum().clamp_min(1e-12) * (found > 0).sum()


def _angles(x: Tensor) -> Tensor:
    """[N, D] -> [N, N, N]: cosines of the angles at each point between two others (RKD)."""
    edges = x[None] - x[:, None]
    # Within the root, so that samples with one and the same embedding get no endless gradient.
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
    """Squared differences, summed; none where both are below what a ReLU lets through (overhaul)."""
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum()


def overhaul(taps: Sequence[str], weight: float = 1e-3, name: str = "overhaul") -> Term:
    """The overhaul of feature distillation (Heo et al., ICCV'19), per image, over `taps` from first to last.

    The taps are the student's connectors and the teacher's margin ReLUs, both before the ReLU. A stage counts half of
    the next one; the sum is divided by the batch, and `weight` is the authors' 1/1000.
    """

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        pairs = [matched(a, b) for a, b in _pairs(student, teacher, taps)]
        parts = [_partial(a, b) / 2 ** (len(taps) - 1 - i) for i, (a, b) in enumerate(pairs)]
        return torch.stack(parts).sum() / len(labels)

    return Term(name, weight, loss, tuple(taps))
