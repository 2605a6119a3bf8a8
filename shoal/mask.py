"""Partial ReLU layers: a ReLU at the kept positions, the identity elsewhere; and how positions are learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from shoal.budget import Budget
from shoal.errors import ShoalError
from shoal.outputs import Outputs, forward, unwrap
from shoal.sites import ReluSite, is_relu_site
from shoal.surgery import Lowered, replace


class MaskedReLU(nn.Module):
    """ReLU where `mask` ([C, H, W] bool) is true, identity elsewhere (shallow section 4, SENet).

    Computed as one clamp from below by 0 or minus infinity, which costs what a plain ReLU does. While `watched`, it
    keeps its last input in `seen`.
    """

    mask: Tensor
    floor: Tensor
    is_relu_site = True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.watched, self.seen = False, torch.empty(0)
        self.register_buffer("mask", mask.bool())
        self.register_buffer("floor", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())
        self.refresh()

    def refresh(self) -> None:
        """Derive the clamp's floor from the mask; called after the mask changed."""
        zero = torch.zeros((), device=self.mask.device)
        floor = torch.where(self.mask, zero, zero - torch.inf)[None]
        self.floor = floor.contiguous(memory_format=_layout(self.floor))

    def set_mask(self, mask: Tensor) -> None:
        """Exchange the kept positions, on the module's own device."""
        self.mask.copy_(mask)
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape; ShoalError when [C, H, W] is not the mask's."""
        if x.shape[1:] != self.mask.shape:
            raise ShoalError(
                f"found an activation of shape {tuple(x.shape[1:])} at a mask of shape {tuple(self.mask.shape)}; "
                "need the input size that the masks were learned for"
            )
        if self.watched:
            self.seen = x.detach()
        return torch.clamp(x, min=self.floor.to(x.dtype))

    def to_node(self) -> Lowered:
        """A `relu` node with its mask."""
        return "relu", {}, {"mask": self.mask}


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def random_masks(
    budget: Budget, sites: Sequence[ReluSite], generator: torch.Generator, granularity: str = "pixel"
) -> dict[str, Tensor]:
    """Exactly `budget` positions a site, uniformly at random, by pixel or by whole channels (see `top_k`)."""
    scores = {s.name: torch.rand(s.shape, generator=generator, dtype=torch.float64) for s in sites}
    return {name: top_k(score, budget.counts[name], granularity) for name, score in scores.items()}


def top_k(score: Tensor, count: int, granularity: str = "pixel") -> Tensor:
    """A bool mask of exactly `count` ones at the highest scores ([C, H, W]).

    With granularity ``channel`` whole channels are taken by their mean score, the last one filled by pixel.
    """
    if granularity == "channel" and score.dim() == 3:  # a value of a linear layer is a channel by itself
        rank = score.mean((1, 2)).argsort(descending=True, stable=True).argsort(stable=True)
        span = float(score.max() - score.min()) + 1.0
        score = score - rank.to(score)[:, None, None] * 2 * span
    elif granularity not in ("pixel", "channel"):
        raise ShoalError(f"found granularity {granularity!r}; need 'pixel' or 'channel'")
    # A stable sort gives exactly `count` ones whatever ties there are.
    order = score.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view(score.shape)


def add_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of `model` whose named ReLU sites are masked ([C, H, W] bool each). Raises ShoalError on no match."""
    if not masks:
        raise ShoalError("found no masks to add; need at least one ReLU site")
    for name in masks:
        if not is_relu_site(model.get_submodule(name) if name in dict(model.named_modules()) else nn.ReLU()):
            raise ShoalError(f"found no ReLU site {name!r}; need a name that relu_sites gives")
    return replace(model, {name: MaskedReLU(mask) for name, mask in masks.items()})


def masked_sites(model: nn.Module) -> dict[str, MaskedReLU]:
    """The masked ReLU modules of `model` by site name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, MaskedReLU)}


def check_budget(model: nn.Module, budget: Budget) -> None:
    """Raise ShoalError unless every site keeps exactly its budget."""
    for name, module in masked_sites(model).items():
        kept = int(module.mask.sum())
        if kept != budget.counts[name]:
            raise ShoalError(f"found {kept} ReLUs kept at {name}; need {budget.counts[name]}")


SCORES = ("counterfactual", "published")


class DifferenceLearner:
    """SENet's mask search: per site the top-k positions of |teacher - student|, summed over an epoch.

    The published score compares activations after the student's masked ReLU. A kept position is then close to the
    teacher and loses its place, so that nearly all positions change in every epoch. The `counterfactual` score
    compares the teacher's activation with what the student's would be without a ReLU, kept or not: each position is
    judged alike, and masks settle.

    A hook of `fit`: masks found in one epoch hold in the next. `fit` evaluates and keeps the best weights before it
    calls `on_epoch_end`, so a kept checkpoint holds the masks that it was trained and judged with.
    """

    def __init__(self, budget: Budget, granularity: str = "pixel", score: str = "counterfactual") -> None:
        if score not in SCORES:
            raise ShoalError(f"found score {score!r}; need one of {', '.join(SCORES)}")
        self.budget, self.granularity, self.score = budget, granularity, score
        self.taps = tuple(budget.counts)
        self.sums: dict[str, Tensor] = {}
        self.modules: dict[str, MaskedReLU] = {}

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Have the sites keep their inputs, where the score needs them."""
        self.modules = masked_sites(model)
        for module in self.modules.values():
            module.watched = self.score == "counterfactual"

    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None:
        """Add one batch's absolute differences. Raises ShoalError without a teacher."""
        if teacher is None:
            raise ShoalError("found no teacher; need an all-ReLU network to learn masks from")
        with torch.no_grad():
            for name in self.taps:
                module = self.modules[name]
                own = module.seen if module.watched else student.taps[name]
                gap = (teacher.taps[name].float() - own.float()).abs().sum(0)
                self.sums[name] = self.sums[name].add_(gap) if name in self.sums else gap

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Install the masks for the next epoch; returns `mask_change`, the normalised Hamming distance."""
        changed = 0
        for name, module in masked_sites(model).items():
            new = top_k(_reduced(self.sums[name]), self.budget.counts[name], self.granularity)
            changed += int((new != module.mask).sum())
            module.set_mask(new)
            module.watched, module.seen = False, torch.empty(0)
        self.sums = {}
        return {"mask_change": changed / (2 * self.budget.total)}

    def look(self, model: nn.Module, teacher: nn.Module, batches: Iterable[Tensor]) -> None:
        """Install masks by one pass over normalised images, without training: where the search begins."""
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
