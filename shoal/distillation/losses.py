"""Loss terms between a teacher and a student, as functions of `Outputs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.training.objective import Term, taught


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float, direction: str = "forward") -> Tensor:
    """Batch mean of the KL divergence between softened logits [N, K], times the squared temperature; a scalar.

    `direction` ``forward`` is KL(teacher || student), ``reverse`` is KL(student || teacher). The teacher is detached.
    Raises ShoalError for another direction.
    """
    p = F.log_softmax(teacher.detach().float() / temperature, 1)
    q = F.log_softmax(student.float() / temperature, 1)
    if direction == "reverse":
        p, q = q, p
    elif direction != "forward":
        raise ShoalError(f"found KL direction {direction!r}; need 'forward' or 'reverse'")
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def kd(
    weight: float = 1.0,
    temperature: float = 4.0,
    exit: int = -1,
    direction: str = "forward",
    name: str = "kd",
) -> Term:
    """Distillation of the teacher's final logits into classifier `exit` (shallow eq. 2, first term)."""
    return Term(name, weight, lambda s, t, y: kl_divergence(taught(t).final, s.logits[exit], temperature, direction))


def pram(weight: float, sites: Sequence[str], form: str = "paper", name: str = "pram") -> Term:
    """Difference between the post-ReLU activations of the all-ReLU teacher and the student at `sites`.

    ``paper`` is shallow eq. 2: half the sum over sites of the norm (not squared) of the difference between the
    normalised vectors of the whole batch. ``attention-transfer`` is the form of the public code: `attention_transfer`,
    summed over sites. `weight` is the paper's beta. Raises ShoalError for another form.
    """
    forms = {"paper": _pram_paper, "attention-transfer": attention_transfer}
    if form not in forms:
        raise ShoalError(f"found PRAM form {form!r}; need one of {', '.join(forms)}")
    pair = forms[form]

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        known = taught(teacher).taps
        return torch.stack([pair(student.taps[n].float(), known[n].detach().float()) for n in sites]).sum()

    return Term(name, weight, loss, tuple(sites))


def _pram_paper(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (F.normalize(t.flatten(), dim=0) for t in (student, teacher))
    # The square root's gradient is infinite at 0, where student and teacher agree; there the loss is 0 anyway.
    return 0.5 * (a - b).square().sum().clamp_min(1e-12).sqrt()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer between two maps [N, C, H, W]; a scalar.

    Squares are averaged over channels and normalised per sample; the result is their mean squared difference.
    """
    a, b = (F.normalize(t.square().mean(1).flatten(1)) for t in (student, teacher))
    return (a - b).square().mean()
