"""Loss terms over `Outputs`, and who teaches whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.training.objective import Term, taught


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float, direction: str = "forward") -> Tensor:
    """Mean over the batch of KL between softened logits [N, K], times the temperature squared.

    `direction` ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher). The teacher is detached.
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
    """Mismatch of post-ReLU activations between the all-ReLU teacher and the student at `sites`.

    ``paper``: shallow eq. 2, (1/2) sum over sites of the un-squared norm of the difference of the whole batch's
    normalised vectors. ``attention-transfer``: the public code's form, mean squared difference of the normalised
    channel means of squares, summed over sites. `weight` is the paper's beta. Raises ShoalError for another form.
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
    """Mean squared difference of the normalised channel means of squares of two maps [N, C, H, W]."""
    a, b = (F.normalize(t.square().mean(1).flatten(1)) for t in (student, teacher))
    return (a - b).square().mean()
