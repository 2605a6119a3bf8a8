"""SENet (Kundu et al., ICLR'23), stage 2: ReLUs stay where the teacher's and student's activations differ most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.outputs import Outputs, forward
from shoal.reduction.budget import Budget
from shoal.reduction.learners.search import Problem, Search
from shoal.reduction.learners.soft import batch_sum
from shoal.reduction.masks import MaskedReLU, check_budget, masked_sites, random_masks, top_k

SCORES = ("counterfactual", "published")


class DifferenceLearner:
    """SENet's mask search: at each site the top-k positions of |teacher - student|, summed over an epoch.

    The `published` score compares activations after the student's masked ReLU. At a kept position they are close, so
    that position is dropped next, and nearly all positions change in every epoch. The `counterfactual` score compares
    the teacher's activation with the student's input to the ReLU, whether the position is kept or not. Kept and removed
    positions are then comparable, and the masks converge.

    A hook of `fit`: the masks found in one epoch are used in the next. `fit` evaluates and keeps the best weights
    before it calls `on_epoch_end`, so a kept checkpoint has the masks that it was trained and evaluated with. Raises
    ShoalError for an unknown score.
    """

    recordable = True

    def __init__(self, budget: Budget, granularity: str = "pixel", score: str = "counterfactual") -> None:
        if score not in SCORES:
            raise ShoalError(f"found score {score!r}; need one of {', '.join(SCORES)}")
        self.budget, self.granularity, self.score = budget, granularity, score
        self.taps = tuple(budget.counts)
        self.sums: dict[str, Tensor] = {}
        self.counting = False
        self.modules: dict[str, MaskedReLU] = {}
        self.scratch = torch.empty(0)

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Make the sites store their inputs, if the score needs them, and reset the sums."""
        self.modules = masked_sites(model)
        for name in self.taps:
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.modules[name].mask, dtype=torch.float32)
            self.sums[name].zero_()
        self.counting = True
        for module in self.modules.values():
            module.watched = self.score == "counterfactual"

    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None:
        """Add the absolute differences of one batch to the sums. Raises ShoalError without a teacher."""
        if teacher is None:
            raise ShoalError("found no teacher; need an all-ReLU network to learn masks from")
        with torch.no_grad():
            for name in self.taps:
                module = self.modules[name]
                own = module.seen if module.watched else student.taps[name]
                self.sums[name].add_(batch_sum(self._difference(teacher.taps[name].float(), own.float()).abs_()))
                module.seen = torch.empty(0)  # frees the memory before the backward pass

    def _difference(self, a: Tensor, b: Tensor) -> Tensor:
        """a - b, in a buffer that all sites share, since allocating memory costs more than the subtraction."""
        if self.scratch.numel() < a.numel() or self.scratch.device != a.device:
            self.scratch = a.new_empty(a.numel())
        return torch.sub(a, b, out=self.scratch[: a.numel()].as_strided(a.shape, a.stride()))

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Set the masks for the next epoch; returns `mask_change`, their normalised Hamming distance from the old ones.

        It is in [0, 1]: the number of changed positions divided by twice the budget.
        """
        changed = 0
        for name, module in masked_sites(model).items():
            new = top_k(_reduced(self.sums[name]), self.budget.counts[name], self.granularity)
            changed += int((new != module.mask).sum())
            module.set_mask(new)
            module.watched, module.seen = False, torch.empty(0)
        self.counting = False
        return {"mask_change": changed / (2 * self.budget.total)}

    def state(self) -> dict[str, Tensor]:
        """The sums, which a run resumed within an epoch needs besides the model; empty between epochs."""
        return dict(self.sums) if self.counting else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned, within an epoch."""
        for name, value in state.items():
            self.sums[name].copy_(value)

    def look(self, model: nn.Module, teacher: nn.Module, batches: Iterable[Tensor]) -> None:
        """Set the initial masks by one pass over batches of normalised images [N, C, H, W], without training."""
        modes = model.training, teacher.training
        model.eval(), teacher.eval()
        self.on_epoch_start(model, -1)
        with torch.no_grad():
            for x in batches:
                self.on_batch(forward(model, x, self.taps), forward(teacher, x, self.taps))
        self.on_epoch_end(model, -1)
        model.train(modes[0]), teacher.train(modes[1])


def _reduced(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


class Random(Search):
    """Budgets by sensitivity; at each site random positions: a baseline with the same budget and epochs."""

    per_site = True
    from_teacher = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.hooks, self.select_from = (), 0
        self.budget = problem.budget(self.first_total())
        generator = torch.Generator().manual_seed(problem.seed)
        start = random_masks(self.budget, problem.sites, generator, problem.granularity)
        self.model = self.install({name: MaskedReLU(mask) for name, mask in start.items()})

    def first_total(self) -> int:
        """The number of ReLUs at the start."""
        return self.problem.total

    def masks(self) -> dict[str, Tensor]:
        """The masks of the kept epoch. Raises ShoalError unless every site keeps exactly its budget."""
        check_budget(self.model, self.budget)
        return {name: module.mask for name, module in masked_sites(self.model).items()}


class SENet(Random):
    """Budgets by sensitivity; at each site the positions where teacher and student differ most (`DifferenceLearner`).

    Unless the problem `begins_learned`, the first epoch runs with random masks and its weights may not be selected.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        learner = DifferenceLearner(self.budget, problem.granularity, problem.score)
        if problem.begins_learned:
            learner.look(self.model, problem.teacher, (x for x, _ in problem.batches()))
        self.hooks = (learner,)
        self.select_from = int(not problem.begins_learned)
